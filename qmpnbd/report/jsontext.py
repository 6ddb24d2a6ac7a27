"""Documents as JSON text.

Small documents go through pydantic as a whole. Maps can have millions of extents, for which an object each would
take minutes and gigabytes: their columns are written as text right away, in the place the model gives them, one
extent a line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from qmpnbd.extents import U64, ExtentMap
from qmpnbd.report.model import ChainDocument, Document, MapDocument
from qmpnbd.report.rows import Block, constant, digits, extent_rows, joined


def document_json(document: Document) -> str:
    """Returns a document as indented JSON with a newline at its end, in ASCII.

    File names need not be valid UTF-8; as escaped surrogates they survive, which pydantic's own writer refuses.
    """
    return json.dumps(document.model_dump(mode="json"), indent=2) + "\n"


def _head(document: Document, without: str) -> str:
    """Returns a document but for its last field and its closing brace."""
    text = json.dumps(document.model_dump(mode="json", exclude={without}), indent=2)
    return text.removesuffix("\n}")


def chain_json(head: ChainDocument, extents: ExtentMap) -> Iterator[str | bytes]:
    """Yields a chain document piece by piece.

    Args:
        head: the document without its extents.
        extents: allocation depth.
    """
    yield _head(head, "extents")
    yield ',\n  "extents": ['
    yield from _extents(extents, "    ")
    yield "\n  ]\n}\n"


def map_json(head: MapDocument, maps: dict[str, ExtentMap]) -> Iterator[str | bytes]:
    """Yields a map document piece by piece.

    Args:
        head: the document without its maps.
        maps: context -> map.
    """
    yield _head(head, "maps")
    yield ',\n  "maps": ['
    separator = "\n"
    for context, extents in maps.items():
        yield f'{separator}    {{\n      "context": {json.dumps(context)},\n      "extents": ['
        yield from _extents(extents, "        ", head.offset)
        yield "\n      ]\n    }"
        separator = ",\n"
    yield "\n  ]\n}\n"


def _extents(extents: ExtentMap, indent: str, base: int = 0) -> Iterator[bytes]:
    def line(offsets: U64, lengths: U64, values: U64) -> list[Block]:
        count = offsets.size
        return [
            constant(f'{indent}{{"offset": '.encode(), count),
            digits(offsets),
            constant(b', "length": ', count),
            digits(lengths),
            constant(b', "value": ', count),
            digits(values),
            constant(b"},\n", count),
        ]

    if len(extents):
        yield b"\n"
    yield from joined(extent_rows(extents, line, base=base), b",\n")
