"""Reads maps: block status over a range for metadata contexts of a connection, several requests in flight.

The range is cut into spans, each asked for by itself, so that the server works on the next while this one is decoded.
How long a span is depends on how many extents the last replies told: a dense disk in many small ones, an empty disk
in few large ones. One reply covers the contexts unequally (QEMU stops each after 131,072 extents), so in each span
every context has a cursor of its own, and what is left of it is asked for from the lowest one. A context that is ahead
gets some bytes told again, which are dropped::

    |<--------------- span --------------->|<--- the next one, in flight meanwhile
    request at cursor of A    next request
    |                         |
    A ========================|............
    B ====================================|
                              [already told]

A reply is judged before it is believed ("Structured reply types", NBD_REPLY_TYPE_BLOCK_STATUS of doc/proto.md): one
chunk for each context, no extent of no length, nothing but the last extent past the request, nothing past the export.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from typing import Final

import numpy as np

from qmpnbd.errors import UsageError
from qmpnbd.extents import ExtentMap
from qmpnbd.nbd.connection import Connection
from qmpnbd.nbd.constants import SECTOR, Command, CommandFlag, TransmissionFlag
from qmpnbd.nbd.export import Export
from qmpnbd.nbd.limits import DEFAULT_LIMITS, STATUS_IN_FLIGHT, Limits
from qmpnbd.nbd.messages import pack_status_filter
from qmpnbd.nbd.pace import Pace
from qmpnbd.nbd.quirks import Quirk
from qmpnbd.nbd.ranges import aligned_range, longest_effect, rest
from qmpnbd.nbd.requests import Batch, Due, Job, Request, Wait
from qmpnbd.nbd.survey_reply import Reply, Span, Terms, joined
from qmpnbd.nbd.survey_volley import EmptyVolley
from qmpnbd.nbd.wire import Send

FIRST_SPAN: Final = 128 << 20
"""Bytes of the first spans: a short reply on any disk, and enough to know how dense it is."""

_SHORTEST_SPAN: Final = 16 << 20
_LIKED_EXTENTS: Final = 65536  # half of what QEMU tells at most, so that few replies are short
_GROWTH: Final = 8  # a disk that is empty here may be dense there
_VOLLEY: Final = 256  # requests made at once while the disk is empty; the server works on them one after the other
_VOLLEYS: Final = 2  # one is answered while the next one is on its way
_LOOSE: Final = 1024  # replies kept as they came; each costs hundreds of bytes, however little it tells
_GRACE: Final = 1024
"""No disk has a status for less than a sector ("NBD_CMD_BLOCK_STATUS": lengths SHOULD be multiples of 512), so a
server that needs more replies than there are sectors, plus some for unaligned ends, is not getting anywhere."""


class Survey:
    """One reading of maps. It can be taken up again, on another connection to the same export.

    Args:
        export: what to read maps of.
        offset: first byte.
        length: bytes; None for all the rest. Neither needs to be aligned.
        contexts: some of the metadata contexts that were agreed on; None for all of them.
        limits: what the server may make us do.
        lenient: which faults of the server to bear.
        clock: what the server's pace is measured by, in seconds.

    Raises:
        UsageError: a range outside the export, no context, or one that was not agreed on.
    """

    def __init__(
        self,
        export: Export,
        where: str,
        offset: int = 0,
        length: int | None = None,
        *,
        contexts: Collection[str] | None = None,
        limits: Limits = DEFAULT_LIMITS,
        lenient: frozenset[Quirk] = frozenset(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.names = _chosen(export, contexts, where)
        self._terms = Terms(where, export.size, lenient, limits.affordable_extents)
        self._where = where
        self._asked = offset, (rest(export, offset, where) if length is None else length)
        self._next, self._end = aligned_range(export, *self._asked, where)
        self._start = self._next
        self._spans: list[Span] = []
        self._again: deque[Span] = deque()
        self._length = FIRST_SPAN
        self._longest = longest_effect(export)
        self._block = export.minimum_block
        self._short = 0
        self._loose = 0
        self._empty = False
        self._volleys: dict[Request, EmptyVolley] = {}
        self._limits = limits
        self._pace = Pace(limits.in_flight, clock)
        self._most_short = min(limits.short_replies, _GRACE + export.size // SECTOR)

    def run(self, connection: Connection) -> Job[dict[str, ExtentMap]]:
        """Reads the map of every context chosen.

        Returns:
            For each context a map of exactly the length asked for; its byte 0 is the first one asked for.

        Raises:
            NbdRequestError: the server could not tell the status of some range; the connection can be used further.
            NbdProtocolError: a reply that cannot be true, or too many.
            NbdUnsupportedError: more extents than the limits allow; the connection can be used further.
            NbdDisconnectedError: the connection ended; the survey can be taken up on another one.
        """
        for volley in self._volleys.values():
            self._spans.extend(volley.spans())
        self._volleys.clear()
        self._again = deque(span for span in self._spans if not span.complete)
        self._pace.restart()
        with connection.batch() as batch:
            while True:
                if headers := self._requests(connection, batch):
                    yield Send(headers)
                if not batch.pending and not batch.finished:
                    break
                yield Wait(batch, Due(batch.pending))
                while batch.finished:
                    request = batch.finished.popleft()
                    connection.require_success(request)
                    if request in self._volleys:
                        volley = self._volleys.pop(request)
                        self._terms.spend(volley.count)
                        self._spans.extend(volley.spans())
                        self._loose += 1
                        self._pace.restart()
                if self._terms.error is not None:
                    raise self._terms.error
                if self._loose >= _LOOSE:
                    self._join()
        self._join()
        if self._start < self._end and [(each.start, each.end) for each in self._spans] != [(self._start, self._end)]:
            raise RuntimeError(f"{self._where}: a map with a gap, which is a defect of qmpnbd")  # and not a map
        return {name: self._map(name) for name in self.names}

    def once(self, connection: Connection, *, one: bool) -> Job[dict[str, ExtentMap]]:
        """Makes a single request about the range and returns what it told, which may be less for each context.

        Raises:
            UsageError: the range is longer than one request can ask about, or not aligned.
            Exception: what `run` raises.
        """
        if (self._start, self._end) != (self._asked[0], sum(self._asked)) or not 0 < self._asked[1] <= self._longest:
            raise UsageError(
                f"[{self._asked[0]:#x}, {sum(self._asked):#x}) cannot be asked about at once: in blocks of"
                f" {self._block} bytes, and at most {self._longest}",
                where=self._where,
            )
        span = Span(self._start, self._end, self.names)
        self._spans.append(span)
        with connection.batch() as batch:
            yield Send(self._request(connection, batch, span, CommandFlag.REQ_ONE if one else 0))
            yield Wait(batch, Due(batch.pending))
            connection.require_success(batch.finished.popleft())
        if self._terms.error is not None:
            raise self._terms.error
        return {name: self._map(name) for name in self.names}

    def _believed(self, reply: Reply, extents: int) -> None:
        """Learns from a reply that is complete and was believed; what it left out is asked for again."""
        span = reply.span
        self._loose += 1
        if not span.complete:
            self._short += 1
            if self._short > self._most_short:
                raise reply.nonsense(f"short reply number {self._short}", f"at most {self._most_short} for this size")
            self._again.append(span)
        self._pace.answered(extents)
        covered = span.cursor - reply.offset
        ideal = covered * _LIKED_EXTENTS // extents
        self._empty = extents == 1
        self._length = max(_SHORTEST_SPAN, min(ideal, self._length * _GROWTH, self._longest))

    def _join(self) -> None:
        """Puts together what is known so far, so that a map costs what its extents do."""
        self._spans.sort(key=lambda span: span.start)
        self._spans = joined(self._spans)
        self._loose = 0

    def _requests(self, connection: Connection, batch: Batch) -> bytes:
        """Makes as many requests as may be in flight."""
        headers = []
        while (volley := self._volley(connection, batch)) is not None:
            self._volleys[volley.request] = volley
            headers.append(volley.headers(connection.submit_volley(batch, volley)))
        while len(batch.pending) < self._pace.in_flight and (span := self._span()) is not None:
            headers.append(self._request(connection, batch, span, 0))
        return b"".join(headers)

    def _volley(self, connection: Connection, batch: Batch) -> EmptyVolley | None:
        """Returns many requests to make at once, if the disk has been empty lately and much of it is left."""
        export = connection.export
        enough = self._end - self._next >= _VOLLEY * self._longest
        if not enough or not self._empty or self._length < self._longest or len(self._volleys) == _VOLLEYS:
            return None
        if len(export.contexts) > 1 or export.replies == "extended":
            return None
        if connection.abandoned:  # by the hundred they would soon be too many
            return None
        if self._limits.in_flight < STATUS_IN_FLIGHT:  # somebody wants few
            return None

        def alone(span: Span) -> Request:
            self._spans.append(span)
            reply = self._reply(connection, span, span.start, export.contexts)
            most = self._limits.extra_chunks + 1
            return Request(Command.BLOCK_STATUS, span.start, span.end - span.start, batch, reply, most)

        bounds = list(range(self._next, self._next + (_VOLLEY + 1) * self._longest, self._longest))
        self._next = bounds[-1]
        (name,) = self.names
        return EmptyVolley(batch, name, export.contexts[name], bounds, alone)

    def _span(self) -> Span | None:
        """Returns a span with something left to ask for."""
        if self._again:
            return self._again.popleft()
        if self._next == self._end:
            return None
        length = self._length - self._length % max(self._block, 65536)
        end = min(self._next + min(length, self._longest), self._end)
        span = Span(self._next, end, self.names)
        self._spans.append(span)
        self._next = end
        return span

    def _request(self, connection: Connection, batch: Batch, span: Span, flags: int) -> bytes:
        """Asks for what is left of a span."""
        export = connection.export
        # An extent may end off the blocks that requests must keep to ("Size constraints").
        offset = span.cursor - span.cursor % self._block
        length = span.end - offset
        ids = [export.contexts[name] for name in self.names]
        payload = b""
        expected = export.contexts
        selective = export.replies == "extended" and export.flags & TransmissionFlag.BLOCK_STATUS_PAYLOAD
        if selective and len(ids) < len(expected):
            payload = pack_status_filter(length, ids)
            expected = {name: expected[name] for name in self.names}
        reply = self._reply(connection, span, offset, expected, one=bool(flags & CommandFlag.REQ_ONE))
        size = len(payload) if payload else None
        header = connection.submit(batch, Command.BLOCK_STATUS, offset, length, reply, flags=flags, payload=size)
        return header + payload

    def _reply(
        self, connection: Connection, span: Span, offset: int, expected: Mapping[str, int], *, one: bool = False
    ) -> Reply:
        self._pace.asked()
        return Reply(self._terms, self._believed, connection, span, offset=offset, expected=expected, one=one)

    def _map(self, name: str) -> ExtentMap:
        """Joins what the spans know of one context, and lets go of it."""
        tracks = [span.tracks.pop(name) for span in self._spans]
        count = sum(len(piece) for track in tracks for piece in track.ends)
        ends, values = np.empty(count, dtype=np.uint64), np.empty(count, dtype=np.uint64)
        at = count
        for track in reversed(tracks):
            while track.ends:  # a piece is let go of as soon as it is copied: together they are as large as the map
                piece, told = track.ends.pop(), track.values.pop()
                ends[at - len(piece) : at] = piece
                values[at - len(piece) : at] = told
                at -= len(piece)
        ends -= np.uint64(self._start)
        joined = ExtentMap.taking(ends, values)
        offset, length = self._asked
        first = offset - self._start
        if first == 0 and joined.size <= length:
            return joined
        return joined.clip(first, min(first + length, joined.size))


def _chosen(export: Export, contexts: Collection[str] | None, where: str) -> tuple[str, ...]:
    """Returns the contexts to read, in the order in which they were agreed on."""
    if isinstance(contexts, str):
        raise UsageError(f"contexts is one text ({contexts!r}), not a collection of names", where=where)
    for name in contexts or ():
        if name not in export.contexts:
            raise UsageError(f"the metadata context {name!r} was not asked for when connecting", where=where)
    chosen = tuple(name for name in export.contexts if contexts is None or name in contexts)
    if not chosen:
        raise UsageError("no metadata context was asked for, so there is no map to read", where=where)
    return chosen
