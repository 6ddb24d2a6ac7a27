"""How long exports are kept: until a command ends, the time is over, or something ends them from outside."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from qmpnbd.deadline import Deadline
from qmpnbd.errors import DeadlineError, UsageError
from qmpnbd.export.session import Session
from qmpnbd.qmp.monitor import finish
from qmpnbd.qmp.storage_daemon import ended

END_SECONDS = 10.0
"""How long a command may take to end after SIGTERM, before it is killed."""


async def until_told(session: Session, seconds: float | None) -> None:
    """Keeps the exports until the time is over.

    Args:
        session: the exports.
        seconds: the time; None for no end.

    Raises:
        BrokenPipeError: whoever was to read stdout went away: nobody knows the URIs any more.
        MonitorLostError: QEMU is gone, or its monitor.
        InterferenceError: somebody removed an export.
    """
    reader = asyncio.ensure_future(_reader_gone())
    watch = asyncio.ensure_future(session.watch(Deadline(seconds)))
    try:
        done, _ = await asyncio.wait({reader, watch}, return_when=asyncio.FIRST_COMPLETED)
        with contextlib.suppress(DeadlineError):  # which is what was asked for
            for task in done:
                task.result()
    finally:
        await _dropped(reader, watch)


async def until_command_ends(
    session: Session, command: Sequence[str], environment: Mapping[str, str], seconds: float | None
) -> int:
    """Runs a command while the exports are there; ends it if something ends them, or us.

    Args:
        session: the exports.
        command: the command and its arguments; no shell.
        environment: variables besides ours.
        seconds: the time it has; None for no end.

    Returns:
        Its exit code, or 128 plus the number of the signal that ended it.

    Raises:
        UsageError: there is no such command, or it may not be run.
        DeadlineError: the time is over.
        MonitorLostError: QEMU is gone, or its monitor.
        InterferenceError: somebody removed an export.
    """
    try:
        process = await asyncio.create_subprocess_exec(*command, env={**os.environ, **environment})
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(f"cannot be run: {reason}", where=command[0], remedy="Correct what follows --exec.") from error
    over = asyncio.ensure_future(process.wait())
    watch = asyncio.ensure_future(session.watch(Deadline(seconds)))
    try:
        await asyncio.wait({over, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not over.done():
            watch.result()
        code = await over
        return code if code >= 0 else 128 - code
    finally:
        await finish(ended(process, END_SECONDS))
        await _dropped(over, watch)


async def _reader_gone() -> None:
    """Raises BrokenPipeError when nobody can read what is written to stdout any more; else waits for ever."""
    output = sys.stdout.fileno()
    gone = asyncio.Event()
    if stat.S_ISFIFO(os.fstat(output).st_mode):
        # Nothing ever comes out of the writing end of a pipe: what makes it readable is the error.
        asyncio.get_running_loop().add_reader(output, gone.set)
    try:
        await gone.wait()
    finally:
        asyncio.get_running_loop().remove_reader(output)
    raise BrokenPipeError


async def _dropped(*futures: asyncio.Future[Any]) -> None:
    for future in futures:
        future.cancel()
    await asyncio.gather(*futures, return_exceptions=True)
