"""Puts qmpnbd and other tools that back up running guests through the same accidents; prints a table in Markdown.

::

    a machine whose processor stands still, two qcow2 disks; its devices are made to write over the human monitor
    full backup, an accident, increment, restore by the tool's own program -> compared with the disks, byte for byte

A cell tells what happened, not what a manual says: exit codes, and how many clusters of 64 KiB are not in the restored
disk. qmpbackup is run from a checkout that is named (with the Python that runs this, which needs its `colorlog`),
virtnbdbackup if it is installed, on a domain of a libvirt session of its own. Nothing of them is part of this.
"""

# ruff: noqa: D102 - what the methods of a tool do is said in `Tool`.
from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.peer_machines import Domain, Machine, content, libvirt_machine, qemu_machine

CLUSTER = 65536
MIB = 1 << 20
SECONDS = 120


@dataclass(frozen=True)
class Ended:
    """How a tool ended."""

    code: int
    said: str


class Tool(ABC):
    """A tool, with a place of its own to back up to."""

    name = ""

    def __init__(self, machine: Machine, folder: Path) -> None:
        self.machine, self.folder, self.target = machine, folder, folder / "target"

    @abstractmethod
    def words(self, *, full: bool) -> list[str]:
        """Returns the command line of a backup."""

    @abstractmethod
    def restored(self, disk: int) -> tuple[int, bytes]:
        """Restores the newest backup of a disk; returns the exit code and what came out."""

    @abstractmethod
    def files(self, disk: int) -> list[Path]:
        """Returns the images of a disk, oldest first."""

    def back_up(self, *, full: bool = False) -> int:
        """Backs up."""
        return run(self.words(full=full), self.folder).code

    def start(self) -> subprocess.Popen[bytes]:
        """Starts an increment."""
        words = self.words(full=False)
        return subprocess.Popen(words, cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def run(words: Sequence[str], folder: Path) -> Ended:
    """Runs a program; 124 if it does not end."""
    try:
        done = subprocess.run(words, cwd=folder, check=False, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return Ended(124, "")
    return Ended(done.returncode, done.stdout + done.stderr)


class Qmpnbd(Tool):
    """This product."""

    name = "qmpnbd"

    def __init__(self, machine: Machine, folder: Path) -> None:
        super().__init__(machine, folder)
        run([*self._command, "repository", "create", str(self.target)], folder)

    @property
    def _command(self) -> list[str]:
        return [sys.executable, "-m", "qmpnbd"]

    def words(self, *, full: bool) -> list[str]:
        kind = "full" if full else "auto"
        return [
            *self._command,
            "backup",
            str(self.target),
            "--qmp",
            self.machine.monitor,
            "--chain",
            "c",
            "--type",
            kind,
        ]

    def restored(self, disk: int) -> tuple[int, bytes]:
        path = self.folder / "restored.raw"
        path.unlink(missing_ok=True)
        words = ["restore", str(self.target), "latest", "--chain", "c", "--disk", f"vd{disk}", str(path)]
        ended = run([*self._command, *words, "--format", "raw"], self.folder)
        return ended.code, path.read_bytes() if path.exists() else b""

    def files(self, disk: int) -> list[Path]:
        return sorted((self.target / "c").glob(f"*/vd{disk}.qcow2"))


class Qmpbackup(Tool):
    """qmpbackup, from a checkout."""

    name = "qmpbackup"
    checkout = Path()

    def words(self, *, full: bool) -> list[str]:
        more = ["--level", "full" if full else "inc", "--target", str(self.target)]
        program = str(self.checkout / "qmpbackup")
        return [
            "env",
            f"PYTHONPATH={self.checkout}",
            sys.executable,
            program,
            "--socket",
            self.machine.monitor,
            "backup",
            *more,
        ]

    def restored(self, disk: int) -> tuple[int, bytes]:
        path = self.folder / "restored.qcow2"
        path.unlink(missing_ok=True)
        (folder, *_) = sorted({each.parent for each in self.files(disk)}) or [self.target]
        copy = self.folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        if folder.exists():
            shutil.copytree(folder, copy)
        words = [
            sys.executable,
            str(self.checkout / "qmprestore"),
            "merge",
            "--dir",
            str(copy),
            "--targetfile",
            str(path),
        ]
        ended = run(["env", f"PYTHONPATH={self.checkout}", *words], self.folder)
        return ended.code, content(path) if path.exists() else b""

    def files(self, disk: int) -> list[Path]:
        found = [each for each in self.target.rglob("*") if each.name.startswith(("FULL-", "INC-"))]
        return sorted((each for each in found if f"d{disk}" in str(each)), key=lambda each: each.stat().st_mtime)


class Virtnbdbackup(Tool):
    """virtnbdbackup, as it is installed."""

    name = "virtnbdbackup"

    def words(self, *, full: bool) -> list[str]:
        assert isinstance(self.machine, Domain)
        more = ["-l", "full" if full else "inc", "-o", str(self.target), "-n", "-S", str(self.folder)]
        return ["virtnbdbackup", *self.machine.reaching, "-d", self.machine.name, *more]

    def restored(self, disk: int) -> tuple[int, bytes]:
        assert isinstance(self.machine, Domain)
        out = self.folder / "restored"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        words = ["virtnbdrestore", *self.machine.reaching, "-i", str(self.target), "-o", str(out), "-n"]
        ended = run([*words, "-d", self.machine.target(disk), "-L", str(self.folder / "log")], self.folder)
        found = [path for path in out.iterdir() if path.suffix in (".img", ".qcow2", ".raw") or "d0" in path.name]
        return ended.code, content(found[0]) if found else b""

    def files(self, disk: int) -> list[Path]:
        found = self.target.glob(f"{self.machine.target(disk)}.*.data")
        return sorted(found, key=lambda each: each.stat().st_mtime)


def lost(tool: Tool, disk: int = 0) -> str:
    """Restores, and tells how much of the disk as it is now is not in it."""
    truth = tool.machine.content(disk)
    code, found = tool.restored(disk)
    count = sum(truth[at : at + CLUSTER] != found[at : at + CLUSTER] for at in range(0, len(truth), CLUSTER))
    if not found:
        return f"nothing restored, exit code {code}"
    return f"restored: {'all' if not count else f'**{count} clusters wrong**'}, exit code {code}"


@contextlib.contextmanager
def steadily(machine: Machine) -> Iterator[None]:
    """Has the disks written to without a pause."""
    stop, dice = threading.Event(), random.Random(1)

    def work() -> None:
        while not stop.is_set():
            machine.write(dice.randrange(2), f"write -P {dice.randrange(1, 255)} {dice.randrange(128) * CLUSTER} 64k")

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def a_writing_guest(tool: Tool) -> str:
    """A guest writes while its first backup starts and ends."""
    with steadily(tool.machine):
        codes = [tool.back_up(full=True)]
    codes.append(tool.back_up())
    return f"{codes}; {lost(tool)}; other disk {lost(tool, 1)}"


def a_busy_guest(tool: Tool) -> str:
    """It writes while increments start and end."""
    codes = [tool.back_up(full=True)]
    with steadily(tool.machine):
        codes += [tool.back_up() for _ in range(3)]
    codes.append(tool.back_up())
    return f"{codes}; {lost(tool)}"


def killed(tool: Tool) -> str:
    """A run is killed."""
    return _signalled(tool, signal.SIGKILL)


def told_to_end(tool: Tool) -> str:
    """A run is told to end by SIGTERM."""
    return _signalled(tool, signal.SIGTERM)


def _signalled(tool: Tool, number: signal.Signals) -> str:
    full = tool.back_up(full=True)
    tool.machine.write(0, f"write -P 7 0 {4 * MIB}")
    before = tool.machine.present()
    child = tool.start()
    end = time.monotonic() + 20
    while child.poll() is None and tool.machine.present() <= before and time.monotonic() < end:
        time.sleep(0.01)
    child.send_signal(number)
    code = child.wait(SECONDS)
    time.sleep(1)
    left = len(tool.machine.present() - before)
    after = tool.back_up()
    return f"full: {full}; ended with {code}, jobs and nodes left in QEMU: {left}; next: {after}; {lost(tool)}"


def qemu_killed(tool: Tool) -> str:
    """QEMU dies and is started again."""
    full = tool.back_up(full=True)
    tool.machine.stop()
    tool.machine.start()
    tool.machine.kill()
    tool.machine.start()
    tool.machine.write(0, "write -P 9 1M 64k")
    after = tool.back_up()
    return f"full: {full}; next: {after}; {lost(tool)}"


def became_zero(tool: Tool) -> str:
    """A range becomes zero."""
    tool.machine.write(0, "write -P 5 2M 1M")
    codes = [tool.back_up(full=True)]
    tool.machine.write(0, "write -z 2M 1M")
    codes.append(tool.back_up())
    return f"{codes}; {lost(tool)}"


def out_of_order(tool: Tool) -> str:
    """The times of the files change, as a copy changes them."""
    codes = []
    for value in (1, 2, 3):
        tool.machine.write(0, f"write -P {value} 1M 64k")
        codes.append(tool.back_up(full=value == 1))
        time.sleep(1.1)
    files = tool.files(0)
    for number, path in enumerate([files[0], *reversed(files[1:])]):
        os.utime(path, (1_600_000_000 + number, 1_600_000_000 + number))
    return f"{codes}; {lost(tool)}"


def one_missing(tool: Tool) -> str:
    """An increment in the middle is gone."""
    codes = []
    for value in (1, 2, 3):
        tool.machine.write(0, f"write -P {value} {value}M 64k")
        codes.append(tool.back_up(full=value == 1))
        time.sleep(1.1)
    tool.files(0)[1].unlink()
    return f"{codes}; {lost(tool)}"


def cut(tool: Tool) -> str:
    """The newest image has been cut short."""
    tool.machine.write(0, f"write -P 3 0 {4 * MIB}")
    code = tool.back_up(full=True)
    path = tool.files(0)[-1]
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    return f"{code}; {lost(tool)}"


def new_disk(tool: Tool) -> str:
    """The machine gets another disk."""
    code = tool.back_up(full=True)
    tool.machine.stop()
    tool.machine.more()
    tool.machine.start()
    tool.machine.write(0, "write -P 9 1M 64k")
    after = tool.back_up()
    return f"full: {code}; next: {after}; {lost(tool)}"


ACCIDENTS: tuple[Callable[[Tool], str], ...] = (
    a_writing_guest,
    a_busy_guest,
    killed,
    told_to_end,
    qemu_killed,
    became_zero,
    cut,
    out_of_order,
    one_missing,
    new_disk,
)


def cell(kind: type[Tool], accident: Callable[[Tool], str]) -> str:
    """Has an accident happen to a tool, on a machine of its own."""
    opened = libvirt_machine if kind is Virtnbdbackup else qemu_machine
    with tempfile.TemporaryDirectory(prefix="p-") as name, opened(Path(name)) as machine:
        try:
            return accident(kind(machine, Path(name)))
        except Exception as error:
            told = re.sub(r"[|\s]+", " ", str(error))
            return f"{type(error).__name__}: {told[:120]}"


def version(words: Sequence[str]) -> str:
    """Returns the first number that looks like a version in what a program says."""
    found = re.search(r"\d+\.\d+[\d.]*", run(words, Path.cwd()).said)
    return found[0] if found else "?"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--qmpbackup", type=Path, metavar="DIR", help="a checkout of qmpbackup")
    parser.add_argument(
        "--only", action="append", metavar="ACCIDENT", help=", ".join(each.__name__ for each in ACCIDENTS)
    )
    arguments = parser.parse_args()
    tools: dict[type[Tool], str] = {Qmpnbd: version([sys.executable, "-m", "qmpnbd", "--version"])}
    if arguments.qmpbackup:
        Qmpbackup.checkout = arguments.qmpbackup.resolve()
        told = (Qmpbackup.checkout / "libqmpbackup/version.py").read_text()
        tools[Qmpbackup] = str(re.findall(r'VERSION = "(.+?)"', told)[0])
    if shutil.which("virtnbdbackup"):
        tools[Virtnbdbackup] = version(["virtnbdbackup", "--version"])
    qemu = version(["qemu-system-x86_64", "--version"])
    print(f"| QEMU {qemu} | {' | '.join(f'{tool.name} {number}' for tool, number in tools.items())} |")
    print("|---" * (len(tools) + 1) + "|")
    for accident in ACCIDENTS:
        if not arguments.only or accident.__name__ in arguments.only:
            cells = [cell(tool, accident) for tool in tools]
            print(f"| {str(accident.__doc__).rstrip('.')} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
