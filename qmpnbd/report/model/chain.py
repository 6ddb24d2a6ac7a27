"""The document of ``qmpnbd chain``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qmpnbd.report.model.parts import Document, ExtentEntry, LayerEntry, UnreadableEntry


class ChainDocument(Document):
    """The result of ``qmpnbd chain``: what an NBD export of the image would serve in a metadata context.

    Attributes:
        image: the active layer.
        size: bytes of the disk.
        context: what the extents are; ``qemu:allocation-depth`` unless another was asked for.
        layers: the backing chain, active layer first.
        unreadable: the first ranges QEMU cannot read; their allocation depth is 4294967296.
        extents: the map.
    """

    schema_: Literal["qmpnbd.chain/1"] = Field(default="qmpnbd.chain/1", alias="schema")
    image: str
    size: int
    context: str = "qemu:allocation-depth"
    layers: tuple[LayerEntry, ...]
    unreadable: tuple[UnreadableEntry, ...] = ()
    extents: tuple[ExtentEntry, ...]
