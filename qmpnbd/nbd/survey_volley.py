"""Many requests for status at once, where a disk is so empty that each reply tells one extent.

With 32-bit lengths an empty disk of 256 TiB takes 65,538 requests. QEMU answers one in ten microseconds; Python needs
several times that to make a request, take its reply apart and book it. So they are made by the hundred and their
replies compared with what is expected, column by column. A reply that is anything else than the one extent asked for,
good or bad, is judged by itself as always.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import numpy as np

from qmpnbd.nbd.constants import CHUNK_MAGIC, MAX_EXTRA_CHUNKS, REQUEST_MAGIC, ChunkFlag, ChunkType, Command
from qmpnbd.nbd.requests import NOWHERE, Batch, Request, Sink
from qmpnbd.nbd.survey_reply import Span

_REQUEST: Final = np.dtype(
    [("magic", ">u4"), ("flags", ">u2"), ("type", ">u2"), ("cookie", ">u8"), ("offset", ">u8"), ("length", ">u4")]
)
"""`qmpnbd.nbd.messages.RequestHeader`, compact."""

_REPLY: Final = np.dtype(
    [
        *(("magic", ">u4"), ("flags", ">u2"), ("type", ">u2"), ("cookie", ">u8"), ("length", ">u4")),
        *(("id", ">u4"), ("bytes", ">u4"), ("status", ">u4")),
    ]
)
"""A whole reply as expected: one chunk, with its magic, of one extent."""


class EmptyVolley:
    """Requests for consecutive spans of one length, for one metadata context.

    Args:
        batch: the survey.
        name: the metadata context.
        id_: its id.
        bounds: where the spans begin, and at last where they end.
        alone: makes a request for a span whose reply is not the expected one.
    """

    def __init__(self, batch: Batch, name: str, id_: int, bounds: list[int], alone: Callable[[Span], Request]) -> None:
        self.first = 0
        self.count = len(bounds) - 1
        start, end = bounds[0], bounds[-1]
        self.request = Request(Command.BLOCK_STATUS, start, end - start, batch, Sink(), most_chunks=0)
        self.open = self.count
        self._name = name
        self._id = id_
        self._bounds = np.array(bounds, dtype=np.uint64)
        self._lengths = np.diff(self._bounds)
        self._values = np.zeros(self.count, dtype=np.uint32)
        self._told = np.zeros(self.count, dtype=bool)
        self._apart = np.zeros(self.count, dtype=bool)
        self._alone = alone

    def headers(self, first: int) -> bytes:
        """Returns the headers to send, now that the cookies are known."""
        self.first = first
        requests = np.zeros(self.count, dtype=_REQUEST)
        requests["magic"] = REQUEST_MAGIC
        requests["type"] = Command.BLOCK_STATUS
        requests["cookie"] = np.arange(first, first + self.count)
        requests["offset"] = self._bounds[:-1]
        requests["length"] = self._lengths
        return requests.tobytes()

    def take(self, arrived: memoryview) -> int:
        """Books the replies at the beginning of what arrived that are as expected; returns how many bytes they have."""
        replies = np.frombuffer(arrived, dtype=_REPLY, count=len(arrived) // _REPLY.itemsize)
        # A cookie below the first one becomes a very large number.
        index = replies["cookie"].astype(np.uint64) - np.uint64(self.first)
        good = index < self.count
        index = np.where(good, index, 0).astype(np.intp)
        good &= (replies["magic"] == CHUNK_MAGIC) & (replies["flags"] == ChunkFlag.DONE)
        good &= (replies["type"] == ChunkType.BLOCK_STATUS) & (replies["length"] == _REPLY.itemsize - 20)
        good &= (replies["id"] == self._id) & (replies["bytes"] == self._lengths[index])
        good &= ~(self._told[index] | self._apart[index])
        count = good.size if good.all() else int(good.argmin())
        if count > 1 and np.unique(index[:count]).size < count:
            count = 1  # one of them twice
        index = index[:count]
        self._values[index] = replies["status"][:count]
        self._told[index] = True
        self.open -= count
        return count * _REPLY.itemsize

    def single(self, cookie: int) -> Request | None:
        """Returns one of the requests to be booked by itself; None if it was answered."""
        index = cookie - self.first
        if self._told[index] or self._apart[index]:
            return None
        self._apart[index] = True
        self.open -= 1
        if self.request.sink is NOWHERE:  # given up meanwhile
            return self.answered(cookie)
        return self._alone(Span(int(self._bounds[index]), int(self._bounds[index + 1]), [self._name]))

    def answered(self, cookie: int) -> Request:
        """Returns what stands for a request that nobody wants anything of any more."""
        start, length = int(self._bounds[cookie - self.first]), int(self._lengths[cookie - self.first])
        return Request(Command.BLOCK_STATUS, start, length, self.request.batch, NOWHERE, 1 + MAX_EXTRA_CHUNKS)

    def spans(self) -> Iterator[Span]:
        """Yields what became known, and what did not and is nobody else's, in spans."""
        edges = np.flatnonzero(np.diff(np.stack((self._told, self._apart)).astype(np.int8), axis=1).any(axis=0)) + 1
        for first, last in zip([0, *edges.tolist()], [*edges.tolist(), self.count], strict=True):
            if self._apart[first]:
                continue
            span = Span(int(self._bounds[first]), int(self._bounds[last]), [self._name])
            if self._told[first]:
                track = span.tracks[self._name]
                track.ends.append(self._bounds[first + 1 : last + 1])
                track.values.append(self._values[first:last])
                track.cursor = span.end
            yield span
