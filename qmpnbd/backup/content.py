"""What a copy consists of: which bytes hold data, which read as zeroes, and which are not part of it.

::

    content      | DATA                      | ZERO        | ABSENT | DATA  |
    pieces       |  0   |  1   |  2  |  3    |             |        |   4   |
                 cut at multiples of 1 MiB     no piece      no piece

A whole disk is made of `DATA` and `ZERO`. In a layer on top of another one `ABSENT` leaves a byte to that. What
has a hash is a piece of data, so that a piece is also what is read, written and proved at a time.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from qmpnbd.extents import U64, ExtentMap

ABSENT: Final = 0
"""Not in this layer: what it stands on decides."""

DATA: Final = 1
"""Bytes that are stored."""

ZERO: Final = 2
"""Reads as zeroes; nothing is stored."""

PIECE: Final = 1 << 20
"""Bytes of a piece at most, and the multiple of bytes at which runs of data are cut."""


def _runs(content: ExtentMap) -> tuple[U64, U64]:
    """Returns where the runs of data start and end."""
    data = content.values == np.uint64(DATA)
    return content.starts[data], content.ends[data]


def _counts(starts: U64, ends: U64) -> U64:
    """Returns how many pieces each run has."""
    piece, one = np.uint64(PIECE), np.uint64(1)
    # Every run has a byte, so nothing here falls below 0; nor does it pass 2**64, as adding to the end could.
    counts: U64 = (ends - one) // piece + one - starts // piece
    return counts


def piece_count(content: ExtentMap) -> int:
    """Returns how many pieces the data has; needs no memory for them."""
    return int(_counts(*_runs(content)).sum())


def pieces(content: ExtentMap) -> tuple[U64, U64]:
    """Returns the pieces of the data: their offsets and their lengths in bytes, in ascending order."""
    starts, ends = _runs(content)
    piece = np.uint64(PIECE)
    counts = _counts(starts, ends)
    total = int(counts.sum())
    if not total:
        return np.empty(0, np.uint64), np.empty(0, np.uint64)
    which = np.repeat(np.arange(starts.size), counts.astype(np.intp))
    first_of_run = np.repeat(np.cumsum(counts) - counts, counts.astype(np.intp))
    number = np.arange(total, dtype=np.uint64) - first_of_run
    grid = (starts[which] // piece + number) * piece
    offsets = np.maximum(grid, starts[which])
    return offsets, np.minimum(grid + piece, ends[which]) - offsets


def aligned(content: ExtentMap, granularity: int) -> ExtentMap:
    """Returns a content whose runs begin and end at multiples of `granularity`, or at the end of the disk.

    What has parts of several kinds becomes data as a whole: no byte of data is lost, none that is absent becomes a
    zero, and no zero shows what lies below. Such data is to be read from where all bytes of the disk can be read.
    """
    step, size = np.uint64(granularity), np.uint64(content.size)
    inner = content.ends[:-1]  # the end of the disk is no border between two kinds
    mixed = np.unique(inner[inner % step != 0] // step * step)
    edges = np.empty(2 * mixed.size + 1, np.uint64)
    edges[0:-1:2], edges[1:-1:2], edges[-1] = mixed, np.minimum(mixed + step, size), size
    marks = np.zeros(edges.size, np.uint64)
    marks[1:-1:2] = 1
    return content.combine(ExtentMap(edges, marks), lambda own, mark: np.where(mark != 0, np.uint64(DATA), own))
