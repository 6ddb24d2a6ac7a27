"""The longest time without a write done that a guest has seen, told by itself, while a point in time is taken.

The guest of ``vm-images/guest.py`` writes 4 KiB to each of four disks by turns, past every cache, and says so on its
console when the disk has acknowledged it. Two clocks see the gaps: the guest's own, with which its kernel stamps every
line, and this host's, when the line arrives. The guest's stands still while it is paused, the host's does not.
"""

from __future__ import annotations

import asyncio
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from qmpnbd.deadline import Deadline
from qmpnbd.qmp.monitor import Monitor
from qmpnbd.qmp.planning import Wishes
from qmpnbd.qmp.pointintime import Statement, point_in_time
from qmpnbd.qmp.rundir import RunDirectory

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "vm-images")]

import guest  # noqa: E402 - a recipe, not part of the package

from tests.servers import blockdev, qemu  # noqa: E402 - needs the path above

DISKS = 4
SIZE = "256M"
ROUNDS = 7
TAKING_SECONDS = 0.15
"""About as long as it takes to get there; for the comparison."""

WRITTEN = re.compile(rb"\[ *(\d+\.\d+)\] qmpnbd-guest: wrote (\d+)")


@dataclass
class Console:
    """What the guest said, and when.

    Attributes:
        lines: the host's time and the guest's, in seconds, of each record that was acknowledged.
    """

    lines: list[tuple[float, float]] = field(default_factory=list)

    def read(self, path: Path) -> None:
        """Reads until the guest ends."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))
            with sock.makefile("rb") as lines:
                for line in lines:
                    if (found := WRITTEN.search(line)) is not None:
                        self.lines.append((time.monotonic(), float(found[1])))

    def longest(self, begin: float, end: float) -> tuple[float, float]:
        """Returns the longest gap that touches a span of the host's time, in ms: by the guest's clock and by ours."""
        pairs = [(a, b) for a, b in pairwise(self.lines) if b[0] >= begin and a[0] <= end]
        return max(b[1] - a[1] for a, b in pairs) * 1000, max(b[0] - a[0] for a, b in pairs) * 1000

    def wait(self, count: int) -> None:
        """Waits until so many more records have been written."""
        goal, end = len(self.lines) + count, time.monotonic() + 60
        while len(self.lines) < goal:
            if time.monotonic() > end:
                raise RuntimeError("the guest does not write")
            time.sleep(0.01)


@contextmanager
def writing_guest(program: str, folder: Path) -> Iterator[tuple[str, Console]]:
    """Boots the guest; yields its monitor and its console."""
    linux = guest.build(ROOT / ".work/guest-packages", ROOT / ".work/guest")
    words = f"{linux.append} printk.devkmsg=on qmpnbd.places=1048576 qmpnbd.write=stamped"
    serial = folder / "serial"
    arguments = ["-m", "192", "-kernel", str(linux.kernel), "-initrd", str(linux.initramfs), "-append", words]
    arguments += ["-serial", f"unix:{serial},server=on,wait=off"]
    for number in range(DISKS):
        disk = folder / f"guest{number}.qcow2"
        disk.unlink(missing_ok=True)
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, SIZE], check=True)
        arguments += ["-blockdev", blockdev(disk, f"disk{number}")]
        arguments += ["-device", f"virtio-blk-pci,id=vd{number},drive=disk{number}"]
    console = Console()
    with qemu(*arguments, program=program) as server:
        threading.Thread(target=console.read, args=(serial,), daemon=True).start()  # ends with the guest
        server.side("cont")
        console.wait(20)
        yield str(server.qmp), console


async def take(monitor: str, folder: Path, wishes: Wishes) -> tuple[Statement, float, float]:
    """Takes a point in time of all disks; returns what it says, and when it began and was there."""
    disks = [f"vd{number}" for number in range(DISKS)]
    async with await Monitor.connect(monitor, Deadline(20)) as connected:
        with RunDirectory.create(str(folder), for_peer=connected.peer) as directory:
            began = time.monotonic()
            async with point_in_time(connected, disks, directory, Deadline(20), wishes=wishes) as point:
                return point.statement, began, time.monotonic()


def gaps(folder: Path, program: str, release: str) -> Iterator[str]:
    """Measures every recipe on one QEMU; yields rows of a table."""
    wished = {"backup": Wishes(), "copy-before-write": Wishes(protect_guest=True)}
    wished["snapshot"] = Wishes(exact_chain=True, scratch_dir=str(folder))
    with writing_guest(program, folder) as (monitor, console):
        alone = []
        for _ in range(ROUNDS):
            began = time.monotonic()
            time.sleep(TAKING_SECONDS)
            ended = time.monotonic()
            console.wait(1)
            alone.append((*console.longest(began, ended), 0.0))
        yield _row(release, "writing alone, as long", alone)
        for name, wishes in wished.items():
            found = []
            for _ in range(ROUNDS):
                said, began, ended = asyncio.run(take(monitor, folder, wishes))
                console.wait(1)
                found.append((*console.longest(began, ended), said.window_ms))
            if said.recipe.value == name:  # else this QEMU cannot do it, and another one was used
                yield _row(release, name, found)


def _row(release: str, what: str, found: list[tuple[float, float, float]]) -> str:
    cells = [f"{statistics.median(column):.0f} / {max(column):.0f}" for column in zip(*found, strict=True)]
    return f"| {release} | {what} | {' | '.join(cells)} |"


def table(folder: Path) -> str:
    """Measures every QEMU that is here."""
    lines = [
        "**Four disks, inside a guest that writes: the longest time without a write done, in ms (median / worst)**",
        "",
        "| QEMU | | by the guest's clock | by the host's clock | of which: the window that is told |",
        "|---|---|---|---|---|",
    ]
    programs = {"installed": "qemu-system-x86_64"}
    programs |= {path.parents[1].name: str(path) for path in ROOT.glob(".work/qemu/*/bin/qemu-system-x86_64")}
    for release, program in sorted(programs.items()):
        (folder / "serial").unlink(missing_ok=True)
        lines += gaps(folder, program, release)
    return "\n".join(lines) + "\n"
