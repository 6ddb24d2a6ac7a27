"""The reply that nearly every READ gets: all the data asked for, in one chunk, which is the last one.

Whoever reads much gets thousands of these in a second, so they are recognised by one look at what precedes the data,
and the data go straight to where they are wanted. Everything else - holes, pieces, errors, late chunks, lies - is left
to `qmpnbd.nbd.connection`, which judges each field by itself.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final

from qmpnbd.nbd.constants import (
    CHUNK_MAGIC,
    EXTENDED_CHUNK_MAGIC,
    SIMPLE_REPLY_MAGIC,
    ChunkFlag,
    ChunkType,
    Command,
)
from qmpnbd.nbd.export import Replies
from qmpnbd.nbd.requests import Request

LARGE: Final = 64 * 1024
"""Bytes of a READ from which on its data are not received together with what precedes them, to be moved afterwards."""

SHORTEST: Final[dict[Replies, int]] = {"simple": 16, "structured": 16, "extended": 32}
"""Bytes of the shortest message: with structured replies, what is not a READ may be answered with a simple one."""

_HEADS: Final[dict[Replies, struct.Struct]] = {
    "simple": struct.Struct(">IIQ"),  # magic, error, cookie
    "structured": struct.Struct(">IHHQIQ"),  # magic, flags, type, cookie, length of the payload, offset of the data
    "extended": struct.Struct(">IHHQQQQ"),  # the same with the offset of the request before the length
}

_COOKIE: Final[dict[Replies, int]] = {"simple": 2, "structured": 3, "extended": 3}
_DONE: Final = int(ChunkFlag.DONE)
_DATA: Final = int(ChunkType.OFFSET_DATA)

HEADS: Final[dict[Replies, int]] = {replies: layout.size for replies, layout in _HEADS.items()}
"""Bytes that precede the data, for each kind of replies."""


def whole_read(replies: Replies, ahead: memoryview, pending: Mapping[int, Request]) -> tuple[int, Request] | None:
    """Recognises the beginning of a whole reply ("Structured reply types", "Simple reply message").

    Args:
        replies: the kind that was agreed on.
        ahead: what arrived.
        pending: requests without a complete reply, by cookie.

    Returns:
        Cookie and request of the reply whose data follow `HEADS[replies]` bytes further on; None if what arrived is
        anything else, or not enough to tell.
    """
    head = _HEADS[replies]
    if len(ahead) < head.size:
        return None
    fields = head.unpack_from(ahead)
    cookie = fields[_COOKIE[replies]]
    request = pending.get(cookie)
    if request is None or request.command != Command.READ or request.chunks:
        return None
    offset, length = request.offset, request.length
    if replies == "structured":
        good = fields == (CHUNK_MAGIC, _DONE, _DATA, cookie, length + 8, offset)
    elif replies == "extended":
        good = fields == (EXTENDED_CHUNK_MAGIC, _DONE, _DATA, cookie, offset, length + 8, offset)
    else:
        good = fields == (SIMPLE_REPLY_MAGIC, 0, cookie)
    return (cookie, request) if good else None
