"""Shows people on stderr how far long work is: in place on a terminal, else one line a minute."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from qmpnbd.cli import output, terminal

if TYPE_CHECKING:
    from qmpnbd.validate.progress import Progress

T = TypeVar("T")

_TERMINAL_SECONDS = 0.5
_LINE_SECONDS = 60.0
_COLUMNS = 80
_CLEAR = "\r\x1b[K"


async def shown(work: Coroutine[Any, Any, T], progress: Progress) -> T:
    """Runs `work` and shows its progress meanwhile."""
    on_terminal = sys.stderr.isatty()
    ticker = asyncio.ensure_future(_tick(progress, on_terminal=on_terminal))
    try:
        return await work
    finally:
        ticker.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await ticker
        if on_terminal:
            print(_CLEAR, end="", file=sys.stderr, flush=True)


async def _tick(progress: Progress, *, on_terminal: bool) -> None:
    while True:
        await asyncio.sleep(_TERMINAL_SECONDS if on_terminal else _LINE_SECONDS)
        line = progress.line()
        if on_terminal:
            room = (terminal.width(sys.stderr) or _COLUMNS) - 1
            print(f"{_CLEAR}{line[:room]}", end="", file=sys.stderr, flush=True)
        else:
            output.tell(line)
