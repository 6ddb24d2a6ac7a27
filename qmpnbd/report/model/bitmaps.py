"""The document of ``qmpnbd chain --bitmaps``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qmpnbd.report.model.parts import Document, Part


class BitmapEntry(Part):
    """A persistent bitmap.

    Attributes:
        layer_index: the layer it is stored in.
        file: that layer's file.
        name: unique in the file.
        granularity: bytes of the disk a bit stands for.
        recording: QEMU goes on recording in it when the image is opened.
        inconsistent: it was in use when the image was last closed, or still is: it cannot be relied on.
        dirty_bytes: bytes of the disk that it marks; null where it cannot be relied on.
    """

    layer_index: int
    file: str
    name: str
    granularity: int
    recording: bool
    inconsistent: bool
    dirty_bytes: int | None


class BitmapsDocument(Document):
    """The result of ``qmpnbd chain --bitmaps``: the persistent bitmaps of every layer."""

    schema_: Literal["qmpnbd.bitmaps/1"] = Field(default="qmpnbd.bitmaps/1", alias="schema")
    image: str
    bitmaps: tuple[BitmapEntry, ...]
