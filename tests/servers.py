"""Real servers for tests: started with a deadline, ended always.

Each has two monitors: `qmp` for the one under test and `side` for the test itself, because a monitor serves one
client at a time.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

START_SECONDS = 20.0


def tool(name: str) -> str:
    """Returns a program's path; a missing one is a fault of the set-up, not a reason to skip."""
    path = shutil.which(name)
    assert path is not None, f"{name} is not installed: run ./scripts/test, which sets up everything"
    return path


def wait_until(condition: Callable[[], bool], what: str, seconds: float = START_SECONDS) -> None:
    """Waits for a condition that nothing announces."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"gave up waiting for {what}"
        time.sleep(0.005)


def listening(path: Path) -> bool:
    """Whether somebody listens on a UNIX socket; asks the kernel, because a server counts whoever connects.

    That the file is there says less: it appears before the server listens.
    """
    accepting = "00010000"  # __SO_ACCEPTCON in the fourth column
    sockets = (line.split() for line in Path("/proc/net/unix").read_text().splitlines())
    return any(fields[3] == accepting and fields[7:] == [str(path)] for fields in sockets)


def new_qemu_nbd() -> str:
    """Returns a qemu-nbd with extended headers (8.2 or newer), or skips.

    That is the one that QMPNBD_NEW_QEMU_NBD names, else the installed one, else what `scripts/get-qemu 10.0` unpacked.
    """
    unpacked = Path(__file__).resolve().parent.parent / ".work/qemu/10.0/bin/qemu-nbd"
    named = os.environ.get("QMPNBD_NEW_QEMU_NBD")
    for program in [named] if named else [tool("qemu-nbd"), str(unpacked)]:
        if os.access(program, os.X_OK):
            said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
            if tuple(int(part) for part in said.split()[1].split(".")[:2]) >= (8, 2):
                return program
    pytest.skip("no qemu-nbd with extended headers: scripts/get-qemu 10.0 unpacks one, QMPNBD_NEW_QEMU_NBD names one")


@contextlib.contextmanager
def short_folder() -> Iterator[Path]:
    """A folder whose name leaves room for sockets: a UNIX socket path has at most 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="t-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextlib.contextmanager
def process(
    arguments: Sequence[str], log: Path, cwd: Path | None = None, inherited: Sequence[int] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a server with its output in a file, and ends it."""
    with log.open("wb") as output:
        child = subprocess.Popen(
            arguments, stdout=output, stderr=output, stdin=subprocess.DEVNULL, cwd=cwd, pass_fds=inherited
        )
    try:
        yield child
    finally:
        child.send_signal(signal.SIGCONT)
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait(10)


class Side:
    """A second client of the same QEMU: blocking, as small as can be, and independent of what is under test."""

    def __init__(self, at: Path | socket.socket) -> None:
        """Greets, over a socket's path or over a connected one, which is closed at the end."""
        self._socket = socket.socket(socket.AF_UNIX) if isinstance(at, Path) else at
        self._socket.settimeout(20)
        if isinstance(at, Path):
            self._socket.connect(str(at))
        self._lines = self._socket.makefile("rb")
        assert "QMP" in json.loads(self._lines.readline())
        self("qmp_capabilities")

    def __call__(self, command: str, **arguments: object) -> Any:
        """Executes a command; keyword names are written with underscores."""
        names = {name.replace("_", "-"): value for name, value in arguments.items()}
        return self.execute(command, names)

    def execute(self, command: str, arguments: Mapping[str, object]) -> Any:
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while True:
            reply = json.loads(self._lines.readline())
            if "event" not in reply:
                assert "error" not in reply, f"{command} {arguments}: {reply['error']}"
                return reply["return"]

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


@dataclass(frozen=True)
class Server:
    """A running QEMU or storage daemon."""

    qmp: Path
    side: Side
    pid: int
    folder: Path

    def exports(self) -> list[str]:
        return [export["id"] for export in self.side("query-block-exports")]

    def nodes(self) -> list[str]:
        return sorted(node["node-name"] for node in self.side("query-named-block-nodes", flat=True))

    def nbd_server_runs(self) -> bool:
        """Asks without a side effect: starting one on a file descriptor that does not exist fails either way."""
        try:
            self.side("nbd-server-start", addr={"type": "fd", "data": {"str": "no-such-descriptor"}})
        except AssertionError as error:
            return "already running" in str(error)
        raise AssertionError("a server was started on nothing")


@contextlib.contextmanager
def qemu(*arguments: str, cwd: Path | None = None, program: str = "") -> Iterator[Server]:
    """Runs qemu-system-x86_64, paused before its first instruction, with `arguments` for its disks."""
    command = [
        program or tool("qemu-system-x86_64"),
        "-accel",
        "tcg",
        "-nodefaults",
        "-display",
        "none",
        "-S",
        "-m",
        "32",
    ]
    with _server([*command, *arguments], ("-mon", "mode=control,"), cwd) as server:
        yield server


@contextlib.contextmanager
def storage_daemon(*arguments: str, cwd: Path | None = None, program: str = "") -> Iterator[Server]:
    """Runs qemu-storage-daemon: QEMU's block layer without a guest."""
    command = [program or tool("qemu-storage-daemon")]
    with _server([*command, *arguments], ("--monitor", ""), cwd) as server:
        yield server


@contextlib.contextmanager
def _log_told(log: Path) -> Iterator[None]:
    """Adds what a server said to an error that comes out of its use."""
    try:
        yield
    except Exception as error:
        error.add_note(f"the server said: {log.read_text(errors='replace')[-2000:]}")
        raise


@contextlib.contextmanager
def _server(command: Sequence[str], monitor: tuple[str, str], cwd: Path | None) -> Iterator[Server]:
    """Runs a server with three monitors: two that listen, and one over which it says that it has begun to serve them.

    Whoever connects to one that listens before that meets the thread that takes it over, and may be greeted twice, or
    never (7.2). What the third one answers comes after the two others were taken over: they are named before it.
    """
    option, mode = monitor
    ours, its = socket.socketpair()
    with short_folder() as folder, ours:
        log = folder / "log"
        words = [*command]
        for name in ("qmp", "side"):
            words += ["--chardev", f"socket,path={folder}/{name},server=on,wait=off,id={name}"]
            words += [option, f"{mode}chardev={name}"]
        words += ["--chardev", f"socket,fd={its.fileno()},id=ready", option, f"{mode}chardev=ready"]
        with _log_told(log), process(words, log, cwd, [its.fileno()]) as child:
            its.close()
            try:
                Side(ours).close()
            except (AssertionError, OSError, ValueError) as error:
                raise AssertionError(log.read_text()) from error
            side = Side(folder / "side")
            try:
                yield Server(folder / "qmp", side, child.pid, folder)
            finally:
                side.close()


def qemu_img(*arguments: str | Path) -> str:
    """Runs qemu-img and returns its output."""
    done = subprocess.run(
        [tool("qemu-img"), *map(str, arguments)], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def qemu_io(image: Path, *commands: str, format: str = "qcow2") -> None:  # noqa: A002 - qemu-io's own word
    """Runs qemu-io commands on an image."""
    options = [part for command in commands for part in ("-c", command)]
    done = subprocess.run(
        [tool("qemu-io"), "-f", format, *options, str(image)], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert "failed" not in done.stdout, done.stdout


def blockdev(path: Path | str, node_name: str, driver: str = "qcow2", **options: object) -> str:
    """Returns a --blockdev argument for an image file; option names are written with underscores."""
    file = {"driver": "file", "filename": os.fspath(path)}
    more = {name.replace("_", "-"): value for name, value in options.items()}
    return json.dumps({"driver": driver, "node-name": node_name, "file": file, **more})
