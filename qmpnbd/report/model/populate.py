"""The document of ``qmpnbd bitmap populate``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qmpnbd.report.model.parts import Document


class PopulateDocument(Document):
    """The result of ``qmpnbd bitmap populate``.

    Attributes:
        monitor: the QMP address.
        qemu: QEMU's version.
        disk: the disk as it was addressed.
        node_name: the node that the bitmap belongs to.
        bitmap: its name.
        created: whether it was made for this; else it existed, and keeps what it had.
        recording: whether it records the guest's writes.
        persistent: whether it survives the end of QEMU.
        granularity: bytes of the disk a bit stands for.
        source: where the extents came from.
        extents: how many were filled in, after rounding out to the granularity.
        filled_bytes: their bytes.
        dirty_bytes: bytes that the bitmap marks now, with what it had and what the guest wrote meanwhile.
    """

    schema_: Literal["qmpnbd.populate/1"] = Field(default="qmpnbd.populate/1", alias="schema")
    monitor: str
    qemu: str
    disk: str
    node_name: str
    bitmap: str
    created: bool
    recording: bool
    persistent: bool
    granularity: int
    source: str
    extents: int
    filled_bytes: int
    dirty_bytes: int
