"""Checkpoints on a guest that writes all the time: every record that it knows to be on its disk is in them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qmpnbd.control.populate import Filling, populate
from qmpnbd.control.ranges import DepthRange
from qmpnbd.qmp.checkpoint_plan import Operation
from qmpnbd.qmp.checkpoints import Change, change_checkpoints, list_checkpoints
from tests.guestwrites import Range, dirty, rounded
from tests.qemu_versions import QemuBinaries, each_qemu
from tests.servers import blockdev, qemu_img, wait_until
from tests.test_guest import pytestmark as needs_a_guest
from tests.test_guest import running

pytestmark = needs_a_guest

GRANULE = 65536


def written(serial: Path) -> list[Range]:
    """The records that the guest knows to be on its disk."""
    found = re.findall(r"qmpnbd-guest: record \d+ at (\d+)\r?\n", serial.read_text(errors="replace"))
    return [(int(offset), int(offset) + 4096) for offset in found]


def missing(ranges: list[Range], marked: list[Range]) -> list[Range]:
    return [each for each in rounded(ranges, GRANULE) if not any(o <= each[0] and each[1] <= e for o, e in marked)]


@pytest.mark.timeout(240)
@each_qemu
def test_no_record_of_a_writing_guest_is_missing(binaries: QemuBinaries, folder: Path) -> None:
    disk = folder / "disk.qcow2"
    serial = disk.with_suffix(".serial")
    qemu_img("create", "-q", "-f", "qcow2", disk, "64M")
    devices = ["-blockdev", blockdev(disk, "top"), "-device", "virtio-blk-pci,id=vd0,drive=top"]
    marks: dict[str, int] = {}
    with running(disk, *devices, program=binaries.system) as server:

        def change(operation: Operation) -> None:
            change_checkpoints(str(server.qmp), Change(operation, "nightly"))
            some = len(written(serial)) + 5
            wait_until(lambda: len(written(serial)) > some, "the guest to write", 30)

        def nothing_is_missing() -> None:
            (state,) = list_checkpoints(str(server.qmp), chain="nightly").disks
            for each in state.usable:
                marks.setdefault(each.bitmap, len(written(serial)))
                truth = written(serial)[marks[each.bitmap] :]
                found = dirty(server, "top", [one.bitmap for one in state.since(each.number)])
                assert missing(truth, found) == []

        change("create")
        nothing_is_missing()
        for decision in ("abort", "commit", "abort", "commit"):
            change("create")
            nothing_is_missing()
            change("abort" if decision == "abort" else "commit")
            nothing_is_missing()
        populate(str(server.qmp), Filling("vd0", "filled", DepthRange(1, 1), runtime_dir=str(folder)))
        everything = written(serial)
        assert missing(everything, dirty(server, "top", ["filled"])) == []
        assert server.side("query-status")["status"] == "running"
