"""Validates a disk in a loop for minutes or hours, while everything that can happen to it happens.

::

    writer     sequential and random writes, zeroes, discards; without a pause, at --rate
    snapshots  an overlay is put on top, and committed again, at any moment (also in the middle of a validation)
    faults     now and then an entry of a table is spoilt behind QEMU's back: it must be found, there and nowhere else
    instants   now and then all of it at a point in time, and a bitmap must know what changed since an earlier one;
               some of these bitmaps are cleared meanwhile, which must be found

The disk is a storage daemon's, which does with it what a QEMU with a guest does. In a part of the disk nobody writes,
and there the faults are put. Counted are false alarms (a discrepancy that is none) and faults that were missed; ends
with 1 unless both are 0.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qmpnbd.deadline import Deadline
from qmpnbd.errors import CommandFailedError, NoSuchDiskError, QmpnbdError
from qmpnbd.nbd.client import Client
from qmpnbd.qmp.monitor import Monitor
from qmpnbd.qmp.planning import Wishes
from qmpnbd.report.model import DiskReport
from qmpnbd.validate.choice import Choice
from qmpnbd.validate.run import Options, validate_disks

MIB = 1 << 20
CLUSTER = 65536
_HOST = 0x00FF_FFFF_FFFF_FE00
_SECONDS = 120.0
_POLL_SECONDS = 0.02
_BITMAP = "soak"
_CHANGE_SECONDS = 0.5


@dataclass
class Counts:
    """What happened.

    Attributes:
        turns: times something was begun.
        instants: validations at a point in time.
        validations: those that ended with a verdict on the disk.
        moved: those that could not begin, because the node had just gone.
        incomplete: those that could not judge everything.
        worst_share: the smallest part of the disk that was judged, of validations in which the graph stood still.
        graph: validations in which the graph never stood still.
        snapshots: overlays put on top.
        commits: overlays committed.
        faults: entries and bitmaps spoilt.
        alarms: false alarms, in words.
        missed: faults that were not found, in words.
        written: bytes that the guest wrote, zeroed or discarded.
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


def make_images(folder: Path, size: int, quiet: int) -> None:
    """Makes a chain of three layers; the last `quiet` bytes are held by the base alone."""
    run = lambda *words: subprocess.run(words, check=True, stdout=subprocess.DEVNULL)  # noqa: E731
    base, mid, top = (str(folder / f"{name}.qcow2") for name in ("base", "mid", "top"))
    run("qemu-img", "create", "-q", "-f", "qcow2", base, str(size))
    fill = [word for at in range(0, size, 8 * MIB) for word in ("-c", f"write -q -P {at // MIB % 200 + 1} {at} 3M")]
    run("qemu-io", "-f", "qcow2", *fill, "-c", f"write -q -P 77 {size - quiet} {quiet}", base)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", mid)
    run("qemu-io", "-f", "qcow2", "-c", "write -q -P 9 4M 9M", "-c", "write -q -z 30M 5M", mid)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", mid, "-F", "qcow2", top)


@contextlib.contextmanager
def daemon(program: str, folder: Path) -> Iterator[None]:
    """Runs a storage daemon with two monitors."""
    words = [program]
    for name in ("qmp", "side"):
        words += [
            "--chardev",
            f"socket,path={folder}/{name},server=on,wait=off,id={name}",
            "--monitor",
            f"chardev={name}",
        ]
    file = {"driver": "file", "filename": f"{folder}/top.qcow2"}
    words += ["--blockdev", json.dumps({"driver": "qcow2", "node-name": "top", "discard": "unmap", "file": file})]
    words += ["--nbd-server", f"addr.type=unix,addr.path={folder}/nbd,max-connections=0"]
    words += ["--export", "type=nbd,id=guest,name=guest,node-name=top,writable=on"]
    with subprocess.Popen(words) as child:
        try:
            end = time.monotonic() + 20
            while not (folder / "side").exists() or not (folder / "nbd").exists():
                if child.poll() is not None or time.monotonic() > end:
                    raise SystemExit("the storage daemon does not start")
                time.sleep(0.02)
            time.sleep(0.2)
            yield
        finally:
            child.terminate()


class Writer(threading.Thread):
    """The guest: writes until it is told to stop."""

    def __init__(self, uri: str, size: int, rate: float, seed: int, counts: Counts) -> None:
        super().__init__(daemon=True)
        self.stop = threading.Event()
        self.error: QmpnbdError | None = None
        self._uri, self._size, self._rate, self._counts = uri, size, rate, counts
        self._dice = random.Random(seed)

    def run(self) -> None:
        """Writes."""
        try:
            with Client.connect(self._uri, deadline=Deadline(20)) as client:
                self._write(client)
        except QmpnbdError as error:
            self.error = error

    def _write(self, client: Client) -> None:
        dice, cursor, began = self._dice, 0, time.monotonic()
        noise = [dice.randbytes(MIB) for _ in range(4)]
        while not self.stop.is_set():
            kind = dice.random()
            if kind < 0.4:  # sequential
                length = MIB
                cursor = cursor + length if cursor + 2 * length <= self._size else 0
                client.write(cursor, dice.choice(noise))
            elif kind < 0.8:  # random
                length = dice.choice((4096, 16384, CLUSTER, 256 << 10))
                client.write(self._place(length), dice.choice(noise)[:length])
            elif kind < 0.9:
                length = dice.choice((4096, CLUSTER, MIB))
                client.write_zeroes(self._place(length), length)
            else:
                length = dice.choice((4096, CLUSTER, 4 * MIB))
                client.trim(self._place(length), length)
            if dice.random() < 0.01:
                client.flush()
            self._counts.written += length
            ahead = self._counts.written / self._rate - (time.monotonic() - began)
            if ahead > 0.05:
                time.sleep(ahead)

    def _place(self, length: int) -> int:
        return self._dice.randrange((self._size - length) // 4096) * 4096


class Snapshots:
    """Puts overlays on top and commits them again."""

    def __init__(self, monitor: Monitor, folder: Path, seed: int, counts: Counts) -> None:
        self.lock = asyncio.Lock()
        self._monitor, self._folder, self._counts = monitor, folder, counts
        self._dice = random.Random(seed)
        self._stack = ["top"]
        self._number = 0

    async def run(self) -> None:
        """Goes on until it is cancelled."""
        while True:
            await asyncio.sleep(self._dice.uniform(0.3, 3.0))
            async with self.lock:
                if len(self._stack) == 1 or (len(self._stack) < 5 and self._dice.random() < 0.5):
                    await self._snapshot()
                else:
                    await self._commit()

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Executes a command on the monitor of whoever manages the disk."""
        names = {name.replace("_", "-"): value for name, value in arguments.items()}
        return await self._monitor.execute(command, names, deadline=Deadline(_SECONDS))

    async def _snapshot(self) -> None:
        self._number += 1
        name = f"over{self._number}"
        path, size = self._folder / f"{name}.qcow2", (await self._node(self._stack[-1]))["image"]["virtual-size"]
        command = ("qemu-img", "create", "-q", "-f", "qcow2", str(path), str(size))
        await asyncio.to_thread(subprocess.run, command, check=True)
        file = {"driver": "file", "filename": str(path)}
        await self.execute("blockdev-add", driver="qcow2", node_name=name, backing=None, discard="unmap", file=file)
        await self.execute("blockdev-snapshot", node=self._stack[-1], overlay=name)
        self._stack.append(name)
        self._counts.snapshots += 1

    async def _node(self, name: str) -> Any:
        nodes = await self.execute("query-named-block-nodes", flat=True)
        return next(node for node in nodes if node["node-name"] == name)

    async def _commit(self) -> None:
        over, below = self._stack[-1], self._stack[-2]
        await self.execute("block-commit", job_id="commit", device=over, top_node=over, base_node=below)
        await self._reached("ready")
        await self.execute("job-complete", id="commit")
        await self._reached("null")
        self._stack.pop()
        await self._deleted(over)
        (self._folder / f"{over}.qcow2").unlink()
        self._counts.commits += 1

    async def _deleted(self, node: str) -> None:
        """Deletes a node; a validation that is under way may still have an export on it."""
        for _ in range(round(_SECONDS / _POLL_SECONDS)):
            try:
                await self.execute("blockdev-del", node_name=node)
            except CommandFailedError as error:
                if "in use" not in error.description:
                    raise
                await asyncio.sleep(_POLL_SECONDS)
            else:
                return
        raise SystemExit(f"the node {node} stays in use")

    async def _reached(self, wanted: str) -> None:
        """Waits for a status of the commit; one that has ended is not listed any more."""
        for _ in range(round(_SECONDS / _POLL_SECONDS)):
            jobs = await self.execute("query-jobs")
            status = next((job["status"] for job in jobs if job["id"] == "commit"), "null")
            if status == wanted:
                return
            if status in ("null", "aborting"):
                break
            await asyncio.sleep(_POLL_SECONDS)
        raise SystemExit(f"the commit did not become {wanted}")

    async def active(self) -> str:
        """Returns the node that the guest's export stands on now."""
        exports = await self.execute("query-block-exports")
        return next(export["node-name"] for export in exports if export["id"] == "guest")


@contextlib.contextmanager
def spoilt(image: Path, offset: int, kind: str) -> Iterator[None]:
    """Spoils the L2 entry of a guest cluster for a while."""
    with image.open("r+b", buffering=0) as file:
        file.seek(40)
        l1 = struct.unpack(">Q", file.read(8))[0]
        file.seek(l1 + offset // (CLUSTER * CLUSTER // 8) * 8)
        table = struct.unpack(">Q", file.read(8))[0] & _HOST
        place = table + offset // CLUSTER % (CLUSTER // 8) * 8
        file.seek(place)
        before = file.read(8)
        entry = struct.unpack(">Q", before)[0]
        file.seek(place)
        file.write(struct.pack(">Q", 0 if kind == "cleared" else entry | 1))
        try:
            yield
        finally:
            file.seek(place)
            file.write(before)


class Soak:
    """The run."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.counts = Counts()
        self._folder = folder
        self._size, self._quiet = arguments.size * MIB, min(64, arguments.size // 4) * MIB
        self._end = time.monotonic() + arguments.minutes * 60
        self._arguments = arguments
        self._dice = random.Random(arguments.seed)
        self._uri = f"nbd+unix:///?socket={folder}/nbd"

    async def run(self) -> None:
        """Runs to the end of the time."""
        guest = f"nbd+unix:///guest?socket={self._folder}/nbd"
        seed, rate = self._arguments.seed, self._arguments.rate * 1e6
        writer = Writer(guest, self._size - self._quiet, rate, seed, self.counts)
        async with await Monitor.connect(str(self._folder / "side"), Deadline(20)) as monitor:
            snapshots = Snapshots(monitor, self._folder, seed, self.counts)
            writer.start()
            try:
                async with self._coming_and_going(snapshots) as task:
                    while time.monotonic() < self._end:
                        await self._once(snapshots)
                        if task.done() or writer.error is not None:
                            task.result()
                            raise SystemExit(f"the guest ended: {writer.error}")
            finally:
                writer.stop.set()
                writer.join(20)

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
        turn = self.counts.turns % 6
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
        with spoilt(self._folder / "base.qcow2", offset, kind):
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
            seconds=_SECONDS,
            nbd=self._uri,
            runtime_dir=str(self._folder),
            choice=Choice(seed=self._seed()),
            instant=instant,
            change_seconds=change_seconds,
        )
        try:
            node = await snapshots.active()
            report = await validate_disks(str(self._folder / "qmp"), [node], options)
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
            share = 1 - max((each.set_aside_bytes / max(each.bytes, 1) for each in disk.compared), default=0)
            self.counts.worst_share = min(self.counts.worst_share, share)
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
    parser.add_argument("--minutes", type=float, default=5.0, help="how long (default: 5)")
    parser.add_argument("--rate", type=float, default=50.0, help="MB/s that the guest writes (default: 50)")
    parser.add_argument("--size", type=int, default=1024, help="MiB of the disk (default: 1024)")
    parser.add_argument("--seed", type=int, default=1, help="of everything that is chosen by chance (default: 1)")
    parser.add_argument("--storage-daemon", default="qemu-storage-daemon", help="another release's")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    began = time.monotonic()
    soak = Soak(arguments, folder)
    try:
        make_images(folder, arguments.size * MIB, min(64, arguments.size // 4) * MIB)
        with daemon(arguments.storage_daemon, folder):
            asyncio.run(soak.run())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    counts, seconds = soak.counts, time.monotonic() - began
    print(f"{seconds:.0f} s, {counts.validations} validations, {counts.moved} that could not begin")
    print(f"at a point in time: {counts.instants} of them")
    print(f"guest: {counts.written / seconds / 1e6:.0f} MB/s, {counts.snapshots} snapshots, {counts.commits} commits")
    print(f"not everything judged: {counts.incomplete}, {counts.graph} of them because the graph never stood still")
    print(f"least judged of a disk whose graph stood still: {counts.worst_share:.4%}")
    print(f"faults: {counts.faults}, missed: {len(counts.missed)}; false alarms: {len(counts.alarms)}")
    for words in (*counts.missed, *counts.alarms):
        print(f"  {words}")
    return 1 if counts.missed or counts.alarms else 0


if __name__ == "__main__":
    sys.exit(main())
