"""Which bytes a sample compares: some of every layer, and those on both sides of every boundary. Pure.

::

    depth      |  1  |   2          |1|     0       |     2     |
    sample         -x- -   --     -x-x-     --     -x-     --
               boundaries (x) and runs (-), of each depth some

Faults show where one layer ends and another begins, and in a layer as a whole; so there is looked. Chosen by chance
that is the same for the same disk and seed every time.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from qmpnbd.extents import ExtentMap

MAX_BOUNDARIES = 128
"""Boundaries that are looked at; 1 MiB with what lies around them. On a local disk a sample costs about 20 ms."""

RUNS_A_DEPTH = 4
"""Places inside of runs that are looked at for each depth."""

MAX_RANGES = 4096
"""Ranges in which a whole disk is compared: each has its hash in the report."""

_LEAST = 1 << 20  # bytes of such a range
_SHIFT = np.uint64(32)  # allocation depths have 32 bits
_AROUND = 4096  # bytes on each side of a boundary
_INSIDE = 32768  # bytes inside a run
_ALIGNMENT = 4096  # a block of any device


@dataclass(frozen=True, slots=True)
class Sample:
    """A choice of ranges.

    Attributes:
        ranges: offset and length of each, in order, none touching the next.
        note: how they were chosen, for people.
    """

    ranges: tuple[tuple[int, int], ...]
    note: str

    @property
    def bytes(self) -> int:
        """Bytes in all of them."""
        return sum(length for _, length in self.ranges)


def whole(size: int) -> Sample:
    """Returns all of a disk, in ranges of a power of two, `MAX_RANGES` at most."""
    step = max(_LEAST, 1 << (-(-size // MAX_RANGES) - 1).bit_length())
    return Sample(tuple((offset, min(step, size - offset)) for offset in range(0, size, step)), "")


def both(computed: ExtentMap, served: ExtentMap) -> ExtentMap:
    """Returns a map by which to sample: it has the boundaries of two, for one that only one side knows is suspect."""
    if computed == served:
        return computed
    return computed.combine(served, lambda own, told: own << _SHIFT | told)


def sample(depth: ExtentMap, seed: int, alignment: int = _ALIGNMENT) -> Sample:
    """Chooses a sample of a disk.

    Args:
        depth: the allocation depth of every byte, or that of `both` sides.
        seed: another one makes another sample.
        alignment: the ranges begin and end at multiples of so many bytes, but for the end of the disk.
    """
    if not depth.size:
        return Sample((), "")
    dice = random.Random(f"{seed}/{depth.size}")  # noqa: S311 - which bytes are looked at is no secret
    edges = depth.ends[:-1]
    count = int(edges.size)
    places = dice.sample(range(count), MAX_BOUNDARIES) if count > MAX_BOUNDARIES else range(count)
    wanted = [(edge - _AROUND, edge + _AROUND) for edge in edges[np.fromiter(places, np.intp)].tolist()]
    for value in np.unique(depth.values).tolist():
        runs = np.flatnonzero(depth.values == np.uint64(value))
        starts, ends = depth.starts, depth.ends
        for place in dice.sample(range(runs.size), min(RUNS_A_DEPTH, runs.size)):
            start, end = int(starts[runs[place]]), int(ends[runs[place]])
            first = dice.randrange(start, max(end - _INSIDE, start) + 1)
            wanted.append((first, min(first + _INSIDE, end)))
    ranges = tuple(_joined(wanted, max(alignment, _ALIGNMENT), depth.size))
    some = f"{MAX_BOUNDARIES} of {count:,}" if count > MAX_BOUNDARIES else f"all {count:,}"
    return Sample(ranges, f"sample (seed {seed}): {some} boundaries, and places in every layer")


def _joined(wanted: Iterable[tuple[int, int]], alignment: int, size: int) -> Iterable[tuple[int, int]]:
    """Yields offset and length of ranges, aligned, in order and without overlap."""
    start, end = 0, 0
    for low, high in sorted(wanted):
        first = max(low, 0) // alignment * alignment
        last = min(-(-high // alignment) * alignment, size)
        if first > end:
            if end > start:
                yield start, end - start
            start = first
        end = max(end, last)
    if end > start:
        yield start, end - start
