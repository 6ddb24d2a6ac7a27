"""Data of an export: reads that believe nothing incomplete, and writes; cut into pieces, several in flight.

Every byte of a read must be told exactly once, as data or as a hole ("NBD_CMD_READ"): a server that answers with half
of it and calls that a success (and clients that take it for one) exist. A buffer is handed out only when it is full.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from qmpnbd.errors import NbdDisconnectedError, NbdUnsupportedError, UsageError
from qmpnbd.nbd.connection import Connection
from qmpnbd.nbd.constants import Command, CommandFlag, TransmissionFlag
from qmpnbd.nbd.export import Export
from qmpnbd.nbd.ranges import check_range, longest_payload, pieces
from qmpnbd.nbd.requests import Batch, Due, Give, Job, Request, Sink, Wait
from qmpnbd.nbd.wire import Send

READ_PIECE: Final = 256 << 10
"""Bytes of one READ unless the caller chooses. Smaller ones cost both ends more, larger ones the cache."""

READS_IN_FLIGHT: Final = 32
"""READs in flight unless the caller chooses: twice as many as QEMU works on at a time, so that it never lacks them."""

WRITE_PIECE: Final = 1 << 20
"""Bytes of one WRITE."""

IN_FLIGHT: Final = 8
"""Requests in flight that change something. More of them, or more connections, bring nothing on one disk."""

MOST_IN_FLIGHT: Final = 64
"""More than QEMU works on at a time is of no use, and each has a buffer."""

_ZEROES: Final = bytes(READ_PIECE)
_NO_BUFFER: Final = memoryview(b"")


def _few(in_flight: int) -> int:
    """Returns with how many requests left in flight new ones are made, all together."""
    return in_flight - (in_flight + 3) // 4


class Coverage:
    """Which of ``length`` bytes were told; each may be told once."""

    __slots__ = ("_ends", "_length", "_starts")

    def __init__(self, length: int) -> None:
        self._length = length
        self._starts: list[int] = []  # runs that do not touch, in order
        self._ends: list[int] = []

    def add(self, start: int, end: int) -> bool:
        """Books ``[start, end)``; False if some of it was told before."""
        starts, ends = self._starts, self._ends
        at = bisect_left(starts, start)
        if (at and ends[at - 1] > start) or (at < len(starts) and starts[at] < end):
            return False
        joins_left, joins_right = bool(at) and ends[at - 1] == start, at < len(starts) and starts[at] == end
        if joins_left and joins_right:
            ends[at - 1] = ends.pop(at)
            del starts[at]
        elif joins_left:
            ends[at - 1] = end
        elif joins_right:
            starts[at] = start
        else:
            starts.insert(at, start)
            ends.insert(at, end)
        return True

    @property
    def gap(self) -> int | None:
        """The first byte that was not told; None if all were."""
        if not self._length:
            return None
        if not self._starts or self._starts[0]:
            return 0
        return None if self._ends[0] == self._length else self._ends[0]


class Destination(Sink):
    """Where the data of one READ goes.

    Args:
        connection: the one it comes over.
        offset: first byte of the export.
        length: bytes of the request.
        place: makes the buffer, by offset and length of the request, when the first of its data is there; a longer one
            will do.

    Attributes:
        view: the buffer; empty before.
    """

    __slots__ = ("_connection", "_coverage", "_place", "_whole", "length", "offset", "view")

    def __init__(
        self, connection: Connection, offset: int, length: int, place: Callable[[int, int], memoryview]
    ) -> None:
        self.offset = offset
        self.length = length
        self.view = _NO_BUFFER
        self._connection = connection
        self._place = place
        self._whole = False  # told all at once, as nearly always
        self._coverage: Coverage | None = None

    def room(self, request: Request, offset: int, length: int) -> memoryview:
        """Returns the part of the buffer for some data."""
        if not self.view:
            self.view = self._place(self.offset, self.length)
            if length == self.length:
                self._whole = True
                return self.view if len(self.view) == length else self.view[:length]
            self._coverage = Coverage(self.length)
        start = offset - self.offset
        if self._coverage is None or not self._coverage.add(start, start + length):
            raise self._connection.violation(
                f"bytes of [{offset:#x}, {offset + length:#x}) twice in reply to {request}"
            )
        return self.view[start : start + length]

    def hole(self, request: Request, offset: int, length: int) -> None:
        """Zeroes the part of the buffer where there is a hole; it is never larger than what was asked for."""
        room = self.room(request, offset, length)
        for start, size in pieces(0, length, len(_ZEROES)):
            room[start : start + size] = _ZEROES[:size]

    def done(self, request: Request) -> None:
        """Judges the reply as a whole."""
        if self._whole or request.failure is not None:
            return
        gap = 0 if self._coverage is None else self._coverage.gap
        if gap is not None:
            raise self._connection.violation(
                f"success in reply to {request}, and nothing about the byte at {self.offset + gap:#x}"
            )


class Reading:
    """A read into one buffer. It can be taken up again, on another connection to the same export.

    Args:
        export: what to read.
        where: server and export, for messages.
        offset: first byte.
        buffer: contiguous and writable; as many bytes are read as it has.
        unfragmented: have each piece answered in one chunk (NBD_CMD_FLAG_DF).

    Raises:
        UsageError: a range or a buffer that does not do.
        NbdUnsupportedError: the export cannot do what is asked.
    """

    def __init__(
        self, export: Export, where: str, offset: int, buffer: memoryview, *, unfragmented: bool = False
    ) -> None:
        check_range(export, offset, len(buffer), where)
        self._buffer = buffer
        self._offset = offset
        self._flags = _df(export, where) if unfragmented else 0
        self._todo = deque(pieces(offset, len(buffer), min(READ_PIECE, longest_payload(export))))
        self._out: dict[Request, tuple[int, int]] = {}

    def run(self, connection: Connection) -> Job[None]:
        """Reads.

        Raises:
            NbdRequestError: some of it cannot be read; the connection can be used further.
            NbdProtocolError: a reply that cannot be true.
            NbdDisconnectedError: the connection ended; the reading can be taken up on another one.
        """
        self._todo.extend(self._out.values())
        self._out.clear()
        with connection.batch() as batch:
            while self._todo or self._out:
                if self._todo and len(batch.pending) <= _few(READS_IN_FLIGHT):
                    headers = []
                    while self._todo and len(batch.pending) < READS_IN_FLIGHT:
                        headers.append(self._request(connection, batch))
                    yield Send(b"".join(headers))
                yield Wait(batch, Due(batch.pending))
                while batch.finished:
                    request = batch.finished.popleft()
                    connection.require_success(request)
                    del self._out[request]

    def _request(self, connection: Connection, batch: Batch) -> bytes:
        offset, length = self._todo[0]  # it stays there until it is booked: the connection may be lost
        start = offset - self._offset
        sink = Destination(connection, offset, length, lambda *_: self._buffer[start : start + length])
        header = connection.submit(batch, Command.READ, offset, length, sink, flags=self._flags)
        self._out[next(reversed(batch.pending.values()))] = self._todo.popleft()
        return header


class Chunks:
    """Reads of many ranges into a few reused buffers. They can be taken up again, on another connection.

    Args:
        export: what to read.
        where: server and export, for messages.
        ranges: offset and length of each; asked for one after the other.
        size: bytes of one piece at most.
        in_flight: requests in flight.
        place: tells where the data of a piece goes, by its offset and length; None for buffers of this object's own,
            which are reused.

    Raises:
        UsageError: a size or a number that makes no sense.
    """

    def __init__(
        self,
        export: Export,
        where: str,
        ranges: Iterable[tuple[int, int]],
        *,
        size: int,
        in_flight: int,
        place: Callable[[int, int], memoryview] | None = None,
    ) -> None:
        block = export.minimum_block
        if size < 1 or size % block or not 1 <= in_flight <= MOST_IN_FLIGHT:
            raise UsageError(
                f"pieces of {size} bytes, {in_flight} in flight: pieces are multiples of {block}, and of them 1 to"
                f" {MOST_IN_FLIGHT} are in flight",
                where=where,
            )
        self._export = export
        self._where = where
        self._size = min(size, longest_payload(export))
        self._in_flight = in_flight
        self._ranges = self._cut(ranges)
        self._own = place is None
        self._chosen = place or (lambda *_: self._buffer())
        self._again: deque[tuple[int, int]] = deque()
        self._free: list[memoryview] = []
        self._out: dict[Request, Destination] = {}

    def run(self, connection: Connection) -> Job[None]:
        """Reads, and gives offset and data of each piece, in the order in which they arrive.

        Raises:
            NbdRequestError: a piece cannot be read; the connection can be used further.
            NbdProtocolError: a reply that cannot be true.
            NbdDisconnectedError: the connection ended; the pieces not given yet can be read over another one.
            UsageError: a range outside the export, or off its blocks.
        """
        for piece in self._out.values():
            self._again.append((piece.offset, piece.length))
            if piece.view and self._own:
                self._free.append(piece.view)
        self._out.clear()
        few = _few(self._in_flight)
        with connection.batch() as batch:
            wait = Wait(batch, Due(batch.pending))
            while True:
                if len(batch.pending) <= few and (headers := self._requests(connection, batch)):
                    yield Send(headers)
                if not self._out:
                    return
                if not batch.finished:
                    yield wait
                request = batch.finished.popleft()
                connection.require_success(request)
                piece = self._out.pop(request)
                yield Give((piece.offset, piece.view[: piece.length]))
                if self._own:
                    self._free.append(piece.view)

    def _requests(self, connection: Connection, batch: Batch) -> bytes:
        """Makes as many requests as may be in flight."""
        headers = []
        while len(batch.pending) < self._in_flight:
            found = self._again.popleft() if self._again else next(self._ranges, None)
            if found is None:
                break
            offset, length = found
            piece = Destination(connection, offset, length, self._chosen)
            try:
                headers.append(connection.submit(batch, Command.READ, offset, length, piece))
            except NbdDisconnectedError:
                self._again.appendleft(found)
                raise
            self._out[next(reversed(batch.pending.values()))] = piece
        return b"".join(headers)

    def _buffer(self) -> memoryview:
        """Returns the buffer that was used last, and is likely to be in the cache still."""
        return self._free.pop() if self._free else memoryview(bytearray(self._size))

    def _cut(self, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        for offset, length in ranges:
            check_range(self._export, offset, length, self._where)
            yield from pieces(offset, length, self._size)


def write(connection: Connection, offset: int, data: memoryview, *, fua: bool) -> Job[None]:
    """Writes, in several requests where one is not enough ("NBD_CMD_WRITE").

    Returns when the server has answered all of them. After an error some of it may have been written.

    Raises:
        UsageError: a range that does not do.
        NbdUnsupportedError: the export cannot be written to, or not with `fua`.
        NbdRequestError: some of it failed, the first such piece is named; the connection can be used further.
        NbdProtocolError: a reply that cannot be true.
        NbdDisconnectedError: the connection ended.
    """
    export, where = connection.export, connection.where
    require_writable(export, where)
    flags = fua_flag(export, where) if fua else 0
    check_range(export, offset, len(data), where)
    todo = deque(pieces(offset, len(data), min(WRITE_PIECE, longest_payload(export))))
    failed: list[Request] = []
    with connection.batch() as batch:
        while todo or batch.pending or batch.finished:
            while todo and not failed and len(batch.pending) < IN_FLIGHT:
                at, length = todo.popleft()
                header = connection.submit(batch, Command.WRITE, at, length, flags=flags)
                yield Send(header, data[at - offset : at - offset + length])
            if failed:
                todo.clear()
            if batch.pending and not batch.finished:
                yield Wait(batch, Due(batch.pending))
            while batch.finished:
                request = batch.finished.popleft()
                if request.failure is not None:
                    failed.append(request)
    if failed:
        connection.require_success(min(failed, key=lambda request: request.offset))


def require_writable(export: Export, where: str) -> None:
    """Returns if an export may be written to.

    Raises:
        NbdUnsupportedError: it is read-only.
    """
    if export.flags & TransmissionFlag.READ_ONLY:
        raise NbdUnsupportedError("the export is read-only (NBD_FLAG_READ_ONLY)", where=where)


def require_flag(export: Export, flag: TransmissionFlag, what: str, where: str) -> None:
    """Returns if an export has a flag.

    Raises:
        NbdUnsupportedError: it has not.
    """
    if not export.flags & flag:
        raise NbdUnsupportedError(f"the export offers no {what} (NBD_FLAG_{flag.name})", where=where)


def fua_flag(export: Export, where: str) -> CommandFlag:
    """Returns the flag that has a write made durable before it is answered.

    Raises:
        NbdUnsupportedError: the export does not know it.
    """
    require_flag(export, TransmissionFlag.SEND_FUA, "writing through", where)
    return CommandFlag.FUA


def _df(export: Export, where: str) -> CommandFlag:
    require_flag(export, TransmissionFlag.SEND_DF, "unfragmented reads", where)
    return CommandFlag.DF


def new_buffer(export: Export, where: str, offset: int, length: int) -> bytearray:
    """Returns a buffer for a range, once it is known to be one.

    Raises:
        UsageError: the range does not do.
    """
    check_range(export, offset, length, where)
    return bytearray(length)


def writable_view(buffer: Any, where: str) -> memoryview:
    """Returns a buffer as bytes that can be received into.

    Raises:
        UsageError: it is none, read-only, or not contiguous.
    """
    view = readable_view(buffer, where)
    if view.readonly:
        raise UsageError("the buffer cannot be written to", where=where)
    return view


def readable_view(buffer: Any, where: str) -> memoryview:
    """Returns a buffer as bytes.

    Raises:
        UsageError: it is none, or not contiguous.
    """
    try:
        return memoryview(buffer).cast("B")
    except TypeError as error:
        raise UsageError(f"not a contiguous buffer: {error}", where=where) from error
