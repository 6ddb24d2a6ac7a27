"""Served against computed, on a disk that may be written meanwhile.

The two maps cannot be read at one instant, so a difference may be the guest's doing. Each round reads::

    [watch on]  ->  served before  ->  flush  ->  files (computed)  ->  served after  ->  [watch off: touched]

    a byte agrees if computed equals the served value before or after: QEMU and the files said the same within the
    round. A byte that differs from both, was served alike before and after, and was not touched all the while is a
    discrepancy. Whatever else differs is open, and judged again in the next round.

The watch (dirty bitmaps) costs a little, so the first round goes without it and finds no discrepancy. What is open
after the last round is set aside, and told.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from qmpnbd.extents import U64, ExtentMap
from qmpnbd.report.model import Finding

_SHIFT = np.uint64(32)
_LOW = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Discrepancy:
    """A run of bytes for which served and computed differ.

    Attributes:
        offset: first byte.
        end: the byte after the last one.
        served: allocation depth as served.
        computed: allocation depth computed from the files.
    """

    offset: int
    end: int
    served: int
    computed: int


class Comparison:
    """The judgement over several rounds; pure.

    Attributes:
        rounds: rounds judged so far.
    """

    def __init__(self, size: int) -> None:
        self.rounds = 0
        self._open = ExtentMap.uniform(size, 1)
        self._found = ExtentMap.uniform(size, 0)

    @property
    def settled(self) -> bool:
        """Whether every byte has agreed or is a discrepancy: another round would tell nothing new."""
        return self.rounds > 0 and not self._open.values.any()

    def add(
        self,
        before: ExtentMap,
        computed: ExtentMap,
        after: ExtentMap | None = None,
        touched: ExtentMap | None = None,
    ) -> None:
        """Judges a round.

        Args:
            before: the map served before the files were read.
            computed: the map computed from the files.
            after: the map served after that; needed only if `before` and `computed` differ.
            touched: not 0 for every byte that was written during the round; None if nobody watched.

        Raises:
            ValueError: the maps differ in size, or `after` is needed and missing.
        """
        self.rounds += 1
        if before == computed:
            self._open = ExtentMap.uniform(before.size, 0)
            return
        if after is None:
            raise ValueError("the maps differ, so the map served after the files were read is needed")
        differs = before.combine(computed, np.not_equal).combine(after.combine(computed, np.not_equal), np.logical_and)
        bad = self._open.combine(differs, np.logical_and)
        if touched is None:
            self._open = bad
            return
        at_rest = before.combine(after, np.equal).combine(touched, lambda same, dirty: (same != 0) & (dirty == 0))
        found = bad.combine(at_rest, np.logical_and)
        self._found = self._found.overlay(before.combine(computed, _pair).combine(found, _where))
        self._open = bad.combine(found, lambda is_bad, is_found: (is_bad != 0) & (is_found == 0))

    def leave_open(self, where: ExtentMap) -> None:
        """Sets aside what cannot be judged, however it was told.

        Args:
            where: 1 for every such byte, else 0.
        """
        self._open = self._open.combine(where, np.logical_or)

    def discrepancies(self) -> Iterator[Discrepancy]:
        """Yields every discrepancy, in order."""
        for extent in self._found:
            if extent.value:
                yield Discrepancy(extent.offset, extent.end, extent.value >> 32, extent.value & _LOW)

    def discrepancy_map(self) -> ExtentMap:
        """Returns what is not 0 for every byte of a discrepancy, and 0 elsewhere."""
        return self._found

    def discrepancy_totals(self) -> tuple[int, int]:
        """Returns the number of discrepancies and the bytes in them."""
        bytes_found = self._found.size - self._found.totals().get(0, 0)
        return int(np.count_nonzero(self._found.values)), bytes_found

    def set_aside(self) -> ExtentMap:
        """Returns 1 for every byte that could not be judged, 0 elsewhere."""
        return self._open


@dataclass(frozen=True, slots=True)
class MapFinding:
    """What the comparison of one metadata context found.

    Attributes:
        context: its name.
        served: the map as served; None where there is nothing to compare it with, or nothing is served.
        comparison: the judgement; None likewise.
        note: why there is none, or what else to know; may be empty.
        finding: what a discrepancy means (`qmpnbd.report.model.DiscrepancyEntry`).
    """

    context: str
    served: ExtentMap | None
    comparison: Comparison | None
    note: str = ""
    finding: Finding = "differs"


def compared(served: ExtentMap, computed: ExtentMap) -> Comparison:
    """Compares two maps of a disk that stands still."""
    comparison = Comparison(served.size)
    comparison.add(served, computed, served, ExtentMap.uniform(served.size, 0))
    return comparison


class Ranged(Protocol):
    """Something with an offset and an end."""

    @property
    def offset(self) -> int:
        """The first byte."""

    @property
    def end(self) -> int:
        """The byte after the last one."""


def marked(size: int, comparisons: Iterable[Comparison | None], ranges: Sequence[Ranged]) -> ExtentMap:
    """Returns 1 for every byte of a discrepancy, and 0 elsewhere.

    Args:
        size: of the disk.
        comparisons: of maps; None for what was not compared.
        ranges: discrepancies of other things.
    """
    found = ExtentMap.uniform(size, 0)
    for comparison in comparisons:
        if comparison is not None:
            found = found.combine(comparison.discrepancy_map(), np.logical_or)
    edges = [edge for each in sorted(ranges, key=lambda each: each.offset) for edge in (each.offset, each.end)]
    if not edges:
        return found
    return found.combine(ExtentMap([*edges, size], np.arange(len(edges) + 1) % 2), np.logical_or)


def _pair(served: U64, computed: U64) -> U64:
    # Two 32-bit depths in one value; served and computed differ wherever it is used, so it is not 0 there.
    return (served << _SHIFT) | (computed & np.uint64(_LOW))


def _where(pair: U64, wanted: U64) -> U64:
    return np.where(wanted != 0, pair, np.uint64(0))
