"""Entries that QEMU answers with EIO for: what they are, what covers them, and what is said about them."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from qmpnbd.errors import ImageCorruptError, ImageTruncatedError
from qmpnbd.extents import ExtentMap
from qmpnbd.images.files import open_chain
from qmpnbd.images.qcow2_format import EXTENDED_L2_BIT
from qmpnbd.images.status import UNREADABLE_DEPTH, Status
from tests.handmade import COPIED, DATA, END, ZERO, put, qcow2_bytes, runs, write
from tests.servers import tool

COMPRESSED = 1 << 62
SUB = 512
CLUSTER = 32 * SUB
HOST = 0x10000


def qemu_serves(path: str, offset: int) -> bool | None:
    """Whether QEMU says that a sector is allocated; None for an I/O error. A process each: one error taints a node."""
    command = [tool("qemu-io"), "-r", "-f", "qcow2", "-c", f"alloc {offset} 512", path]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    if "failed" in done.stdout + done.stderr or done.returncode:
        return None
    assert "bytes allocated" in done.stdout, done.stdout + done.stderr
    return done.stdout.startswith("512/")


REFCOUNTS: dict[str, Any] = {
    "refcount_table_offset": 0x18000,
    "refcount_table_clusters": 1,
}  # QEMU wants one, and never looks at it
EXTENDED: dict[str, Any] = {**REFCOUNTS, "cluster_bits": 14, "incompatible": EXTENDED_L2_BIT}
ENTRIES: list[tuple[int, int]] = [
    (0, 0),
    (COPIED | HOST, 0),
    (COPIED | HOST, 0xFFFFFFFF),
    (COPIED | HOST, 1),
    (COPIED | HOST, 1 << 32 | 2),
    (COPIED | HOST | ZERO, 2),
    (COPIED | HOST, 1 << 32 | 1),
    (COPIED | HOST, 1 << 63 | 1 << 31),
    (0, 1),
    (0, 1 << 31),
    (0, 1 << 32),
    (ZERO, 0),
    (COPIED, 0),
    (COPIED, 1),
    (COPIED | HOST | 0x200, 0),
    (COPIED | HOST | 0x200, 1 << 32),
    (COPIED | HOST | 0x200, 2),
    (COMPRESSED | HOST, 0),
    (COMPRESSED | HOST, 0xFFFFFFFFFFFFFFFF),
    (0x3F << 56 | HOST, 1),
]


@pytest.mark.real
@pytest.mark.parametrize(("entry", "bitmap"), ENTRIES)
@pytest.mark.parametrize("data_file", [False, True])
def test_extended_entries_as_qemu_reads_them(entry: int, bitmap: int, data_file: bool, here: Path) -> None:
    name = "d.raw" if data_file else ""
    write("d.raw", bytes(END))
    # Guest cluster 4 is where a data file must have host offset HOST.
    write("a.qcow2", qcow2_bytes({4: (entry, bitmap)}, size=5 * CLUSTER, data_file=name, **EXTENDED))
    with open_chain("a.qcow2") as chain:
        statuses = chain.statuses(0).statuses
    for sub in (0, 1, 5, 31):
        ours = statuses.at(4 * CLUSTER + sub * SUB)
        served = qemu_serves("a.qcow2", 4 * CLUSTER + sub * SUB)
        assert served == (None if ours == Status.UNREADABLE else ours != Status.UNALLOCATED), sub


@pytest.mark.real
@pytest.mark.parametrize(
    "entry",
    [0, COPIED, COPIED | 0x800, COPIED | 0xA00, 0x800, ZERO, ZERO | 0x800, ZERO | 0xA00, COPIED | ZERO, COMPRESSED],
)
def test_entries_with_a_data_file_as_qemu_reads_them(entry: int, here: Path) -> None:
    write("d.raw", bytes(END))
    for cluster in (0, 4):
        write("a.qcow2", qcow2_bytes({cluster: entry}, size=5 * 512, data_file="d.raw", **REFCOUNTS))
        with open_chain("a.qcow2") as chain:
            ours = chain.statuses(0).statuses.at(cluster * 512)
        served = qemu_serves("a.qcow2", cluster * 512)
        assert served == (None if ours == Status.UNREADABLE else ours != Status.UNALLOCATED), cluster


def test_a_map_goes_on_around_what_is_unreadable(here: Path) -> None:
    bad = COPIED | DATA | 0x200
    write("a.qcow2", qcow2_bytes({3: bad, 4: bad, 9: COPIED | DATA}, cluster_bits=10, size=128 * 512))
    with open_chain("a.qcow2") as chain:
        depth, unreadable = chain.depth_with_errors()
        assert chain.base_allocation_with_errors() == (
            runs((6, 3), (4, UNREADABLE_DEPTH), (8, 3), (2, 0), (108, 3)),
            unreadable,
        )
        statuses = chain.statuses(0).statuses
        with pytest.raises(ImageCorruptError, match="L2 entry at byte 0x818: the host offset lies inside"):
            chain.allocation_depth()
        with pytest.raises(ImageCorruptError):
            chain.allocated(0)
        with pytest.raises(ImageCorruptError):
            list(chain.map_entries())
        with pytest.raises(ImageCorruptError):
            chain.base_allocation()
        with pytest.raises(ImageCorruptError):
            chain.locate(3 * 1024)
        assert chain.locate(9 * 1024) == (0, "a.qcow2", DATA)
    assert depth == runs((6, 0), (4, UNREADABLE_DEPTH), (8, 0), (2, 1), (108, 0))
    assert statuses == runs((6, 0), (4, Status.UNREADABLE), (8, 0), (2, Status.DATA), (108, 0))
    (only,) = unreadable
    assert (only.layer, only.path, only.offset, only.end) == (0, "a.qcow2", 3072, 5120)
    assert only.reason.startswith("L2 entry at byte 0x818: the host offset lies inside a cluster")


def test_what_upper_layers_cover_is_no_error(here: Path) -> None:
    bad = COPIED | DATA | 0x200
    write("base.qcow2", qcow2_bytes({3: bad, 70: bad}, cluster_bits=10, size=128 * 1024))
    write("top.qcow2", qcow2_bytes({6: ZERO, 7: ZERO}, size=128 * 1024, backing="base.qcow2", backing_format="qcow2"))
    with open_chain("top.qcow2") as chain:
        depth, (only,) = chain.depth_with_errors()
    assert depth == runs((6, 0), (2, 1), (132, 0), (2, UNREADABLE_DEPTH), (114, 0))
    assert (only.layer, only.offset, only.end) == (1, 70 * 1024, 71 * 1024)
    write("top.qcow2", qcow2_bytes({6: ZERO}, size=72 * 512, backing="base.qcow2", backing_format="qcow2"))
    with open_chain("top.qcow2") as chain:
        depth, (half,) = chain.depth_with_errors()
    assert depth == runs((6, 0), (1, 1), (1, UNREADABLE_DEPTH), (64, 0)), "half of the bad cluster is covered"
    assert (half.offset, half.end) == (7 * 512, 8 * 512)


def test_an_l2_table_inside_a_cluster(here: Path) -> None:
    image = bytearray(qcow2_bytes({}, cluster_bits=10, size=256 * 1024))
    put(image, 0x400, (COPIED | 0xA00).to_bytes(8, "big"))
    write("a.qcow2", bytes(image))
    with open_chain("a.qcow2") as chain:
        depth, (only,) = chain.depth_with_errors()
    assert depth == ExtentMap.of_extents([(128 * 1024, UNREADABLE_DEPTH), (128 * 1024, 0)])
    assert only.reason.startswith("L1 entry at byte 0x400: L2 table 0 does not start at a cluster")


def test_reasons_are_bounded(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qmpnbd.images.layers.MAX_UNREADABLE", 3)
    bad = dict.fromkeys(range(0, 60, 2), COPIED | DATA | 0x200)
    write("a.qcow2", qcow2_bytes(bad, cluster_bits=10, size=60 * 1024))
    with open_chain("a.qcow2") as chain:
        depth, unreadable = chain.depth_with_errors()
    assert len(unreadable) == 3
    assert depth.totals()[UNREADABLE_DEPTH] == 30 * 1024


def test_what_is_cut_off_stays_an_error_of_the_whole(here: Path) -> None:
    write("a.qcow2", qcow2_bytes({3: COPIED | END}))
    with open_chain("a.qcow2") as chain:
        with pytest.raises(ImageTruncatedError):
            chain.depth_with_errors()
        with pytest.raises(ImageTruncatedError):
            chain.statuses(0)
        assert chain.statuses(0, 0, 1024).statuses == runs((2, 0)), "another window"


def test_tables_below_what_upper_layers_hold_are_not_read(here: Path) -> None:
    """The second table of the base lies beyond the end of its file, which matters only where it can be seen."""
    base = bytearray(qcow2_bytes({0: ZERO, 64: ZERO}))
    put(base, 0x208, (COPIED | END).to_bytes(8, "big"))
    write("base.qcow2", bytes(base))
    held = dict.fromkeys(range(64, 128), ZERO)
    write("top.qcow2", qcow2_bytes(held, backing="base.qcow2", backing_format="qcow2"))
    with open_chain("top.qcow2") as chain:
        assert chain.allocation_depth() == runs((1, 2), (63, 0), (64, 1))
    del held[100]
    write("top.qcow2", qcow2_bytes(held, backing="base.qcow2", backing_format="qcow2"))
    with open_chain("top.qcow2") as chain, pytest.raises(ImageTruncatedError, match="L2 table 1"):
        chain.allocation_depth()
