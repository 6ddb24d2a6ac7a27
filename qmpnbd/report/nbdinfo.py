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

from qmpnbd.extents import ExtentMap
from qmpnbd.report.contexts import describe


def map_json(context: str, extents: ExtentMap) -> Iterator[str]:
    """Yields the document piece by piece, an extent a piece."""
    yield "[\n"
    separator = ""
    for extent in extents:
        meaning = describe(context, extent.value)
        words = "" if meaning is None else f', "description": "{meaning}"'
        yield f'{separator}{{ "offset": {extent.offset}, "length": {extent.length}, "type": {extent.value}{words}}}'
        separator = ",\n"
    yield "\n]\n"
