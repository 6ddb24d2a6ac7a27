"""The structs of the transmission phase, bytes to values and back.

With extended headers ("NBD_OPT_EXTENDED_HEADERS") lengths of effects have 64 bits, and a chunk tells the offset of its
request; payloads stay as short as ever. All integers are big-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import ClassVar

from qmpnbd.nbd.constants import EXTENDED_REQUEST_MAGIC, REQUEST_MAGIC
from qmpnbd.nbd.wire import Received

MAGIC = struct.Struct(">I")
"""The 32 bits that tell which kind of reply follows."""

OFFSET = struct.Struct(">Q")
"""What precedes the data of an OFFSET_DATA chunk, and is part of ERROR_OFFSET: a byte of the export."""

HOLE = struct.Struct(">QI")
"""The payload of an OFFSET_HOLE chunk: offset and length. The length has 32 bits, whatever the headers."""

STATUS = struct.Struct(">I")
"""What precedes the extents of a BLOCK_STATUS chunk: the context id."""

STATUS_EXT = struct.Struct(">II")
"""What precedes the extents of a BLOCK_STATUS_EXT chunk: the context id and how many there are."""


def pack_status_filter(length: int, ids: list[int]) -> bytes:
    """Returns the payload of a BLOCK_STATUS request: bytes asked about (64 bits), context ids wanted (32 each)."""
    return struct.pack(f">Q{len(ids)}I", length, *ids)


_COMPACT = struct.Struct(">IHHQQI")
_EXTENDED = struct.Struct(">IHHQQQ")


def pack_request(command: int, cookie: int, offset: int, length: int, flags: int, *, extended: bool) -> bytes:
    """Returns the bytes of a `RequestHeader`, for those who make thousands of them in a second."""
    if extended:
        return _EXTENDED.pack(EXTENDED_REQUEST_MAGIC, flags, command, cookie, offset, length)
    return _COMPACT.pack(REQUEST_MAGIC, flags, command, cookie, offset, length)


@dataclass(frozen=True, slots=True)
class RequestHeader:
    """What the client asks of an export ("Request message").

    ::

        compact                   extended
        0   4   0x25609513        0   4   0x21e41c71
        4   2   command flags     4   2   command flags
        6   2   command           6   2   command
        8   8   cookie            8   8   cookie
        16  8   offset            16  8   offset
        24  4   length            24  8   length, of the payload if the flag PAYLOAD_LEN is set
    """

    command: int
    cookie: int
    offset: int = 0
    length: int = 0
    flags: int = 0
    magic: int = REQUEST_MAGIC

    LAYOUT: ClassVar = _COMPACT
    EXTENDED: ClassVar = _EXTENDED

    def pack(self, *, extended: bool = False) -> bytes:
        """Returns the bytes on the wire."""
        return pack_request(self.command, self.cookie, self.offset, self.length, self.flags, extended=extended)

    @classmethod
    def unpack(cls, data: Received) -> RequestHeader:
        """Takes a request apart, whichever of the two it is long enough for; the magic is for the reader to check."""
        layout = cls.EXTENDED if len(data) == cls.EXTENDED.size else cls.LAYOUT
        magic, flags, command, cookie, offset, length = layout.unpack(data)
        return cls(command, cookie, offset, length, flags, magic)


@dataclass(frozen=True, slots=True)
class SimpleReply:
    """A simple reply behind its magic ("Simple reply message").

    ::

        0   4   error, 0 for success
        4   8   cookie
    """

    error: int
    cookie: int

    LAYOUT: ClassVar = struct.Struct(">IQ")

    def pack(self) -> bytes:
        """Returns the bytes on the wire."""
        return self.LAYOUT.pack(self.error, self.cookie)

    @classmethod
    def unpack(cls, data: Received) -> SimpleReply:
        """Takes a simple reply apart."""
        return cls(*cls.LAYOUT.unpack(data))


@dataclass(frozen=True, slots=True)
class ChunkHeader:
    """What precedes the payload of a chunk, behind its magic ("Structured reply chunk message").

    ::

        structured                      extended
        0   2   flags                   0   2   flags
        2   2   type                    2   2   type
        4   8   cookie                  4   8   cookie
        12  4   length of the payload   12  8   offset of the request
                                        20  8   length of the payload
    """

    flags: int
    type: int
    cookie: int
    length: int
    offset: int = 0

    LAYOUT: ClassVar = struct.Struct(">HHQI")
    EXTENDED: ClassVar = struct.Struct(">HHQQQ")

    def pack(self, *, extended: bool = False) -> bytes:
        """Returns the bytes on the wire."""
        if extended:
            return self.EXTENDED.pack(self.flags, self.type, self.cookie, self.offset, self.length)
        return self.LAYOUT.pack(self.flags, self.type, self.cookie, self.length)

    @classmethod
    def unpack(cls, data: Received) -> ChunkHeader:
        """Takes a chunk header apart, whichever of the two it is long enough for."""
        if len(data) == cls.EXTENDED.size:
            flags, type_, cookie, offset, length = cls.EXTENDED.unpack(data)
            return cls(flags, type_, cookie, length, offset)
        return cls(*cls.LAYOUT.unpack(data))


@dataclass(frozen=True, slots=True)
class ErrorPayload:
    """The payload of an error chunk ("Structured reply types").

    ::

        0   4   error
        4   2   length of the message
        6   -   message
        -   8   offset (ERROR_OFFSET only)
    """

    error: int
    message: bytes
    rest: bytes = b""

    LAYOUT: ClassVar = struct.Struct(">IH")
    OFFSET: ClassVar = struct.Struct(">Q")

    def pack(self) -> bytes:
        """Returns the bytes on the wire."""
        return self.LAYOUT.pack(self.error, len(self.message)) + self.message + self.rest

    @classmethod
    def unpack(cls, data: Received) -> ErrorPayload | None:
        """Takes an error apart; None if the message does not fit. What follows the message stays in `rest`."""
        if len(data) < cls.LAYOUT.size:
            return None
        error, length = cls.LAYOUT.unpack_from(data)
        end = cls.LAYOUT.size + length
        return cls(error, bytes(data[cls.LAYOUT.size : end]), bytes(data[end:])) if end <= len(data) else None
