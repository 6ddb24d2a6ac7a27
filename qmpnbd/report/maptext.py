"""Maps as text for people: a picture, and a table with all contexts side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from qmpnbd.extents import U64, ExtentMap
from qmpnbd.report.contexts import UNREADABLE, describe
from qmpnbd.report.rows import Block, choice, constant, digits, lockstep, rows
from qmpnbd.report.strip import STRIP_CELLS, dominant


def status_mark(value: int) -> str:
    """Returns one character for a status: ``.`` for 0, ``+`` above 9, ``?`` for what cannot be read."""
    if value == UNREADABLE:
        return "?"
    return "." if value == 0 else str(value) if value <= 9 else "+"


def picture(extents: ExtentMap) -> str:
    """Returns a map as a strip of characters: the status that most bytes have in each of equal parts."""
    return "[" + "".join(status_mark(value) for value in dominant(extents, STRIP_CELLS)) + "]"


def maps_text(maps: Mapping[str, ExtentMap], base: int = 0) -> Iterator[str | bytes]:
    """Yields maps of one size piece by piece, heading first; a line wherever one of them changes.

    Args:
        maps: context -> map.
        base: offset of the maps' first byte.
    """
    width = max(len(context) for context in maps)
    for context, extents in maps.items():
        if len(extents):
            yield f"{context:<{width}} {picture(extents)}\n"
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
