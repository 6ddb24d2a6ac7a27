"""The transmission phase: requests go out, chunks come back, and each is matched by its cookie.

::

                 submit()                      receive()                    receive()
    cookie 1   ------------->  pending   <-- BLOCK_STATUS chunk  ...   <-- chunk with DONE   ---> finished
                                                                                                    |
                                         <-- a late chunk of cookie 1: skipped by its length  <-----+
                                         <-- a cookie nobody knows: the connection is dead

The connection is the one place that knows what state the conversation is in; what its programs yield is for a door to
do (see `qmpnbd.nbd.requests`). Answers are booked by cookie, so nothing here depends on how many requests are in
flight, or whose they are.

Late chunks are real: with two metadata contexts, QEMU (5.2 to 10.0) answers a request that failed for the first
context with an error chunk that says DONE, and goes on to send the chunk of the second one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum, auto
from typing import Final

from qmpnbd.errors import NbdDisconnectedError, NbdProtocolError, UsageError
from qmpnbd.nbd import constants, messages, whole_reads
from qmpnbd.nbd.chunk_rules import header_fault, request_failed, unpack_failure
from qmpnbd.nbd.constants import ChunkFlag, ChunkType, Command, CommandFlag, WireError
from qmpnbd.nbd.export import Export
from qmpnbd.nbd.limits import DEFAULT_LIMITS, Limits
from qmpnbd.nbd.messages import ChunkHeader, SimpleReply, pack_request
from qmpnbd.nbd.requests import (
    NOWHERE,
    Batch,
    Due,
    Failure,
    Job,
    Look,
    ReceiveInto,
    Reception,
    Request,
    Sink,
    Status,
    Volley,
    Wait,
)
from qmpnbd.nbd.wire import Buffer, Receive, Received, Send


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

_LIVE: Final = {State.OPEN, State.DRAINING}


class Connection:
    """The conversation about one export after the handshake.

    Args:
        export: what was agreed.
        where: server and export, for messages.
        limits: how much the server may answer.

    Attributes:
        requests: how many were made.
        messages: how many were received.
        answered: how many requests, or many at once, got all of their answer.
    """

    def __init__(self, export: Export, where: str, limits: Limits = DEFAULT_LIMITS) -> None:
        self.export = export
        self.where = where
        self.requests = 0
        self.messages = 0
        self.answered = 0
        self._limits = limits
        self._extended = export.replies == "extended"
        self._state = State.OPEN
        self._pending: dict[int, Request] = {}
        self._finished: dict[int, Request] = {}  # oldest first
        self._volleys: list[Volley] = []
        self._filling: tuple[Request, ReceiveInto] | None = None
        self._last_cookie = 0  # counts up and never wraps in practice: no cookie is used twice
        self._due = Due(self._pending)
        self._replies = export.replies
        self._head = whole_reads.HEADS[export.replies]
        shortest = whole_reads.SHORTEST[export.replies]
        self._look_far = Look(shortest, self._due, constants.LOOK_AHEAD)
        self._look_near = Look(shortest, self._due, self._head)
        self._look: Look | None = None

    @property
    def state(self) -> State:
        """What may still be said."""
        return self._state

    @property
    def live(self) -> bool:
        """Whether the server is there and can be believed."""
        return self._state in _LIVE

    @property
    def busy(self) -> bool:
        """Whether an answer is still to come, though perhaps nobody waits for it any more."""
        return bool(self._pending or self._volleys)

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

    # Requests.

    @contextmanager
    def batch(self) -> Iterator[Batch]:
        """Makes a batch; what is pending of it at the end is abandoned."""
        batch = Batch()
        try:
            yield batch
        finally:
            for request in batch.pending.values():
                request.sink = NOWHERE
                if self._filling is not None and self._filling[0] is request:
                    self._filling[1].buffer = None
            batch.pending.clear()
            batch.finished.clear()
            batch.wake = None

    def submit(
        self,
        batch: Batch,
        command: Command,
        offset: int = 0,
        length: int = 0,
        sink: Sink = NOWHERE,
        *,
        flags: int = 0,
        payload: int | None = None,
    ) -> bytes:
        """Books a request and returns its header, which must be sent before anything else is.

        Args:
            batch: the call it belongs to.
            command: what to ask.
            offset: first byte.
            length: bytes it is about.
            sink: who is given what it brings.
            flags: how to do it.
            payload: bytes that follow the header, if they are not `length` bytes of data to write.

        Raises:
            UsageError: the connection is closed.
            NbdDisconnectedError: the server is shutting down, or the connection was lost before.
        """
        self._require_open()
        if len(self._pending) >= constants.MAX_PENDING:
            self.lose()
            raise NbdDisconnectedError(f"{constants.MAX_PENDING} requests were not answered", where=self.where)
        self._last_cookie += 1
        self.requests += 1
        most = self._limits.extra_chunks
        if command == Command.READ:
            most += length // constants.SECTOR + 2  # and two at unaligned ends
            self._look = self._look_near if length >= whole_reads.LARGE else self._look_far
        elif command == Command.BLOCK_STATUS:
            most += len(self.export.contexts)
        whole = bool(command == Command.READ and flags & _DF)
        request = Request(command, offset, length, batch, sink, most, whole)
        self._pending[self._last_cookie] = batch.pending[self._last_cookie] = request
        if self._extended and (payload is not None or command == Command.WRITE):
            flags |= CommandFlag.PAYLOAD_LEN
        told = length if payload is None else payload
        return pack_request(command, self._last_cookie, offset, told, flags, extended=self._extended)

    def submit_volley(self, batch: Batch, volley: Volley) -> int:
        """Books many requests, whose headers must be sent before anything else is; returns the first of their cookies.

        Raises:
            UsageError: the connection is closed.
            NbdDisconnectedError: the server is shutting down, or the connection was lost before.
        """
        self._require_open()
        first = self._last_cookie + 1
        self._last_cookie += volley.count
        self.requests += volley.count
        self._volleys.append(volley)
        batch.pending[first] = volley.request
        return first

    def call(
        self,
        command: Command,
        offset: int = 0,
        length: int = 0,
        sink: Sink = NOWHERE,
        *,
        flags: int = 0,
        payload: Buffer | None = None,
    ) -> Job[None]:
        """Makes one request and sees it through; see `submit`.

        Raises:
            NbdRequestError: the request failed; the connection can be used further.
            NbdProtocolError: the server broke the protocol.
            NbdDisconnectedError: the server is shutting down, or the connection was lost before.
            UsageError: the connection is closed.
        """
        with self.batch() as batch:
            size = None if payload is None else len(payload)
            header = self.submit(batch, command, offset, length, sink, flags=flags, payload=size)
            yield Send(header, b"" if payload is None else payload)
            yield Wait(batch, Due(batch.pending))
            self.require_success(batch.finished.popleft())

    def disconnect(self) -> bytes:
        """Takes leave if there is anybody to take leave of, and returns what to send for it.

        No answer comes ("Terminating the transmission phase").
        """
        if not self.live:
            return b""
        self._become(State.CLOSED)
        self._last_cookie += 1
        return pack_request(Command.DISC, self._last_cookie, 0, 0, 0, extended=self._extended)

    def require_success(self, request: Request) -> None:
        """Returns if a finished request was carried out.

        Raises:
            NbdRequestError: it failed.
            NbdDisconnectedError: it failed because the server is shutting down.
        """
        if request.failure is not None:
            raise request_failed(request, request.failure, self.where)

    # Answers.

    def receive(self) -> Reception:
        """Receives one message and books it to its request.

        Raises:
            NbdProtocolError: the server broke the protocol.
        """
        due = self._due
        if self._volleys:
            if taken := self._take_volleys((yield self._look_far)):
                yield ReceiveInto(None, taken, due)
                return
        elif self._look is not None:
            whole = whole_reads.whole_read(self._replies, (yield self._look), self._pending)
            if whole is not None:
                self.messages += 1
                cookie, request = whole
                request.chunks = request.contents = 1
                room = request.sink.room(request, request.offset, request.length)
                operation = ReceiveInto(room, request.length, due, self._head)
                self._filling = (request, operation)
                try:
                    yield operation
                finally:
                    self._filling = None
                self._finish(cookie)
                return
        (magic,) = messages.MAGIC.unpack((yield Receive(messages.MAGIC.size, due)))
        self.messages += 1
        if magic == constants.SIMPLE_REPLY_MAGIC and not self._extended:
            yield from self._simple(SimpleReply.unpack((yield Receive(SimpleReply.LAYOUT.size, due))))
            return
        if magic != _MAGICS[self.export.replies]:
            raise self.violation(f"a reply begins with {magic:#010x}")
        layout = ChunkHeader.EXTENDED if self._extended else ChunkHeader.LAYOUT
        header = ChunkHeader.unpack((yield Receive(layout.size, due)))
        request = self._request(header.cookie)
        if self._extended and header.offset != request.offset:
            raise self.violation(f"a chunk that tells the offset {header.offset:#x} in reply to {request}")
        if fault := header_fault(header, request, self.export.replies, self._limits.memory):
            raise self.violation(fault)
        if header.type == ChunkType.OFFSET_DATA:
            start = messages.OFFSET.unpack((yield Receive(messages.OFFSET.size, due)))[0]
            yield from self._data(request, start, header.length - messages.OFFSET.size)
        elif header.length:
            self._take(header, (yield Receive(header.length, due)), request)
        if header.flags & ChunkFlag.DONE:
            self._finish(header.cookie)

    def _request(self, cookie: int) -> Request:
        """Finds the request that a message belongs to, perhaps one that is finished, and counts the message."""
        request = self._pending.get(cookie) or self._finished.get(cookie) or self._single(cookie)
        if request is None:
            raise self.violation(f"a reply to the unknown cookie {cookie:#x}")
        request.chunks += 1
        if request.chunks > request.most_chunks:
            raise self.violation(f"more than {request.most_chunks} chunks in reply to {request}")
        return request

    def _take_volleys(self, arrived: memoryview) -> int:
        """Books answers that are as expected all together; returns how many bytes they have."""
        for volley in self._volleys:
            if taken := volley.take(arrived):
                self.messages += 1
                self.answered += 1
                if not volley.open:
                    self._end_volley(volley)
                return taken
        return 0

    def _single(self, cookie: int) -> Request | None:
        """Has one of many requests booked by itself, because its answer is not the expected one."""
        for volley in self._volleys:
            if volley.first <= cookie < volley.first + volley.count:
                request = volley.single(cookie)
                if request is not None:
                    self._pending[cookie] = request
                    if request.sink is not NOWHERE:
                        request.batch.pending[cookie] = request
                if not volley.open:
                    self._end_volley(volley)
                return request
        return None

    def _end_volley(self, volley: Volley) -> None:
        self._volleys.remove(volley)
        batch = volley.request.batch
        if batch.pending.pop(volley.first, None) is not None:
            batch.finished.append(volley.request)
            if batch.wake is not None:
                batch.wake()

    def _simple(self, reply: SimpleReply) -> Reception:
        """Books a simple reply; data follows if they are all that was agreed on ("Simple reply message")."""
        request = self._request(reply.cookie)
        if reply.cookie in self._finished:
            raise self.violation(f"a second simple reply to {request}")
        if reply.error:
            self._fail(request, Failure(reply.error))
        elif request.command == Command.READ:
            if self.export.replies != "simple":
                raise self.violation(f"a simple reply to {request}, which must be answered in chunks")
            yield from self._data(request, request.offset, request.length)
        self._finish(reply.cookie)

    def _data(self, request: Request, start: int, length: int) -> Reception:
        """Receives data straight to where it is wanted."""
        self._check_range(request, start, length, "data")
        operation = ReceiveInto(request.sink.room(request, start, length), length, self._due)
        self._filling = (request, operation)
        try:
            yield operation
        finally:
            self._filling = None

    def _check_range(self, request: Request, start: int, length: int, what: str) -> None:
        """Judges where the content of a chunk lies."""
        if not request.offset <= start <= start + length <= request.offset + request.length:
            raise self.violation(f"{what} for [{start:#x}, {start + length:#x}) in reply to {request}")
        request.contents += 1
        if request.whole and request.contents > 1:
            raise self.violation(f"more than one piece in reply to {request}, which must not be fragmented")

    def _take(self, header: ChunkHeader, payload: Received, request: Request) -> None:
        """Books a payload that is not data; every byte of it must have a meaning ("Structured reply types")."""
        if header.type & constants.CHUNK_ERROR_BIT:
            failure = unpack_failure(header, payload)
            if isinstance(failure, str):
                raise self.violation(failure)
            self._fail(request, failure)
        elif header.type == ChunkType.OFFSET_HOLE:
            start, length = messages.HOLE.unpack(payload)
            if not length:
                raise self.violation(f"a hole of no length in reply to {request}")
            self._check_range(request, start, length, "a hole")
            request.sink.hole(request, start, length)
        elif header.type == ChunkType.BLOCK_STATUS:
            (id_,) = messages.STATUS.unpack_from(payload)
            request.sink.status(request, Status(id_, memoryview(payload)[messages.STATUS.size :]))
        else:
            id_, count = messages.STATUS_EXT.unpack_from(payload)
            entries = memoryview(payload)[messages.STATUS_EXT.size :]
            if len(entries) != 16 * count:
                raise self.violation(f"a chunk of {len(entries) // 16} extents that tells of {count}")
            request.sink.status(request, Status(id_, entries, wide=True))

    def _fail(self, request: Request, failure: Failure) -> None:
        if failure.offset is not None and not 0 <= failure.offset - request.offset < request.length:
            raise self.violation(f"an error at {failure.offset:#x} in reply to {request}")
        request.failure = request.failure or failure
        if failure.wire_error == WireError.ESHUTDOWN:
            self._become(State.DRAINING)

    def _finish(self, cookie: int) -> None:
        """Books that nothing more comes for a request, if that was not said before."""
        request = self._pending.get(cookie)
        if request is None:
            return
        request.sink.done(request)
        self.answered += 1
        del self._pending[cookie]
        request.sink = NOWHERE
        self._finished[cookie] = request
        if len(self._finished) > constants.MAX_FINISHED_COOKIES:
            del self._finished[next(iter(self._finished))]
        batch = request.batch
        if batch.pending.pop(cookie, None) is not None:
            batch.finished.append(request)
            if batch.wake is not None:
                batch.wake()

    def _require_open(self) -> None:
        if self._state is State.CLOSED:
            raise UsageError("the connection is closed", where=self.where)
        if self._state is not State.OPEN:
            why = "the server is shutting down" if self._state is State.DRAINING else "the connection was lost before"
            raise NbdDisconnectedError(why, where=self.where)

    def _become(self, state: State) -> None:
        """Changes the state, if that is legal."""
        if state not in _NEXT[self._state]:
            raise UsageError(f"the connection is {self._state.name.lower()}", where=self.where)
        self._state = state
        if state in {State.CLOSED, State.DEAD}:
            self._pending.clear()  # nobody will answer them
            self._volleys.clear()


_DF: Final = int(CommandFlag.DF)  # a number is compared ten times faster than a flag

_MAGICS: Final = {
    "simple": constants.SIMPLE_REPLY_MAGIC,
    "structured": constants.CHUNK_MAGIC,
    "extended": constants.EXTENDED_CHUNK_MAGIC,
}
