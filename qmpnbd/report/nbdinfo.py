"""The very bytes of ``nbdinfo --map=CONTEXT``, so that anyone can diff.

Established on nbdinfo 1.14 and 1.22, which agree::

    [                                                                                         --json
    { "offset": 0, "length": 1048576, "type": 4, "description": "backing depth 4"},
    { "offset": 1048576, "length": 65536, "type": 0, "description": "absent"}
    ]
             0     1048576    4  backing depth 4                                              text
       1048576       65536    0  absent
         65536   5.9%   0 absent                                                              --totals
       1048576  94.1%   4 backing depth 4

No description where the value has no name; an empty map is ``[``, an empty line and ``]``.
"""

from __future__ import annotations

from collections.abc import Iterator

from qmpnbd.extents import U64, ExtentMap
from qmpnbd.report.contexts import describe
from qmpnbd.report.rows import Block, choice, constant, digits, extent_rows, joined


def map_json(context: str, extents: ExtentMap) -> Iterator[bytes]:
    """Yields the document piece by piece, some thousand extents a piece."""

    def tail(value: int) -> bytes:
        meaning = describe(context, value)
        words = "" if meaning is None else f', "description": "{meaning}"'
        return f', "type": {value}{words}}},\n'.encode()

    def line(offsets: U64, lengths: U64, values: U64) -> list[Block]:
        count = offsets.size
        return [
            constant(b'{ "offset": ', count),
            digits(offsets),
            constant(b', "length": ', count),
            digits(lengths),
            choice(values, tail),
        ]

    yield b"[\n"
    yield from joined(extent_rows(extents, line), b",\n")
    yield b"\n]\n"


def map_text(context: str, extents: ExtentMap) -> Iterator[bytes]:
    """Yields the lines of a map, some thousand extents a piece."""

    def tail(value: int) -> bytes:
        meaning = describe(context, value)
        return f"  {value:>3}{'' if meaning is None else f'  {meaning}'}\n".encode()

    def line(offsets: U64, lengths: U64, values: U64) -> list[Block]:
        return [digits(offsets, 10), constant(b"  ", offsets.size), digits(lengths, 10), choice(values, tail)]

    yield from extent_rows(extents, line)


def totals_text(context: str, extents: ExtentMap) -> str:
    """Returns how many bytes have each value, as text."""
    lines = []
    for value, size in extents.totals().items():
        meaning = describe(context, value)
        words = "" if meaning is None else f" {meaning}"
        lines.append(f"{size:>10} {100.0 * size / extents.size:>5.1f}% {value:>3}{words}\n")
    return "".join(lines)


def totals_json(context: str, extents: ExtentMap) -> str:
    """Returns how many bytes have each value, as JSON; percentages as C's ``%g`` prints them."""
    entries = []
    for value, size in extents.totals().items():
        meaning = describe(context, value)
        words = "" if meaning is None else f', "description": "{meaning}"'
        percent = f"{100.0 * size / extents.size:g}"
        entries.append(f'{{ "size": {size}, "percent": {percent}, "type": {value}{words} }}')
    return "[\n" + ",\n".join(entries) + "\n]\n" if entries else "[]\n"
