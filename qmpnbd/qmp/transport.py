"""How QMP travels: what every way to a monitor must offer, and what all of them share.

::

    qmp.monitor     commands with deadlines, events, reconnecting; the one that callers see
        |
    Transport  -->  qmp.direct    QEMU's own monitor socket, spoken to by qemu.qmp; events come by themselves
               `->  qmp.libvirt   libvirt's connection to the monitor, lent to us; events are found out by asking
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from qemu.qmp import EventListener

from qmpnbd.errors import MonitorLostError, OutcomeUnknownError
from qmpnbd.qmp.commands import what_tells
from qmpnbd.qmp.process import Peer

T = TypeVar("T")

MAX_REPLY = 10 << 20
"""Bytes in one reply; qemu.qmp's own bound. The longest that is asked for here, the schema, has 240 KiB."""


class Transport(ABC):
    """A way to a monitor that is open; deadlines are the business of who calls.

    Attributes:
        where: the address, for messages.
        peer: QEMU's process if it is on this host and the kernel tells it, else None.
        is_local: whether QEMU is on this host for certain.
        passes_descriptors: whether file descriptors can be sent with commands.
        identity: equal for two connections to one running QEMU, as far as that can be told.
        is_polled: whether events are found out by asking: those that undo each other between two looks are not seen.
    """

    where: str
    peer: Peer | None
    is_local: bool
    passes_descriptors: bool
    identity: object
    is_polled: bool

    @abstractmethod
    async def execute(self, command: str, arguments: Mapping[str, object] | None, fd: int | None) -> object:
        """Sends a command, with a file descriptor if there is one, and returns its reply, decoded.

        Raises:
            CommandFailedError: QEMU refused it.
            MonitorLostError: the connection ended; `OutcomeUnknownError` if the command may have been carried out.
            UsageError: file descriptors cannot be sent this way.
        """

    @abstractmethod
    def listen(self, listener: EventListener) -> AbstractContextManager[None]:
        """Collects events in `listener` for a while.

        Raises:
            UsageError: events of such a name cannot be had this way.
        """

    @abstractmethod
    async def next_event(self, listener: EventListener) -> Mapping[str, object]:
        """Waits for the next event of `listener` and returns it as QMP has it: ``{"event": …, "data": …}``.

        Raises:
            MonitorLostError: the connection ended.
        """

    @abstractmethod
    def is_gone(self) -> bool:
        """Returns whether QEMU has ended for certain, and with it everything inside."""

    @abstractmethod
    async def close(self) -> None:
        """Ends the connection; never raises, and takes a bounded time."""


def lost(command: str, where: str, why: str = "the monitor connection ended") -> MonitorLostError:
    """Makes the error for a connection that ended while a command was under way.

    A command that changes something is never repeated: it may have been carried out, and QEMU must be asked.
    """
    asks = what_tells(command)
    if not asks:
        return MonitorLostError(f"{why} during {command}", where=where, remedy="See whether QEMU still runs.")
    return OutcomeUnknownError(command, asks, why, where=where)


async def in_daemon_thread(call: Callable[[], T], name: str) -> T:
    """Runs a blocking call in a thread that nobody waits for at the end: it knows no deadline.

    Args:
        call: what to run.
        name: the thread's.

    Raises:
        Exception: whatever `call` raised.
    """
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[T] = loop.create_future()

    def tell(set_outcome: Callable[[Any], None], value: object) -> None:
        if not outcome.done():
            set_outcome(value)

    def run() -> None:
        told: tuple[Callable[[Any], None], object]
        try:
            told = outcome.set_result, call()
        except Exception as error:
            told = outcome.set_exception, error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(tell, *told)

    threading.Thread(target=run, daemon=True, name=name).start()
    return await outcome
