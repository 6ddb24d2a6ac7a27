"""What a chunk may be, judged by its header before its payload is received, and what a failure means.

Pure: what is wrong is returned as a text, and the connection decides what becomes of it.
"""

from __future__ import annotations

from typing import Final

from qmpnbd.errors import NbdDisconnectedError, NbdRequestError
from qmpnbd.nbd import constants, messages
from qmpnbd.nbd.constants import ChunkFlag, ChunkType, Command, WireError
from qmpnbd.nbd.export import Replies
from qmpnbd.nbd.messages import ChunkHeader, ErrorPayload
from qmpnbd.nbd.requests import Failure, Request
from qmpnbd.nbd.wire import Received, printable

_STATUS_TYPES: Final = {"structured": ChunkType.BLOCK_STATUS, "extended": ChunkType.BLOCK_STATUS_EXT}

_REMEDIES: Final[dict[int, str]] = {
    WireError.EIO: "The server could not read its image; its log says more, and so does qemu-img check.",
    WireError.EPERM: "The export may be inactive, as on the target of a migration.",
}


def header_fault(header: ChunkHeader, request: Request, replies: Replies, memory: int) -> str | None:
    """Judges type and length of a chunk before its payload is received ("Structured reply types").

    Args:
        header: of the chunk.
        request: what it answers.
        replies: the form that was agreed on.
        memory: bytes of a payload that there is room for, if it is no data.

    Returns:
        What is wrong; None if it may be what it says.
    """
    length, kind = header.length, header.type
    if kind & constants.CHUNK_ERROR_BIT:
        fits = (14 if kind == ChunkType.ERROR_OFFSET else 6) <= length <= constants.MAX_ERROR_CHUNK
    elif kind == ChunkType.NONE:
        fits = length == 0
        if not header.flags & ChunkFlag.DONE:
            return "an NBD_REPLY_TYPE_NONE chunk that is not the last one"
    elif request.command == Command.READ and kind == ChunkType.OFFSET_DATA:
        fits = messages.OFFSET.size < length <= messages.OFFSET.size + request.length
    elif request.command == Command.READ and kind == ChunkType.OFFSET_HOLE:
        fits = length == messages.HOLE.size
    elif request.command == Command.BLOCK_STATUS and kind == _STATUS_TYPES.get(replies):
        head, each = (messages.STATUS_EXT.size, 16) if replies == "extended" else (messages.STATUS.size, 8)
        entries, left = divmod(length - head, each)
        # Each extent has a byte at least; one past the end is a fault that a caller may choose to bear.
        most = min(constants.MAX_STATUS_EXTENTS, request.length + 1, memory // each)
        fits = left == 0 and 1 <= entries <= most
    else:
        return f"a chunk of type {kind} in reply to {request}, which answers nothing that was asked"
    return None if fits else f"a chunk of type {kind:#x} with {length} bytes in reply to {request}"


def unpack_failure(header: ChunkHeader, payload: Received) -> Failure | str:
    """Takes an error chunk apart; every byte of it must have a meaning.

    Returns:
        The failure, or what is wrong with the chunk.
    """
    error = ErrorPayload.unpack(payload)
    if error is None:
        return f"an error chunk of {len(payload)} bytes whose message does not fit"
    if error.error == 0:
        return "an error chunk with error 0"
    left = len(error.rest)
    if (header.type == ChunkType.ERROR and left != 0) or (header.type == ChunkType.ERROR_OFFSET and left != 8):
        return f"an error chunk of type {header.type:#x} with {left} bytes behind its message"
    offset = int.from_bytes(error.rest, "big") if header.type == ChunkType.ERROR_OFFSET else None
    return Failure(error.error, printable(error.message), offset)


def request_failed(request: Request, failure: Failure, where: str) -> NbdRequestError | NbdDisconnectedError:
    """Makes the error for a request that failed ("Error values")."""
    said = "" if failure.offset is None else f" at {failure.offset:#x}"
    said += f": {failure.message}" if failure.message else ""
    if failure.wire_error == WireError.ESHUTDOWN:
        return NbdDisconnectedError(f"the server is shutting down ({request} failed{said})", where=where)
    # "unexpected values should be treated as EINVAL"; the number is told all the same.
    known = failure.wire_error in WireError.__members__.values()
    name = WireError(failure.wire_error).name if known else f"unknown error {failure.wire_error}, as good as EINVAL"
    return NbdRequestError(
        f"{request} failed at the server ({name}{said})",
        where=where,
        wire_error=failure.wire_error,
        offset=request.offset,
        length=request.length,
        remedy=_REMEDIES.get(failure.wire_error, ""),
    )
