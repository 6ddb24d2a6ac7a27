"""The disk that a soak validates: written hard, its overlays come and go, and its tables are spoilt on demand.

A storage daemon has it, and does with it what a QEMU with a guest does. Nobody writes to the last part of the disk,
which the base alone holds: there faults can be put that nothing covers up.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qmpnbd.deadline import Deadline
from qmpnbd.errors import CommandFailedError, QmpnbdError
from qmpnbd.nbd.client import Client
from qmpnbd.qmp.monitor import Monitor
from tests.fleets import CLUSTER, l2_place, overwritten, spoilt
from tests.qemu_versions import QemuBinaries
from tests.servers import Server, blockdev, qemu_img, qemu_io

MIB = 1 << 20
SECONDS = 120.0
_POLL_SECONDS = 0.02


def make_images(folder: Path, size: int, quiet: int) -> None:
    """Makes a chain of three layers; the last `quiet` bytes are held by the base alone."""
    base, mid, top = (folder / f"{name}.qcow2" for name in ("base", "mid", "top"))
    qemu_img("create", "-q", "-f", "qcow2", base, str(size))
    fill = [f"write -q -P {at // MIB % 200 + 1} {at} 3M" for at in range(0, size, 8 * MIB)]
    qemu_io(base, *fill, f"write -q -P 77 {size - quiet} {quiet}")
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", mid)
    qemu_io(mid, "write -q -P 9 4M 9M", "write -q -z 30M 5M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", mid, "-F", "qcow2", top)


@contextlib.contextmanager
def served(binaries: QemuBinaries, folder: Path) -> Iterator[Server]:
    """Runs the storage daemon: the guest's export at `guest_uri`, a monitor for `Snapshots` at `folder`/snapshots."""
    with binaries.daemon(
        *("--blockdev", blockdev(folder / "top.qcow2", "top", discard="unmap")),
        *("--nbd-server", f"addr.type=unix,addr.path={folder}/nbd,max-connections=0"),
        *("--export", "type=nbd,id=guest,name=guest,node-name=top,writable=on"),
        *("--chardev", f"socket,path={folder}/snapshots,server=on,wait=off,id=snapshots"),
        *("--monitor", "chardev=snapshots"),
    ) as server:
        yield server


def guest_uri(folder: Path) -> str:
    """Returns where the guest's disk is."""
    return f"nbd+unix:///guest?socket={folder}/nbd"


class Writer(threading.Thread):
    """The guest: writes until it is told to stop.

    Attributes:
        stop: tells it to.
        error: why it ended, if it was not told to.
        written: bytes that it wrote, zeroed or discarded.

    Args:
        uri: of its disk.
        size: it writes to so many bytes from the beginning.
        rate: bytes a second.
        seed: of what it writes where.
    """

    def __init__(self, uri: str, size: int, rate: float, seed: int) -> None:
        super().__init__(daemon=True)
        self.stop = threading.Event()
        self.error: QmpnbdError | None = None
        self.written = 0
        self._uri, self._size, self._rate = uri, size, rate
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
            self.written += length
            ahead = self.written / self._rate - (time.monotonic() - began)
            if ahead > 0.05:
                time.sleep(ahead)

    def _place(self, length: int) -> int:
        return self._dice.randrange((self._size - length) // 4096) * 4096


class Snapshots:
    """Puts overlays on top and commits them again.

    Attributes:
        lock: who holds it finds a chain that stands still.
        taken: overlays put on top.
        committed: overlays committed.

    Args:
        monitor: of the QEMU, for nobody else.
        folder: where the overlays are made.
        seed: of what is done when.
        pauses: the shortest and the longest one, in seconds.
    """

    def __init__(self, monitor: Monitor, folder: Path, seed: int, pauses: tuple[float, float] = (0.3, 3.0)) -> None:
        self.lock = asyncio.Lock()
        self.taken = self.committed = 0
        self._monitor, self._folder = monitor, folder
        self._dice = random.Random(seed)
        self._pauses = pauses
        self._stack = ["top"]
        self._number = 0

    async def run(self) -> None:
        """Goes on until it is cancelled."""
        while True:
            await asyncio.sleep(self._dice.uniform(*self._pauses))
            async with self.lock:
                if len(self._stack) == 1 or (len(self._stack) < 5 and self._dice.random() < 0.5):
                    await self._snapshot()
                else:
                    await self._commit()

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Executes a command on the monitor of whoever manages the disk."""
        names = {name.replace("_", "-"): value for name, value in arguments.items()}
        return await self._monitor.execute(command, names, deadline=Deadline(SECONDS))

    async def _snapshot(self) -> None:
        self._number += 1
        name = f"over{self._number}"
        path, size = self._folder / f"{name}.qcow2", (await self._node(self._stack[-1]))["image"]["virtual-size"]
        await asyncio.to_thread(qemu_img, "create", "-q", "-f", "qcow2", path, str(size))
        file = {"driver": "file", "filename": str(path)}
        await self.execute("blockdev-add", driver="qcow2", node_name=name, backing=None, discard="unmap", file=file)
        await self.execute("blockdev-snapshot", node=self._stack[-1], overlay=name)
        self._stack.append(name)
        self.taken += 1

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
        self.committed += 1

    async def _deleted(self, node: str) -> None:
        """Deletes a node; a validation that is under way may still have an export on it."""
        for _ in range(round(SECONDS / _POLL_SECONDS)):
            try:
                await self.execute("blockdev-del", node_name=node)
            except CommandFailedError as error:
                if "in use" not in error.description:
                    raise
                await asyncio.sleep(_POLL_SECONDS)
            else:
                return
        raise AssertionError(f"the node {node} stays in use")

    async def _reached(self, wanted: str) -> None:
        """Waits for a status of the commit; one that has ended is not listed any more."""
        for _ in range(round(SECONDS / _POLL_SECONDS)):
            jobs = await self.execute("query-jobs")
            status = next((job["status"] for job in jobs if job["id"] == "commit"), "null")
            if status == wanted:
                return
            if status in ("null", "aborting"):
                break
            await asyncio.sleep(_POLL_SECONDS)
        raise AssertionError(f"the commit did not become {wanted}")

    async def active(self) -> str:
        """Returns the node that the guest's export stands on now."""
        exports = await self.execute("query-block-exports")
        return str(next(export["node-name"] for export in exports if export["id"] == "guest"))


@contextlib.contextmanager
def spoilt_for_a_while(image: Path, offset: int, kind: str) -> Iterator[None]:
    """Spoils the L2 entry of a guest cluster, and mends it again; see `tests.fleets.spoilt`."""
    before = spoilt(image, offset, kind)
    try:
        yield
    finally:
        overwritten(image, l2_place(image, offset), before)
