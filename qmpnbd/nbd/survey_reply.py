"""What a server says of the status of one span, judged extent by extent before it is believed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from qmpnbd.errors import NbdUnsupportedError
from qmpnbd.extents import U64
from qmpnbd.nbd.connection import Connection
from qmpnbd.nbd.quirks import Quirk
from qmpnbd.nbd.requests import Request, Sink, Status

Values: TypeAlias = npt.NDArray[np.uint32] | npt.NDArray[np.uint64]

_LARGE: Final = 1024  # extents of a piece that is not worth copying to save what it costs itself
_SMALL = ("base:", "qemu:")  # namespaces whose status has 32 bits, whatever the headers


@dataclass(slots=True)
class Terms:
    """What replies are judged by, and what they have cost.

    Attributes:
        where: server and export, for messages.
        size: bytes of the export.
        lenient: which faults of the server to bear.
        most_extents: so many may be told.
        extents: so many were told.
        error: what to raise because too many were.
    """

    where: str
    size: int
    lenient: frozenset[Quirk]
    most_extents: int
    extents: int = 0
    error: NbdUnsupportedError | None = None

    def spend(self, extents: int) -> bool:
        """Counts extents that were told; whether there is still room for them."""
        self.extents += extents
        if self.extents > self.most_extents and self.error is None:
            self.error = NbdUnsupportedError(
                f"the map has more than {self.most_extents} extents",
                where=self.where,
                remedy="Read it in parts, or allow more.",
            )
        return self.error is None


@dataclass(slots=True)
class Track:
    """What is known of one context in one span.

    Attributes:
        cursor: everything in the span before this byte is known.
        ends: where extents end, in pieces.
        values: their status, in pieces.
    """

    cursor: int
    ends: list[U64] = field(default_factory=list)
    values: list[Values] = field(default_factory=list)

    def join(self) -> None:
        """Puts small pieces together, and runs of one status across them; large ones are not copied again."""
        pieces = list(zip(self.ends, self.values, strict=True))
        self.ends, self.values = [], []
        for large, some in groupby(pieces, key=lambda piece: len(piece[0]) >= _LARGE):
            group = list(some)
            if not large:
                ends, values = zip(*group, strict=True)
                group = [_runs(np.concatenate(ends), np.concatenate(values))]
            for piece, told in group:
                self.ends.append(piece)
                self.values.append(told)


class Span:
    """Bytes ``[start, end)`` that are asked for by themselves, and what is known of each context in them."""

    __slots__ = ("end", "start", "tracks")

    def __init__(self, start: int, end: int, names: Sequence[str]) -> None:
        self.start = start
        self.end = end
        self.tracks = {name: Track(start) for name in names}

    @property
    def cursor(self) -> int:
        """Everything before this byte is known, in all contexts."""
        return min(track.cursor for track in self.tracks.values())

    @property
    def complete(self) -> bool:
        """Whether everything is known."""
        return self.cursor >= self.end


def joined(spans: list[Span]) -> list[Span]:
    """Puts together what is known: a span and its pieces cost many times what an extent does.

    Args:
        spans: in order; there may be gaps between them.

    Returns:
        The same knowledge in fewer spans. Those with something left to ask for are the same objects.
    """
    result: list[Span] = []
    last: Span | None = None  # made here, so that it may grow
    for span in spans:
        if not span.complete:
            last = None
            result.append(span)
            continue
        if last is None or last.end != span.start:
            last = Span(span.start, span.start, tuple(span.tracks))
            result.append(last)
        last.end = span.end
        for name, track in span.tracks.items():
            grown = last.tracks[name]
            grown.cursor = track.cursor
            grown.ends += track.ends
            grown.values += track.values
    for span in result:
        for track in span.tracks.values():
            track.join()
    return result


def _runs(ends: U64, values: Values) -> tuple[U64, Values]:
    """Returns extents with runs of one status put together; there is at least one extent."""
    last_of_run = np.append(values[1:] != values[:-1], True)
    return (ends, values) if last_of_run.all() else (ends[last_of_run], values[last_of_run])


class Reply(Sink):
    """The answer to one request of a survey."""

    __slots__ = (
        *("_believed", "_connection", "_expected", "_extents", "_lowest", "_one", "_seen", "_terms"),
        *("end", "offset", "span"),
    )

    def __init__(
        self,
        terms: Terms,
        believed: Callable[[Reply, int], None],
        connection: Connection,
        span: Span,
        *,
        offset: int,
        expected: Mapping[str, int],
        one: bool,
    ) -> None:
        self._terms = terms
        self._connection = connection
        self._believed = believed
        self._expected = {id_: name for name, id_ in expected.items()}
        self._seen: set[int] = set()
        self._lowest = span.cursor
        self._extents = 1
        self._one = one
        self.span = span
        self.offset = offset
        self.end = span.end

    def status(self, request: Request, told: Status) -> None:  # noqa: ARG002 - of no use here
        """Judges the extents of one context and keeps those that are new."""
        name = self._expected.get(told.context_id)
        if name is None:
            if Quirk.UNKNOWN_CONTEXT in self._terms.lenient:
                return
            raise self.nonsense(f"context id {told.context_id}", f"none but {self._names()}")
        if told.context_id in self._seen:
            raise self.nonsense(f"two chunks for {name}", "one")
        self._seen.add(told.context_id)
        dtype, width = (">u8", 16) if told.wide else (">u4", 8)
        track = self.span.tracks.get(name)
        if not self._terms.spend(len(told.entries) // width) or track is None:
            return
        pairs = np.frombuffer(told.entries, dtype=dtype).reshape(-1, 2)
        self._extents = max(self._extents, len(pairs))
        ends, values = self._judged(name, pairs[:, 0].astype(np.uint64), pairs[:, 1])
        large = told.wide and int(values.max()) >> 32
        self._keep(track, ends, values.astype(np.uint64) if large else values.astype(np.uint32))

    def done(self, request: Request) -> None:
        """Judges the reply as a whole."""
        if request.failure is not None or self._terms.error is not None:
            return
        missing = [name for id_, name in self._expected.items() if id_ not in self._seen]
        if missing:
            raise self.nonsense(f"no chunk for {', '.join(missing)}", f"one for each of {self._names()}")
        if self.span.cursor <= self._lowest:
            block = self._connection.export.minimum_block
            raise self.nonsense(f"nothing beyond {self._lowest:#x}", f"more than a block of {block} bytes")
        self._believed(self, self._extents)

    def nonsense(self, got: str, expected: str) -> Exception:
        """Makes the error for a reply that cannot be true; the connection is dead then."""
        return self._connection.violation(
            f"block status of [{self.offset:#x}, {self.end:#x}): got {got}, expected {expected}"
        )

    def _judged(self, name: str, lengths: U64, values: Values) -> tuple[U64, Values]:
        """Returns where extents end, counted from the request, and their status, once nothing speaks against them."""
        lenient = self._terms.lenient
        if not lengths.all():
            first = int(np.argmin(lengths != 0))
            if not first or Quirk.ZERO_LENGTH_EXTENT not in lenient:
                at = self.offset + int(lengths[:first].sum())
                raise self.nonsense(f"an extent of length 0 at {at:#x} for {name}", "at least 1")
            lengths, values = lengths[:first], values[:first]
        if self._one and lengths.size > 1:
            raise self.nonsense(f"{lengths.size} extents for {name}", "one, as was asked for (NBD_CMD_FLAG_REQ_ONE)")
        ends = np.cumsum(lengths, dtype=np.uint64)
        length = self.end - self.offset
        # 64-bit lengths may add up to more than 64 bits; then a sum is less than the one before it.
        surplus = np.flatnonzero((ends[:-1] >= length) | (ends[1:] <= ends[:-1]))
        if surplus.size:
            kept = int(surplus[0]) + 1
            if Quirk.EXTRA_EXTENT not in lenient or int(ends[kept - 1]) < length:
                begin = self.offset + int(ends[kept - 1])
                raise self.nonsense(f"extents for {name} that begin at {begin:#x}", f"none from {self.end:#x} on")
            ends, values = ends[:kept], values[:kept]
        if self.offset + int(ends[-1]) > self._terms.size and Quirk.EXTENT_PAST_EXPORT not in lenient:
            got = f"an extent for {name} up to {self.offset + int(ends[-1]):#x}"
            raise self.nonsense(got, f"none past the export's end at {self._terms.size:#x}")
        if values.dtype.itemsize == 8 and name.startswith(_SMALL) and int(values.max()) >> 32:
            raise self.nonsense(f"the status {int(values.max()):#x} for {name}", "32 bits")
        ends[-1] = min(int(ends[-1]), length)
        return ends, values

    def _keep(self, track: Track, ends: U64, values: Values) -> None:
        """Keeps what was not known before, with runs of one status put together."""
        ends += np.uint64(self.offset)
        if track.cursor > self.offset:  # told again
            new = int(np.searchsorted(ends, np.uint64(track.cursor), side="right"))
            ends, values = ends[new:], values[new:]
        if not ends.size:
            return
        ends, values = _runs(ends, values)
        track.ends.append(ends)
        track.values.append(values)
        track.cursor = int(ends[-1])

    def _names(self) -> str:
        return ", ".join(f"{name} (id {id_})" for id_, name in self._expected.items())
