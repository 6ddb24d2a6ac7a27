"""A map in small: equal parts of the disk, and the status that most bytes of each part have."""

from __future__ import annotations

import numpy as np

from qmpnbd.extents import U64, ExtentMap

STRIP_CELLS = 64
"""Parts of a disk in a report; fits a terminal with room for a frame."""

PICTURE_RUNS = 8192
"""Runs of a map that is drawn: more than a screen has columns, so that there is something to zoom into."""


def dominant(extents: ExtentMap, cells: int) -> tuple[int, ...]:
    """Returns the status that most bytes have in each of `cells` equal parts (fewer on a disk of fewer bytes).

    The smallest of several equally frequent ones. What it takes does not depend on how many statuses there are.
    """
    edges = _edges(extents.size, cells)
    if not edges.size:
        return ()
    ends, in_cell, values = ExtentMap(edges, np.arange(edges.size)).aligned(extents)
    lengths = np.diff(ends, prepend=np.uint64(0))
    # One after the other: the statuses of a cell, each with its bytes.
    order = np.lexsort((values, in_cell))
    in_cell, values = in_cell[order], values[order]
    first = np.flatnonzero(np.append(True, (in_cell[1:] != in_cell[:-1]) | (values[1:] != values[:-1])))
    shares = np.add.reduceat(lengths[order], first)
    # The largest share of a cell comes last; of equal ones that of the smallest status.
    ranked = np.lexsort((~values[first], shares, in_cell[first]))
    last = np.flatnonzero(np.append(np.diff(in_cell[first][ranked]) != 0, True))
    return tuple(values[first][ranked][last].tolist())


def bounded(extents: ExtentMap, runs: int = PICTURE_RUNS) -> ExtentMap:
    """Returns a map of at most `runs` runs: the map itself, or the dominant status of as many equal parts."""
    if len(extents) <= runs:
        return extents
    return ExtentMap(_edges(extents.size, runs), dominant(extents, runs))


def bounded_marks(extents: ExtentMap, runs: int = PICTURE_RUNS) -> ExtentMap:
    """Returns where a map is not 0, as 1, in at most `runs` runs; a part with a single such byte counts as whole."""
    marks = extents.mapped(lambda values: values != 0)
    if len(marks) <= runs:
        return marks
    edges = _edges(marks.size, runs)
    starts = np.append(np.zeros(1, dtype=np.uint64), edges[:-1])
    first = np.searchsorted(marks.ends, starts, side="right")
    last = np.searchsorted(marks.ends, edges, side="left")
    # Neighbours differ, so that two runs in a part are a mark and a gap.
    return ExtentMap(edges, (marks.values[first] != 0) | (first != last))


def _edges(size: int, cells: int) -> U64:
    cells = min(cells, size)
    # Python integers: size * cells can pass 2**64.
    return np.array([size * (cell + 1) // cells for cell in range(cells)], dtype=np.uint64)
