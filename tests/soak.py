"""Validates a disk in a loop for minutes or hours, while everything that can happen to it happens.

::

    writer     sequential and random writes, zeroes, discards; without a pause, at --rate
    snapshots  an overlay is put on top, and committed again, at any moment (also in the middle of a validation)
    faults     now and then an entry of a table is spoilt behind QEMU's back: it must be found, there and nowhere else
    instants   now and then all of it at a point in time, and a bitmap must know what changed since an earlier one;
               some of these bitmaps are cleared meanwhile, which must be found

Counted are false alarms (a discrepancy that is none) and faults that were missed; ends with 1 unless both are 0, if
less than 99 % of a disk was judged whose graph stood still, and if there was no time for one of the things above.
`scripts/soak` runs it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from qmpnbd.deadline import Deadline
from qmpnbd.errors import CommandFailedError, NoSuchDiskError
from qmpnbd.qmp.monitor import Monitor
from qmpnbd.qmp.planning import Wishes
from qmpnbd.report.contexts import CONTENT
from qmpnbd.report.model import DiskReport
from qmpnbd.validate.choice import Choice
from qmpnbd.validate.run import Options, validate_disks
from tests.fleets import CLUSTER
from tests.qemu_versions import INSTALLED, QemuBinaries, binaries_of
from tests.servers import Server, short_folder
from tests.soak_disk import MIB, SECONDS, Snapshots, Writer, guest_uri, make_images, served, spoilt_for_a_while

_POLL_SECONDS = 0.02
_BITMAP = "soak"
_CHANGE_SECONDS = 0.5
_LEAST_SHARE = 0.99
_CYCLE = 6
"""Turns after which all of them have been done."""


@dataclass
class Counts:
    """What happened.

    Attributes:
        turns: times something was begun.
        instants: validations at a point in time.
        validations: those that ended with a verdict on the disk.
        moved: those that could not begin, because the node had just gone.
        incomplete: those that could not judge everything.
        worst_share: the smallest part of the disk of which a map was judged, where the graph stood still.
        graph: validations in which the graph never stood still.
        snapshots: overlays put on top.
        commits: overlays committed.
        faults: entries and bitmaps spoilt.
        alarms: false alarms, in words.
        missed: faults that were not found, in words.
        written: bytes that the guest wrote, zeroed or discarded.
        seconds: how long it took.
    """

    turns: int = 0
    instants: int = 0
    validations: int = 0
    moved: int = 0
    incomplete: int = 0
    worst_share: float = 1.0
    graph: int = 0
    snapshots: int = 0
    commits: int = 0
    faults: int = 0
    alarms: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    written: int = 0
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """Says `passed`, `failed`, or that something never happened, so that nothing is said of it."""
        if self.missed or self.alarms or self.worst_share < _LEAST_SHARE:
            return "failed"
        happened = (self.validations - self.incomplete, self.instants, self.snapshots, self.commits, self.faults)
        return "passed" if all(happened) else "too short to say anything"


@dataclass(frozen=True)
class Terms:
    """What is asked for.

    Attributes:
        minutes: how long.
        rate: MB/s that the guest writes.
        size: MiB of the disk.
        seed: of everything that is chosen by chance.
    """

    minutes: float = 5.0
    rate: float = 50.0
    size: int = 1024
    seed: int = 1


def soaked(binaries: QemuBinaries, terms: Terms) -> Counts:
    """Soaks on one release of QEMU, and returns what happened."""
    size, quiet = terms.size * MIB, min(64, terms.size // 4) * MIB
    with short_folder() as folder:
        make_images(folder, size, quiet)
        with served(binaries, folder) as server:
            soak = Soak(server, folder, terms, size, quiet)
            asyncio.run(soak.run())
    return soak.counts


class Soak:
    """The run."""

    def __init__(self, server: Server, folder: Path, terms: Terms, size: int, quiet: int) -> None:
        self.counts = Counts()
        self._server, self._folder, self._terms = server, folder, terms
        self._size, self._quiet = size, quiet
        self._dice = random.Random(terms.seed)

    async def run(self) -> None:
        """Runs to the end of the time, and does everything once whatever the time."""
        terms, began = self._terms, time.monotonic()
        writer = Writer(guest_uri(self._folder), self._size - self._quiet, terms.rate * 1e6, terms.seed)
        async with await Monitor.connect(str(self._folder / "snapshots"), Deadline(20)) as monitor:
            snapshots = Snapshots(monitor, self._folder, terms.seed)
            writer.start()
            try:
                async with self._coming_and_going(snapshots) as task:
                    while time.monotonic() < began + terms.minutes * 60 or self.counts.turns < _CYCLE:
                        await self._once(snapshots)
                        if task.done():
                            task.result()
                        assert writer.error is None, f"the guest ended: {writer.error}"
            finally:
                writer.stop.set()
                writer.join(20)
        self.counts.snapshots, self.counts.commits = snapshots.taken, snapshots.committed
        self.counts.written, self.counts.seconds = writer.written, time.monotonic() - began

    @contextlib.asynccontextmanager
    async def _coming_and_going(self, snapshots: Snapshots) -> AsyncIterator[asyncio.Task[None]]:
        task = asyncio.create_task(snapshots.run())
        try:
            yield task
        finally:
            async with contextlib.AsyncExitStack() as stack:
                if not task.done():
                    await stack.enter_async_context(snapshots.lock)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def _once(self, snapshots: Snapshots) -> None:
        turn = self.counts.turns % _CYCLE
        self.counts.turns += 1
        if turn == 3:
            async with snapshots.lock:  # a fault must be there for a whole validation, on a chain that stands still
                await self._with_fault(snapshots)
        elif turn == 5:
            async with snapshots.lock:  # a disk that a job works on has no point in time
                await self._at_instant(snapshots)
        else:
            disk = await self._validated(snapshots)
            if disk is not None and disk.discrepancy_count:
                self.counts.alarms.append(_words(disk))

    async def _at_instant(self, snapshots: Snapshots) -> None:
        """Validates at a point in time, with a bitmap that must know what changed, unless it is spoilt."""
        node, spoil = await snapshots.active(), self._dice.random() < 0.5
        await snapshots.execute("block-dirty-bitmap-add", node=node, name=_BITMAP)
        clearing = asyncio.create_task(self._cleared_again_and_again(snapshots, node)) if spoil else None
        try:
            wishes = Wishes(scratch_dir=str(self._folder))
            disk = await self._validated(snapshots, instant=wishes, change_seconds=_CHANGE_SECONDS)
        finally:
            if clearing is not None:
                clearing.cancel()
                await asyncio.gather(clearing, return_exceptions=True)
            await snapshots.execute("block-dirty-bitmap-remove", node=node, name=_BITMAP)
        self.counts.instants += 1
        self.counts.faults += spoil
        found = [] if disk is None else disk.discrepancies
        missing = [each for each in found if each.finding == "bitmap-misses-change"]
        if spoil and not missing:
            self.counts.missed.append("a bitmap that was cleared")
        if disk is not None and (len(missing) < len(found) or (missing and not spoil)):
            self.counts.alarms.append(f"at a point in time: {_words(disk)}")

    async def _cleared_again_and_again(self, snapshots: Snapshots, node: str) -> None:
        while True:
            await snapshots.execute("block-dirty-bitmap-clear", node=node, name=_BITMAP)
            await asyncio.sleep(_POLL_SECONDS)

    async def _with_fault(self, snapshots: Snapshots) -> None:
        kind = self._dice.choice(("cleared", "zero flag"))
        offset = self._size - self._dice.randrange(1, self._quiet // CLUSTER) * CLUSTER
        await self._validated(snapshots)  # QEMU has the tables in its cache from now on
        self.counts.faults += 1
        with spoilt_for_a_while(self._folder / "base.qcow2", offset, kind):
            for _ in range(5):
                disk = await self._validated(snapshots)
                if disk is not None and disk.verdict in ("agreed", "discrepancy"):
                    break
            else:
                self.counts.missed.append(f"{kind} at {offset}: never judged")
                return
        inside = [each for each in disk.discrepancies if offset <= each.offset and each.end <= offset + CLUSTER]
        if not inside:
            self.counts.missed.append(f"{kind} at {offset}")
        if len(inside) < len(disk.discrepancies):
            self.counts.alarms.append(f"beside a fault at {offset}: {_words(disk)}")

    async def _validated(
        self, snapshots: Snapshots, *, instant: Wishes | None = None, change_seconds: float | None = None
    ) -> DiskReport | None:
        options = Options(
            seconds=SECONDS,
            nbd=f"nbd+unix:///?socket={self._folder}/nbd",
            runtime_dir=str(self._folder),
            choice=Choice(seed=self._seed()),
            instant=instant,
            change_seconds=change_seconds,
        )
        try:
            node = await snapshots.active()
            report = await validate_disks(str(self._server.qmp), [node], options)
        except (NoSuchDiskError, CommandFailedError):
            self.counts.moved += 1
            return None
        (disk,) = report.disks
        if report.left_behind:
            self.counts.alarms.append(f"left behind: {report.left_behind}")
        self.counts.validations += 1
        self.counts.incomplete += disk.verdict == "incomplete"
        if disk.unfinished == "graph":
            self.counts.graph += 1
        elif instant is None:
            maps = [each for each in disk.compared if each.what != CONTENT]  # of content it is a sample that is judged
            aside = max(each.set_aside_bytes for each in maps)
            self.counts.worst_share = min(self.counts.worst_share, 1 - aside / disk.size)
        return disk

    def _seed(self) -> int:
        return self._dice.randrange(1 << 30)


def _words(disk: DiskReport) -> str:
    first = disk.discrepancies[0]
    counted = {each.what: each.discrepancy_count for each in disk.compared if each.discrepancy_count}
    return f"{counted}, first {first.compared} [{first.offset}, {first.end}) {first.served}/{first.computed}"


def main() -> int:
    """Soaks, and tells what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, words in (
        ("minutes", "how long, on each QEMU"),
        ("rate", "MB/s that the guest writes"),
        ("size", "MiB of the disk"),
        ("seed", "of everything that is chosen by chance"),
    ):
        default = getattr(Terms, name)
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{words} (default: {default:g})")
    parser.add_argument("--qemu", action="append", metavar="RELEASE", help="5.2, 7.2, ... (default: the installed one)")
    arguments = parser.parse_args()
    terms = Terms(arguments.minutes, arguments.rate, arguments.size, arguments.seed)
    failed = 0
    for release in arguments.qemu or [INSTALLED]:
        binaries = binaries_of(release)
        counts = soaked(binaries, terms)
        sys.stdout.write("\n".join([f"QEMU {binaries.release}: {counts.verdict}", *_told(counts), ""]))
        sys.stdout.flush()
        failed += counts.verdict != "passed"
    return int(failed > 0)


def _told(counts: Counts) -> Iterator[str]:
    rate = counts.written / max(counts.seconds, 1) / 1e6
    yield f"  {counts.seconds:.0f} s, {counts.validations} validations, {counts.moved} that could not begin"
    yield f"  at a point in time: {counts.instants} of them"
    yield f"  guest: {rate:.0f} MB/s, {counts.snapshots} snapshots, {counts.commits} commits"
    yield f"  not everything judged: {counts.incomplete}, {counts.graph} of them because the graph never stood still"
    yield f"  least judged of a disk whose graph stood still: {counts.worst_share:.4%}"
    yield f"  faults: {counts.faults}, missed: {len(counts.missed)}; false alarms: {len(counts.alarms)}"
    for words in (*counts.missed, *counts.alarms):
        yield f"    {words}"


if __name__ == "__main__":
    sys.exit(main())
