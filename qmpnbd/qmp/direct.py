"""QEMU's own monitor socket: qemu.qmp, with the waits that it lacks.

A QMP socket serves one client at a time. The second one connects (the kernel accepts for QEMU) and then hears
nothing; so does a client of a stopped QEMU. qemu.qmp would wait for ever, and so would it for a server that is no
monitor and waits for us to speak. So the first byte is waited for here, before qemu.qmp takes the socket over::

    connect -> first byte '{' within 5 s -> greeting, capabilities (qemu.qmp) -> commands
                |          |
                |          `- something else: not a monitor
                `- nothing: taken by another client, or stopped
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import socket
from collections.abc import Awaitable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Self

from qemu.qmp import ConnectError, EventListener, ExecInterruptedError, ExecuteError, QMPClient, QMPError, StateError
from qemu.qmp.protocol import Runstate

from qmpnbd.deadline import Deadline
from qmpnbd.errors import (
    CommandFailedError,
    MonitorLostError,
    MonitorSilentError,
    NotAMonitorError,
    ReplyTooLongError,
    UsageError,
)
from qmpnbd.qmp.address import FdAddress, TcpAddress, UnixAddress
from qmpnbd.qmp.dialling import connect_error, connected
from qmpnbd.qmp.process import peer_of
from qmpnbd.qmp.transport import MAX_REPLY, Transport, lost

GREETING_SECONDS = 5.0
"""How long a monitor may take to greet; QEMU does it at once unless it is stopped or taken."""

CLOSE_SECONDS = 2.0
"""How long a polite goodbye may take; it waits for QEMU to read what was written."""

_LONGEST_EVENT = 65536


class DirectTransport(Transport):
    """A monitor socket; made by `connect`."""

    is_polled = False

    def __init__(self, client: QMPClient, sock: socket.socket, where: str) -> None:
        self._client = client
        self._socket = sock
        self._sending_fd = asyncio.Lock()
        self.where = where
        self.passes_descriptors = sock.family == socket.AF_UNIX
        self.peer = self.identity = peer_of(sock)
        self.is_local = sock.family == socket.AF_UNIX or _is_loopback(sock)

    @classmethod
    async def connect(cls, address: UnixAddress | TcpAddress | FdAddress, deadline: Deadline) -> Self:
        """Connects and negotiates; the greeting alone must come within `GREETING_SECONDS`.

        Raises:
            UsageError: not a socket.
            MonitorConnectError: nothing to connect to.
            NotAMonitorError: what answers does not speak QMP.
            MonitorSilentError: no greeting.
            DeadlineError: `deadline` passed.
        """
        where = str(address)
        greeting = deadline.within(GREETING_SECONDS)
        try:
            sock = await connected(address, greeting, where)
        except TimeoutError:
            raise _silent(where, greeting.seconds) from None
        client = QMPClient("qmpnbd", MAX_REPLY)
        # The default listener keeps every event for ever; only short-lived listeners are used here.
        client.events.event_filter = lambda _event: False
        try:
            async with asyncio.timeout(greeting.remaining("the QMP greeting", where)):
                await _past_events(sock, where)
                await client.connect(sock)
        except TimeoutError:
            sock.close()
            raise _silent(where, greeting.seconds) from None
        except ConnectError as error:
            sock.close()
            raise NotAMonitorError(
                f"not a QMP monitor: {error.exc}", where=where, remedy="Give the socket of QEMU's -qmp option."
            ) from error
        except BaseException:
            sock.close()
            raise
        return cls(client, sock, where)

    async def execute(self, command: str, arguments: Mapping[str, object] | None, fd: int | None) -> object:
        """See `Transport.execute`."""
        try:
            if fd is None:
                return await self._client.execute(command, arguments)
            return await self._execute_with(fd, command, arguments)
        except ExecuteError as error:
            raise CommandFailedError(command, error.error_class, str(error), where=self.where) from error
        except (ExecInterruptedError, StateError, QMPError, EOFError, OSError) as error:
            raise await self._lost(command) from error

    async def _execute_with(self, fd: int, command: str, arguments: Mapping[str, object] | None) -> object:
        if not self.passes_descriptors:
            raise UsageError(
                "file descriptors cannot be passed over TCP", where=self.where, remedy="Use a UNIX socket as monitor."
            )
        # QEMU takes the descriptor that came last, so nobody else may send one until it has been taken.
        async with self._sending_fd:
            self._client.send_fd_scm(fd)
            return await self._client.execute(command, arguments)

    async def _lost(self, command: str) -> MonitorLostError:
        """Finds out why the connection ended: only `disconnect` tells, and there only the first time."""
        cause = await self._disconnect()
        if isinstance(cause, ValueError):  # asyncio.StreamReader: no end of line within its limit
            return ReplyTooLongError(
                f"the reply to {command} is longer than {MAX_REPLY >> 20} MiB",
                where=self.where,
                remedy="Ask for less; a graph of that many nodes cannot be worked on.",
            )
        return lost(command, self.where)

    def listen(self, listener: EventListener) -> AbstractContextManager[None]:
        """See `Transport.listen`; every event can be had."""
        return self._client.listen(listener)

    async def next_event(self, listener: EventListener) -> Mapping[str, object]:
        """See `Transport.next_event`; a listener of qemu.qmp alone would wait for ever for a QEMU that has ended."""
        event = asyncio.ensure_future(listener.get())
        ended = asyncio.ensure_future(self._ended())
        try:
            await asyncio.wait({event, ended}, return_when=asyncio.FIRST_COMPLETED)
            if event.done():
                return event.result()
            raise MonitorLostError("the monitor connection ended", where=self.where)
        finally:
            await _drop(event, ended)

    async def _ended(self) -> None:
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()

    def is_gone(self) -> bool:
        """See `Transport.is_gone`."""
        return self.peer is not None and self.peer.has_ended()

    async def close(self) -> None:
        """See `Transport.close`; takes at most a few seconds even if QEMU does not read."""
        await self._disconnect()

    async def _disconnect(self) -> Exception | None:
        """Disconnects, politely first; returns what ended the connection if it has ended by itself."""
        goodbye = asyncio.ensure_future(_outcome(self._client.disconnect()))
        done, _ = await asyncio.wait({goodbye}, timeout=CLOSE_SECONDS)
        if not done:
            # Ends the pending reads and writes of qemu.qmp, which wait for a QEMU that does not read.
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            await asyncio.wait({goodbye}, timeout=CLOSE_SECONDS)
        cause = goodbye.result() if goodbye.done() else None
        await _drop(goodbye)
        return cause


async def _outcome(work: Awaitable[object]) -> Exception | None:
    # After a death of QEMU, disconnect() raises the cause, of any type.
    try:
        await work
    except Exception as error:
        return error
    return None


async def _drop(*futures: asyncio.Future[Any]) -> None:
    for future in futures:
        future.cancel()
    await asyncio.gather(*futures, return_exceptions=True)


async def _past_events(sock: socket.socket, where: str) -> None:
    """Waits until the peer has said something; events before it are dropped.

    A monitor that somebody has just left may tell the next client what happens before it greets (seen with 10.0).
    """
    await _first_byte(sock, where)
    while _is_event(said := _peeked(sock, _LONGEST_EVENT, where).partition(b"\n")):
        sock.recv(len(said[0]) + 1)
        await _first_byte(sock, where)


def _is_event(said: tuple[bytes, bytes, bytes]) -> bool:
    line, end, _ = said
    if not end:
        return False
    try:
        told = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(told, dict) and "event" in told


async def _first_byte(sock: socket.socket, where: str) -> None:
    """Waits until the peer has said something, and leaves it in the socket."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(sock, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(sock)
    first = _peeked(sock, 1, where)
    if first != b"{":
        said = "it closed the connection" if not first else f"it began with {first!r}"
        raise NotAMonitorError(
            f"not a QMP monitor: {said}", where=where, remedy="Give the socket of QEMU's -qmp option."
        )


def _peeked(sock: socket.socket, count: int, where: str) -> bytes:
    try:
        return sock.recv(count, socket.MSG_PEEK)
    except OSError as error:
        raise connect_error(error, where) from error


def _silent(where: str, seconds: float | None) -> MonitorSilentError:
    return MonitorSilentError(
        f"no greeting within {seconds:g} s",
        where=where,
        remedy="Another client holds this monitor (it serves one at a time), or QEMU is stopped, or it is no monitor. "
        "Give QEMU a second -qmp socket for qmpnbd.",
    )


def _is_loopback(sock: socket.socket) -> bool:
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    return ipaddress.ip_address(sock.getpeername()[0].partition("%")[0]).is_loopback
