"""A storage daemon of our own for images that no QEMU has open: QEMU's block layer without a guest.

::

    qmpnbd-3f9a01c7/daemon.log   what it says

Its monitor is one half of a pair of sockets that it inherits, connected before it runs. One that listens is not safe to
connect to while it starts: the thread that accepts and the thread that takes the monitor over meet, and QEMU greets
twice or never (7.2).

It opens images read-only, and QEMU's locks see to it that nobody writes to them meanwhile. It ends with us, also when
we are killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import stat
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import IO

from qmpnbd.deadline import Deadline
from qmpnbd.errors import ImageMissingError, ImageUnreadableError, MonitorConnectError, MonitorError, UsageError
from qmpnbd.qmp.address import FdAddress
from qmpnbd.qmp.monitor import Monitor, finish
from qmpnbd.qmp.process import Peer
from qmpnbd.qmp.rundir import RunDirectory

NODE = "image"
"""The node-name of the image."""

PROGRAM = "qemu-storage-daemon"

_END_SECONDS = 5.0
_DEATH_SECONDS = 1.0
_LOG_BYTES = 4096
_PR_SET_PDEATHSIG = 1  # prctl(2)


@asynccontextmanager
async def storage_daemon(
    directory: RunDirectory, image: str, image_format: str, deadline: Deadline, program: str = PROGRAM
) -> AsyncIterator[Monitor]:
    """Runs a storage daemon that has an image open, read-only, as node `NODE`.

    Args:
        directory: the run's private directory.
        image: path of the image.
        image_format: QEMU's name of its format (``qcow2``, ``raw``, …); nothing is probed for the image itself.
        deadline: for its start.
        program: the daemon.

    Yields:
        Its monitor.

    Raises:
        UsageError: there is no such program.
        ImageMissingError: there is no such image.
        ImageUnreadableError: the daemon cannot open it: not permitted, or a QEMU has it open.
        MonitorError: the daemon does not answer.
        DeadlineError: no answer in time.
    """
    blockdev = json.dumps(_node(image, image_format))
    async with AsyncExitStack() as stack:
        try:
            monitor = await stack.enter_async_context(
                running_daemon(directory, ["--blockdev", blockdev], deadline, program)
            )
        except MonitorConnectError as error:
            raise _unreadable(error, blockdev, image) from error
        yield monitor


@asynccontextmanager
async def running_daemon(
    directory: RunDirectory, options: Sequence[str], deadline: Deadline, program: str = PROGRAM
) -> AsyncIterator[Monitor]:
    """Runs a storage daemon.

    Args:
        directory: the run's private directory.
        options: its options beside those of its monitor.
        deadline: for its start.
        program: the daemon.

    Yields:
        Its monitor.

    Raises:
        UsageError: there is no such program.
        MonitorConnectError: it ended at once; the error says what it said.
        MonitorError: it does not answer.
        DeadlineError: no answer in time.
    """
    path = shutil.which(program)
    if path is None:
        raise UsageError(
            "there is no such program, and images cannot be served without it",
            where=program,
            remedy="Install QEMU's storage daemon (Debian: qemu-system-common or qemu-utils).",
        )
    log = directory.log_path
    ours, its = socket.socketpair()
    with ours, its, log.open("wb") as output:
        words = ["--chardev", f"socket,id=qmp,fd={its.fileno()}", "--monitor", "chardev=qmp", *options]
        process = await started(path, words, output, its)
        address = FdAddress(ours.detach(), program)
    try:
        try:
            monitor = await Monitor.connect(address, deadline)
        except MonitorError as error:
            raise await _ended_at_once(process, log, program) or error from error
        monitor.peer = Peer(process.pid)  # of a pair of sockets the kernel tells who made it, and that was us
        async with monitor:
            yield monitor
    finally:
        await finish(ended(process, _END_SECONDS))


def _node(image: str, image_format: str) -> dict[str, object]:
    try:
        is_device = stat.S_ISBLK(Path(image).stat().st_mode)
    except FileNotFoundError as error:
        raise ImageMissingError("no such file", where=image) from error
    except OSError as error:
        raise ImageUnreadableError(f"cannot be read: {error.strerror}", where=image) from error
    file = {"driver": "host_device" if is_device else "file", "filename": str(Path(image).absolute())}
    return {"driver": image_format, "node-name": NODE, "read-only": True, "file": file}


async def started(
    program: str, arguments: Sequence[str], output: IO[bytes], inherited: socket.socket
) -> asyncio.subprocess.Process:
    """Starts a program that ends with us, also when we are killed.

    Args:
        program: its path.
        arguments: its arguments.
        output: where it writes to.
        inherited: a socket that it gets, under the same number.
    """
    # A session of its own: the Ctrl-C of a terminal is for us, who take down what it serves first.
    return await asyncio.create_subprocess_exec(
        program,
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        pass_fds=[inherited.fileno()],
        start_new_session=True,
        preexec_fn=_ending_with(os.getpid()),  # one system call, looked up before the fork
    )


def _ending_with(parent: int) -> Callable[[], None]:
    """Returns what the child does before it becomes the daemon: ask the kernel to be killed when we end."""
    prctl = ctypes.CDLL(None).prctl

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # we ended before the kernel knew
            os._exit(1)

    return ask


async def _ended_at_once(process: asyncio.subprocess.Process, log: Path, program: str) -> MonitorConnectError | None:
    """Returns that the daemon ended, and what it said; or None if it runs."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(process.wait(), _DEATH_SECONDS)
    if process.returncode is None:
        return None
    told = next((line for line in _start_of(log).splitlines() if line.strip()), "it said nothing")
    return MonitorConnectError(
        f"it ended at once with {process.returncode}: {told}", where=program, remedy="See whether it runs by hand."
    )


def _unreadable(error: MonitorConnectError, blockdev: str, image: str) -> ImageUnreadableError:
    told = error.what.partition(blockdev)[2].removeprefix(": ") or error.what
    remedy = "See whether the file can be read and has this format."
    if " lock" in told:
        remedy = "A QEMU has it open: export the disk from that QEMU, with --qmp."
    return ImageUnreadableError(f"the storage daemon cannot open it: {told}", where=image, remedy=remedy)


def _start_of(log: Path) -> str:
    with log.open("rb") as file:
        return file.read(_LOG_BYTES).decode("utf-8", "replace")


async def ended(process: asyncio.subprocess.Process, seconds: float) -> None:
    """Has a process of ours end: asks it to, and makes it, each for so many seconds at most."""
    for end in (process.terminate, process.kill):
        if process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            end()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), seconds)
