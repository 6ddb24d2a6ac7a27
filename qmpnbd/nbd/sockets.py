"""Sockets for the blocking door: everything sent, exactly so much received, nothing waited for longer than allowed.

What both doors need of sockets is here as well: where received bytes lie, and how a failure of a socket is told.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import threading
import time
from queue import Empty, SimpleQueue
from typing import Any, Final, TypeAlias, TypeVar

from qmpnbd.deadline import Deadline
from qmpnbd.errors import DeadlineError, NbdConnectError, NbdDisconnectedError, QmpnbdError
from qmpnbd.nbd.uri import NbdUri
from qmpnbd.nbd.wire import Program, Receive, Received, Send

CONNECT_PATIENCE: Final = 10.0
"""Seconds to wait for a connection to be accepted, whatever time the caller has. A LAN needs milliseconds."""

RETRY_INTERVAL: Final = 0.02
"""Seconds between two tries to enter the full queue of a UNIX socket; the kernel has no way to wait for it."""

_LOOK: Final = 0.25  # seconds after which a wait looks whether its Deadline was told to stop
_BUFFER: Final = 64 * 1024  # bytes; headers are received with what follows them, larger payloads go past it

_T = TypeVar("_T")
Address: TypeAlias = tuple[socket.AddressFamily, Any]


class Inbox:
    """Bytes received: what came too early is kept, what is large goes straight to where it is wanted."""

    __slots__ = ("_buffer", "_early", "_end", "_start", "_target", "have")

    def __init__(self) -> None:
        self._buffer = memoryview(bytearray(_BUFFER))
        self._start = self._end = 0
        self._target = bytearray()
        self._early = False
        self.have = 0

    def ask(self, count: int) -> None:
        """Begins to collect `count` bytes."""
        self._target = bytearray(count)
        self.have = 0
        self._serve()

    @property
    def complete(self) -> bool:
        """Whether all bytes asked for are there."""
        return self.have == len(self._target)

    @property
    def asked(self) -> int:
        """Bytes asked for."""
        return len(self._target)

    def room(self) -> memoryview:
        """Returns where the next bytes are to be received; call `arrived` afterwards."""
        self._early = len(self._target) - self.have < _BUFFER
        return self._buffer if self._early else memoryview(self._target)[self.have :]

    def arrived(self, count: int) -> None:
        """Books `count` bytes received into `room`."""
        if self._early:
            self._start, self._end = 0, count
            self._serve()
        else:
            self.have += count

    def take(self) -> bytearray:
        """Returns the bytes asked for; they belong to the caller."""
        taken, self._target, self.have = self._target, bytearray(), 0
        return taken

    def _serve(self) -> None:
        count = min(len(self._target) - self.have, self._end - self._start)
        self._target[self.have : self.have + count] = self._buffer[self._start : self._start + count]
        self._start += count
        self.have += count


def connect_failed(error: OSError, where: str) -> NbdConnectError:
    """Makes the error for a socket that does not open."""
    if isinstance(error, socket.gaierror):
        return NbdConnectError(f"cannot find the host: {error.strerror}", where=where)
    remedy = {
        errno.ENOENT: "There is no such socket: is the server running, and is this its path?",
        errno.ECONNREFUSED: "Nobody listens there: the server has ended, or has not begun.",
        errno.EACCES: "The socket belongs to another user.",
        errno.EAGAIN: "The server's queue of connections is full: it accepts none.",
    }.get(error.errno or 0, "")
    return NbdConnectError(f"cannot connect: {error.strerror or error}", where=where, remedy=remedy)


def disconnected(what: str, inbox: Inbox | None, where: str, error: OSError | None = None) -> NbdDisconnectedError:
    """Makes the error for a connection that ended while something was due."""
    how = "the server closed the connection" if error is None else f"the connection broke ({error.strerror or error})"
    got = f" ({inbox.have} of {inbox.asked} bytes came)" if inbox is not None and inbox.have else ""
    return NbdDisconnectedError(f"{how} while {what} was due{got}", where=where)


def unix_address(uri: NbdUri) -> Address:
    """Returns the address of a UNIX socket, with the bytes of its path as they were given."""
    return socket.AF_UNIX, uri.path.encode("utf-8", "surrogateescape")


def new_socket(family: socket.AddressFamily) -> socket.socket:
    """Makes a socket that never blocks; small requests leave at once."""
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    if family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


class Stream:
    """A socket that sends all, receives exactly, and is never waited for longer than allowed."""

    def __init__(self, sock: socket.socket, where: str) -> None:
        self._sock = sock
        self._where = where
        self._inbox = Inbox()
        self._poll = select.poll()

    def perform(self, operation: Send | Receive, deadline: Deadline) -> Received:
        """Does what a program asks for.

        Raises:
            DeadlineError: the caller's time is over.
            TimeoutError: the operation's own patience is over.
            NbdDisconnectedError: the connection ended.
        """
        if isinstance(operation, Send):
            self._send(operation.data, deadline)
            return b""
        clock = deadline if operation.patience is None else deadline.within(operation.patience)
        try:
            return self._receive(operation.count, operation.what, clock)
        except DeadlineError as error:
            deadline.check(operation.what, self._where)
            raise TimeoutError(error.what) from error

    def wait(self, events: int, what: str, deadline: Deadline) -> None:
        """Returns when the socket is ready."""
        self._poll.register(self._sock, events)
        while True:
            left = deadline.remaining(what, self._where)
            if self._poll.poll(1000 * (_LOOK if left is None else min(left, _LOOK))):
                return

    def close(self) -> None:
        """Closes the socket."""
        self._sock.close()

    def shut_down(self) -> None:
        """Ends the conversation, so that whoever waits for the socket learns of it."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def _send(self, data: bytes, deadline: Deadline) -> None:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self._sock.send(rest) :]
            except BlockingIOError:
                self.wait(select.POLLOUT, "the server to take a request", deadline)
            except OSError as error:
                raise disconnected("a request", None, self._where, error) from error

    def _receive(self, count: int, what: str, deadline: Deadline) -> bytearray:
        self._inbox.ask(count)
        while not self._inbox.complete:
            try:
                got = self._sock.recv_into(self._inbox.room())
            except BlockingIOError:
                self.wait(select.POLLIN, what, deadline)
                continue
            except OSError as error:
                raise disconnected(what, self._inbox, self._where, error) from error
            if not got:
                raise disconnected(what, self._inbox, self._where)
            self._inbox.arrived(got)
        return self._inbox.take()


def _addresses(uri: NbdUri, clock: Deadline, where: str) -> list[Address]:
    """Finds the addresses of a host; in a thread, because a resolver cannot be told how long it may take."""
    if uri.transport == "unix":
        return [unix_address(uri)]
    found: SimpleQueue[list[Address] | OSError] = SimpleQueue()

    def resolve() -> None:
        try:
            answers = socket.getaddrinfo(uri.host, uri.port, type=socket.SOCK_STREAM)
            found.put([(family, address) for family, _, _, _, address in answers])
        except UnicodeError as error:  # the name cannot even be asked for
            found.put(socket.gaierror(socket.EAI_NONAME, str(error)))
        except OSError as error:
            found.put(error)

    threading.Thread(target=resolve, daemon=True, name="qmpnbd-resolve").start()
    while True:
        left = clock.remaining("the address of the host", where)
        with contextlib.suppress(Empty):
            addresses = found.get(timeout=_LOOK if left is None else min(left, _LOOK))
            if isinstance(addresses, OSError):
                raise connect_failed(addresses, where) from addresses
            return addresses


def _open(address: Address, clock: Deadline, where: str) -> Stream:
    """Connects to one address."""
    sock = new_socket(address[0])
    try:
        stream = Stream(sock, where)
        while (code := sock.connect_ex(address[1])) == errno.EAGAIN:
            left = clock.remaining("room in the server's queue", where)
            time.sleep(RETRY_INTERVAL if left is None else min(left, RETRY_INTERVAL))
        if code == errno.EINPROGRESS:
            stream.wait(select.POLLOUT, "the connection to be accepted", clock)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    except BaseException:
        sock.close()
        raise
    if code:
        sock.close()
        raise OSError(code, os.strerror(code))
    return stream


def open_stream(uri: NbdUri, deadline: Deadline, where: str) -> Stream:
    """Connects to the first address that accepts."""
    clock = deadline.within(CONNECT_PATIENCE)
    try:
        failure = OSError(errno.EADDRNOTAVAIL, "the host has no address")
        for address in _addresses(uri, clock, where):
            try:
                return _open(address, clock, where)
            except OSError as error:
                failure = error
        raise connect_failed(failure, where) from failure
    except DeadlineError as error:
        deadline.check("the connection to be accepted", where)
        raise NbdConnectError(f"nobody accepts the connection ({error.what})", where=where) from error


def drive(program: Program[_T], stream: Stream, deadline: Deadline) -> _T:
    """Does what a program asks for until it returns."""
    try:
        operation = next(program)
        while True:
            try:
                outcome = stream.perform(operation, deadline)
            except (QmpnbdError, TimeoutError) as error:
                operation = program.throw(error)
            else:
                operation = program.send(outcome)
    except StopIteration as stop:
        result: _T = stop.value
        return result
    finally:
        program.close()
