"""Joining an export while jobs of others may be about to end.

::

    job  | copies … | its nodes are at rest | the end: QEMU waits until all is at rest, in its main loop
    we              |         join          | nobody told this client to rest: QEMU waits for ever, its guest, too

Seen with QEMU 7.2 and 10.0, when mirror and commit jobs end. QEMU goes on at once when the client has left. So whoever
has joined asks QEMU whether it still answers, for as long as a job that was there may have been at its end already; if
it falls silent, he leaves and comes again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeVar

from qmpnbd.deadline import Deadline
from qmpnbd.errors import DeadlineError
from qmpnbd.qmp.jobs import read_jobs
from qmpnbd.qmp.monitor import Monitor

C = TypeVar("C")

_PATIENCE: Final = 0.5  # seconds; a QEMU that is only slow gets twice as long with every try
_ENDING_SECONDS: Final = 0.25  # from the rest of its nodes to the end of a job
_LOOK_SECONDS: Final = 0.02
_COPYING: Final = frozenset({"mirror", "commit"})


class Closeable(Protocol):
    """What a thread connects."""

    def close(self) -> None:
        """Closes the connection; never fails."""
        ...


B = TypeVar("B", bound=Closeable)


async def join(
    connect: Callable[[], Awaitable[C]], leave: Callable[[C], Awaitable[None]], monitor: Monitor, deadline: Deadline
) -> C:
    """Connects to an export of a QEMU so that it goes on.

    Args:
        connect: connects.
        leave: closes a connection, and all that keeps it open.
        monitor: of that QEMU.
        deadline: how long it may take.

    Raises:
        MonitorError: QEMU is gone.
        DeadlineError: the time is over; it has left.
        Exception: whatever `connect` raises.
    """
    patience = _PATIENCE
    while True:
        client = await connect()
        try:
            if await _goes_on(monitor, patience, deadline):
                return client
        except BaseException:
            await leave(client)
            raise
        await leave(client)
        await read_jobs(monitor, deadline)
        patience *= 2


async def _goes_on(monitor: Monitor, patience: float, deadline: Deadline) -> bool:
    """Returns whether QEMU answers, until no job that was there can have been at its end when we joined."""
    loop = asyncio.get_running_loop()
    end = loop.time() + _ENDING_SECONDS
    suspects: set[str] | None = None
    while True:
        try:
            jobs = await read_jobs(monitor, deadline.within(patience))
        except DeadlineError:
            deadline.check("QEMU to go on", monitor.where)
            return False
        copying = {job.id for job in jobs if job.type in _COPYING}
        suspects = copying if suspects is None else suspects & copying
        if not suspects or loop.time() > end:
            return True
        await asyncio.sleep(_LOOK_SECONDS)


class Join(Protocol):
    """How code that waits in a thread connects to an export."""

    def __call__(self, connect: Callable[[], B], /) -> B:
        """Returns what `connect` connected."""
        ...


def straight(connect: Callable[[], B], /) -> B:
    """Connects to what is no export of a QEMU that has a guest."""
    return connect()


@dataclass(frozen=True, slots=True)
class JoinFromThread:
    """`join` for code that waits in a thread; made where the monitor's loop runs.

    Attributes:
        monitor: of the QEMU.
        deadline: for everything.
        loop: the monitor's.
    """

    monitor: Monitor
    deadline: Deadline
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

    def __call__(self, connect: Callable[[], B], /) -> B:
        """Connects; raises as `join` does."""
        joined = join(
            lambda: asyncio.to_thread(connect),
            lambda client: asyncio.to_thread(client.close),
            self.monitor,
            self.deadline,
        )
        return asyncio.run_coroutine_threadsafe(joined, self.loop).result()
