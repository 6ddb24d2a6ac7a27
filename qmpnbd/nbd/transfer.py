"""Data of an export: reads that believe nothing incomplete, and writes; cut into pieces, several in flight.

Every byte of a read must be told exactly once, as data or as a hole ("NBD_CMD_READ"): a server that answers with half
of it and calls that a success (and clients that take it for one) exist. A buffer is handed out only when it is full.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from qmpnbd.errors import NbdDisconnectedError, NbdUnsupportedError, UsageError
from qmpnbd.nbd.connection import Connection
from qmpnbd.nbd.constants import Command, CommandFlag, TransmissionFlag
from qmpnbd.nbd.export import Export
from qmpnbd.nbd.ranges import check_range, longest_payload, pieces
from qmpnbd.nbd.requests import Batch, Due, Give, Job, Request, Sink, Wait
from qmpnbd.nbd.wire import Send

PIECE: Final = 1 << 20
"""Bytes of one request unless the caller chooses. Smaller ones cost the server more, larger ones the cache."""

IN_FLIGHT: Final = 8
"""Requests in flight. More of them, or more connections, bring nothing on one connection to one disk."""

CHUNKS_IN_FLIGHT: Final = 16
"""Requests of `Chunks` in flight: as many as QEMU works on at a time. With fewer, both ends sleep and wake by turns on
an idle machine, and a local read takes up to twice as long."""

MOST_IN_FLIGHT: Final = 64
"""More than QEMU works on at a time is of no use, and each has a buffer."""

_ZEROES: Final = bytes(PIECE)


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
        offset: the byte of the export that goes to the beginning of `view`.
        view: as long as the request.
    """

    __slots__ = ("_connection", "_coverage", "_offset", "view")

    def __init__(self, connection: Connection, offset: int, view: memoryview) -> None:
        self._connection = connection
        self._offset = offset
        self._coverage = Coverage(len(view))
        self.view = view

    def room(self, request: Request, offset: int, length: int) -> memoryview:
        """Returns the part of the buffer for some data."""
        start = offset - self._offset
        if not self._coverage.add(start, start + length):
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
        gap = self._coverage.gap
        if request.failure is None and gap is not None:
            raise self._connection.violation(
                f"success in reply to {request}, and nothing about the byte at {self._offset + gap:#x}"
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
        self._todo = deque(pieces(offset, len(buffer), min(PIECE, longest_payload(export))))
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
                headers = []
                while self._todo and len(batch.pending) < IN_FLIGHT:
                    headers.append(self._request(connection, batch))
                if headers:
                    yield Send(b"".join(headers))
                yield Wait(batch, Due(batch.pending))
                while batch.finished:
                    request = batch.finished.popleft()
                    connection.require_success(request)
                    del self._out[request]

    def _request(self, connection: Connection, batch: Batch) -> bytes:
        offset, length = self._todo[0]  # it stays there until it is booked: the connection may be lost
        start = offset - self._offset
        sink = Destination(connection, offset, self._buffer[start : start + length])
        header = connection.submit(batch, Command.READ, offset, length, sink, flags=self._flags)
        self._out[next(reversed(batch.pending.values()))] = self._todo.popleft()
        return header


@dataclass(slots=True, eq=False)
class _Piece:
    offset: int
    length: int
    buffer: memoryview


class Chunks:
    """Reads of many ranges into a few reused buffers. They can be taken up again, on another connection.

    Args:
        export: what to read.
        where: server and export, for messages.
        ranges: offset and length of each; asked for one after the other.
        size: bytes of one piece at most.
        in_flight: requests in flight.

    Raises:
        UsageError: a size or a number that makes no sense.
    """

    def __init__(
        self, export: Export, where: str, ranges: Iterable[tuple[int, int]], *, size: int, in_flight: int
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
        self._again: deque[_Piece] = deque()
        self._free: list[memoryview] = []
        self._buffers = 0
        self._out: dict[Request, _Piece] = {}

    def run(self, connection: Connection) -> Job[None]:
        """Reads, and gives offset and data of each piece, in the order in which they arrive.

        Raises:
            NbdRequestError: a piece cannot be read; the connection can be used further.
            NbdProtocolError: a reply that cannot be true.
            NbdDisconnectedError: the connection ended; the pieces not given yet can be read over another one.
            UsageError: a range outside the export, or off its blocks.
        """
        self._again.extend(self._out.values())
        self._out.clear()
        with connection.batch() as batch:
            while True:
                if headers := self._requests(connection, batch):
                    yield Send(headers)
                if not self._out:
                    return
                if not batch.finished:
                    yield Wait(batch, Due(batch.pending))
                request = batch.finished.popleft()
                connection.require_success(request)
                piece = self._out[request]  # it stays there until it is given: sending may fail
                if headers := self._requests(connection, batch):
                    yield Send(headers)  # the server works while the caller does
                del self._out[request]
                yield Give((piece.offset, piece.buffer[: piece.length]))
                self._free.append(piece.buffer)

    def _requests(self, connection: Connection, batch: Batch) -> bytes:
        """Makes as many requests as may be in flight and have a buffer."""
        headers = []
        while len(batch.pending) < self._in_flight and (piece := self._piece()) is not None:
            sink = Destination(connection, piece.offset, piece.buffer[: piece.length])
            try:
                headers.append(connection.submit(batch, Command.READ, piece.offset, piece.length, sink))
            except NbdDisconnectedError:
                self._again.appendleft(piece)
                raise
            self._out[next(reversed(batch.pending.values()))] = piece
        return b"".join(headers)

    def _piece(self) -> _Piece | None:
        """Returns what to read next, with a buffer."""
        if self._again:
            return self._again.popleft()
        if not self._free and self._buffers > self._in_flight:
            return None  # one for each request, and one that the caller looks at
        if (found := next(self._ranges, None)) is None:
            return None
        if not self._free:
            self._buffers += 1
            self._free.append(memoryview(bytearray(self._size)))
        return _Piece(*found, self._free.pop())

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
    todo = deque(pieces(offset, len(data), min(PIECE, longest_payload(export))))
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
