"""Maps as text for people."""

from __future__ import annotations

from collections.abc import Iterator

from qmpnbd.extents import U64, ExtentMap
from qmpnbd.report.contexts import describe
from qmpnbd.report.rows import Block, choice, constant, digits, extent_rows


def extents_text(context: str, extents: ExtentMap) -> Iterator[str | bytes]:
    """Yields a map piece by piece, heading first."""

    def tail(value: int) -> bytes:
        return f" {value:>5}  {describe(context, value) or ''}".rstrip().encode() + b"\n"

    def line(offsets: U64, lengths: U64, values: U64) -> list[Block]:
        return [digits(offsets, 16), constant(b" ", offsets.size), digits(lengths, 16), choice(values, tail)]

    yield f"{'offset':>16} {'length':>16} {'value':>5}  {context}\n"
    yield from extent_rows(extents, line)
