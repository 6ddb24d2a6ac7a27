"""The document of ``qmpnbd copy``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qmpnbd.report.model.parts import Document

CopyForm = Literal["raw", "qcow2", "chain", "device", "nbd"]


class CopyDocument(Document):
    """The result of ``qmpnbd copy``.

    Attributes:
        source: an NBD URI or a path, as it was asked for.
        target: likewise.
        form: what the target is; never ``chain``, which a restore can make.
        size: bytes of the disk.
        data_bytes: bytes that were read and written.
        zero_bytes: bytes that read as zeroes, and were not written where that could be done.
        read_back_bytes: bytes that were read back and proved; null if that was not asked for.
        resumed_bytes: bytes of data that an earlier run had copied, and that were proved; null without ``--resume``.
        seconds: from the first byte read to the last one handed to the target.
    """

    schema_: Literal["qmpnbd.copy/1"] = Field(default="qmpnbd.copy/1", alias="schema")
    source: str
    target: str
    form: CopyForm
    size: int
    data_bytes: int
    zero_bytes: int
    read_back_bytes: int | None = None
    resumed_bytes: int | None = None
    seconds: float
