"""How backups of running guests lose data, case by case: the naive order loses it here and now, ours does not.

The first half of each test shows the loss with plain QMP commands (`tests.naive_backup`), so that what the second half
asserts of the product is known to be something that can fail.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests import naive_backup as naive
from tests.backup_commands import (
    backup,
    backup_words,
    command,
    full_target,
    is_held,
    kinds,
    new_repository,
    newest,
    nothing_is_left,
    stock_read,
)
from tests.instants import SIZE, UNIT, Machine, build_chain, machine, machine_on
from tests.qemu_versions import QemuBinaries, each_qemu
from tests.qmp_between import between
from tests.servers import Server, qemu_img, wait_until

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]  # many runs in one test, on a machine that may be busy

MIB = 1 << 20
HALF = f"write -P 3 {4 * MIB} {UNIT}"


@each_qemu
def test_a_write_between_the_start_of_the_copy_and_that_of_the_bitmap_is_not_lost(
    binaries: QemuBinaries, folder: Path
) -> None:
    """Naive: the copy of a disk begins, disk by disk, and then the bitmap; a write in between is in neither."""
    repository = new_repository(folder / "repository")
    with machine(binaries, folder) as running:
        side = running.server.side
        for name in ("full0", "full1"):
            naive.new_layer(side, folder / f"{name}.qcow2", name)
        naive.start(side, "disk0", "full0", sync="full")
        running.write(0, HALF)
        running.write(1, HALF)  # the guest wrote it after the other half
        naive.start(side, "disk1", "full1", sync="full")
        for number in range(2):
            side("block-dirty-bitmap-add", node=f"disk{number}", name=naive.BITMAP)
        assert [naive.finish(side, f"full{number}") for number in range(2)] == ["", ""]
        halves = [naive.content(folder / f"full{number}.qcow2")[4 * MIB] for number in range(2)]
        assert (halves[0] != 3, halves[1]) == (True, 3), "the second half without the first one"

        naive.new_layer(side, folder / "increment.qcow2", "increment", folder / "full0.qcow2")
        naive.start(side, "disk0", "increment", sync="incremental", bitmap=naive.BITMAP)
        assert naive.finish(side, "increment") == ""
        assert naive.content(folder / "increment.qcow2")[4 * MIB : 4 * MIB + UNIT] != bytes([3]) * UNIT, "not lost"
        for number in range(2):
            side("block-dirty-bitmap-remove", node=f"disk{number}", name=naive.BITMAP)

        places = iter(range(1, 128))

        def write_both(_command: Mapping[str, Any]) -> None:
            place = next(places)
            for number in range(2):
                running.write(number, f"write -P {place} {place * UNIT} 4096")

        for kind in ("full", "increment", "increment"):
            with between(running.server.qmp, write_both) as (address, seam):
                ended = backup(address, repository)
            assert {each[0] for each in kinds(ended).values()} == {kind}
            assert len(seam.commands) > 5
            one, other = (stock_read(newest(repository), disk, folder) for disk in running.disks)
            written = [[content[place * UNIT] == place for place in range(1, 128)] for content in (one, other)]
            assert written[0] == written[1], "the disks are of different instants"
        assert any(written[0])
        backup(running.server.qmp, repository)  # while nobody writes: whatever the others left out would show
        is_held(running, repository, folder)
        nothing_is_left(running)


@each_qemu
def test_an_increment_of_a_busy_guest_is_read_without_permission_denied(binaries: QemuBinaries, folder: Path) -> None:
    """Naive: the filter's bitmap is older than the one that the job reads by, which is cleared before it fails."""
    with machine(binaries, folder) as running:
        if binaries.version >= (7, 1, 0):  # before, there is no such filter
            assert "Permission denied" in _job_beyond_its_filter(running, folder)
            assert naive.count(running.server.side, "disk0") == 0, "and the delta is kept"
    repository = new_repository(folder / "repository")
    with machine_on(binaries, folder, running.images) as running:
        backup(running.server.qmp, repository)
        running.write(0, HALF)
        with between(running.server.qmp, lambda _: running.write(0, f"write -P 5 {6 * MIB} {UNIT}")) as (address, _):
            assert {each[0] for each in kinds(backup(address, repository)).values()} == {"increment"}
        is_held(running, repository, folder)


def _job_beyond_its_filter(running: Machine, folder: Path) -> str:
    side = running.server.side
    for name, disabled in ((naive.BITMAP, False), ("filters", True), ("jobs", True)):
        side("block-dirty-bitmap-add", node="disk0", name=name, disabled=disabled)
    naive.new_layer(side, folder / "kept.qcow2", "kept")
    naive.new_layer(side, folder / "increment.qcow2", "increment")
    running.write(0, HALF)
    side("block-dirty-bitmap-merge", node="disk0", target="filters", bitmaps=[naive.BITMAP])
    filter_ = {"file": "disk0", "target": "kept", "bitmap": {"node": "disk0", "name": "filters"}}
    side("blockdev-add", driver="copy-before-write", node_name="filter", **filter_)
    side("qom-set", path="/machine/peripheral/vd0", property="drive", value="filter")
    side("blockdev-add", driver="snapshot-access", node_name="access", file="filter")
    running.write(0, f"write -P 5 {6 * MIB} {UNIT}")  # known to the bitmap that records, and to no filter
    actions = [
        {"type": "block-dirty-bitmap-merge", "data": {"node": "disk0", "target": "jobs", "bitmaps": [naive.BITMAP]}},
        {"type": "block-dirty-bitmap-clear", "data": {"node": "disk0", "name": naive.BITMAP}},
    ]
    side("transaction", actions=actions)
    side("block-dirty-bitmap-add", node="access", name="jobs")
    side("block-dirty-bitmap-merge", node="access", target="jobs", bitmaps=[{"node": "disk0", "name": "jobs"}])
    naive.start(side, "access", "increment", sync="bitmap", bitmap="jobs", bitmap_mode="never")
    return naive.finish(side, "increment")


@each_qemu
def test_a_target_that_is_full_does_not_take_the_delta_with_it(binaries: QemuBinaries, folder: Path) -> None:
    """Naive: the only copy of the dirty bits is cleared in the transaction that starts the job."""
    repository = new_repository(folder / "repository")
    with machine(binaries, folder) as running:
        side = running.server.side
        side("block-dirty-bitmap-add", node="disk0", name=naive.BITMAP)
        side("block-dirty-bitmap-add", node="disk0", name="jobs", disabled=True)
        running.write(0, f"write -P 9 0 {4 * MIB}")
        qemu_img("create", "-q", "-f", "raw", folder / "full.raw", str(SIZE))
        full = {"driver": "file", "filename": str(folder / "full.raw")}
        error = [{"event": "none", "iotype": "write", "errno": 28}]
        side("blockdev-add", driver="blkdebug", node_name="increment", image=full, inject_error=error)
        bits = {"node": "disk0", "name": naive.BITMAP}
        job = {"device": "disk0", "target": "increment", "job-id": "increment", "auto-dismiss": False}
        actions = [
            {
                "type": "block-dirty-bitmap-merge",
                "data": {"node": "disk0", "target": "jobs", "bitmaps": [bits["name"]]},
            },
            {"type": "blockdev-backup", "data": {**job, "sync": "bitmap", "bitmap": "jobs", "bitmap-mode": "never"}},
            {"type": "block-dirty-bitmap-clear", "data": bits},
        ]
        side("transaction", actions=actions)
        assert "No space left" in naive.finish(side, "increment")
        assert naive.count(side, "disk0") == 0, "the delta is kept"
        for name in (naive.BITMAP, "jobs"):
            side("block-dirty-bitmap-remove", node="disk0", name=name)

        backup(running.server.qmp, repository)
        running.write(0, f"write -P 11 0 {4 * MIB}")
        with full_target(MIB):
            ended = backup(running.server.qmp, repository, code=83)
        assert "qmpnbd" in ended.err
        nothing_is_left(running)
        running.write(0, HALF)
        assert kinds(backup(running.server.qmp, repository))["vd0"][0] == "increment"
        is_held(running, repository, folder)


@each_qemu
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_killed_or_told_to_end_blocks_no_later_one(
    binaries: QemuBinaries, end: signal.Signals, folder: Path
) -> None:
    """Naive: what it made in QEMU stays unless it is ended by Ctrl-C, and every later run fails on it."""
    repository = new_repository(folder / "repository")
    with machine(binaries, folder) as running:
        side = running.server.side
        words = [sys.executable, "-m", "tests.naive_backup", str(running.server.qmp), str(folder)]
        with subprocess.Popen(words, stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"serving\n"
            child.send_signal(end)
        assert [job["id"] for job in side("query-jobs")] == [naive.FLEECE]
        assert running.server.nbd_server_runs()
        with pytest.raises(AssertionError, match="blockdev-add"):
            naive.fleece(side, folder)
        side("nbd-server-stop")
        naive.end_fleecing(side)

        children: list[subprocess.Popen[bytes]] = []

        def end_it(told: Mapping[str, Any]) -> None:
            if children and told["execute"] == "block-export-add":
                children.pop().send_signal(end)

        # All runs go through the seam: what a dead one left is looked for where it was left.
        with between(running.server.qmp, end_it) as (address, _):
            backup(address, repository)
            running.write(0, HALF)
            words = command(*backup_words(address, repository))
            mortal = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            children.append(mortal)
            assert mortal.wait(60) == {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143}[end]
            if end is signal.SIGTERM:
                nothing_is_left(running)
            running.write(1, HALF)
            assert {each[0] for each in kinds(backup(address, repository)).values()} == {"increment"}
        is_held(running, repository, folder)
        nothing_is_left(running)
        assert not running.server.nbd_server_runs()


@each_qemu
def test_after_a_crash_of_qemu_the_next_backup_is_made(binaries: QemuBinaries, folder: Path) -> None:
    """Naive: an inconsistent bitmap refuses everything but its removal, and so does every later run."""
    repository = new_repository(folder / "repository")
    with machine(binaries, folder) as running:
        side = running.server.side
        side("block-dirty-bitmap-add", node="disk0", name=naive.BITMAP, persistent=True)
        backup(running.server.qmp, repository)
    with machine_on(binaries, folder, running.images) as running:  # which stored and loaded them
        os.kill(running.server.pid, signal.SIGKILL)
        wait_until(lambda: not Path(f"/proc/{running.server.pid}/cmdline").read_bytes(), "QEMU to die")
    with machine_on(binaries, folder, running.images) as running:
        side = running.server.side
        bits = {"node": "disk0", "name": naive.BITMAP}
        with pytest.raises(AssertionError, match="inconsistent"):
            side("block-dirty-bitmap-clear", **bits)
        with pytest.raises(AssertionError, match="already exists"):
            side("block-dirty-bitmap-add", **bits)
        side("block-dirty-bitmap-remove", **bits)

        running.write(0, HALF)
        found = kinds(backup(running.server.qmp, repository))
        assert {reason for _, reason in found.values()} == {"bitmap inconsistent"}
        is_held(running, repository, folder)
        running.write(1, HALF)
        assert {each[0] for each in kinds(backup(running.server.qmp, repository)).values()} == {"increment"}
        is_held(running, repository, folder)


@each_qemu
def test_what_became_zero_is_zero_after_the_restore(binaries: QemuBinaries, folder: Path) -> None:
    """Naive: ranges that are dirty and hold no data are left out, and the restore leaves there what was before."""
    repository = new_repository(folder / "repository")
    with machine(binaries, folder, discard="unmap") as running:
        side = running.server.side
        became_zero = (f"write -z {4 * MIB} {UNIT}", f"discard {2 * MIB} {UNIT}")
        running.write(0, HALF)
        full = running.truth()[0].content
        side("block-dirty-bitmap-add", node="disk0", name=naive.BITMAP)
        running.write(0, *became_zero)
        truth = running.truth()[0].content
        side("block-dirty-bitmap-disable", node="disk0", name=naive.BITMAP)
        uri, allocation, dirty = naive.maps_of(running.server, "disk0", naive.BITMAP)
        found = naive.put_over(full, naive.dirty_data_only(uri, allocation, dirty))
        side("nbd-server-stop")
        assert found[4 * MIB : 4 * MIB + UNIT] == bytes([3]) * UNIT, "the old data is not back"
        assert found != truth

        running.write(0, HALF, f"write -P 4 {2 * MIB} {UNIT}")
        backup(running.server.qmp, repository)
        running.write(0, *became_zero)
        (disk, _) = (ended := backup(running.server.qmp, repository)).document["disks"]
        assert kinds(ended)["vd0"][0] == "increment"
        assert disk["data_bytes"] < UNIT <= disk["zero_bytes"]
        is_held(running, repository, folder)


@each_qemu
def test_no_drive_comes_to_a_device_that_is_not_its_own(binaries: QemuBinaries, folder: Path) -> None:
    """Naive: a drive without a device inherits the one of the drive before it, and the filter goes in there."""
    repository = new_repository(folder / "repository")
    image, spare = build_chain(binaries, folder, "d0", 0), build_chain(binaries, folder, "spare", 1)
    drives = ["-drive", f"if=none,id=d0,node-name=disk0,file={image},format=qcow2", "-device"]
    drives += ["virtio-blk-pci,id=vd0,drive=d0", "-drive", f"if=none,id=d1,node-name=spare,file={spare},format=qcow2"]
    with binaries.qemu(*drives) as server:
        devices = naive.device_of_each_drive(server.side("query-block"))
        assert devices["spare"] == devices["disk0"], "the spare drive has no device"
        if binaries.version >= (6, 2, 0):  # before, no drive of a device can be changed
            path = devices["spare"].removesuffix("/virtio-backend")
            server.side("qom-set", path=path, property="drive", value="spare")
            (now,) = [each for each in server.side("query-block") if each.get("qdev") == devices["disk0"]]
            assert now["inserted"]["node-name"] == "spare", "the guest has its own disk"

    with binaries.qemu(*drives) as server:
        running = Machine(server, folder, (image,))
        before = drives_of(server)
        backup(server.qmp, repository)
        running.write(0, HALF)
        assert set(kinds(backup(server.qmp, repository))) == {"vd0"}
        is_held(running, repository, folder)
        assert drives_of(server) == before
        nothing_is_left(running)


def drives_of(server: Server) -> list[tuple[str, str]]:
    return [(each.get("qdev", ""), each["inserted"]["node-name"]) for each in server.side("query-block")]


@each_qemu
def test_each_disk_is_full_or_an_increment_for_itself(binaries: QemuBinaries, folder: Path) -> None:
    """Naive: one transaction clears the bitmaps of all disks; one that is missing refuses it, for all of them."""
    repository = new_repository(folder / "repository")
    with machine(binaries, folder) as running:
        side = running.server.side
        side("block-dirty-bitmap-add", node="disk0", name=naive.BITMAP)  # disk1 is new, or has lost it
        nodes = [{"node": f"disk{number}", "name": naive.BITMAP} for number in range(2)]
        with pytest.raises(AssertionError, match="not found"):
            side("transaction", actions=[{"type": "block-dirty-bitmap-clear", "data": each} for each in nodes])
        side("block-dirty-bitmap-remove", **nodes[0])

        assert kinds(backup(running.server.qmp, repository, disks=["vd0"])) == {"vd0": ("full", "no backup yet")}
        running.write(0, HALF)
        found = kinds(backup(running.server.qmp, repository))
        assert found["vd0"][0] == "increment"
        assert found["vd1"][0] == "full"
        assert found["vd1"][1] in ("new disk", "no backup yet")
        is_held(running, repository, folder)
        running.write(1, HALF)
        for info in side("query-named-block-nodes", flat=True):
            for bitmap in info.get("dirty-bitmaps", ()):
                if info["node-name"] == "disk1":
                    side("block-dirty-bitmap-remove", node="disk1", name=bitmap["name"])
        running.write(0, HALF)
        found = kinds(backup(running.server.qmp, repository))
        assert (found["vd0"][0], found["vd1"][1]) == ("increment", "bitmap lost")
        is_held(running, repository, folder)
