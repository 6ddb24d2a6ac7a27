"""Rounds of backups of a guest that never rests, with something going wrong before each: no byte may be lost.

::

    full, then twelve times:  a fault (a run killed, QEMU killed, a target full, ...)
                              a backup, which must succeed without anybody's help
                              its disks by qemu-img alone: exactly operations 1..n, for one n, on every disk
    a differential; every point restored by qmpnbd, verified, and the repository checked

As a program (`scripts/backup-rounds`) it goes on for as many rounds as it is told to, on each QEMU that is here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.backup_commands import (
    CHAIN,
    Ended,
    backup,
    backup_words,
    command,
    full_target,
    kinds,
    new_repository,
    newest,
    points,
    restored,
    run,
    stock_read,
)
from tests.backup_guest import SIZE, Guest, driver_of
from tests.nbd_cutter import cutting_after
from tests.qemu_versions import INSTALLED, OTHERS, QemuBinaries, binaries_of
from tests.qmp_between import CutError, between
from tests.servers import qemu_img, short_folder

LOCKED = 80
INTERRUPTED = (0, 143, -signal.SIGKILL, -signal.SIGTERM)


@dataclass
class Round:
    """One guest, one repository, and what was seen.

    Attributes:
        guest: the machine.
        folder: for all that is made.
        dice: decides what is random.
        expected: for each point, by its folder's name, the hash of each disk.
        told: what happened, a line each.
    """

    guest: Guest
    binaries: QemuBinaries
    folder: Path
    dice: random.Random
    expected: dict[str, dict[str, str]] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)
    seconds: float = 2.0

    @property
    def repository(self) -> Path:
        """Where the backups go."""
        return self.folder / "repository"

    @property
    def share(self) -> str:
        """URI of the NBD server that QEMU runs for the guest: there can be no second one."""
        return f"nbd+unix:///?socket={self.guest.nbd}"

    def words(self, *more: str) -> list[str]:
        """Returns the command line of a run."""
        return command(*backup_words(self.guest.server.qmp, self.repository, "--nbd", self.share, *more))

    def backup(self, *more: str, code: int | None = 0) -> dict[str, tuple[str, str]]:
        """Backs up, and compares what stock tools read of it with the record."""
        begin = time.monotonic()
        ended = backup(self.guest.server.qmp, self.repository, "--nbd", self.share, *more, code=code)
        self.seconds = time.monotonic() - begin
        self.compare(newest(self.repository))
        return kinds(ended)

    def compare(self, point: Path) -> None:
        """Compares a point that was taken since the record was last moved on."""
        replay, last = self.guest.replay, self.guest.writer.issued
        found = [stock_read(point, disk, self.folder) for disk in self.guest.disks]
        first = replay.number
        number = replay.find(found, last)
        assert number is not None, f"{point.name}: no operation of {first}..{last}\nnearest: {replay.nearest}"
        hashes = [hashlib.sha256(each).hexdigest() for each in found]
        self.expected[point.name] = dict(zip(self.guest.disks, hashes, strict=True))
        self.told.append(f"{point.name}: operation {number} of {first}..{last}")

    def compare_new(self) -> None:
        """Compares what a run that may have failed has left as a backup."""
        for point in points(self.repository):
            if point.name not in self.expected:
                self.compare(point)

    def restore(self, names: Sequence[str]) -> None:
        """Restores points by the product, and compares all their bytes."""
        for point in (each for each in points(self.repository) if each.name in names):
            for disk, digest in self.expected[point.name].items():
                found = hashlib.sha256(restored(self.repository, point, disk, self.folder)).hexdigest()
                assert found == digest, f"{point.name} {disk}: restored is not what was on the disk"

    def unharmed(self) -> None:
        """The guest writes on, and in QEMU is nothing of ours but checkpoints."""
        self.guest.go_on()
        server = self.guest.server
        assert server.side("query-jobs") == []
        assert [name for name in server.exports() if not name.startswith("guest")] == []
        assert [name for name in server.nodes() if name.startswith("qmpnbd-")] == []
        for info in server.side("query-named-block-nodes", flat=True):
            bitmaps = [each.get("name", "") for each in info.get("dirty-bitmaps", ())]
            assert all(name.startswith("qmpnbd.nightly.c") for name in bitmaps), bitmaps


Fault = Callable[[Round], None]


def _signalled(round_: Round, number: signal.Signals) -> None:
    with subprocess.Popen(round_.words(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as child:
        with suppress(subprocess.TimeoutExpired):
            child.wait(round_.dice.uniform(0, round_.seconds * 1.1))
        child.send_signal(number)
        _, said = child.communicate(timeout=60)
    assert child.returncode in INTERRUPTED, (child.returncode, said)
    if number is not signal.SIGKILL:
        round_.unharmed()
    round_.compare_new()


def killed(round_: Round) -> None:
    """A run is killed at any moment."""
    _signalled(round_, signal.SIGKILL)


def told_to_end(round_: Round) -> None:
    """A run is told to end at any moment."""
    _signalled(round_, signal.SIGTERM)


def qemu_killed(round_: Round) -> None:
    """QEMU is killed while a backup runs."""
    with subprocess.Popen(round_.words(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as child:
        with suppress(subprocess.TimeoutExpired):
            child.wait(round_.dice.uniform(0.3, 0.9) * round_.seconds)
        os.kill(round_.guest.server.pid, signal.SIGKILL)
        _, said = child.communicate(timeout=60)
    assert child.returncode >= 0, said
    round_.compare_new()
    round_.guest.kill()
    round_.guest.start()


def target_full(round_: Round) -> None:
    """No file of the repository can grow any more."""
    with full_target(round_.dice.choice((400_000, 700_000))):
        _refused(round_, backup(round_.guest.server.qmp, round_.repository, "--nbd", round_.share, code=None), 83)


def _refused(round_: Round, ended: Ended, *codes: int) -> None:
    assert ended.code in codes, (ended.code, ended.err)
    assert ended.err
    assert all(point.name in round_.expected for point in points(round_.repository)), "a failed run left a backup"
    round_.unharmed()


def bitmap_removed(round_: Round) -> None:
    """Somebody removes a checkpoint's bitmap while QEMU runs."""
    side = round_.guest.server.side
    for info in side("query-named-block-nodes", flat=True):
        for bitmap in info.get("dirty-bitmaps", ()):
            if info["node-name"] == "disk0":
                side("block-dirty-bitmap-remove", node="disk0", name=bitmap["name"])


def bitmap_removed_offline(round_: Round) -> None:
    """Somebody removes it while the machine is off."""
    round_.guest.stop()
    image = round_.guest.images[0]
    for name in _stored_bitmaps(image):
        qemu_img("bitmap", "--remove", image, name)
    round_.guest.start()


def _stored_bitmaps(image: Path) -> list[str]:
    told = json.loads(qemu_img("info", "--output=json", image))
    stored = told.get("format-specific", {}).get("data", {}).get("bitmaps", ())  # nothing of that in a raw image
    return [each["name"] for each in stored]


def grown(round_: Round) -> None:
    """A disk becomes larger while the machine is off."""
    round_.guest.stop()
    image = round_.guest.images[0]
    qemu_img(
        "resize", "-q", "-f", driver_of(image), image, str(len(round_.guest.replay.contents[0]) + (3 << 20) + 4096)
    )
    round_.guest.changed()
    round_.guest.start()


def added(round_: Round) -> None:
    """The machine gets another disk while it runs."""
    image = round_.folder / "added.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, str(SIZE))
    round_.guest.add(image)


def swapped(round_: Round) -> None:
    """Two disks change places while the machine is off: each has a checkpoint of that name, and it is the other's."""
    round_.guest.stop()
    images = round_.guest.images
    images[0], images[1] = images[1], images[0]
    round_.guest.changed()
    round_.guest.start()


def cut_monitor(round_: Round) -> None:
    """The connection to the monitor ends before some command; the next run comes the same way."""
    left = [round_.dice.randrange(25)]

    def cut(_command: object) -> None:
        left[0] -= 1
        if left[0] == -1:
            raise CutError

    with between(round_.guest.server.qmp, cut) as (address, _):
        ended = backup(address, round_.repository, "--nbd", round_.share, code=None)
        round_.compare_new()
        # 11: it ended before the other side had proved to be a monitor.
        assert ended.code in (0, 11, 13, 16), (ended.code, ended.err)
        left[0] = -1  # what a run has left is looked for where it was left: behind the same peer
        backup(address, round_.repository, "--nbd", round_.share)
        round_.compare_new()


def cut_data(round_: Round) -> None:
    """The connection that the data comes over ends at some byte."""
    with cutting_after(round_.guest.nbd, round_.dice.randrange(1, 3 << 20)) as path:
        share = f"nbd+unix:///?socket={path}"
        ended = backup(round_.guest.server.qmp, round_.repository, "--nbd", share, code=None)
    if ended.code:
        _refused(round_, ended, 30, 31, 34, 36)
    round_.compare_new()


def two_at_once(round_: Round) -> None:
    """Two runs are started at the same time: one succeeds, and the other one names it."""
    children = [
        subprocess.Popen(round_.words(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = [child.communicate(timeout=100)[1] for child in children]
    codes = sorted(child.returncode for child in children)
    assert codes in ([0, LOCKED], [0, 0]), (codes, said)
    if codes[1]:
        names = [str(child.pid) for child in children]
        assert any(name in text for name in names for text in said), said
    round_.compare_new()
    round_.unharmed()


FAULTS: tuple[Fault, ...] = (
    killed,
    told_to_end,
    target_full,
    cut_monitor,
    cut_data,
    two_at_once,
    bitmap_removed,
    bitmap_removed_offline,
    added,
    grown,
    swapped,
    qemu_killed,
)
TO_THE_FIRST = (bitmap_removed, bitmap_removed_offline, grown)
OFF = (bitmap_removed_offline, grown, swapped)


def increments_after(fault: Fault, guest: Guest) -> set[str]:
    """Returns the disks whose next backup must be an increment all the same; that of the others must be none."""
    if fault is qemu_killed:
        return set()
    found = set(guest.disks)
    if fault is swapped:
        found -= {"vd0", "vd1"}
    if fault in TO_THE_FIRST:
        found.discard("vd0")
    if fault is added:
        found.discard(guest.disks[-1])
    if fault in OFF:  # what is no qcow2 has kept no bitmap
        found -= {disk for disk, image in zip(guest.disks, guest.images, strict=True) if image.suffix != ".qcow2"}
    return found


@contextmanager
def a_round(binaries: QemuBinaries, seed: int, seconds_each: float | None = None) -> Iterator[Round]:
    """Makes a guest with two disks: of qcow2 in even rounds, one of them raw in odd ones; and a repository.

    Args:
        binaries: the QEMU.
        seed: decides what is random.
        seconds_each: between two operations of the guest; None to have chance decide.
    """
    dice = random.Random(seed)
    with short_folder() as folder:
        images = [folder / "one.qcow2", folder / ("two.raw" if seed % 2 else "two.qcow2")]
        for image in images:
            qemu_img("create", "-q", "-f", driver_of(image), image, str(SIZE))
        guest = Guest(
            binaries, folder, images, dice.choice((0.0, 0.002, 0.01)) if seconds_each is None else seconds_each
        )
        try:
            guest.start()
            round_ = Round(guest, binaries, folder, dice)
            new_repository(round_.repository)
            yield round_
        finally:
            guest.close()


def whole(round_: Round, faults: Sequence[Fault], restores: int) -> None:
    """Does a round.

    Args:
        round_: with nothing backed up yet.
        faults: before each increment.
        restores: points to restore by the product, beside the first and the last one.
    """
    assert {kind for kind, _ in round_.backup().values()} == {"full"}
    for fault in faults:
        round_.guest.go_on(20)
        fault(round_)
        round_.guest.go_on()
        found = round_.backup()
        round_.unharmed()
        round_.told[-1] += f"; after {fault.__name__}: {found}"
        made = {disk for disk, (kind, _) in found.items() if kind == "increment"}
        assert made == increments_after(fault, round_.guest), (fault.__name__, found)
    first = points(round_.repository)[0].name.partition("-")[2]
    round_.guest.go_on(20)
    round_.backup("--type", "differential", "--since", first, code=None)
    round_.unharmed()
    names = [point.name for point in points(round_.repository)]
    assert set(names) == set(round_.expected)
    round_.restore([names[0], names[-1], *round_.dice.sample(names[1:-1], min(restores, len(names) - 2))])
    run("repository", "check", round_.repository)
    run("verify", round_.repository, "--chain", CHAIN)


def main() -> int:
    """Goes on for as many rounds as it is told to; returns 1 if a byte was lost in one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rounds", nargs="?", type=int, default=100, help="on each QEMU (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the first round; a round is repeated by its seed")
    parser.add_argument("--qemu", action="append", metavar="RELEASE", help="5.2, 7.2, ... (default: all that are here)")
    arguments = parser.parse_args()
    failed = 0
    for release in arguments.qemu or (INSTALLED, *OTHERS):
        for seed in range(arguments.seed, arguments.seed + arguments.rounds):
            failed += not _told(release, seed)
    sys.stdout.write(f"{failed} rounds failed\n")
    return int(failed > 0)


def _told(release: str, seed: int) -> bool:
    """Does a round and tells how it went; returns whether it went well."""
    begin = time.monotonic()
    faults = list(FAULTS)
    random.Random(seed).shuffle(faults)
    with a_round(binaries_of(release), seed) as round_:
        try:
            whole(round_, faults, len(faults))
        except Exception as error:
            sys.stdout.write("\n".join([f"QEMU {release}, seed {seed}: FAILED", *round_.told, f"{error!r}", ""]))
            return False
    seconds = time.monotonic() - begin
    sys.stdout.write(f"QEMU {release}, seed {seed}: {len(round_.expected)} points, 0 bytes lost, {seconds:.0f} s\n")
    sys.stdout.flush()
    return True


if __name__ == "__main__":
    sys.exit(main())
