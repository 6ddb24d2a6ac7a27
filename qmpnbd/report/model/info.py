"""The document of ``qmpnbd info``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qmpnbd.report.model.parts import Document, Part


class ExportEntry(Part):
    """An export as its server describes it.

    Attributes:
        name: the export name.
        canonical: the name the server itself gives it; empty if it does not tell.
        description: the server's words, with control characters as escapes; may be empty.
        uri: where it is.
        size: bytes.
        contexts: the metadata contexts on offer; null if the server has none to offer.
        is_rotational: whether seeking costs.
        is_read_only: whether it refuses to be written.
        can_cache: NBD_CMD_CACHE; likewise the following, named as nbdinfo names them.
        can_df: reads that must come in one piece.
        can_fast_zero: zeroes that fail rather than take long.
        can_flush: NBD_CMD_FLUSH.
        can_fua: writes that are durable when they are acknowledged.
        can_multi_conn: several connections see the same bytes.
        can_trim: NBD_CMD_TRIM.
        can_zero: NBD_CMD_WRITE_ZEROES.
        can_block_status_payload: block status for some of the contexts.
        block_size_minimum: bytes; null if the server does not tell, likewise the following.
        block_size_preferred: bytes.
        block_size_maximum: bytes of payload.
    """

    name: str
    canonical: str
    description: str
    uri: str
    size: int
    contexts: tuple[str, ...] | None
    is_rotational: bool
    is_read_only: bool
    can_cache: bool
    can_df: bool
    can_fast_zero: bool
    can_flush: bool
    can_fua: bool
    can_multi_conn: bool
    can_trim: bool
    can_zero: bool
    can_block_status_payload: bool
    block_size_minimum: int | None
    block_size_preferred: int | None
    block_size_maximum: int | None


class InfoDocument(Document):
    """The result of ``qmpnbd info``.

    Attributes:
        protocol: ``newstyle-fixed``, ``newstyle`` or ``oldstyle``.
        tls: whether the connection was encrypted.
        replies: ``simple``, ``structured`` or ``extended``.
        exports: the export asked for, or all that the server lists.
    """

    schema_: Literal["qmpnbd.info/1"] = Field(default="qmpnbd.info/1", alias="schema")
    protocol: str
    tls: bool
    replies: str
    exports: tuple[ExportEntry, ...]
