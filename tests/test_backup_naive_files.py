"""How backups lose data on the way to files and back: the naive way loses it here and now, ours does not.

As in `tests.test_backup_naive`, which has the orders of commands, the first half of each test shows the loss.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qmpnbd.nbd.client import Client
from qmpnbd.nbd.uri import NbdUri
from tests import naive_backup as naive
from tests.backup_commands import (
    backup,
    backup_words,
    command,
    is_held,
    kinds,
    new_repository,
    newest,
    nothing_is_left,
    points,
    restore_words,
    restored,
    run,
    stock_read,
)
from tests.instants import SIZE, UNIT, build_chain, machine, machine_on
from tests.qemu_versions import QemuBinaries, each_qemu, installed
from tests.qmp_between import between
from tests.servers import blockdev, listening, process, qemu, qemu_img, tool, wait_until

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]  # many runs in one test, on a machine that may be busy

MIB = 1 << 20
HALF = f"write -P 3 {4 * MIB} {UNIT}"


def test_no_dirty_byte_is_left_out_because_another_map_was_cut_shorter(folder: Path) -> None:
    """Naive: two maps are walked side by side by their lengths; QEMU cuts one of them where it has too many extents."""
    size, repository = 80 * MIB, new_repository(folder / "repository")
    image = fragmented(folder / "image.qcow2", size)
    line = 'qemu-io -d /machine/peripheral/vd0/virtio-backend "{}"'
    devices = ["-blockdev", blockdev(image, "disk0"), "-device", "virtio-blk-pci,id=vd0,drive=disk0"]
    with qemu(*devices) as server:

        def write_everywhere(value: int) -> None:
            for place in range(0, size, MIB):
                told = line.format(f"write -P {value} {place} 512")
                assert server.side("human-monitor-command", command_line=told) == ""

        server.side("block-dirty-bitmap-add", node="disk0", name=naive.BITMAP)
        write_everywhere(1)
        server.side("block-dirty-bitmap-disable", node="disk0", name=naive.BITMAP)
        uri, _, dirty = naive.maps_of(server, "disk0", naive.BITMAP)
        there = sum(extent.length for extent in dirty if extent.value)
        met, end = naive.walked_together(uri, size)
        server.side("nbd-server-stop")
        assert (met < there, end) == (True, size), "nothing is left out"

        backup(server.qmp, repository)
        write_everywhere(2)
        assert kinds(backup(server.qmp, repository))["vd0"][0] == "increment"
        server.side("human-monitor-command", command_line=line.format("flush"))
        copy = folder / "copy.qcow2"
        shutil.copy(image, copy)
        truth = naive.content(copy)
        assert truth[size - MIB] == 2
        assert stock_read(newest(repository), "vd0", folder) == truth
        assert restored(repository, newest(repository), "vd0", folder) == truth


def fragmented(path: Path, size: int) -> Path:
    """Makes an image of which every other 512 bytes are allocated."""
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, str(size))
    lines = "".join(f"write -q -P 7 {place} 512\n" for place in range(0, size, 1024))
    words = [tool("qemu-io"), "-t", "unsafe", "-f", "qcow2", str(path)]
    subprocess.run(words, input=lines.encode(), stdout=subprocess.DEVNULL, check=True)
    return path


def test_a_restore_that_fails_and_a_check_without_hashes_do_not_end_with_0(folder: Path) -> None:
    """Naive: errors are told and swallowed, and a backup without checksums has nothing that could be wrong."""
    repository = new_repository(folder / "repository")
    with machine(installed(), folder) as running:
        backup(running.server.qmp, repository)
        image = newest(repository) / "vd0.qcow2"
        whole = image.read_bytes()
        image.write_bytes(whole[: len(whole) // 2])
        assert naive.restore_and_tell(image, folder / "naive.raw") == 0
        assert (folder / "naive.raw").read_bytes() != running.truth()[0].content

        words = restore_words(repository, newest(repository), "vd0", folder / "restored.raw")
        assert run(*words, code=None).code in (81, 42)
        assert not (folder / "restored.raw").exists()
        image.write_bytes(whole)
        run(*words)

        hashes = newest(repository) / "vd0.hashes"
        kept = hashes.read_bytes()
        hashes.unlink()
        assert naive.verify_if_there_is_a_hash(image, hashes) == 0
        assert run("verify", repository, "--chain", "nightly", code=None).code == 1
        hashes.write_bytes(kept)
        assert run("verify", repository, "--chain", "nightly").code == 0


def test_the_order_of_increments_is_theirs_and_a_missing_one_is_noticed(folder: Path) -> None:
    """Naive: increments stand on each other in the order of their files' times, which a copy of the folder changes."""
    repository, copies = new_repository(folder / "repository"), folder / "copies"
    with machine(installed(), folder) as running:
        for value in (1, 2, 3):
            running.write(0, f"write -P {value} {MIB} {UNIT}")
            backup(running.server.qmp, repository)
        truth = running.truth()[0].content
        copies.mkdir()
        images = [Path(shutil.copy(each / "vd0.qcow2", copies / each.name)) for each in points(repository)]
        for number, path in ((1, images[0]), (3, images[1]), (2, images[2])):
            os.utime(path, (number, number))
        assert naive.in_order_of_time(images)[MIB] == 2, "the newest data is not lost"

        for number, point in enumerate(reversed(points(repository))):
            for path in (point, *point.iterdir()):
                os.utime(path, (number, number))
        is_held(running, repository, folder)
        assert truth[MIB] == 3
        shutil.rmtree(points(repository)[1])
        words = restore_words(repository, newest(repository), "vd0", folder / "restored.raw")
        assert run(*words, code=None).code == 81
        assert run("repository", "check", repository, code=None).code != 0


def test_disks_whose_files_have_the_same_name_are_two(folder: Path) -> None:
    """Naive: what is stored is named after the disk's file."""
    repository = new_repository(folder / "repository")
    images: list[Path] = []
    for name in ("one", "two"):
        (folder / name).mkdir()
        images.append(build_chain(installed(), folder / name, "disk", len(images)))
    assert len({naive.target_of(folder, image) for image in images}) == 1
    with machine_on(installed(), folder, images) as running:
        for _ in range(2):
            assert len(kinds(backup(running.server.qmp, repository))) == 2
            is_held(running, repository, folder)
            running.write(1, HALF)


@each_qemu
def test_a_disk_that_cannot_keep_a_bitmap_is_backed_up_too(binaries: QemuBinaries, folder: Path) -> None:
    """Naive: what is no qcow2 is left out, with a warning or without one."""
    repository = new_repository(folder / "repository")
    raw = folder / "d1.raw"
    raw.write_bytes(bytes([5]) * SIZE)
    with machine_on(binaries, folder, (build_chain(binaries, folder, "d0", 0), raw)) as running:
        assert naive.that_can_keep_bitmaps(running.server.side("query-block")) == ["disk0"]
        assert {kind for kind, _ in kinds(backup(running.server.qmp, repository)).values()} == {"full"}
        running.write(1, HALF)
        assert set(kinds(backup(running.server.qmp, repository))) == {"vd0", "vd1"}
        running.write(1, "flush")
        assert stock_read(newest(repository), "vd1", folder) == raw.read_bytes()
    with machine_on(binaries, folder, running.images) as running:  # the bitmap of the raw disk is gone
        running.write(1, f"write -P 6 0 {UNIT}")
        found = kinds(backup(running.server.qmp, repository))
        assert found["vd0"][0] == "increment"
        assert found["vd1"][0] in ("compared", "full")
        running.write(1, "flush")
        assert stock_read(newest(repository), "vd1", folder) == raw.read_bytes()
        assert restored(repository, newest(repository), "vd1", folder) == raw.read_bytes()


@each_qemu
def test_a_guest_goes_on_while_the_target_stands_still(binaries: QemuBinaries, folder: Path) -> None:
    """Naive: the guest's writes wait until what they overwrite is on the target."""
    repository = new_repository(folder / "repository")
    image = build_chain(binaries, folder, "d0", 0)
    with binaries.daemon("--blockdev", blockdev(image, "disk0")) as server, standing_target(folder) as target:
        path = folder / "guest.sock"
        server.side("nbd-server-start", addr={"type": "unix", "data": {"path": str(path)}})
        server.side("block-export-add", type="nbd", id="guest", node_name="disk0", name="guest", writable=True)
        with Client.connect(NbdUri.unix(str(path), "guest")) as guest:
            file = {"type": "unix", "path": str(target.path)}
            server.side("blockdev-add", driver="nbd", node_name="slow", server=file)
            target.stop()
            naive.start(server.side, "disk0", "slow", sync="none")
            with ThreadPoolExecutor(1) as pool:
                write = pool.submit(guest.write, 0, bytes([8]) * UNIT)
                with pytest.raises(TimeoutError):
                    write.result(1)
                target.go_on()
                write.result(20)
            server.side("job-cancel", id="slow")
            assert "cancel" in naive.finish(server.side, "slow")

            def stand_still(told: Mapping[str, Any]) -> None:
                if told["execute"] == "block-export-del":  # it has read what it wants, and cannot write it
                    child.send_signal(signal.SIGSTOP)
                    guest.write(0, bytes([9]) * SIZE)
                    child.send_signal(signal.SIGCONT)

            share = f"nbd+unix:///?socket={path}"
            with between(server.qmp, stand_still) as (address, _):
                words = backup_words(address, repository, "--nbd", share, disks=["disk0"])
                child = subprocess.Popen(command(*words), stdout=subprocess.DEVNULL)
                assert child.wait(60) == 0
        nothing_is_left(server)
        assert stock_read(newest(repository), "disk0", folder) != bytes([9]) * SIZE


@dataclass(frozen=True)
class StandingTarget:
    """A disk in memory, served over NBD, whose server can be made to stand still."""

    path: Path
    pid: int

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)


@contextmanager
def standing_target(folder: Path) -> Iterator[StandingTarget]:
    path = folder / "target.sock"
    with process([tool("nbdkit"), "-f", "-U", str(path), "memory", str(SIZE)], folder / "nbdkit.log") as child:
        wait_until(lambda: listening(path), "nbdkit")
        yield StandingTarget(path, child.pid)
