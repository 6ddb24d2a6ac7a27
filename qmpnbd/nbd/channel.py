"""A connected socket that is never waited for: bytes go out as far as the kernel takes them, and come in as they are.

What both doors have in common: waiting is theirs, everything else about a socket is here. `Channel` knows what is
still to be sent and what came too early; `Pump` turns what came into messages, one at a time. Both can be left at any
byte and taken up again there, which is why a call that ran out of time does not cost the connection.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Final

from qmpnbd.errors import NbdDisconnectedError, NbdProtocolError
from qmpnbd.nbd import constants
from qmpnbd.nbd.connection import Connection
from qmpnbd.nbd.requests import Look, ReceiveInto, Reception
from qmpnbd.nbd.tls import Tls
from qmpnbd.nbd.wire import Buffer, Receive, Received

if TYPE_CHECKING:
    from qmpnbd.nbd.tls_socket import TlsSocket

_BUFFER: Final = constants.LOOK_AHEAD  # bytes; larger payloads go past it
_SPARE: Final = 64  # bytes; more than precedes any payload
_PIECES: Final = 1024  # of what is to be sent, at a time: IOV_MAX of Linux
_NOTHING: Final = memoryview(b"")


class Inbox:
    """Bytes received: what came too early is kept, what is large goes straight to where it is wanted."""

    __slots__ = ("_buffer", "_early", "_end", "_made", "_spare", "_start", "_target", "asked", "have", "operation")

    def __init__(self) -> None:
        self._buffer = memoryview(bytearray(_BUFFER))
        self._spare = self._buffer[:_SPARE]
        self._start = self._end = 0
        self._target = _NOTHING
        self._made: Received = b""
        self._early = False
        self.operation: Receive | ReceiveInto | None = None
        self.asked = 0
        self.have = 0

    def ask(self, operation: Receive | ReceiveInto) -> None:
        """Begins to collect what an operation asks for."""
        self.operation = operation
        self.asked = operation.count
        self.have = 0
        if isinstance(operation, Receive):
            self._made = bytearray(operation.count)
            self._target = memoryview(self._made)
        else:
            self._start += operation.skip
            if operation.buffer is not None:
                self._target = operation.buffer
        if self._start < self._end:
            self._serve()

    @property
    def complete(self) -> bool:
        """Whether all bytes asked for are there."""
        return self.have == self.asked

    @property
    def early(self) -> int:
        """Bytes received that nobody has asked for yet."""
        return self._end - self._start

    def ahead(self) -> memoryview:
        """Returns what came and was not asked for yet; it stays there."""
        return self._buffer[self._start : self._end]

    def more_room(self) -> memoryview:
        """Returns where bytes behind the early ones are to be received; call `more` afterwards."""
        if self._start:
            count = self._end - self._start
            self._buffer[:count] = bytes(self.ahead())
            self._start, self._end = 0, count
        return self._buffer[self._end :]

    def more(self, count: int) -> None:
        """Books `count` bytes received into `more_room`."""
        self._end += count

    def rooms(self) -> list[memoryview]:
        """Returns where the next bytes are to be received, in this order; call `arrived` afterwards.

        What is large goes straight to where it is wanted, and room is left for what precedes the next large payload.
        """
        self._early = self.asked < _BUFFER or self._dropping
        if self._early:
            return [self._buffer]
        return [self._target[self.have :] if self.have else self._target, self._spare]

    def arrived(self, count: int) -> None:
        """Books `count` bytes received into `rooms`."""
        if self._early:
            self._start, self._end = 0, count
            self._serve()
            return
        self.have += count
        if self.have > self.asked:
            self._start, self._end = 0, self.have - self.asked
            self.have = self.asked

    def take(self) -> Received:
        """Returns the bytes asked for, which belong to the caller; nothing if they went to a place of their own."""
        taken = self._made
        self.operation, self._made, self._target, self.asked, self.have = None, b"", _NOTHING, 0, 0
        return taken

    @property
    def _dropping(self) -> bool:
        """Whether nobody wants the bytes any more; that may be decided while they arrive."""
        operation = self.operation
        return isinstance(operation, ReceiveInto) and operation.buffer is None

    def _serve(self) -> None:
        count = min(self.asked - self.have, self._end - self._start)
        if not self._dropping:
            self._target[self.have : self.have + count] = self._buffer[self._start : self._start + count]
        self._start += count
        self.have += count


def disconnected(what: object, inbox: Inbox | None, where: str, error: OSError | None = None) -> NbdDisconnectedError:
    """Makes the error for a connection that ended while something was due."""
    how = "the server closed the connection" if error is None else f"the connection broke ({error.strerror or error})"
    got = f" ({inbox.have} of {inbox.asked} bytes came)" if inbox is not None and inbox.have else ""
    return NbdDisconnectedError(f"{how} while {what} was due{got}", where=where)


class Channel:
    """A non-blocking socket with what is on its way.

    Attributes:
        where: server and export, for messages.
        sent: bytes sent.
        received: bytes received.
    """

    def __init__(self, sock: socket.socket, where: str) -> None:
        self._sock: socket.socket | TlsSocket = sock
        self._shows_all = True  # whatever could be received shows at the socket
        self._inbox = Inbox()
        self._outgoing: deque[memoryview] = deque()
        self.where = where
        self.sent = 0
        self.received = 0

    def push(self, *data: Buffer) -> None:
        """Has data sent, after what was pushed before; `flush` does it."""
        self._outgoing.extend(memoryview(piece).cast("B") for piece in data if len(piece))

    def flush(self) -> bool:
        """Sends what the socket takes; whether nothing is left.

        Raises:
            NbdDisconnectedError: the connection ended.
        """
        outgoing = self._outgoing
        while outgoing:
            try:
                some = list(islice(outgoing, _PIECES))
                count = self._sock.sendmsg(some) if len(some) > 1 else self._sock.send(some[0])
            except BlockingIOError:
                return False
            except OSError as error:
                raise disconnected("a request", None, self.where, error) from error
            self.sent += count
            while outgoing and count >= len(outgoing[0]):
                count -= len(outgoing.popleft())
            if count:
                outgoing[0] = outgoing[0][count:]
        return True

    def keep(self) -> None:
        """Copies what is still to be sent, because its owner does not wait for it any more."""
        self._outgoing = deque(memoryview(bytes(piece)) for piece in self._outgoing)

    def look(self, operation: Look) -> memoryview | None:
        """Returns what arrived, None if it is not enough yet.

        Raises:
            NbdDisconnectedError: the connection ended.
        """
        inbox = self._inbox
        while len(ahead := inbox.ahead()) < operation.count:
            room = inbox.more_room()[: operation.most - len(ahead)]
            got = self._receive_into([room], operation.what)
            if not got:
                return None
            inbox.more(got)
        return ahead

    def receive(self, operation: Receive | ReceiveInto) -> bool:
        """Receives what is there; whether the operation is complete. Call it with the same one until it is.

        Raises:
            NbdDisconnectedError: the connection ended.
        """
        inbox = self._inbox
        if operation is not inbox.operation:
            inbox.ask(operation)
        while not (complete := inbox.have == inbox.asked):
            rooms = inbox.rooms()
            got = self._receive_into(rooms, operation.what)
            if not got:
                return False
            inbox.arrived(got)
            if got < len(rooms[0]) and self._shows_all:
                return inbox.complete  # the socket is empty: asking it once more would only cost time
        return complete

    def _receive_into(self, rooms: list[memoryview], what: object) -> int:
        """Receives what is there; 0 if there is nothing."""
        try:
            got = self._sock.recv_into(rooms[0]) if len(rooms) == 1 else self._sock.recvmsg_into(rooms)[0]
        except BlockingIOError:
            return 0
        except OSError as error:
            raise disconnected(what, self._inbox, self.where, error) from error
        if not got:
            raise disconnected(what, self._inbox, self.where)
        self.received += got
        return got

    def take(self) -> Received:
        """Returns what the complete operation received."""
        return self._inbox.take()

    def start_tls(self, tls: Tls) -> TlsSocket:
        """Puts TLS between the socket and everything else, for the door to see through its handshake.

        Raises:
            NbdProtocolError: something came in clear that must not be taken for something that came over TLS.
            NbdTlsError: certificates or secrets cannot be read.
            NbdUnsupportedError: this Python has not that kind of TLS.
        """
        from qmpnbd.nbd.tls_socket import TlsSocket  # noqa: PLC0415 - OpenSSL takes a while to load

        if self._inbox.early or self._outgoing:
            raise NbdProtocolError(f"{self._inbox.early} bytes in clear where TLS was to begin", where=self.where)
        if isinstance(self._sock, TlsSocket):
            raise TypeError("TLS begins once")
        secure = TlsSocket(self._sock, tls, self.where)
        self._sock, self._shows_all = secure, False
        return secure

    def duplicate(self) -> int:
        """Returns a descriptor of the same socket, for the caller to close."""
        return os.dup(self._sock.fileno())

    def close(self) -> None:
        """Closes the socket."""
        self._outgoing.clear()
        self._sock.close()

    def shut_down(self) -> None:
        """Ends the conversation, so that whoever waits for the socket learns of it."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)


class Pump:
    """Makes messages of what arrives, and has the connection book them."""

    def __init__(self, connection: Connection, channel: Channel) -> None:
        self._connection = connection
        self._channel = channel
        self._program: Reception | None = None
        self._due: Receive | ReceiveInto | Look | None = None

    def advance(self) -> bool:
        """Goes on with what has arrived; whether a message is complete. The connection is dead after an error.

        Raises:
            NbdDisconnectedError: the connection ended.
            NbdProtocolError: the server broke the protocol.
        """
        try:
            if self._program is None:
                self._program = self._connection.receive()
                self._due = next(self._program)
            while self._due is not None:
                if isinstance(self._due, Look):
                    early = self._channel.look(self._due)
                    if early is None:
                        return False
                    self._due = self._program.send(early)
                elif self._channel.receive(self._due):
                    self._due = self._program.send(self._channel.take())
                else:
                    return False
        except StopIteration:
            self._program = self._due = None
            return True
        except BaseException:
            self._program = self._due = None
            self._connection.lose()
            raise
        return False

    def stop(self) -> None:
        """Forgets a message that was begun; there will be no more."""
        self._program = self._due = None
