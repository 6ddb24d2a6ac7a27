"""Points in time: what writers notice of one over four disks, and how long it takes to recover one of eight.

Run it as ``scripts/bench/pointintime``. The writers are processes of their own, one a disk; each writes 4 KiB every two
milliseconds, over NBD to a storage daemon. What they notice is the longest wait for an acknowledgement.
"""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import guestgap
from measure import run

from qmpnbd.deadline import Deadline
from qmpnbd.export.depth import DepthReader
from qmpnbd.nbd.uri import NbdUri
from qmpnbd.qmp.monitor import Monitor
from qmpnbd.qmp.planning import Wishes
from qmpnbd.qmp.pointintime import point_in_time
from qmpnbd.qmp.recover import recover
from qmpnbd.qmp.rundir import RunDirectory
from tests.servers import blockdev, qemu, storage_daemon

ROUNDS = 7
SIZE = 1 << 30
SECONDS = 20.0
WRITER = """
import random, sys, time
from qmpnbd.nbd.client import Client
chance = random.Random(int(sys.argv[2]))
with Client.connect(sys.argv[1]) as client:
    print("ready", flush=True)
    blocks, data = client.export.size // 4096, bytes([7]) * 4096
    end, longest, count = time.monotonic() + float(sys.argv[3]), 0.0, 0
    while (began := time.monotonic()) < end:
        client.write(chance.randrange(blocks) * 4096, data)
        longest, count = max(longest, time.monotonic() - began), count + 1
        time.sleep(0.002)
print(longest * 1000, count)
"""
HELD = """
import asyncio, os, signal, sys
from qmpnbd.deadline import Deadline
from qmpnbd.qmp.monitor import Monitor
from qmpnbd.qmp.pointintime import point_in_time
from qmpnbd.qmp.rundir import RunDirectory
async def main():
    async with await Monitor.connect(sys.argv[1], Deadline(20)) as monitor:
        with RunDirectory.create(sys.argv[2], for_peer=monitor.peer) as directory:
            async with point_in_time(monitor, sys.argv[3].split(","), directory, Deadline(20)):
                os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""


@contextmanager
def daemon(folder: Path, disks: int) -> Iterator[str]:
    """Runs a storage daemon with disks of two layers and an NBD server; yields its monitor."""
    arguments = ["--nbd-server", f"addr.type=unix,addr.path={folder}/nbd"]
    for number in range(disks):
        base, top = folder / f"base{number}.qcow2", folder / f"top{number}.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", base, str(SIZE)], check=True)
        backing = ["-b", str(base), "-F", "qcow2"]
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *backing, top], check=True)
        arguments += ["--blockdev", blockdev(top, f"disk{number}")]
        arguments += ["--export", f"nbd,id=w{number},node-name=disk{number},name=w{number},writable=on"]
    with storage_daemon(*arguments) as server:
        yield str(server.qmp)


async def take(monitor: str, folder: Path, disks: list[str]) -> tuple[float, float]:
    """Takes a point in time with depth, holds it half a second; returns its window and the time to get there, in ms."""
    server = NbdUri.unix(str(folder / "nbd"), "")
    deadline = Deadline(SECONDS)
    async with await Monitor.connect(monitor, deadline) as connected:
        with RunDirectory.create(str(folder), for_peer=connected.peer) as directory:
            began = time.monotonic()
            wishes = Wishes(start_server=False)
            async with (
                DepthReader(connected, server, deadline) as reader,
                point_in_time(connected, disks, directory, deadline, wishes=wishes, before=reader.before) as point,
            ):
                up = (time.monotonic() - began) * 1000
                await asyncio.sleep(0.5)
            return point.statement.window_ms, up


def longest_waits(folder: Path, disks: int, monitor: str | None) -> tuple[float, float, float]:
    """Writes for two seconds; returns the longest wait of any writer, and the window and time of a point in time."""
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, f"nbd+unix:///w{number}?socket={folder}/nbd", str(number), "2"],
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(disks)
    ]
    for writer in writers:
        assert writer.stdout is not None
        writer.stdout.readline()
    window = up = 0.0
    if monitor is not None:
        time.sleep(0.5)
        window, up = asyncio.run(take(monitor, folder, [f"disk{number}" for number in range(disks)]))
    waits = [float(writer.communicate()[0].split()[0]) for writer in writers]
    return max(waits), window, up


def window(folder: Path) -> str:
    """Measures what writers notice."""
    with daemon(folder, 4) as monitor:
        quiet = [longest_waits(folder, 4, None)[0] for _ in range(ROUNDS)]
        taken = [longest_waits(folder, 4, monitor) for _ in range(ROUNDS)]
    lines = [
        "**Four disks, four writers: the longest wait for a write, in ms**",
        "",
        "| | median | worst |",
        "|---|---|---|",
    ]
    columns = {
        "writing alone": quiet,
        "while a point in time is taken, held and taken down": [each[0] for each in taken],
        "of which: the window that is told": [each[1] for each in taken],
        "until it is up, depth before it included": [each[2] for each in taken],
    }
    for name, values in columns.items():
        lines.append(f"| {name} | {statistics.median(values):.1f} | {max(values):.1f} |")
    return "\n".join(lines) + "\n"


async def recovered(monitor: str, folder: Path) -> float:
    """Recovers; returns the seconds it took, connecting not included."""
    async with await Monitor.connect(monitor, Deadline(SECONDS)) as connected:
        began = time.monotonic()
        found = await recover(connected, str(folder), Deadline(SECONDS))
        if not found.removed or found.left:
            raise RuntimeError(f"not recovered: {found}")
        return time.monotonic() - began


def recovery(folder: Path) -> str:
    """Measures the recovery of a killed run with eight disks."""
    arguments = []
    for number in range(8):
        disk = folder / f"vm{number}.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, str(SIZE)], check=True)
        arguments += ["-blockdev", blockdev(disk, f"disk{number}")]
        arguments += ["-device", f"virtio-blk-pci,id=vd{number},drive=disk{number}"]
    disks = ",".join(f"vd{number}" for number in range(8))
    with qemu(*arguments) as server:
        address = str(server.qmp)
        times, command = [], []
        for number in range(2 * ROUNDS):
            done = subprocess.run([sys.executable, "-c", HELD, address, str(folder), disks], check=False)
            if done.returncode != -signal.SIGKILL:
                raise RuntimeError("it was to be killed")
            if number < ROUNDS:
                times.append(asyncio.run(recovered(address, folder)))
            else:
                command.append(run(["qmpnbd", "recover", "--qmp", address, "--runtime-dir", str(folder)]))
        export = ["qmpnbd", "export", "--qmp", address, "--runtime-dir", str(folder), "--point-in-time"]
        held = [run([*export, "--checkpoint", "bench", "--exec", "true"]) for _ in range(ROUNDS)]
    lines = [
        "**Eight disks: a killed run taken down, and a whole run with a checkpoint; seconds**",
        "",
        "| | median | worst | peak MiB |",
        "|---|---|---|---|",
    ]
    lines.append(f"| `recover()` | {statistics.median(times):.2f} | {max(times):.2f} | |")
    for name, runs in (("qmpnbd recover", command), ("qmpnbd export --point-in-time --checkpoint", held)):
        walls = [each.wall for each in runs]
        peak = max(each.memory for each in runs)
        lines.append(f"| `{name}` | {statistics.median(walls):.2f} | {max(walls):.2f} | {peak:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures all of it."""
    with tempfile.TemporaryDirectory(prefix="t-") as name:
        folder = Path(name)
        os.environ["TMPDIR"] = name
        print(guestgap.table(folder))
        print(window(folder))
        print(recovery(folder))


if __name__ == "__main__":
    main()
