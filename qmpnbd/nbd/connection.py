"""The transmission phase: requests go out, chunks come back, and each is matched by its cookie.

::

                 request()                     event()                      event()
    cookie 1   ------------->  pending   <-- BLOCK_STATUS chunk  ...   <-- chunk with DONE   ---> finished
                                                                                                    |
                                         <-- a late chunk of cookie 1: skipped by its length  <-----+
                                         <-- a cookie nobody knows: the connection is dead

The connection is the one place that knows what state the conversation is in; what it yields is for a door to do (see
`qmpnbd.nbd.wire`). Replies are events keyed by cookie, so nothing here depends on how many requests are in flight.

Late chunks are real: with two metadata contexts, QEMU (5.2 to 10.0) answers a request that failed for the first
context with an error chunk that says DONE, and goes on to send the chunk of the second one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from qmpnbd.errors import NbdDisconnectedError, NbdProtocolError, NbdRequestError, NbdUnsupportedError, UsageError
from qmpnbd.nbd import constants, wire
from qmpnbd.nbd.constants import ChunkFlag, ChunkType, Command, TransmissionFlag, WireError
from qmpnbd.nbd.handshake import Export
from qmpnbd.nbd.wire import Program, Receive, Received, Send


class State(Enum):
    """What may still be said."""

    OPEN = auto()
    DRAINING = auto()  # the server is shutting down: take leave, nothing else
    CLOSED = auto()  # we took leave
    DEAD = auto()  # the stream cannot be trusted or is gone


_NEXT: Final = {
    State.OPEN: {State.DRAINING, State.CLOSED, State.DEAD},
    State.DRAINING: {State.DRAINING, State.CLOSED, State.DEAD},
    State.CLOSED: {State.CLOSED, State.DEAD},
    State.DEAD: {State.DEAD},
}


@dataclass(slots=True)
class Request:
    """A request on its way.

    Attributes:
        command: what was asked.
        offset: first byte.
        length: bytes.
        chunks: how many came so far, late ones included.
        failure: the first error the server sent.
    """

    command: Command
    offset: int
    length: int
    chunks: int = 0
    failure: Failure | None = None

    def __str__(self) -> str:
        at = f" [{self.offset:#x}, {self.offset + self.length:#x})" if self.length else ""
        return f"NBD_CMD_{self.command.name}{at}"


@dataclass(frozen=True, slots=True)
class Status:
    """A BLOCK_STATUS chunk.

    Attributes:
        context_id: the metadata context, by its id.
        entries: big-endian pairs of 32-bit length and 32-bit status, at least one.
    """

    context_id: int
    entries: memoryview


@dataclass(frozen=True, slots=True)
class Failure:
    """An error chunk, or a simple reply that says no.

    Attributes:
        wire_error: the error number as sent.
        message: the server's words, printable; may be empty.
        offset: the byte it is about, if the server told.
    """

    wire_error: int
    message: str = ""
    offset: int | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """What one message of the server means.

    Attributes:
        cookie: the request it belongs to.
        request: that request.
        content: what it brought, if anything.
        done: whether the request is finished.
    """

    cookie: int
    request: Request
    content: Status | Failure | None
    done: bool


class Connection:
    """The conversation about one export after the handshake.

    Args:
        export: what was agreed.
        where: server and export, for messages.
    """

    def __init__(self, export: Export, where: str) -> None:
        self.export = export
        self.where = where
        self._state = State.OPEN
        self._pending: dict[int, Request] = {}
        self._finished: OrderedDict[int, Request] = OrderedDict()
        self._last_cookie = 0  # counts up and never wraps in practice: no cookie is used twice

    @property
    def state(self) -> State:
        """What may still be said."""
        return self._state

    @property
    def in_step(self) -> bool:
        """Whether the next byte from the server is the first one of an answer to a request not yet made."""
        return self._state in {State.OPEN, State.DRAINING} and not self._pending

    @property
    def busy(self) -> bool:
        """Whether somebody is waiting for an answer."""
        return self._state in {State.OPEN, State.DRAINING} and bool(self._pending)

    def lose(self) -> None:
        """Declares the connection dead, for instance because the socket is gone."""
        self._become(State.DEAD)

    def closed(self) -> None:
        """Books that we closed, with leave taken or without."""
        if self._state is not State.DEAD:
            self._become(State.CLOSED)

    def violation(self, what: str) -> NbdProtocolError:
        """Declares the connection dead because the server broke the protocol, and makes the error that says how."""
        self._become(State.DEAD)
        return NbdProtocolError(what, where=self.where)

    def call(self, command: Command, offset: int, length: int, take: Callable[[Status], None]) -> Program[None]:
        """Makes one request and sees it through.

        Args:
            command: what to ask.
            offset: first byte.
            length: bytes.
            take: is given each status as it comes.

        Raises:
            NbdRequestError: the request failed; the connection can be used further.
            NbdProtocolError: the server broke the protocol.
            NbdDisconnectedError: the server is shutting down, or the connection was lost before.
            UsageError: another request is under way, or the connection is closed.
        """
        if self._pending:
            raise UsageError("another request is under way on this connection", where=self.where)
        yield from self.request(command, offset, length)
        done = False
        while not done:
            event = yield from self.event()
            if isinstance(event.content, Status):
                take(event.content)
            done = event.done
        if event.request.failure is not None:
            raise self._failed(event.request, event.request.failure)

    def flush(self) -> Program[None]:
        """Asks for everything written to be made durable ("Request types", NBD_CMD_FLUSH).

        Raises:
            NbdUnsupportedError: the export does not offer it.
            NbdRequestError: it failed at the server.
        """
        if not self.export.flags & TransmissionFlag.SEND_FLUSH:
            raise NbdUnsupportedError("the export offers no flush", where=self.where)
        return (yield from self.call(Command.FLUSH, 0, 0, self._no_status))

    def disconnect(self) -> Program[None]:
        """Takes leave if there is anybody to take leave of; no answer comes ("Terminating the transmission phase")."""
        if self._state in {State.OPEN, State.DRAINING}:
            self._become(State.CLOSED)
            self._last_cookie += 1
            yield Send(wire.RequestHeader(Command.DISC, self._last_cookie).pack())

    def request(self, command: Command, offset: int, length: int) -> Program[int]:
        """Sends one request and returns its cookie.

        Raises:
            UsageError: the connection is closed.
            NbdDisconnectedError: the server is shutting down, or the connection was lost before.
        """
        if self._state is State.CLOSED:
            raise UsageError("the connection is closed", where=self.where)
        if self._state is not State.OPEN:
            why = "the server is shutting down" if self._state is State.DRAINING else "the connection was lost before"
            raise NbdDisconnectedError(why, where=self.where)
        self._last_cookie += 1
        cookie = self._last_cookie
        self._pending[cookie] = Request(command, offset, length)
        yield Send(wire.RequestHeader(command, cookie, offset, length).pack())
        return cookie

    def event(self) -> Program[Event]:
        """Reads messages up to the first one that belongs to a request under way.

        Raises:
            NbdProtocolError: the server broke the protocol.
        """
        while True:
            event = yield from self._message()
            if event is not None:
                return event

    def _message(self) -> Program[Event | None]:
        """Reads one message; None if it is a late one."""
        what = "a reply to " + ", ".join(map(str, self._pending.values()))
        (magic,) = wire.REPLY_MAGIC.unpack((yield Receive(wire.REPLY_MAGIC.size, what)))
        if magic == constants.SIMPLE_REPLY_MAGIC:
            simple = wire.SimpleReply.unpack((yield Receive(wire.SimpleReply.LAYOUT.size, what)))
            content = Failure(simple.error) if simple.error else None
            return self._settle(simple.cookie, content, done=True)
        if magic != constants.CHUNK_MAGIC or not self.export.structured:
            raise self.violation(f"a reply begins with {magic:#010x}")
        header = wire.ChunkHeader.unpack((yield Receive(wire.ChunkHeader.LAYOUT.size, what)))
        if header.cookie not in self._pending and header.cookie not in self._finished:
            raise self.violation(f"a reply to the unknown cookie {header.cookie:#x}")
        self._check_length(header)
        payload: Received = (yield Receive(header.length, what)) if header.length else b""
        return self._settle(header.cookie, self._content(header, payload), done=bool(header.flags & ChunkFlag.DONE))

    def _settle(self, cookie: int, content: Status | Failure | None, *, done: bool) -> Event | None:
        """Books a message to its request; None if that one was finished already."""
        late = cookie in self._finished
        request = self._finished[cookie] if late else self._pending.get(cookie)
        if request is None:
            raise self.violation(f"a reply to the unknown cookie {cookie:#x}")
        request.chunks += 1
        bound = len(self.export.contexts) + constants.MAX_EXTRA_CHUNKS
        if request.chunks > bound:
            raise self.violation(f"more than {bound} chunks in reply to {request}")
        if late:
            return None
        if isinstance(content, Failure):
            if content.offset is not None and not 0 <= content.offset - request.offset < request.length:
                raise self.violation(f"an error at {content.offset:#x} in reply to {request}")
            request.failure = request.failure or content
            if content.wire_error == WireError.ESHUTDOWN:
                self._become(State.DRAINING)
        if isinstance(content, Status) and request.command is not Command.BLOCK_STATUS:
            raise self.violation(f"a BLOCK_STATUS chunk in reply to {request}")
        if done:
            self._finished[cookie] = self._pending.pop(cookie)
            if len(self._finished) > constants.MAX_FINISHED_COOKIES:
                self._finished.popitem(last=False)
        return Event(cookie, request, content, done)

    def _check_length(self, header: wire.ChunkHeader) -> None:
        """Judges type and length of a chunk before its payload is received ("Structured reply types")."""
        length = header.length
        if header.type & constants.CHUNK_ERROR_BIT:
            least = 14 if header.type == ChunkType.ERROR_OFFSET else 6
            fits = least <= length <= constants.MAX_ERROR_CHUNK
        elif header.type == ChunkType.NONE:
            fits = length == 0
            if not header.flags & ChunkFlag.DONE:
                raise self.violation("an NBD_REPLY_TYPE_NONE chunk that is not the last one")
        elif header.type == ChunkType.BLOCK_STATUS:
            entries, left = divmod(length - 4, 8)
            fits = left == 0 and 1 <= entries <= constants.MAX_STATUS_EXTENTS
        else:
            raise self.violation(f"a chunk of type {header.type}, which answers nothing that was asked")
        if not fits:
            raise self.violation(f"a chunk of type {header.type:#x} with {length} bytes")

    def _content(self, header: wire.ChunkHeader, payload: Received) -> Status | Failure | None:
        """Takes a payload apart; every byte of it must have a meaning."""
        if header.type == ChunkType.BLOCK_STATUS:
            return Status(int.from_bytes(payload[:4], "big"), memoryview(payload)[4:])
        if not header.type & constants.CHUNK_ERROR_BIT:
            return None
        error = wire.ErrorPayload.unpack(payload)
        if error is None:
            raise self.violation(f"an error chunk of {len(payload)} bytes whose message does not fit")
        if error.error == 0:
            raise self.violation("an error chunk with error 0")
        left = len(error.rest)
        if (header.type == ChunkType.ERROR and left != 0) or (header.type == ChunkType.ERROR_OFFSET and left != 8):
            raise self.violation(f"an error chunk of type {header.type:#x} with {left} bytes behind its message")
        offset = int.from_bytes(error.rest, "big") if header.type == ChunkType.ERROR_OFFSET else None
        return Failure(error.error, wire.printable(error.message), offset)

    def _failed(self, request: Request, failure: Failure) -> NbdRequestError | NbdDisconnectedError:
        """Makes the error for a request that failed."""
        said = "" if failure.offset is None else f" at {failure.offset:#x}"
        said += f": {failure.message}" if failure.message else ""
        if failure.wire_error == WireError.ESHUTDOWN:
            return NbdDisconnectedError(f"the server is shutting down ({request} failed{said})", where=self.where)
        # "unexpected values should be treated as EINVAL" ("Error values"); the number is told all the same.
        known = failure.wire_error in WireError.__members__.values()
        name = WireError(failure.wire_error).name if known else f"unknown error {failure.wire_error}, as good as EINVAL"
        return NbdRequestError(
            f"{request} failed at the server ({name}{said})",
            where=self.where,
            wire_error=failure.wire_error,
            offset=request.offset,
            length=request.length,
            remedy=_REMEDIES.get(failure.wire_error, ""),
        )

    def _no_status(self, status: Status) -> None:
        """Takes a status for a command that has none; `_settle` has refused it before."""
        raise self.violation(f"a status for context id {status.context_id} that nobody asked for")

    def _become(self, state: State) -> None:
        """Changes the state, if that is legal."""
        if state not in _NEXT[self._state]:
            raise UsageError(f"the connection is {self._state.name.lower()}", where=self.where)
        self._state = state
        if state in {State.CLOSED, State.DEAD}:
            self._pending.clear()  # nobody will answer them


_REMEDIES: Final[dict[int, str]] = {
    WireError.EIO: "The server could not read its image; its log says more, and so does qemu-img check.",
    WireError.EPERM: "The export may be inactive, as on the target of a migration.",
}
