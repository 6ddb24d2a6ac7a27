"""Shows people on stderr how far long work in an event loop is."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from qmpnbd.cli.progressline import Line

if TYPE_CHECKING:
    from qmpnbd.validate.progress import Progress

T = TypeVar("T")


async def shown(work: Coroutine[Any, Any, T], progress: Progress) -> T:
    """Runs `work` and shows its progress meanwhile."""
    with Line() as line:
        ticker = asyncio.ensure_future(_tick(line, progress))
        try:
            return await work
        finally:
            ticker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await ticker


async def _tick(line: Line, progress: Progress) -> None:
    while True:
        await asyncio.sleep(line.seconds)
        line.put(progress.line())
