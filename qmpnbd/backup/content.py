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


def pieces(content: ExtentMap) -> tuple[U64, U64]:
    """Returns the pieces of the data: their offsets and their lengths in bytes, in ascending order."""
    data = content.values == np.uint64(DATA)
    starts, ends = content.starts[data], content.ends[data]
    piece = np.uint64(PIECE)
    counts = (ends + (piece - np.uint64(1))) // piece - starts // piece
    total = int(counts.sum())
    if not total:
        return np.empty(0, np.uint64), np.empty(0, np.uint64)
    which = np.repeat(np.arange(starts.size), counts.astype(np.intp))
    first_of_run = np.repeat(np.cumsum(counts) - counts, counts.astype(np.intp))
    number = np.arange(total, dtype=np.uint64) - first_of_run
    grid = (starts[which] // piece + number) * piece
    offsets = np.maximum(grid, starts[which])
    return offsets, np.minimum(grid + piece, ends[which]) - offsets
