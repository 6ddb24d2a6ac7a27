"""The door to a QEMU monitor: qemu.qmp, with a bound on every wait.

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
import socket
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

from qemu.qmp import ConnectError, EventListener, ExecInterruptedError, ExecuteError, QMPClient, QMPError, StateError
from qemu.qmp.protocol import Runstate

from qmpnbd.deadline import Deadline
from qmpnbd.errors import (
    CommandFailedError,
    MonitorConnectError,
    MonitorLostError,
    MonitorSilentError,
    NotAMonitorError,
)
from qmpnbd.qmp.address import MonitorAddress, TcpAddress, UnixAddress, parse_address
from qmpnbd.qmp.models import VersionInfo, parse_reply
from qmpnbd.qmp.process import peer_of

T = TypeVar("T")

GREETING_SECONDS = 5.0
"""How long a monitor may take to greet; QEMU does it at once unless it is stopped or taken."""

CLOSE_SECONDS = 2.0
"""How long a polite goodbye may take; it waits for QEMU to read what was written."""

_RETRY_SECONDS = 0.05


async def finish(work: Coroutine[Any, Any, T]) -> T:
    """Runs `work` to its end even if the caller is cancelled meanwhile; the cancellation is raised afterwards.

    For what must not be left half done: starting something in QEMU whose outcome decides what to take down, and
    taking it down.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        task.exception()  # looked at, so that asyncio does not complain; the cancellation is the news
        raise cancelled
    return task.result()


class Monitor:
    """A connected monitor; made by `connect`, closed by `close` or at the end of an ``async with``.

    Attributes:
        where: the address, for messages.
        version: QEMU's version.
        peer: QEMU's process if it is on this host and the kernel tells it, else None.
        is_local: whether QEMU is on this host for certain.
    """

    def __init__(self, client: QMPClient, sock: socket.socket, where: str) -> None:
        self._client = client
        self._socket = sock
        self.where = where
        self.peer = peer_of(sock)
        self.is_local = sock.family == socket.AF_UNIX or _is_loopback(sock)
        self._version: VersionInfo | None = None

    @classmethod
    async def connect(cls, address: MonitorAddress | str, deadline: Deadline) -> Self:
        """Connects and negotiates.

        Args:
            address: where the monitor listens, parsed or as people write it (`qmpnbd.qmp.address.parse_address`).
            deadline: for all of it; the greeting alone must come within `GREETING_SECONDS`.

        Raises:
            UsageError: not an address.
            MonitorConnectError: nothing to connect to.
            NotAMonitorError: what answers does not speak QMP.
            MonitorSilentError: no greeting.
            DeadlineError: `deadline` passed.
        """
        target = parse_address(address) if isinstance(address, str) else address
        where = str(target)
        greeting = deadline.within(GREETING_SECONDS)
        sock = await _connect(target, greeting, where)
        client = QMPClient("qmpnbd")
        # The default listener keeps every event for ever; only short-lived listeners are used here.
        client.events.event_filter = lambda _event: False
        try:
            async with asyncio.timeout(greeting.remaining("the QMP greeting", where)):
                await _first_byte(sock, where)
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
        monitor = cls(client, sock, where)
        try:
            reply = await monitor.execute("query-version", deadline=deadline)
            monitor._version = parse_reply(VersionInfo, reply, command="query-version", where=where)
        except BaseException:
            await monitor.close()
            raise
        return monitor

    @property
    def version(self) -> VersionInfo:
        """QEMU's version, asked once when connecting."""
        if self._version is None:
            raise MonitorLostError("the connection was not made to its end", where=self.where)
        return self._version

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, deadline: Deadline
    ) -> object:
        """Sends a command and returns its reply, decoded.

        Raises:
            CommandFailedError: QEMU refused it.
            MonitorLostError: the connection ended; whether the command was carried out is unknown.
            DeadlineError: no reply in time; the command may still be carried out.
        """
        seconds = deadline.remaining(f"QEMU's reply to {command}", self.where)
        try:
            async with asyncio.timeout(seconds):
                return await self._client.execute(command, dict(arguments) if arguments is not None else None)
        except TimeoutError:
            raise deadline.expired(f"QEMU's reply to {command}", self.where) from None
        except ExecuteError as error:
            raise CommandFailedError(command, error.error_class, str(error), where=self.where) from error
        except (ExecInterruptedError, StateError, QMPError, EOFError, OSError) as error:
            raise MonitorLostError(
                f"the monitor connection ended during {command}",
                where=self.where,
                remedy="See whether QEMU still runs; what was pending may or may not have happened.",
            ) from error

    @property
    def passes_descriptors(self) -> bool:
        """Whether open files can be handed over this connection."""
        return self._socket.family == socket.AF_UNIX

    async def pass_descriptor(self, descriptor: int, name: str, deadline: Deadline) -> None:
        """Hands QEMU an open file, which its later commands call `name`; ours stays open.

        Not for two tasks at once: QEMU gives ``getfd`` the file that came last.

        Raises:
            CommandFailedError: QEMU refused; of class ``CommandNotFound`` if it takes none (the storage daemon).
            MonitorLostError: the connection ended.
            DeadlineError: no reply in time.
        """
        # Also asks whether QEMU takes files at all: one that was sent for nothing would stay open in it.
        try:
            await self.execute("closefd", {"fdname": name}, deadline=deadline)
        except CommandFailedError as error:
            if error.error_class == "CommandNotFound":
                raise
        try:
            self._client.send_fd_scm(descriptor)
        except (QMPError, OSError, AssertionError) as error:
            raise MonitorLostError("the monitor connection ended", where=self.where) from error
        await self.execute("getfd", {"fdname": name}, deadline=deadline)

    @contextlib.contextmanager
    def events(self, name: str) -> Iterator[EventListener]:
        """Collects the events of one name from here on; enter it before the command that causes them."""
        with self._client.listen(listener := EventListener(name)):
            yield listener

    async def next_event(self, listener: EventListener, what: str, deadline: Deadline) -> Mapping[str, object]:
        """Returns the data of the next event of `listener`.

        Args:
            listener: from `events`.
            what: what is waited for, for messages.
            deadline: how long.

        Raises:
            MonitorLostError: the connection ended; a listener alone would wait for ever.
            DeadlineError: none came in time.
        """
        event = asyncio.ensure_future(listener.get())
        ended = asyncio.ensure_future(self._ended())
        try:
            seconds = deadline.remaining(what, self.where)
            await asyncio.wait({event, ended}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if event.done():
                data = event.result().get("data")
                return data if isinstance(data, dict) else {}
            if ended.done():
                raise MonitorLostError(f"the monitor connection ended while waiting for {what}", where=self.where)
            raise deadline.expired(what, self.where)
        finally:
            await _drop(event, ended)

    async def _ended(self) -> None:
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()

    def is_gone(self) -> bool:
        """Returns whether QEMU's process has ended for certain, and with it everything inside."""
        return self.peer is not None and self.peer.has_ended()

    async def close(self) -> None:
        """Ends the connection; never raises, and takes at most a few seconds even if QEMU does not read."""
        await finish(self._close())

    async def _close(self) -> None:
        goodbye = asyncio.ensure_future(_quietly(self._client.disconnect()))
        done, _ = await asyncio.wait({goodbye}, timeout=CLOSE_SECONDS)
        if not done:
            # Ends the pending reads and writes of qemu.qmp, which wait for a QEMU that does not read.
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            await asyncio.wait({goodbye}, timeout=CLOSE_SECONDS)
        await _drop(goodbye)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


async def _quietly(work: Awaitable[object]) -> None:
    # After a death of QEMU, disconnect() raises the cause, of any type; execute() has told it already.
    with contextlib.suppress(Exception):
        await work


async def _drop(*futures: asyncio.Future[Any]) -> None:
    for future in futures:
        future.cancel()
    await asyncio.gather(*futures, return_exceptions=True)


async def _connect(target: MonitorAddress, deadline: Deadline, where: str) -> socket.socket:
    try:
        async with asyncio.timeout(deadline.remaining("the connection to the monitor", where)):
            if isinstance(target, UnixAddress):
                return await _opened(socket.AF_UNIX, partial(_connect_unix, path=target.path))
            failure = OSError("the host has no address")
            for family, endpoint in await _addresses(target):
                try:
                    return await _opened(family, partial(_connect_tcp, endpoint=endpoint))
                except OSError as error:
                    failure = error
            raise failure
    except TimeoutError:
        if isinstance(target, UnixAddress):
            raise _silent(where, deadline.seconds) from None
        raise MonitorConnectError(
            f"no connection within {deadline.seconds:g} s", where=where, remedy="See whether the host can be reached."
        ) from None
    except OSError as error:
        raise _connect_error(error, where) from error


async def _addresses(target: TcpAddress) -> list[tuple[socket.AddressFamily, Any]]:
    """Finds the addresses of a host in a thread that nobody waits for at the end: a resolver knows no deadline."""
    loop = asyncio.get_running_loop()
    found: asyncio.Future[list[tuple[socket.AddressFamily, Any]]] = loop.create_future()

    def tell(outcome: list[tuple[socket.AddressFamily, Any]] | OSError) -> None:
        if found.done():
            return
        if isinstance(outcome, OSError):
            found.set_exception(outcome)
        else:
            found.set_result(outcome)

    def resolve() -> None:
        outcome: list[tuple[socket.AddressFamily, Any]] | OSError
        try:
            answers = socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
            outcome = [(family, endpoint) for family, _, _, _, endpoint in answers]
        except OSError as error:
            outcome = error
        except UnicodeError as error:
            outcome = OSError(str(error))
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(tell, outcome)

    threading.Thread(target=resolve, daemon=True, name="qmpnbd-resolve").start()
    return await found


async def _opened(family: socket.AddressFamily, connect: Callable[[socket.socket], Awaitable[None]]) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        await connect(sock)
    except BaseException:
        sock.close()
        raise
    return sock


async def _connect_tcp(sock: socket.socket, endpoint: Any) -> None:
    await asyncio.get_running_loop().sock_connect(sock, endpoint)


async def _connect_unix(sock: socket.socket, path: str) -> None:
    while True:
        try:
            sock.connect(path)
        except BlockingIOError:
            # The queue of a listener that accepts nobody is full, and nothing tells when it is not: try again.
            await asyncio.sleep(_RETRY_SECONDS)
        else:
            return


def _connect_error(error: OSError, where: str) -> MonitorConnectError:
    if isinstance(error, FileNotFoundError):
        return MonitorConnectError(
            "no such socket", where=where, remedy="Start QEMU with -qmp unix:PATH,server=on,wait=off, or correct PATH."
        )
    if isinstance(error, ConnectionRefusedError):
        return MonitorConnectError("nobody listens there", where=where, remedy="See whether QEMU still runs.")
    if isinstance(error, PermissionError):
        return MonitorConnectError("permission denied", where=where, remedy="Run as the user of QEMU, or as root.")
    return MonitorConnectError(
        f"cannot connect: {error.strerror or error}", where=where, remedy="Give the socket of QEMU's -qmp option."
    )


async def _first_byte(sock: socket.socket, where: str) -> None:
    """Waits until the peer has said something, and leaves it in the socket."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(sock, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(sock)
    try:
        first = sock.recv(1, socket.MSG_PEEK)
    except OSError as error:
        raise _connect_error(error, where) from error
    if first != b"{":
        said = "it closed the connection" if not first else f"it began with {first!r}"
        raise NotAMonitorError(
            f"not a QMP monitor: {said}", where=where, remedy="Give the socket of QEMU's -qmp option."
        )


def _silent(where: str, seconds: float | None) -> MonitorSilentError:
    return MonitorSilentError(
        f"no greeting within {seconds:g} s",
        where=where,
        remedy="Another client holds this monitor (it serves one at a time), or QEMU is stopped, or it is no monitor. "
        "Give QEMU a second -qmp socket for qmpnbd.",
    )


def _is_loopback(sock: socket.socket) -> bool:
    return ipaddress.ip_address(sock.getpeername()[0].partition("%")[0]).is_loopback
