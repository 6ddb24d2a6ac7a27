"""ExtentMap: a status for every byte of a range, in the fewest possible runs.

The one type that crosses every border of this package::

    bytes     0         65536               196608      262144
              |----------|--------------------|-----------|
    values         1               0                3

    ends   = [65536, 196608, 262144]      uint64, strictly increasing, the last one is the size
    values = [1,     0,      3     ]      uint64, neighbours differ

Two parallel numpy columns, because the work on them is the heart of the product: a map of two million extents is
decoded, merged and compared in tenths of a second, at 16 bytes an extent. Every constructor restores the canonical
form, so ``==`` means 'the same disk'. What a value means is the business of whoever made the map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

U64: TypeAlias = npt.NDArray[np.uint64]

_SLICE = 16384  # extents turned into Python objects at a time while iterating


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of bytes with one status, half-open.

    Attributes:
        offset: first byte.
        end: the byte after the last one.
        value: the status.
    """

    offset: int
    end: int
    value: int

    @property
    def length(self) -> int:
        """Bytes in the run."""
        return self.end - self.offset


@dataclass(frozen=True, slots=True)
class Difference:
    """A run of bytes for which two maps say different things.

    Attributes:
        offset: first byte.
        end: the byte after the last one.
        left: what the map says that was asked for its differences.
        right: what the other one says.
    """

    offset: int
    end: int
    left: int
    right: int


class ExtentMap:
    """A status for every byte of ``[0, size)``; immutable.

    Attributes:
        ends: where each run ends, uint64, strictly increasing; read-only.
        values: the status of each run, uint64; read-only.
    """

    __slots__ = ("ends", "values")

    ends: U64
    values: U64

    def __init__(self, ends: npt.ArrayLike, values: npt.ArrayLike) -> None:
        """Makes a map of runs given by their ends; equal neighbours are merged, empty runs dropped.

        Args:
            ends: where each run ends, in bytes, never decreasing.
            values: the status of each run, as many as `ends`.

        Raises:
            ValueError: the columns differ in length or `ends` decreases.
        """
        end_column = np.asarray(ends, dtype=np.uint64)
        value_column = np.asarray(values, dtype=np.uint64)
        if end_column.ndim != 1 or end_column.shape != value_column.shape:
            raise ValueError(f"ends and values must be columns of one length: {end_column.shape}, {value_column.shape}")
        if end_column.size and not bool(np.all(end_column[1:] >= end_column[:-1])):
            raise ValueError("ends must not decrease")
        last_of_run = _last_of_runs(end_column, value_column)
        self.ends = end_column[last_of_run]
        self.values = value_column[last_of_run]
        self.ends.setflags(write=False)
        self.values.setflags(write=False)

    @classmethod
    def taking(cls, ends: U64, values: U64) -> ExtentMap:
        """Makes a map as `ExtentMap(ends, values)` does, of columns that belong to it from now on.

        Where they are canonical they are not copied, which saves half the memory of a large map.
        """
        ordered = ends.ndim == 1 and ends.shape == values.shape and bool(np.all(ends[1:] >= ends[:-1]))
        if not ordered or not bool(_last_of_runs(ends, values).all()):
            return cls(ends, values)
        made = cls.__new__(cls)
        made.ends, made.values = ends, values
        made.ends.setflags(write=False)
        made.values.setflags(write=False)
        return made

    @classmethod
    def of_lengths(cls, lengths: npt.ArrayLike, values: npt.ArrayLike) -> ExtentMap:
        """Makes a map of consecutive runs given by their lengths in bytes, as they come over the wire."""
        return cls(np.cumsum(np.asarray(lengths, dtype=np.uint64), dtype=np.uint64), values)

    @classmethod
    def of_extents(cls, extents: Iterable[tuple[int, int]]) -> ExtentMap:
        """Makes a map of consecutive ``(length, value)`` pairs; for maps written by hand."""
        pairs = list(extents)
        return cls.of_lengths([length for length, _ in pairs], [value for _, value in pairs])

    @classmethod
    def uniform(cls, size: int, value: int) -> ExtentMap:
        """Makes a map of `size` bytes that all have one status."""
        return cls([size], [value])

    @property
    def size(self) -> int:
        """Bytes covered."""
        return int(self.ends[-1]) if self.ends.size else 0

    @property
    def starts(self) -> U64:
        """Where each run starts; a column like `ends`."""
        starts = np.empty_like(self.ends)
        if starts.size:
            starts[0] = 0
            starts[1:] = self.ends[:-1]
        return starts

    def __len__(self) -> int:
        """Number of runs."""
        return int(self.ends.size)

    def __iter__(self) -> Iterator[Extent]:
        """Yields the runs in order; plain ints, so use the columns for large maps."""
        offset = 0
        for first in range(0, len(self), _SLICE):
            ends = self.ends[first : first + _SLICE].tolist()
            values = self.values[first : first + _SLICE].tolist()
            for end, value in zip(ends, values, strict=True):
                yield Extent(offset, end, value)
                offset = end

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ExtentMap):
            return NotImplemented
        return np.array_equal(self.ends, other.ends) and np.array_equal(self.values, other.values)

    def __hash__(self) -> int:
        return hash((self.ends.tobytes(), self.values.tobytes()))

    def __repr__(self) -> str:
        shown = ", ".join(f"[{e.offset:#x}, {e.end:#x})={e.value}" for e, _ in zip(self, range(8), strict=False))
        more = f", … {len(self) - 8} more" if len(self) > 8 else ""
        return f"ExtentMap({shown}{more})"

    def at(self, offset: int) -> int:
        """Returns the status of the byte at `offset`.

        Raises:
            IndexError: outside ``[0, size)``.
        """
        if not 0 <= offset < self.size:
            raise IndexError(f"offset {offset} outside a map of {self.size} bytes")
        return int(self.values[np.searchsorted(self.ends, np.uint64(offset), side="right")])

    def resized(self, size: int, fill: int) -> ExtentMap:
        """Returns the map of ``[0, size)``: cut short, or continued with the status `fill`."""
        if size > self.size:
            return ExtentMap(np.append(self.ends, np.uint64(size)), np.append(self.values, np.uint64(fill)))
        return ExtentMap(np.minimum(self.ends, np.uint64(size)), self.values)

    def clip(self, offset: int, end: int) -> ExtentMap:
        """Returns the map of the bytes ``[offset, end)`` of this one, moved so that `offset` becomes 0.

        Raises:
            ValueError: not a range inside the map.
        """
        if not 0 <= offset <= end <= self.size:
            raise ValueError(f"[{offset}, {end}) is not inside a map of {self.size} bytes")
        inside = np.clip(self.ends, np.uint64(offset), np.uint64(end)) - np.uint64(offset)
        return ExtentMap(inside, self.values)

    def totals(self) -> dict[int, int]:
        """Returns the bytes that have each status, in ascending order of status."""
        lengths = self.ends - self.starts
        found, which = np.unique(self.values, return_inverse=True)
        # uint64 throughout: bincount would weigh in floating point and lose bytes above 2**53.
        sums = np.zeros(found.size, dtype=np.uint64)
        np.add.at(sums, which, lengths)
        return dict(zip(found.tolist(), sums.tolist(), strict=True))

    def mapped(self, function: Callable[[U64], npt.ArrayLike]) -> ExtentMap:
        """Returns the map with `function` applied to the column of values."""
        return ExtentMap(self.ends, function(self.values))

    def aligned(self, other: ExtentMap) -> tuple[U64, U64, U64]:
        """Cuts this map and `other` at the same places.

        Returns:
            ``ends, own values, other's values``: columns of one length.

        Raises:
            ValueError: the maps differ in size.
        """
        if self.size != other.size:
            raise ValueError(f"maps of different sizes: {self.size} and {other.size} bytes")
        # A stable sort merges the two sorted columns: 100 times faster than np.union1d on a million extents.
        ends = np.concatenate((self.ends, other.ends))
        ends.sort(kind="stable")
        ends = ends[np.append(ends[1:] != ends[:-1], True)] if ends.size else ends
        own = self.values[np.searchsorted(self.ends, ends, side="left")]
        others = other.values[np.searchsorted(other.ends, ends, side="left")]
        return ends, own, others

    def combine(self, other: ExtentMap, join: Callable[[U64, U64], npt.ArrayLike]) -> ExtentMap:
        """Returns the map whose status is ``join(own, other's)`` at every byte.

        Args:
            other: a map of the same size.
            join: takes two columns of values and returns one of the same length.

        Raises:
            ValueError: the maps differ in size.
        """
        ends, own, others = self.aligned(other)
        return ExtentMap(ends, join(own, others))

    def overlay(self, top: ExtentMap, transparent: int = 0) -> ExtentMap:
        """Returns `top` where its status is not `transparent`, and this map elsewhere."""
        return self.combine(top, lambda below, above: np.where(above != np.uint64(transparent), above, below))

    def differences(self, other: ExtentMap) -> Iterator[Difference]:
        """Yields every run for which `other` says something else, in order, merged where both values go on.

        Raises:
            ValueError: the maps differ in size.
        """
        ends, own, others = self.aligned(other)
        if not ends.size:
            return
        starts = np.concatenate((np.zeros(1, dtype=np.uint64), ends[:-1]))
        for index in np.flatnonzero(own != others).tolist():
            yield Difference(int(starts[index]), int(ends[index]), int(own[index]), int(others[index]))


def _last_of_runs(ends: U64, values: U64) -> npt.NDArray[np.bool_]:
    """Returns which runs stay in the canonical form: not empty, and the next that is not has another value."""
    nonempty = np.empty(ends.size, dtype=bool)
    if ends.size:
        nonempty[0] = ends[0] > 0
        np.greater(ends[1:], ends[:-1], out=nonempty[1:])
    if nonempty.all():
        last = np.ones(ends.size, dtype=bool)
        np.not_equal(values[1:], values[:-1], out=last[:-1])
        return last
    kept = np.flatnonzero(nonempty)
    told = values[kept]
    last = np.zeros(ends.size, dtype=bool)
    last[kept[np.append(told[1:] != told[:-1], True)] if kept.size else kept] = True
    return last
