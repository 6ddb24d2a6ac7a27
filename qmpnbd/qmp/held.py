"""A point in time for plain scripts: the blocking twin of `qmpnbd.qmp.pointintime`, over the same code in a thread.

::

    with held_point_in_time("/run/vm.qmp", ["vd0", "vd1"]) as held:
        for offer in held.offers:
            ...                             # nbd+unix:///EXPORT?socket=held.socket_path

The thread also watches the scratch space while the caller works. If the point in time has to be given up, the exports
end, and the reason is raised when the ``with`` is left.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from qmpnbd.deadline import Deadline
from qmpnbd.qmp.monitor import Monitor
from qmpnbd.qmp.plan import Offer
from qmpnbd.qmp.planning import Wishes
from qmpnbd.qmp.pointintime import Statement, point_in_time
from qmpnbd.qmp.rundir import RunDirectory

DEFAULT_SECONDS = 60.0
"""For getting there; what is read before the instant is part of it."""


@dataclass(frozen=True, slots=True)
class Held:
    """A point in time that is being held.

    Attributes:
        offers: what there is to read, in the order of the disks.
        statement: what can be said of it.
        socket_path: where the NBD server listens.
    """

    offers: tuple[Offer, ...]
    statement: Statement
    socket_path: str


@contextmanager
def held_point_in_time(
    monitor: str,
    disks: Sequence[str],
    *,
    seconds: float | None = DEFAULT_SECONDS,
    wishes: Wishes | None = None,
    runtime_dir: str | None = None,
    before: Callable[[Sequence[Offer], str], None] | None = None,
) -> Iterator[Held]:
    """Holds the disks of a guest as they are at one instant.

    Args:
        monitor: where QEMU's monitor listens.
        disks: qdev ids, QOM paths or node-names.
        seconds: for getting there.
        wishes: how. A server of our own is always started.
        runtime_dir: where the private directory is made; None for the folder for temporary files.
        before: called, in another thread, just before the instant, with the offers and the server's socket.

    Yields:
        The point in time.

    Raises:
        QmpnbdError: see `qmpnbd.qmp.pointintime.point_in_time`.
    """
    session = _Session(before)
    work = session.hold(monitor, disks, Deadline(seconds), wishes, runtime_dir)
    thread = threading.Thread(target=session.run, args=(work,), name="qmpnbd-point-in-time")
    thread.start()
    try:
        yield session.held.result()
    finally:
        session.leave()
        thread.join()
        session.ended.result()


class _Session:
    """The thread's side."""

    def __init__(self, before: Callable[[Sequence[Offer], str], None] | None) -> None:
        self.held: Future[Held] = Future()
        self.ended: Future[None] = Future()
        self._before = before
        self._loop: asyncio.AbstractEventLoop | None = None
        self._left = asyncio.Event()

    def run(self, work: Coroutine[object, object, None]) -> None:
        """Runs to the end; told by `ended`, and by `held` if it never got there."""
        try:
            asyncio.run(work)
        except BaseException as error:  # handed to the caller's thread
            self.ended.set_exception(error)
            if not self.held.done():
                self.held.set_exception(error)
        else:
            self.ended.set_result(None)

    def leave(self) -> None:
        """Ends it; from the caller's thread."""
        if self._loop is not None:
            with suppress(RuntimeError):  # it has ended by itself
                self._loop.call_soon_threadsafe(self._left.set)

    async def hold(
        self, address: str, disks: Sequence[str], deadline: Deadline, wishes: Wishes | None, base: str | None
    ) -> None:
        """Holds until `leave`."""
        self._loop = asyncio.get_running_loop()
        async with await Monitor.connect(address, deadline) as monitor:
            with RunDirectory.create(base, for_peer=monitor.peer) as directory:
                socket_path = str(directory.socket_path)

                async def before(offers: Sequence[Offer]) -> None:
                    if self._before is not None:
                        await asyncio.to_thread(self._before, offers, socket_path)

                async with point_in_time(monitor, disks, directory, deadline, wishes=wishes, before=before) as point:
                    self.held.set_result(Held(point.offers, point.statement, socket_path))
                    await self._left.wait()
