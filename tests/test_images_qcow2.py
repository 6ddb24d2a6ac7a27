"""Tables to cluster status, against a model that looks at one entry at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpnbd.errors import ImageCorruptError, ImageTruncatedError
from qmpnbd.extents import ExtentMap
from qmpnbd.images.qcow2 import ENTRY, Cluster, Kind, Tables, allocated_map, entry_location, l2_offsets, understood
from qmpnbd.images.qcow2_format import Qcow2Header

HEADER = Qcow2Header(cluster_bits=9, l1_offset=0x600)  # 64 entries a table
HEADER_2 = Qcow2Header(version=2, cluster_bits=9)
COPIED, COMPRESSED, ZERO = 1 << 63, 1 << 62, 1

entry_values = st.one_of(
    st.just(0),
    st.just(COPIED),
    st.sampled_from([0x1FE, 0x3F << 56, ZERO, COPIED | ZERO]),
    st.integers(1, 1000).map(lambda n: n * 512 | COPIED),
    st.integers(1, 1000).map(lambda n: n * 512 | ZERO),
    st.integers(0, 1 << 62).map(lambda n: n | COMPRESSED),
)


def tables(rows: list[list[int]], indexes: list[int] | None = None) -> Tables:
    count = len(rows)
    offsets = np.arange(count, dtype=np.uint64) * np.uint64(512) + np.uint64(0x1000)
    return Tables(np.array(rows, dtype=ENTRY), np.array(indexes or range(count), dtype=np.uint64), offsets)


def row(**entries: int) -> list[int]:
    """A table of 64 entries, 0 but for e3=..., e7=..."""
    return [entries.get(f"e{index}", 0) for index in range(64)]


@pytest.mark.parametrize(
    ("entry", "cluster"),
    [
        (0, Cluster(Kind.UNALLOCATED, 0)),
        (COPIED, Cluster(Kind.UNALLOCATED, 0)),
        (0x1FE, Cluster(Kind.UNALLOCATED, 0)),
        (0x3F << 56, Cluster(Kind.UNALLOCATED, 0)),
        (COPIED | 0x60000, Cluster(Kind.STANDARD, 0x60000)),
        (0x00FFFFFFFFFFFE00, Cluster(Kind.STANDARD, 0x00FFFFFFFFFFFE00)),
        (ZERO, Cluster(Kind.ZERO_PLAIN, 0)),
        (COPIED | ZERO | 0x60000, Cluster(Kind.ZERO_ALLOCATED, 0x60000)),
        (COMPRESSED, Cluster(Kind.COMPRESSED, 0)),
        (COMPRESSED | 0x12345, Cluster(Kind.COMPRESSED, 0x12345)),
    ],
)
def test_what_an_entry_says(entry: int, cluster: Cluster) -> None:
    assert understood(entry, HEADER) == cluster
    allocated = tables([row(e5=entry)]).runs().at(5)
    assert allocated == cluster.kind.allocated == (entry & ~(COPIED | 0x3F << 56 | 0x1FE) != 0)


def test_a_compressed_entry_keeps_its_length_apart_from_its_offset() -> None:
    entry = COMPRESSED | 3 << 54 | 0x123456
    assert understood(entry, Qcow2Header(cluster_bits=16)) == Cluster(Kind.COMPRESSED, 0x123456)


@given(st.lists(st.tuples(st.integers(0, 3), st.lists(entry_values, min_size=64, max_size=64)), max_size=4))
def test_runs_against_the_model(pieces: list[tuple[int, list[int]]]) -> None:
    """Tables with gaps of 0 to 3 missing tables before them, in one batch and in one batch each."""
    indexes, model = [], []
    for gap, entries in pieces:
        model += [False] * (64 * gap) + [understood(entry, HEADER).kind.allocated for entry in entries]
        indexes.append(len(model) // 64 - 1)
    size = len(model) * 512 + 512 * 7
    wanted = ExtentMap.of_extents([(512, int(value)) for value in [*model, *[False] * 7]])
    rows = [entries for _, entries in pieces]
    together = [tables(rows, indexes).runs()] if rows else []
    apart = [tables([entries], [index]).runs() for entries, index in zip(rows, indexes, strict=True)]
    assert allocated_map(together, HEADER, size) == wanted
    assert allocated_map(apart, HEADER, size) == wanted


def test_a_map_is_cut_at_the_disks_end() -> None:
    full = tables([[COPIED | 0x2000] * 64]).runs()
    assert allocated_map([full], HEADER, 1000) == ExtentMap.uniform(1000, 1)
    assert allocated_map([], HEADER, 0) == ExtentMap([], [])


@pytest.mark.parametrize(
    ("header", "entry", "words"),
    [
        (Qcow2Header(cluster_bits=10), 0x600, "inside a cluster"),
        (Qcow2Header(cluster_bits=21), COPIED | 0x10000, "inside a cluster"),
        (Qcow2Header(cluster_bits=10), ZERO | 0x600, "inside a cluster"),
        (HEADER_2, ZERO, "zero flag"),
        (HEADER_2, ZERO | COPIED | 0x6000, "zero flag"),
    ],
)
def test_an_entry_that_contradicts_the_format(header: Qcow2Header, entry: int, words: str) -> None:
    batch = tables([row(), row(e0=COMPRESSED | 0x201, e7=entry, e9=entry)], [3, 9])
    with pytest.raises(ImageCorruptError, match=words) as caught:
        batch.check(header, "a.qcow2")
    assert (caught.value.structure, caught.value.offset) == ("L2 entry", 0x1200 + 8 * 7)
    assert (caught.value.value, caught.value.where) == (entry, "a.qcow2")


def test_entries_that_only_look_wrong() -> None:
    tables([row(e1=ZERO, e2=ZERO | 0x600, e3=0x1FE)]).check(HEADER, "a.qcow2")
    tables([row(e1=COMPRESSED | 0x201, e2=COMPRESSED | ZERO)]).check(HEADER_2, "a.qcow2")
    tables([row(e1=COMPRESSED | 0x600)]).check(Qcow2Header(cluster_bits=16), "a.qcow2")


def test_data_wholly_beyond_the_end_of_the_file() -> None:
    batch = tables([row(), row(e7=COPIED | 0x6000)], [0, 2])
    with pytest.raises(ImageTruncatedError, match=r"guest offset 0x10e00 .* host offset 0x6000, .* byte 0x6000"):
        batch.check_data(HEADER, "a.qcow2", 0x6000)
    batch.check_data(HEADER, "a.qcow2", 0x6001)


def test_only_standard_clusters_have_data_to_miss() -> None:
    batch = tables([row(e1=ZERO | 0x6000, e2=COMPRESSED | 0x123456, e3=COPIED, e4=0x400)])
    batch.check_data(HEADER, "a.qcow2", 0x600)


def test_l2_offsets() -> None:
    l1 = np.array([0, COPIED | 0x600, 0x1FF | 0x7F << 56, 0x00FFFFFFFFFFFE00], dtype=ENTRY)
    assert l2_offsets(l1, HEADER, "a.qcow2").tolist() == [0, 0x600, 0, 0x00FFFFFFFFFFFE00]
    with pytest.raises(ImageCorruptError, match="L1 entry at byte 0x628") as caught:
        l2_offsets(np.array([0, 0x600], dtype=ENTRY), Qcow2Header(cluster_bits=16, l1_offset=0x600), "a.qcow2", 4)
    assert caught.value.value == 0x600


def test_where_a_guest_offset_leads() -> None:
    assert entry_location(HEADER, 0) == (0, 0)
    assert entry_location(HEADER, 512 * 64 * 3 + 512 * 5 + 511) == (3, 5)
