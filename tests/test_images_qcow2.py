"""Entries to statuses, against a model that looks at one subcluster at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpnbd.images.qcow2 import BEYOND, ENTRY, Cluster, Clusters, Kind, decode, entry_location, fault, l2_offsets
from qmpnbd.images.qcow2 import understood as understood_entry
from qmpnbd.images.qcow2_format import DATA_FILE_BIT, EXTENDED_L2_BIT, Qcow2Header
from qmpnbd.images.status import Status

HEADER = Qcow2Header(cluster_bits=9, l1_offset=0x600)  # 64 entries a table
HEADER_2 = Qcow2Header(version=2, cluster_bits=9)
WITH_DATA_FILE = Qcow2Header(cluster_bits=9, incompatible=DATA_FILE_BIT)
EXTENDED = Qcow2Header(cluster_bits=14, incompatible=EXTENDED_L2_BIT)
BOTH = Qcow2Header(cluster_bits=14, incompatible=EXTENDED_L2_BIT | DATA_FILE_BIT)
ALL_HEADERS = [HEADER, HEADER_2, Qcow2Header(cluster_bits=16), WITH_DATA_FILE, EXTENDED, BOTH]
COPIED, COMPRESSED, ZERO = 1 << 63, 1 << 62, 1
HOST = 0x00FFFFFFFFFFFE00
FIRST = 5

entry_values = st.one_of(
    st.just(0),
    st.just(COPIED),
    st.sampled_from([0x1FE, 0x3F << 56, ZERO, COPIED | ZERO]),
    st.integers(1, 1000).map(lambda n: n * 512 | COPIED),
    st.integers(1, 1000).map(lambda n: n * 16384 | COPIED),
    st.integers(1, 1000).map(lambda n: n * 512 | ZERO),
    st.integers(0, 1 << 62).map(lambda n: n | COMPRESSED),
)
bitmap_values = st.one_of(
    st.just(0),
    st.integers(0, (1 << 32) - 1),
    st.integers(0, (1 << 32) - 1).map(lambda bits: bits << 32),
    st.integers(0, (1 << 32) - 1).map(lambda bits: bits | ~bits << 32 & (1 << 64) - 1),
    st.integers(0, (1 << 64) - 1),
)


def model(entry: int, bitmap: int, sub: int, header: Qcow2Header, cluster: int, file_size: int) -> int:
    """The rules, one after the other."""
    host, data_file = entry & HOST, header.has_data_file
    held = bool(host) or (data_file and bool(entry & COPIED))
    wrong_place = host != cluster * header.cluster_size if data_file else host % header.cluster_size != 0
    if entry & COMPRESSED:
        return Status.UNREADABLE if data_file else Status.COMPRESSED
    if header.extended_l2:
        data, zero = bitmap & 0xFFFFFFFF, bitmap >> 32
        if (held and (data & zero or wrong_place)) or (not held and data):
            return Status.UNREADABLE
        if zero >> sub & 1:
            return Status.ZERO_ALLOCATED if held else Status.ZERO
        if not data >> sub & 1:
            return Status.UNALLOCATED
        return BEYOND if host + sub * header.granule >= file_size else Status.DATA
    if entry & ZERO:
        if header.version == 2 or (host and wrong_place):
            return Status.UNREADABLE
        return Status.ZERO_ALLOCATED if host else Status.ZERO
    if not held:
        return Status.UNALLOCATED
    if wrong_place:
        return Status.UNREADABLE
    return BEYOND if host >= file_size else Status.DATA


def decoded(entries: list[tuple[int, int]], header: Qcow2Header, file_size: int = 1 << 62) -> Clusters:
    words = [word for pair in entries for word in (pair if header.extended_l2 else pair[:1])]
    return decode(np.array(words, dtype=ENTRY).view(np.uint64), header, FIRST, file_size)


@given(
    st.sampled_from(ALL_HEADERS),
    st.lists(st.tuples(entry_values, bitmap_values), max_size=70),
    st.sampled_from([0, 1 << 17, 1 << 62]),
)
def test_against_the_model(header: Qcow2Header, entries: list[tuple[int, int]], file_size: int) -> None:
    wanted = [
        model(entry, bitmap, sub, header, FIRST + index, file_size)
        for index, (entry, bitmap) in enumerate(entries)
        for sub in range(header.subclusters)
    ]
    clusters = decoded(entries, header, file_size)
    assert clusters.codes.tolist() == wanted
    assert clusters.entries.tolist() == [entry for entry, _ in entries]
    assert (clusters.bitmaps is None) == (not header.extended_l2)
    granules = np.arange(len(wanted))
    shifts = clusters.shifts(granules).tolist()
    for granule, (code, shift) in enumerate(zip(wanted, shifts, strict=True)):
        number = granule // header.subclusters
        host = (shift + (FIRST + number) * header.cluster_size) % (1 << 64)
        placed = code in (Status.DATA, Status.ZERO_ALLOCATED)
        assert host == entries[number][0] & HOST if placed else shift == 0


@given(st.sampled_from(ALL_HEADERS), entry_values, bitmap_values)
def test_every_fault_has_words_of_its_own(header: Qcow2Header, entry: int, bitmap: int) -> None:
    codes = decoded([(entry, bitmap)], header).codes
    words = fault(entry, bitmap, header)
    if (codes == Status.UNREADABLE).any() and not header.has_data_file:
        assert "data file" not in words


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
    assert understood_entry(entry, HEADER) == cluster
    assert cluster.kind.allocated == (entry & ~(COPIED | 0x3F << 56 | 0x1FE) != 0)


def test_a_compressed_entry_keeps_its_length_apart_from_its_offset() -> None:
    entry = COMPRESSED | 3 << 54 | 0x123456
    assert understood_entry(entry, Qcow2Header(cluster_bits=16)) == Cluster(Kind.COMPRESSED, 0x123456)


@pytest.mark.parametrize(
    ("header", "entry", "bitmap", "words"),
    [
        (Qcow2Header(cluster_bits=10), 0x600, 0, "inside a cluster"),
        (Qcow2Header(cluster_bits=21), COPIED | 0x10000, 0, "inside a cluster"),
        (Qcow2Header(cluster_bits=10), ZERO | 0x600, 0, "inside a cluster"),
        (HEADER_2, ZERO, 0, "zero flag"),
        (HEADER_2, ZERO | COPIED | 0x6000, 0, "zero flag"),
        (EXTENDED, 0x4200, 0, "inside a cluster"),
        (EXTENDED, 0x4000, 1 | 1 << 32, "data and as zeroes at once"),
        (EXTENDED, 0, 2, "without a host cluster"),
        (WITH_DATA_FILE, COPIED, 0, "not the guest offset"),
        (WITH_DATA_FILE, 0x600, 0, "not the guest offset"),
        (WITH_DATA_FILE, COMPRESSED, 0, "compressed cluster"),
        (BOTH, COPIED | 0x8000, 0, "not the guest offset"),
    ],
)
def test_an_entry_that_contradicts_the_format(header: Qcow2Header, entry: int, bitmap: int, words: str) -> None:
    clusters = decoded([(0, 0), (entry, bitmap), (0, 0)], header)
    step = header.subclusters
    assert (clusters.codes[step : 2 * step] == Status.UNREADABLE).all()
    assert not clusters.codes[:step].any()
    assert not clusters.codes[2 * step :].any()
    assert words in fault(entry, bitmap, header)


def test_l2_offsets() -> None:
    l1 = np.array([0, COPIED | 0x600, 0x1FF | 0x7F << 56, 0x00FFFFFFFFFFFE00], dtype=ENTRY)
    offsets, misplaced = l2_offsets(l1, HEADER)
    assert offsets.tolist() == [0, 0x600, 0, 0x00FFFFFFFFFFFE00]
    assert not misplaced.any()
    assert l2_offsets(l1, Qcow2Header(cluster_bits=16))[1].tolist() == [False, True, False, True]


def test_where_a_guest_offset_leads() -> None:
    assert entry_location(HEADER, 0) == (0, 0)
    assert entry_location(HEADER, 512 * 64 * 3 + 512 * 5 + 511) == (3, 5)
    assert entry_location(EXTENDED, 16384 * 1024 * 3 + 16384 * 5) == (3, 5)
