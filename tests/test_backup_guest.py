"""Backups of a real guest that writes numbered pairs: every byte of every restore point is known from two numbers."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.backup_commands import (
    backup,
    backup_words,
    command,
    kinds,
    new_repository,
    newest,
    points,
    restored,
    stock_read,
)
from tests.backup_guest import raw_content
from tests.qemu_versions import QemuBinaries, each_qemu
from tests.servers import Server
from tests.test_pointintime_guest import RECORD, SIZE, go_on, needs_a_kernel, records_in, writing_guest, written
from tests.test_vm_images import guest

pytestmark = [pytest.mark.real, needs_a_kernel]

AT_BOOT = 1048576
"""Where the guest writes the record that it begins with, on the first disk."""


def record(number: int, place: int) -> bytes:
    """What the guest writes."""
    return b"%-4095s\n" % f"qmpnbd record {number} at {place}".encode()


def expected(before: bytes, pairs: int, *, first: bool) -> bytes:
    """What a disk holds after some pairs."""
    content = bytearray(before)
    if first:
        content[AT_BOOT : AT_BOOT + RECORD] = record(1, AT_BOOT)
    for number in range(1, pairs + 1):
        place = guest.pair_place(number, SIZE)
        content[place : place + RECORD] = record(number, place)
    return bytes(content)


class Witness:
    """Knows what the disks held before the guest was started, and how far it has come."""

    def __init__(self, server: Server, before: list[bytes]) -> None:
        self._server, self._before = server, before
        self._least = 0
        self.pairs: list[int] = []

    def about_to_begin(self) -> None:
        """What is on the disks by now must be in the backup that is begun next."""
        self._least = written(self._server)

    def compare(self, found: list[bytes]) -> None:
        """Both disks hold whole pairs up to one number, or the last one's second half is missing; and nothing else."""
        counts = [max(records_in(content), default=0) for content in found]
        assert counts[0] - counts[1] in (0, 1), counts
        assert self._least <= counts[1] <= written(self._server), (self._least, counts)
        for disk, (before, count, content) in enumerate(zip(self._before, counts, found, strict=True)):
            assert content == expected(before, count, first=disk == 0), f"disk {disk} after {count} pairs"
        self.pairs.append(counts[0])


@pytest.mark.timeout(300)
@each_qemu
def test_every_point_lies_between_two_halves_of_a_pair_also_after_a_run_was_killed(
    binaries: QemuBinaries, folder: Path
) -> None:
    repository = new_repository(folder / "repository")
    images = []
    with writing_guest(binaries, folder) as (server, _):
        # What the disks held before is what the layers below the guest's own writes hold: it is made anew.
        (folder / "again").mkdir()
        images = untouched(binaries, folder / "again")
        witness = Witness(server, images)

        def take(*more: str) -> dict[str, tuple[str, str]]:
            go_on(server)
            witness.about_to_begin()
            ended = backup(server.qmp, repository, *more)
            witness.compare([stock_read(newest(repository), disk, folder) for disk in ("vd0", "vd1")])
            return kinds(ended)

        begin = time.monotonic()
        assert {kind for kind, _ in take().values()} == {"full"}
        seconds = time.monotonic() - begin
        for share in (0.5, 0.8):
            go_on(server)
            with subprocess.Popen(command(*backup_words(server.qmp, repository)), stdout=subprocess.DEVNULL) as child:
                try:
                    child.wait(seconds * share)
                except subprocess.TimeoutExpired:
                    child.send_signal(signal.SIGKILL)
            assert {kind for kind, _ in take().values()} == {"increment"}
        first = points(repository)[0].name.partition("-")[2]
        assert {kind for kind, _ in take("--type", "differential", "--since", first).values()} == {"differential"}
        assert server.side("query-status")["status"] == "running"
        go_on(server)
    assert witness.pairs == sorted(set(witness.pairs))
    for disk, before in zip(("vd0", "vd1"), images, strict=True):
        content = restored(repository, newest(repository), disk, folder)
        assert content == expected(before, max(records_in(content)), first=disk == "vd0")


def untouched(binaries: QemuBinaries, folder: Path) -> list[bytes]:
    """What the disks of `writing_guest` hold before it writes: one content for both."""
    base, top = folder / "base.qcow2", folder / "top.qcow2"
    for image, below in ((base, []), (top, ["-b", str(base), "-F", "qcow2"])):
        create = [binaries.img, "create", "-q", "-f", "qcow2", *below, str(image), str(SIZE)]
        subprocess.run(create, check=True, timeout=60)
    for image, place in ((base, "2M"), (base, "9M"), (top, "1M"), (top, "8M")):
        words = [binaries.io, "-f", "qcow2", "-c", f"write -P 1 {place} 2M", str(image)]
        subprocess.run(words, check=True, capture_output=True, timeout=60)
    return [raw_content(top)] * 2
