"""SHA-256 of each range that was compared, of the bytes as they come; pure.

With the hash and the place of a range anybody can see later, on a copy of the disk, whether it still holds what it held
when it was validated: ``dd`` and ``sha256sum`` are enough. Nothing is read a second time for it::

    served pieces   |  1  |  3  |  2  |          |
    range 0         |  1  | held .....|  2, 3    |  ->  SHA-256

A range has a hash only if its bytes are those of one moment: every piece agreed with the files at once, and nothing was
written there from the first to the last. So a running disk's are told of one round, and only if it was watched.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from qmpnbd.extents import ExtentMap
from qmpnbd.report.model import RangeHashEntry

MAX_HELD: Final = 64 << 20
"""Bytes that are held because others before them have not come: eight times what is asked for at a time."""


class _Begun:
    """A range of which some has come.

    Attributes:
        at: the byte to be hashed next.
        held: pieces behind it, by their offset.
    """

    __slots__ = ("_digest", "at", "held")

    def __init__(self, at: int) -> None:
        self.at = at
        self.held: dict[int, bytes] = {}
        self._digest = hashlib.sha256()

    def add(self, data: bytes | bytearray | memoryview) -> None:
        self._digest.update(data)
        self.at += len(data)

    def __str__(self) -> str:
        return self._digest.hexdigest()


class Hashes:
    """The hashes of ranges.

    Args:
        ranges: offset and length of each, in order, without overlap.
    """

    def __init__(self, ranges: Sequence[tuple[int, int]] = ()) -> None:
        self._ranges = tuple(ranges)
        self._starts = [offset for offset, _ in ranges]
        self._told: dict[int, str] | None = None
        self.begin()

    def begin(self) -> None:
        """Begins a round; what one before has brought is forgotten, unless it was settled."""
        self._begun: dict[int, _Begun] = {}
        self._whole: dict[int, str] = {}
        self._lost: set[int] = set()
        self._held = 0

    def add(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Adds a piece on which both sides agree.

        Args:
            offset: where it lies: in one of the ranges.
            data: its bytes; they may be changed afterwards.
        """
        number = bisect_right(self._starts, offset) - 1
        if self._told is not None or number in self._lost:
            return
        start, length = self._ranges[number]
        begun = self._begun.setdefault(number, _Begun(start))
        if offset != begun.at:
            self._hold(begun, offset, data)
            return
        begun.add(data)
        while (piece := begun.held.pop(begun.at, None)) is not None:
            self._held -= len(piece)
            begun.add(piece)
        if begun.at == start + length:
            self._whole[number] = str(self._begun.pop(number))

    def lose(self, offset: int) -> None:
        """Notes that the range of a byte has no hash: the sides differ there, or it was written."""
        number = bisect_right(self._starts, offset) - 1
        self._lost.add(number)
        if (begun := self._begun.pop(number, None)) is not None:
            self._held -= sum(map(len, begun.held.values()))

    def settle(self, touched: ExtentMap | None) -> None:
        """Ends the round in which the ranges were read. It counts; later ones read only what was written in it.

        Args:
            touched: not 0 for every byte that was written during the round; None if nobody watched.
        """
        if self._told is None:
            written = self._written(touched)
            self._told = {number: digest for number, digest in self._whole.items() if not written[number]}
            self.begin()

    def told(self) -> tuple[RangeHashEntry, ...]:
        """Returns all ranges, each with its hash if it has one."""
        told = self._told or {}
        return tuple(
            RangeHashEntry(offset=offset, length=length, sha256=told.get(number))
            for number, (offset, length) in enumerate(self._ranges)
        )

    def _hold(self, begun: _Begun, offset: int, data: bytes | bytearray | memoryview) -> None:
        if self._held + len(data) > MAX_HELD:
            self.lose(offset)
            return
        begun.held[offset] = bytes(data)
        self._held += len(data)

    def _written(self, touched: ExtentMap | None) -> npt.NDArray[np.bool_]:
        """Returns of each range whether some of it was written, or that may be."""
        if touched is None or not self._ranges:
            return np.ones(len(self._ranges), np.bool_)
        offsets, lengths = np.array(self._ranges, np.uint64).T
        dirty = touched.values != 0
        first = np.searchsorted(touched.ends[dirty], offsets, side="right")
        last = np.searchsorted(touched.starts[dirty], offsets + lengths, side="left")
        written: npt.NDArray[np.bool_] = last > first
        return written
