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
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeVar

from qmpnbd.deadline import Deadline
from qmpnbd.errors import DeadlineError
from qmpnbd.qmp.jobs import read_jobs
from qmpnbd.qmp.monitor import Monitor, finish

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
    connect: Callable[[], Awaitable[C]],
    leave: Callable[[C], Coroutine[Any, Any, None]],
    monitor: Monitor,
    deadline: Deadline,
) -> C:
    """Connects to an export of a QEMU so that it goes on.

    Args:
        connect: connects, and sees to it that what it connected is closed in the end, whatever happens here.
        leave: closes a connection at once, with all that keeps it open: QEMU has fallen silent.
        monitor: of that QEMU.
        deadline: how long it may take.

    Raises:
        MonitorError: QEMU is gone.
        DeadlineError: the time is over.
        Exception: whatever `connect` raises.
    """
    patience = _PATIENCE
    while True:
        client = await connect()
        if await _goes_on(monitor, patience, deadline):
            return client
        await finish(leave(client))
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
        """Connects; raises as `join` does, and has left then."""
        clients: list[B] = []

        async def connected() -> B:
            clients.append(await asyncio.to_thread(connect))
            return clients[-1]

        async def leave(client: B) -> None:
            await asyncio.to_thread(client.close)

        joined = join(connected, leave, self.monitor, self.deadline)
        try:
            return asyncio.run_coroutine_threadsafe(joined, self.loop).result()
        except BaseException:
            for client in clients:
                client.close()
            raise
