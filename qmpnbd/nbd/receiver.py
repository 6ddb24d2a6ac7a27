"""What arrives in the transmission phase: message after message, judged and given to the request it belongs to.

Answers are found by cookie, so nothing here depends on how many requests are in flight, or whose they are. A chunk is
judged before its payload is received, and data goes straight to where it is wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from qmpnbd.errors import NbdProtocolError
from qmpnbd.nbd import constants, messages, whole_reads
from qmpnbd.nbd.chunk_rules import header_fault, unpack_failure
from qmpnbd.nbd.constants import ChunkFlag, ChunkType, Command, WireError
from qmpnbd.nbd.export import Export
from qmpnbd.nbd.ledger import Ledger
from qmpnbd.nbd.messages import ChunkHeader, SimpleReply
from qmpnbd.nbd.requests import Due, Failure, Look, ReceiveInto, Reception, Request, Status
from qmpnbd.nbd.wire import Receive, Received


class Receiver:
    """Receives the answers to the requests of a ledger.

    Args:
        export: what was agreed.
        ledger: the requests.
        memory: bytes of a payload that there is room for, if it is no data.
        violation: declares the connection dead because the server broke the protocol, and makes the error.
        drain: takes note that the server is shutting down.

    Attributes:
        messages: how many were received.
    """

    def __init__(
        self,
        export: Export,
        ledger: Ledger,
        memory: int,
        violation: Callable[[str], NbdProtocolError],
        drain: Callable[[], None],
    ) -> None:
        self.messages = 0
        self._ledger = ledger
        self._memory = memory
        self._violation = violation
        self._drain = drain
        self._replies = export.replies
        self._extended = export.replies == "extended"
        self._filling: tuple[Request, ReceiveInto] | None = None
        self._due = Due(ledger.pending)
        self._head = whole_reads.HEADS[export.replies]
        shortest = whole_reads.SHORTEST[export.replies]
        self._look_far = Look(shortest, self._due, constants.LOOK_AHEAD)
        self._look_near = Look(shortest, self._due, self._head)
        self._look: Look | None = None

    def expect_read(self, length: int) -> None:
        """Prepares for the data of a READ."""
        self._look = self._look_near if length >= whole_reads.LARGE else self._look_far

    def drop(self, request: Request) -> None:
        """Has data dropped that is just being received for a request."""
        if self._filling is not None and self._filling[0] is request:
            self._filling[1].buffer = None

    def receive(self) -> Reception:
        """Receives one message and books it to its request.

        Raises:
            NbdProtocolError: the server broke the protocol.
        """
        due = self._due
        if self._ledger.volleys:
            if taken := self._ledger.take_volleys((yield self._look_far)):
                self.messages += 1
                yield ReceiveInto(None, taken, due)
                return
        elif self._look is not None:
            whole = whole_reads.whole_read(self._replies, (yield self._look), self._ledger.pending)
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
                self._ledger.finish(cookie)
                return
        (magic,) = messages.MAGIC.unpack((yield Receive(messages.MAGIC.size, due)))
        self.messages += 1
        if magic == constants.SIMPLE_REPLY_MAGIC and not self._extended:
            yield from self._simple(SimpleReply.unpack((yield Receive(SimpleReply.LAYOUT.size, due))))
            return
        if magic != _MAGICS[self._replies]:
            raise self._violation(f"a reply begins with {magic:#010x}")
        layout = ChunkHeader.EXTENDED if self._extended else ChunkHeader.LAYOUT
        header = ChunkHeader.unpack((yield Receive(layout.size, due)))
        request = self._request(header.cookie)
        if self._extended and header.offset != request.offset:
            raise self._violation(f"a chunk that tells the offset {header.offset:#x} in reply to {request}")
        if fault := header_fault(header, request, self._replies, self._memory):
            raise self._violation(fault)
        if header.type == ChunkType.OFFSET_DATA:
            start = messages.OFFSET.unpack((yield Receive(messages.OFFSET.size, due)))[0]
            yield from self._data(request, start, header.length - messages.OFFSET.size)
        elif header.length:
            self._take(header, (yield Receive(header.length, due)), request)
        if header.flags & ChunkFlag.DONE:
            self._ledger.finish(header.cookie)

    def _request(self, cookie: int) -> Request:
        """Finds the request that a message belongs to, perhaps one that is finished, and counts the message."""
        request = self._ledger.find(cookie)
        if request is None:
            raise self._violation(f"a reply to the unknown cookie {cookie:#x}")
        request.chunks += 1
        if request.chunks > request.most_chunks:
            raise self._violation(f"more than {request.most_chunks} chunks in reply to {request}")
        return request

    def _simple(self, reply: SimpleReply) -> Reception:
        """Books a simple reply; data follows if they are all that was agreed on ("Simple reply message")."""
        request = self._request(reply.cookie)
        if self._ledger.is_finished(reply.cookie):
            raise self._violation(f"a second simple reply to {request}")
        if reply.error:
            self._fail(request, Failure(reply.error))
        elif request.command == Command.READ:
            if self._replies != "simple":
                raise self._violation(f"a simple reply to {request}, which must be answered in chunks")
            yield from self._data(request, request.offset, request.length)
        self._ledger.finish(reply.cookie)

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
            raise self._violation(f"{what} for [{start:#x}, {start + length:#x}) in reply to {request}")
        request.contents += 1
        if request.whole and request.contents > 1:
            raise self._violation(f"more than one piece in reply to {request}, which must not be fragmented")

    def _take(self, header: ChunkHeader, payload: Received, request: Request) -> None:
        """Books a payload that is not data; every byte of it must have a meaning ("Structured reply types")."""
        if header.type & constants.CHUNK_ERROR_BIT:
            failure = unpack_failure(header, payload)
            if isinstance(failure, str):
                raise self._violation(failure)
            self._fail(request, failure)
        elif header.type == ChunkType.OFFSET_HOLE:
            start, length = messages.HOLE.unpack(payload)
            if not length:
                raise self._violation(f"a hole of no length in reply to {request}")
            self._check_range(request, start, length, "a hole")
            request.sink.hole(request, start, length)
        elif header.type == ChunkType.BLOCK_STATUS:
            (id_,) = messages.STATUS.unpack_from(payload)
            request.sink.status(request, Status(id_, memoryview(payload)[messages.STATUS.size :]))
        else:
            id_, count = messages.STATUS_EXT.unpack_from(payload)
            entries = memoryview(payload)[messages.STATUS_EXT.size :]
            if len(entries) != 16 * count:
                raise self._violation(f"a chunk of {len(entries) // 16} extents that tells of {count}")
            request.sink.status(request, Status(id_, entries, wide=True))

    def _fail(self, request: Request, failure: Failure) -> None:
        if failure.offset is not None and not 0 <= failure.offset - request.offset < request.length:
            raise self._violation(f"an error at {failure.offset:#x} in reply to {request}")
        request.failure = request.failure or failure
        if failure.wire_error == WireError.ESHUTDOWN:
            self._drain()


_MAGICS: Final = {
    "simple": constants.SIMPLE_REPLY_MAGIC,
    "structured": constants.CHUNK_MAGIC,
    "extended": constants.EXTENDED_CHUNK_MAGIC,
}
