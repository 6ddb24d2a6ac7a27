"""The document of ``qmpnbd map``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qmpnbd.report.model.parts import Document, ExtentEntry, Part


class ContextMap(Part):
    """What an export says in one metadata context."""

    context: str
    extents: tuple[ExtentEntry, ...]


class MapDocument(Document):
    """The result of ``qmpnbd map``.

    Attributes:
        uri: the export.
        size: bytes of the export.
        offset: where the maps begin.
        maps: one for each context.
    """

    schema_: Literal["qmpnbd.map/1"] = Field(default="qmpnbd.map/1", alias="schema")
    uri: str
    size: int
    offset: int = 0
    maps: tuple[ContextMap, ...]
