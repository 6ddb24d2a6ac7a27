"""The very bytes of ``nbdinfo --map=CONTEXT --json``, so that anyone can diff.

Established on nbdinfo 1.14 and 1.22, which agree::

    [
    { "offset": 0, "length": 1048576, "type": 4, "description": "backing depth 4"},
    { "offset": 1048576, "length": 65536, "type": 0, "description": "absent"}
    ]

No description key where the value has no name; an empty map is ``[``, an empty line and ``]``.
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
