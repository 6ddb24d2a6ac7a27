"""Maps as text for people: a picture, and a table with all contexts side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from qmpnbd.extents import U64, ExtentMap
from qmpnbd.report.contexts import UNREADABLE, describe
from qmpnbd.report.rows import Block, choice, constant, digits, lockstep, rows
from qmpnbd.report.strip import STRIP_CELLS, dominant

_LEAST_CELLS = 8
"""Characters that a row of a picture has at least."""


def status_mark(value: int) -> str:
    """Returns one character for a status: ``.`` for 0, ``+`` above 9, ``?`` for what cannot be read."""
    if value == UNREADABLE:
        return "?"
    return "." if value == 0 else str(value) if value <= 9 else "+"


def strip_rows(cells: str, width: int | None = None) -> Iterator[str]:
    """Yields a strip of characters in brackets; in several rows of one length where one does not fit.

    Args:
        cells: a character for each part of the disk.
        width: columns of the terminal; None for as many as it takes.
    """
    row = len(cells)
    while width is not None and row + 2 > width and row > _LEAST_CELLS:
        row //= 2
    yield from (f"[{cells[at : at + row]}]" for at in range(0, len(cells), row or 1))


def _pictures(maps: Mapping[str, ExtentMap], width: int | None) -> Iterator[str]:
    """Yields each map as a strip: the status that most bytes have in each of equal parts."""
    names = max(len(context) for context in maps) + 1
    below = width is not None and names + STRIP_CELLS + 2 > width
    for context, extents in maps.items():
        if not len(extents):
            continue
        cells = "".join(status_mark(value) for value in dominant(extents, STRIP_CELLS))
        if below:
            yield f"{context}\n"
            yield from (f"{row}\n" for row in strip_rows(cells, width))
        else:
            yield f"{context:<{names}}[{cells}]\n"


def maps_text(maps: Mapping[str, ExtentMap], base: int = 0, width: int | None = None) -> Iterator[str | bytes]:
    """Yields maps of one size piece by piece, heading first; a line wherever one of them changes.

    Args:
        maps: context -> map.
        base: offset of the maps' first byte.
        width: columns of the terminal, which the pictures fit into; None for as many as it takes.
    """
    yield from _pictures(maps, width)
    contexts = list(maps)
    columns = [max(len(context), 24) for context in contexts]
    heading = f"{'offset':>16} {'length':>16}" + "".join(
        f"  {context:<{column}}" for context, column in zip(contexts, columns, strict=True)
    )
    yield heading.rstrip() + "\n"
    ends, values = lockstep(list(maps.values()))

    def line(offsets: U64, lengths: U64, statuses: Sequence[U64]) -> list[Block]:
        cells = [choice(status, cell) for status, cell in zip(statuses, _cells(contexts, columns), strict=True)]
        return [digits(offsets, 16), constant(b" ", offsets.size), digits(lengths, 16), *cells]

    yield from rows(ends, values, line, base=base)


def _cells(contexts: Sequence[str], columns: Sequence[int]) -> list[Callable[[int], bytes]]:
    """Returns what writes a status, for each context; the last one ends the line."""

    def cell(context: str, column: int, end: bytes, value: int) -> bytes:
        shown = "-" if value == UNREADABLE else value
        text = f"  {shown:>4} {describe(context, value) or ''}".rstrip()
        return text.encode() + end if end else f"{text:<{column + 2}}".encode()

    ends = [b""] * (len(contexts) - 1) + [b"\n"]
    return [partial(cell, *each) for each in zip(contexts, columns, ends, strict=True)]
