"""Many lines of text from columns of numbers.

A map can have millions of extents, and formatting each in Python takes longer than reading the map did. So lines are
set like type, some thousand at a time: every part of a line is a block of equal width, one row a line, and what is
shorter than its block is filled with NUL, which is left out at the end::

    { "offset":  | ␀␀␀␀65536 |  , "length":  | 131072 | , "type": 1},␊
    { "offset":  | 104857600 |  , "length":  | ␀␀4096 | , "type": 0},␊

Measured on 2.2 million lines: 0.3 s, where string formatting takes 2.7 s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from qmpnbd.extents import U64, ExtentMap

Block: TypeAlias = npt.NDArray[np.uint8]
"""Characters, a line a row; NUL for none."""

LINES = 4096
"""Lines set at a time: their blocks fit into the processor's cache."""

_PLACES = 4  # decimal places looked up at a time
_WORDS = np.frombuffer(b"".join(b"%04d" % number for number in range(10**_PLACES)), dtype=np.uint32)
_POWERS = np.array([10**power for power in range(1, 20)], dtype=np.uint64)


def constant(text: bytes, count: int) -> Block:
    """Returns a block that has the same text in each of `count` lines."""
    return np.broadcast_to(np.frombuffer(text, dtype=np.uint8), (count, len(text)))


def digits(values: U64, width: int = 0) -> Block:
    """Returns a block with a decimal number a line.

    Args:
        values: the numbers, at least one.
        width: at least so many characters, filled with blanks on the left.
    """
    longest = len(str(int(values.max())))
    words = -(-longest // _PLACES)
    looked_up = np.empty((values.size, words), dtype=np.uint32)
    rest = values
    for word in range(words - 1, 0, -1):
        rest, part = np.divmod(rest, np.uint64(10**_PLACES))
        looked_up[:, word] = _WORDS[part]
    looked_up[:, 0] = _WORDS[rest]
    characters = looked_up.view(np.uint8)[:, words * _PLACES - longest :]
    if len(str(int(values.min()))) < longest:
        counts = 1 + np.searchsorted(_POWERS, values, side="right")
        filler = np.where(np.arange(longest) < longest - width, np.uint8(0), np.uint8(ord(" ")))
        characters = np.where(np.arange(longest) < (longest - counts)[:, None], filler, characters)
    if longest >= width:
        return characters
    return np.concatenate((constant(b" " * (width - longest), values.size), characters), axis=1)


def choice(values: U64, text: Callable[[int], bytes]) -> Block:
    """Returns a block whose text depends on a number; `text` is asked once for each number that occurs."""
    found, which = _distinct(values)
    texts = [text(value) for value in found.tolist()]
    width = max(map(len, texts), default=0)
    table = np.frombuffer(b"".join(each.ljust(width, b"\0") for each in texts), dtype=np.uint8)
    return table.reshape(len(texts), width)[which]


def _distinct(values: U64) -> tuple[U64, npt.NDArray[np.intp]]:
    """Returns the numbers that occur, ascending, and which of them each is."""
    end = int(values.max(initial=0)) + 1
    if end > LINES:
        return np.unique(values, return_inverse=True)
    # Statuses are small nearly always: a table needs no sorting.
    occurs = np.zeros(end, dtype=bool)
    occurs[values] = True
    return np.flatnonzero(occurs).astype(np.uint64), (np.cumsum(occurs) - 1)[values]


def shown_where(block: Block, wanted: npt.NDArray[np.bool_]) -> Block:
    """Returns a block that is left out of the lines that are not wanted."""
    return np.where(wanted[:, None], block, np.uint8(0))


def typeset(blocks: Sequence[Block]) -> bytes:
    """Returns the text of blocks laid side by side."""
    return np.concatenate(blocks, axis=1).tobytes().replace(b"\0", b"")


Line: TypeAlias = Callable[[U64, U64, Sequence[U64]], Sequence[Block]]
"""Makes the blocks of lines from the columns offset, length and values, one column of these for each map."""


def rows(ends: U64, columns: Sequence[U64], line: Line, *, base: int = 0, lines: int = LINES) -> Iterator[bytes]:
    """Yields the text of runs, some thousand at a time.

    Args:
        ends: where each run ends.
        columns: the values of each run, in one map or several.
        line: makes the blocks.
        base: what is added to every offset.
        lines: runs at a time.
    """
    for first in range(0, ends.size, lines):
        some_ends = ends[first : first + lines]
        starts = np.empty_like(some_ends)
        starts[0] = ends[first - 1] if first else 0
        starts[1:] = some_ends[:-1]
        values = [column[first : first + lines] for column in columns]
        yield typeset(line(starts + np.uint64(base), some_ends - starts, values))


def extent_rows(
    extents: ExtentMap, blocks: Callable[[U64, U64, U64], Sequence[Block]], *, base: int = 0, lines: int = LINES
) -> Iterator[bytes]:
    """Yields the text of a map; see `rows`."""
    return rows(
        extents.ends,
        [extents.values],
        lambda starts, lengths, values: blocks(starts, lengths, values[0]),
        base=base,
        lines=lines,
    )


def lockstep(maps: Sequence[ExtentMap]) -> tuple[U64, list[U64]]:
    """Cuts maps of one size at all their edges: the ends of the runs, and each map's values in them."""
    ends = maps[0].ends
    for other in maps[1:]:
        ends, _, _ = ExtentMap(ends, np.arange(ends.size, dtype=np.uint64)).aligned(other)
    return ends, [each.values[np.searchsorted(each.ends, ends, side="left")] for each in maps]


def joined(pieces: Iterator[bytes], separator: bytes) -> Iterator[bytes]:
    """Yields pieces whose lines all end with `separator`, without the last one."""
    piece = next(pieces, b"")
    for following in pieces:
        yield piece
        piece = following
    yield piece.removesuffix(separator)
