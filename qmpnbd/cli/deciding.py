"""What becomes of a checkpoint that an export has begun, when it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from qmpnbd.cli import options, output
from qmpnbd.deadline import Deadline
from qmpnbd.export.session import Session


@asynccontextmanager
async def left_to_others(session: Session) -> AsyncIterator[None]:
    """Leaves the checkpoint pending at the end, also when a signal brings it; after an error it is merged back."""
    try:
        yield
    except asyncio.CancelledError:
        await _left(session)
        raise
    await _left(session)


async def _left(session: Session) -> None:
    begun = session.checkpoint
    if begun is not None:
        await session.leave(Deadline(options.SHORT_SECONDS))
        which = f"--chain {begun.chain} --number {begun.number}"
        output.tell(f"checkpoint {begun.number} is pending: `qmpnbd checkpoint commit` or `abort`, with {which}")


async def decided(session: Session, code: int) -> None:
    """Commits the checkpoint if the command that copied ended with 0, else merges it back."""
    begun = session.checkpoint
    if begun is None:
        return
    which = f"checkpoint {begun.number} of chain {begun.chain}"
    if code == 0:
        await session.commit(Deadline(options.SHORT_SECONDS))
        output.tell(f"{which} is committed")
    else:
        await session.abort(Deadline(options.SHORT_SECONDS))
        output.tell(f"{which} is merged back: the command ended with {code}")
