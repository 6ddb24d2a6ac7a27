"""A storage daemon of our own for an image that no QEMU has open: QEMU's block layer without a guest.

::

    qmpnbd-3f9a01c7/qmp.sock     listening before the daemon runs, and handed to it: nothing has to be waited for
    qmpnbd-3f9a01c7/daemon.log   what it says

It opens the image read-only, and QEMU's locks see to it that nobody writes to it meanwhile. It ends with us, also when
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
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from qmpnbd.deadline import Deadline
from qmpnbd.errors import ImageMissingError, ImageUnreadableError, MonitorError, UsageError
from qmpnbd.qmp.address import UnixAddress
from qmpnbd.qmp.listeners import listening
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
    path = shutil.which(program)
    if path is None:
        raise UsageError(f"there is no program {program}", where=image, remedy="Install QEMU's storage daemon.")
    blockdev = json.dumps(_node(image, image_format))
    address = UnixAddress(str(directory.path / "qmp.sock"))
    log = directory.path / "daemon.log"
    with listening(address) as sock, log.open("wb") as output:
        # A session of its own: the Ctrl-C of a terminal is for us, who take the exports down first.
        process = await asyncio.create_subprocess_exec(
            path,
            *("--chardev", f"socket,id=qmp,fd={sock.fileno()},server=on,wait=off", "--monitor", "chardev=qmp"),
            *("--blockdev", blockdev),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[sock.fileno()],
            start_new_session=True,
            preexec_fn=_ending_with(os.getpid()),  # one system call, looked up before the fork
        )
    try:
        try:
            monitor = await Monitor.connect(address, deadline)
        except MonitorError as error:
            raise await _why(process, log, blockdev, image) or error from error
        monitor.peer = Peer(process.pid)  # 5.2 lets the kernel tell who made the socket, and that was us
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


def _ending_with(parent: int) -> Callable[[], None]:
    """Returns what the child does before it becomes the daemon: ask the kernel to be killed when we end."""
    prctl = ctypes.CDLL(None).prctl

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # we ended before the kernel knew
            os._exit(1)

    return ask


async def _why(
    process: asyncio.subprocess.Process, log: Path, blockdev: str, image: str
) -> ImageUnreadableError | None:
    """Returns why the daemon ended, or None if it runs."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(process.wait(), _DEATH_SECONDS)
    if process.returncode is None:
        return None
    lines = _start_of(log).splitlines()
    told = next((line for line in lines if line.strip()), f"it ended with {process.returncode}")
    told = told.partition(blockdev)[2].removeprefix(": ") or told
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
