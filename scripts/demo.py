#!/usr/bin/env python3
"""The demo: one disk of five layers, one virtual machine, one fault.

First a guest runs on a backing chain, and ``qmpnbd validate`` finds that what QEMU serves is what the files hold. Then
the same on a copy, in whose files a single L2 entry is cleared behind QEMU's back: QEMU goes on serving from its cache,
the files say something else, and the validation must fail. At the end everything is taken down again, on every way out.

Run it as ``./scripts/demo``. It exits 0 only if everything came out as it should.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

HERE = Path(__file__).resolve().parent.parent
WORK = HERE / ".work"
sys.path.insert(0, str(HERE / "vm-images"))

import chain  # noqa: E402 - the recipes are no package, they are found by path
import guest  # noqa: E402

GUEST_DEADLINE = 12.0
COMMAND_DEADLINE = 60.0
START_DEADLINE = 10.0
STOP_DEADLINE = 5.0

WIDTH = 100

# A UNIX socket's path has 107 bytes; this leaves room for its name.
LONGEST_FOLDER = 80


class DemoError(Exception):
    """The demo cannot go on; says why."""


# --- telling it ------------------------------------------------------------------------------------------------


def chapter(number: int, title: str) -> None:
    """Print a numbered heading."""
    print(f"\n{number}. {title}", flush=True)


def tell(text: str) -> None:
    """Print lines below a heading."""
    for line in text.splitlines():
        print(f"   {line}".rstrip(), flush=True)


def sizes(count: int) -> str:
    """A count of bytes, for a reader."""
    return f"{count / (1 << 20):.1f} MiB"


# --- a virtual machine -----------------------------------------------------------------------------------------


class Machine:
    """A QEMU with one disk, ``vd0``, and a QMP socket in a folder."""

    def __init__(self, folder: Path, name: str, active_layer: Path) -> None:
        self.socket = folder / f"{name}.qmp"
        self.serial = folder / f"{name}.serial"
        self._folder = folder
        self._active_layer = active_layer
        self._process: subprocess.Popen[str] | None = None

    def start(self, *options: str) -> None:
        """Start QEMU and wait for its QMP socket."""
        image = {
            "driver": "qcow2",
            "node-name": "disk0",
            "file": {"driver": "file", "filename": str(self._active_layer)},
        }
        command = [
            *("qemu-system-x86_64", "-accel", "tcg", "-nodefaults", "-no-user-config", "-display", "none"),
            *("-qmp", f"unix:{self.socket.name},server=on,wait=off", "-serial", f"file:{self.serial.name}"),
            *("-blockdev", json.dumps(image), "-device", "virtio-blk-pci,id=vd0,drive=disk0", *options),
        ]
        if shutil.which("setpriv"):
            # Should this process be killed outright, QEMU ends as well.
            command = ["setpriv", "--pdeathsig", "TERM", *command]
        # A session of its own: Ctrl-C is for us, and qmpnbd needs a QEMU to clean up in.
        self._process = subprocess.Popen(
            command,
            cwd=self._folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        deadline = time.monotonic() + START_DEADLINE
        while not self.socket.exists():
            self._must_run()
            if time.monotonic() > deadline:
                raise DemoError(f"QEMU made no QMP socket within {START_DEADLINE:.0f} s")
            time.sleep(0.02)

    def says(self, line: str, within: float) -> bool:
        """Whether the guest prints a line on its serial console in time."""
        deadline = time.monotonic() + within
        while time.monotonic() < deadline:
            self._must_run()
            if self.serial.exists() and line in self.serial.read_text(errors="replace"):
                return True
            time.sleep(0.05)
        return False

    def ask(self, *commands: str) -> list[Any]:
        """Run QMP commands without arguments, and return what they return."""
        return asyncio.run(_ask(self.socket, commands))

    def stop(self) -> None:
        """End QEMU, politely first; does nothing if it never started."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_DEADLINE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _must_run(self) -> None:
        if self._process is not None and self._process.poll() is not None:
            words = self._process.stderr.read().strip() if self._process.stderr else ""
            raise DemoError(f"QEMU ended by itself ({self._process.returncode}): {words}")


async def _ask(socket: Path, commands: tuple[str, ...]) -> list[Any]:
    from qemu.qmp import QMPClient  # noqa: PLC0415 - 90 ms that only the steps that need it should wait for

    client = QMPClient("demo")
    async with asyncio.timeout(START_DEADLINE):
        await client.connect(str(socket))
        try:
            return [await client.execute(command) for command in commands]
        finally:
            await client.disconnect()


# --- qmpnbd, as a person would run it --------------------------------------------------------------------------


def qmpnbd(folder: Path, *arguments: str, expected: int, quiet: bool = False) -> bool:
    """Run one command and show it with its output; return whether it exited as expected."""
    if not quiet:
        tell(f"$ qmpnbd {' '.join(arguments)}")
    started = time.monotonic()
    code, output = _run(folder, "qmpnbd", *arguments)
    met = code == expected
    if not quiet or not met:
        tell("\n".join("  " + line for line in output.splitlines()))
    verdict = "as it should" if met else f"AND SHOULD HAVE EXITED {expected}"
    tell(f"qmpnbd exited {code} after {time.monotonic() - started:.1f} s, {verdict}.")
    return met


def _run(folder: Path, *command: str) -> tuple[int, str]:
    # Not subprocess.run: on a signal that kills its child, and this one has things to take down.
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "COLUMNS": str(WIDTH)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=COMMAND_DEADLINE)
    except subprocess.TimeoutExpired:
        raise DemoError(f"{' '.join(command)}: not done within {COMMAND_DEADLINE:.0f} s") from None
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_DEADLINE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    return process.returncode, output


# --- the story -------------------------------------------------------------------------------------------------


def make_disk(folder: Path) -> Path:
    """Make the chain and show its layers; return the active one."""
    started = time.monotonic()
    active_layer = chain.build(folder)
    chapter(1, f"A disk of five layers, made with qemu-img and qemu-io ({time.monotonic() - started:.1f} s)")
    for overlay in reversed(chain.OVERLAYS):
        used = (folder / overlay.name).stat().st_blocks * 512
        note = "   <- the guest writes here" if overlay is chain.OVERLAYS[-1] else ""
        tell(f"{overlay.name:<16}{overlay.size.rstrip('M'):>4} MiB, {sizes(used):>8} in the file{note}")
    used = (folder / chain.TEMPLATE).stat().st_blocks * 512
    tell(f"{chain.TEMPLATE:<16}{chain.TEMPLATE_SIZE >> 20:>4} MiB, {sizes(used):>8} in the file   <- the base")
    return active_layer


def start_guest(machine: Machine) -> None:
    """Boot the guest; where that fails, leave the machine paused, and say so."""
    started = time.monotonic()
    try:
        linux = guest.build(WORK / "guest-packages", WORK / "guest")
    except guest.GuestError as error:
        machine.start("-m", "64", "-S")
        chapter(2, "A virtual machine on it, paused: there is no kernel for a guest here")
        tell(str(error))
        return
    machine.start(
        *("-m", "192", "-kernel", str(linux.kernel), "-initrd", str(linux.initramfs), "-append", linux.append)
    )
    if machine.says(guest.READY, GUEST_DEADLINE):
        chapter(2, f"A virtual machine on it: a tiny Linux, booted without KVM ({time.monotonic() - started:.1f} s)")
        tell(f"It has written {len(guest.PLACES)} records straight to its disk, over data and into holes; it runs on.")
    else:
        machine.ask("stop")
        chapter(2, "A virtual machine on it, paused")
        tell(f"Its guest was not ready within {GUEST_DEADLINE:.0f} s, and is held where it is.")


def copy_disk(machine: Machine, source: Path, target: Path) -> None:
    """Copy the chain as it is at one instant: a machine that stops brings its tables to the disk."""
    (status,) = machine.ask("query-status")
    if status["running"]:
        machine.ask("stop")
    shutil.copytree(source, target)
    if status["running"]:
        machine.ask("cont")


def break_a_copy(folder: Path, original: Machine, copy: Machine) -> bool:
    """Validate a copy, spoil it while QEMU has its tables cached, validate again."""
    chapter(5, "Something breaks: a copy of the disk, and one L2 entry lost from its files")
    copy_disk(original, folder / "disk", folder / "copy")
    copy.start("-m", "64", "-S")
    tell("A second machine has opened the copy and read its tables.")
    met = qmpnbd(folder, "validate", "--qmp", copy.socket.name, "vd0", expected=0, quiet=True)
    tell("Now, behind its back:")
    done = chain.spoil(folder / "copy" / chain.SPOILED_LAYER, chain.SPOILED_OFFSET)
    tell(textwrap.fill(done, WIDTH, initial_indent="  ", subsequent_indent="  "))
    tell("QEMU serves that cluster from its cache still; the next start of the machine would not find it.")
    return qmpnbd(folder, "validate", "--qmp", copy.socket.name, "vd0", expected=1) and met


def nothing_left(machines: dict[str, Machine]) -> bool:
    """Whether the machines are as they were before qmpnbd came: no exports, no named bitmaps."""
    clean = True
    for name, machine in machines.items():
        exports, nodes = machine.ask("query-block-exports", "query-named-block-nodes")
        bitmaps = {entry["name"] for node in nodes for entry in node.get("dirty-bitmaps", ()) if entry.get("name")}
        tell(f"{name}: {len(exports)} exports, {len(bitmaps)} bitmaps")
        clean = clean and not exports and not bitmaps
    return clean


def story(folder: Path, stack: ExitStack) -> bool:
    """Everything in order; return whether every expectation was met."""
    print("qmpnbd: is what a running QEMU says about its disk what the disk's files say?")
    active_layer = make_disk(folder / "disk")
    machine = Machine(folder, "vm", active_layer)
    copy = Machine(folder, "copy", folder / "copy" / active_layer.name)
    stack.callback(machine.stop)
    stack.callback(copy.stop)
    start_guest(machine)

    chapter(3, "Which disks does it have?")
    results = [qmpnbd(folder, "disks", "--qmp", machine.socket.name, expected=0)]
    chapter(4, "Does QEMU serve over NBD, layer for layer, what the files hold?")
    results.append(qmpnbd(folder, "validate", "--qmp", machine.socket.name, "vd0", expected=0))
    results.append(break_a_copy(folder, machine, copy))
    chapter(6, "What qmpnbd left in the two machines")
    results.append(nothing_left({"first": machine, "second": copy}))
    return all(results)


def work_folder() -> Path:
    """A new folder for all files and sockets, whose path is short enough for a socket."""
    WORK.mkdir(exist_ok=True)
    parent = str(WORK) if len(str(WORK)) <= LONGEST_FOLDER else None
    return Path(tempfile.mkdtemp(prefix="demo-", dir=parent))


def leave(number: int, _frame: FrameType | None) -> None:
    """On a signal: unwind, which takes everything down."""
    raise SystemExit(128 + number)


def main() -> int:
    """Tell the story, take everything down, return the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
    started = time.monotonic()
    with ExitStack() as stack:
        try:
            folder = work_folder()
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            good = story(folder, stack)
        except (DemoError, OSError, subprocess.CalledProcessError) as error:
            print(f"\ndemo: {error}", file=sys.stderr)
            return 1
        finally:
            # A second Ctrl-C must not stop the taking down; it has deadlines of its own.
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
    tell("Both machines are ended, and their files are removed.")
    end = "Everything came out as it should" if good else "SOMETHING DID NOT COME OUT AS IT SHOULD (see above)"
    print(f"\n{end} ({time.monotonic() - started:.1f} s).")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
