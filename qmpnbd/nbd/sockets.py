"""Sockets for the blocking door: everything sent, exactly so much received, nothing waited for longer than allowed.

How a failure of a socket is told is here for both doors.
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
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

from qmpnbd.deadline import Deadline
from qmpnbd.errors import DeadlineError, NbdConnectError, NbdTlsError, QmpnbdError
from qmpnbd.nbd import constants
from qmpnbd.nbd.channel import Channel
from qmpnbd.nbd.uri import NbdUri
from qmpnbd.nbd.wire import Program, Receive, Received, Send, StartTls

if TYPE_CHECKING:
    from qmpnbd.nbd.tls_socket import TlsSocket

CONNECT_PATIENCE: Final = 10.0
"""Seconds to wait for a connection to be accepted, whatever time the caller has. A LAN needs milliseconds."""

RETRY_INTERVAL: Final = 0.02
"""Seconds between two tries to enter the full queue of a UNIX socket; the kernel has no way to wait for it."""

_LOOK: Final = 0.25  # seconds after which a wait looks whether its Deadline was told to stop

_T = TypeVar("_T")
Address: TypeAlias = tuple[socket.AddressFamily, Any]


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


def unix_address(uri: NbdUri) -> Address:
    """Returns the address of a UNIX socket, with the bytes of its path as they were given."""
    return socket.AF_UNIX, uri.path.encode("utf-8", "surrogateescape")


def new_socket(family: socket.AddressFamily) -> socket.socket:
    """Makes a socket that never blocks; small requests leave at once."""
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    if family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


class Stream(Channel):
    """A channel that can be waited for, never longer than allowed."""

    def __init__(self, sock: socket.socket, where: str) -> None:
        super().__init__(sock, where)
        self._poll = select.poll()

    def perform(self, operation: Send | Receive | StartTls, deadline: Deadline) -> Received:
        """Does what a program of the handshake asks for.

        Raises:
            DeadlineError: the caller's time is over.
            TimeoutError: the operation's own patience is over.
            NbdDisconnectedError: the connection ended.
            NbdTlsError: TLS did not come about.
        """
        if isinstance(operation, StartTls):
            self._shake(self.start_tls(operation.tls), deadline)
            return b""
        if isinstance(operation, Send):
            self.push(operation.data, operation.payload)
            while not self.flush():
                self.wait(select.POLLOUT, "the server to take a request", deadline)
            return b""
        clock = deadline if operation.patience is None else deadline.within(operation.patience)
        try:
            while not self.receive(operation):
                self.wait(select.POLLIN, operation.what, clock)
        except DeadlineError as error:
            deadline.check(operation.what, self.where)
            raise TimeoutError(error.what) from error
        return self.take()

    def _shake(self, secure: TlsSocket, deadline: Deadline) -> None:
        what, clock = "the TLS handshake", deadline.within(constants.TLS_PATIENCE)
        try:
            while (events := secure.shake()) is not None:
                self.wait(events, what, clock)
        except DeadlineError as error:
            deadline.check(what, self.where)
            raise NbdTlsError("the server is silent in the middle of the TLS handshake", where=self.where) from error

    def wait(self, events: int, what: object, deadline: Deadline) -> None:
        """Returns when the socket is ready."""
        self._poll.register(self._sock, events)
        while True:
            left = deadline.remaining(what, self.where)
            if self._poll.poll(1000 * (_LOOK if left is None else min(left, _LOOK))):
                return


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
