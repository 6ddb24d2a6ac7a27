"""Bytes to values and back: every struct of option haggling, and the operations a program yields.

A *program* is a generator that talks NBD without doing any I/O. It yields what it needs, and whoever drives it (the
doors in `qmpnbd.nbd.client` and `qmpnbd.nbd.aio`) does that and sends back the outcome::

    program                                   door
       yield Send(data)          ------->     send everything            ------> b""
       yield Receive(20, "...")  ------->     receive exactly 20 bytes   ------> the bytes
                                              end of stream, no time     ------> thrown into the program
       return value              ------->     the caller gets it

The transmission phase has programs of its own kind and its own structs: see `qmpnbd.nbd.requests` and `messages`.

All integers are big-endian. Section names in quotes are those of doc/proto.md of the NBD project.
"""

from __future__ import annotations

import struct
from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar, TypeAlias, TypeVar

from qmpnbd.nbd.constants import (
    GREETING_MAGIC,
    MAX_STRING,
    OLDSTYLE_MAGIC,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    ZEROES,
)
from qmpnbd.nbd.tls import Tls
from qmpnbd.printable import printable as escaped

Received: TypeAlias = bytes | bytearray
Buffer: TypeAlias = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Send:
    """Send all of `data`, and right behind it all of `payload`. What comes back is empty."""

    data: bytes
    payload: Buffer = b""


@dataclass(frozen=True, slots=True)
class Receive:
    """Receive exactly `count` bytes. What comes back is those bytes, and belongs to the program.

    Attributes:
        count: bytes, bounded by whoever asks.
        what: what is being waited for, for the message when it does not come; made a text only then.
        patience: seconds after which nothing is to be expected any more, whatever time the caller has; when they are
            over TimeoutError is thrown into the program.
    """

    count: int
    what: object
    patience: float | None = None


@dataclass(frozen=True, slots=True)
class StartTls:
    """Speak TLS from here on. What comes back is empty.

    Whatever was received in clear and not yet asked for makes this fail: somebody on the way put it there, to have it
    taken for something that came over TLS.

    Attributes:
        tls: how, complete.
    """

    tls: Tls


_T = TypeVar("_T")
Program: TypeAlias = Generator[Send | Receive | StartTls, Received, _T]


@dataclass(frozen=True, slots=True)
class Greeting:
    """How a newstyle server begins ("Newstyle negotiation").

    ::

        0   8   "NBDMAGIC"
        8   8   "IHAVEOPT"            an oldstyle server sends another number here
        16  2   handshake flags
    """

    magic: bytes
    style: int
    flags: int

    LAYOUT: ClassVar = struct.Struct(">8sQH")

    def pack(self) -> bytes:
        """Returns the bytes on the wire."""
        return self.LAYOUT.pack(self.magic, self.style, self.flags)

    @classmethod
    def newstyle(cls, flags: int) -> Greeting:
        """Makes the greeting of a newstyle server."""
        return cls(GREETING_MAGIC, OPTION_MAGIC, flags)

    @classmethod
    def unpack(cls, data: Received) -> Greeting:
        """Takes the greeting apart; whether it is one is for the reader to say."""
        return cls(*cls.LAYOUT.unpack(data))


@dataclass(frozen=True, slots=True)
class OldstyleGreeting:
    """How an oldstyle server begins, and all it ever says of its export ("Oldstyle negotiation").

    ::

        0   8   "NBDMAGIC"
        8   8   0x420281861253
        16  8   size of the export
        24  4   handshake flags (upper half), transmission flags (lower half)
        28  124 zeroes, reserved
    """

    size: int
    flags: int

    LAYOUT: ClassVar = struct.Struct(f">8sQQI{ZEROES}x")

    def pack(self) -> bytes:
        """Returns the bytes on the wire."""
        return self.LAYOUT.pack(GREETING_MAGIC, OLDSTYLE_MAGIC, self.size, self.flags)

    @classmethod
    def unpack(cls, data: Received) -> OldstyleGreeting:
        """Takes the greeting apart; the magics are for the reader to check, `flags` are the transmission flags."""
        _, _, size, flags = cls.LAYOUT.unpack(data)
        return cls(size, flags & 0xFFFF)


CLIENT_FLAGS = struct.Struct(">I")
"""The client's answer to the greeting: 32 bits of client flags."""


@dataclass(frozen=True, slots=True)
class OptionRequest:
    """What the client asks while haggling ("Newstyle negotiation").

    ::

        0   8   "IHAVEOPT"
        8   4   option
        12  4   length of the data
        16  -   data
    """

    option: int
    data: bytes = b""

    LAYOUT: ClassVar = struct.Struct(">QII")

    def pack(self) -> bytes:
        """Returns the bytes on the wire."""
        return self.LAYOUT.pack(OPTION_MAGIC, self.option, len(self.data)) + self.data

    @classmethod
    def unpack_header(cls, header: Received) -> tuple[int, int, int]:
        """Returns magic, option and length of the data."""
        magic, option, length = cls.LAYOUT.unpack(header)
        return magic, option, length


@dataclass(frozen=True, slots=True)
class OptionReplyHeader:
    """What precedes the data of every option reply ("Fixed newstyle negotiation").

    ::

        0   8   0x3e889045565a9
        8   4   option this answers
        12  4   type of reply
        16  4   length of the data
    """

    option: int
    type: int
    length: int
    magic: int = OPTION_REPLY_MAGIC

    LAYOUT: ClassVar = struct.Struct(">QIII")

    def pack(self) -> bytes:
        """Returns the bytes on the wire."""
        return self.LAYOUT.pack(self.magic, self.option, self.type, self.length)

    @classmethod
    def unpack(cls, data: Received) -> OptionReplyHeader:
        """Takes a header apart; the magic is for the reader to check."""
        magic, option, type_, length = cls.LAYOUT.unpack(data)
        return cls(option, type_, length, magic)


def pack_string(text: bytes) -> bytes:
    """Returns a string as options carry it: 32 bits of length, then that many bytes."""
    return _U32.pack(len(text)) + text


def unpack_string(data: Received) -> tuple[bytes, bytes] | None:
    """Returns a string that begins `data` and what follows it; None if it does not fit, or is longer than allowed."""
    if len(data) < _U32.size:
        return None
    end = _U32.size + int(_U32.unpack_from(data)[0])
    return (bytes(data[_U32.size : end]), bytes(data[end:])) if end <= min(len(data), _U32.size + MAX_STRING) else None


_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")


def pack_go(name: bytes, infos: list[int]) -> bytes:
    """Returns the data of GO or INFO: name (32-bit length, bytes), number of infos (16), infos (16 each)."""
    return pack_string(name) + b"".join(_U16.pack(number) for number in (len(infos), *infos))


def pack_meta_context_query(name: bytes, queries: list[bytes]) -> bytes:
    """Returns the data of SET_ and LIST_META_CONTEXT: name, number of queries (32 bits), queries."""
    return pack_string(name) + _U32.pack(len(queries)) + b"".join(pack_string(query) for query in queries)


@dataclass(frozen=True, slots=True)
class ExportNameReply:
    """The answer to EXPORT_NAME ("Newstyle negotiation").

    ::

        0   8   size of the export
        8   2   transmission flags
        10  124 zeroes, unless NO_ZEROES was agreed
    """

    size: int
    flags: int

    LAYOUT: ClassVar = struct.Struct(">QH")

    def pack(self, *, zeroes: bool = False) -> bytes:
        """Returns the bytes on the wire."""
        return self.LAYOUT.pack(self.size, self.flags) + bytes(ZEROES if zeroes else 0)

    @classmethod
    def unpack(cls, data: Received) -> ExportNameReply:
        """Takes the answer apart; the zeroes say nothing."""
        return cls(*cls.LAYOUT.unpack_from(data))


@dataclass(frozen=True, slots=True)
class ServerEntry:
    """NBD_REP_SERVER, one export of a list ("Option reply types").

    ::

        0   4   length of the name
        4   -   name
        -   -   description, up to the end
    """

    name: bytes
    description: bytes = b""

    def pack(self) -> bytes:
        """Returns the bytes on the wire."""
        return pack_string(self.name) + self.description

    @classmethod
    def unpack(cls, data: Received) -> ServerEntry | None:
        """Takes an entry apart; None if the name does not fit, or one of the strings is too long."""
        found = unpack_string(data)
        return None if found is None or len(found[1]) > MAX_STRING else cls(*found)


@dataclass(frozen=True, slots=True)
class InfoExport:
    """NBD_INFO_EXPORT ("Option reply types").

    ::

        0   2   0
        2   8   size of the export
        10  2   transmission flags
    """

    size: int
    flags: int

    LAYOUT: ClassVar = struct.Struct(">HQH")

    def pack(self) -> bytes:
        """Returns the bytes on the wire."""
        return self.LAYOUT.pack(0, self.size, self.flags)

    @classmethod
    def unpack(cls, data: Received) -> InfoExport | None:
        """Takes it apart; None if it has not the right length."""
        return cls(*cls.LAYOUT.unpack(data)[1:]) if len(data) == cls.LAYOUT.size else None


@dataclass(frozen=True, slots=True)
class InfoBlockSize:
    """NBD_INFO_BLOCK_SIZE ("Option reply types").

    ::

        0   2   3
        2   4   minimum block size
        6   4   preferred block size
        10  4   maximum payload size
    """

    minimum: int
    preferred: int
    maximum: int

    LAYOUT: ClassVar = struct.Struct(">HIII")

    def pack(self) -> bytes:
        """Returns the bytes on the wire."""
        return self.LAYOUT.pack(3, self.minimum, self.preferred, self.maximum)

    @classmethod
    def unpack(cls, data: Received) -> InfoBlockSize | None:
        """Takes it apart; None if it has not the right length."""
        return cls(*cls.LAYOUT.unpack(data)[1:]) if len(data) == cls.LAYOUT.size else None


def pack_info_text(kind: int, text: bytes) -> bytes:
    """Returns NBD_INFO_NAME or NBD_INFO_DESCRIPTION: the type (16 bits), and a string up to the end."""
    return _U16.pack(kind) + text


def unpack_info_text(data: Received) -> bytes | None:
    """Returns the string of NBD_INFO_NAME or NBD_INFO_DESCRIPTION; None if it is longer than any string."""
    return bytes(data[_U16.size :]) if len(data) <= _U16.size + MAX_STRING else None


def info_type(data: Received) -> int | None:
    """Returns the type that begins the data of a NBD_REP_INFO (16 bits); None if there is not even that."""
    return int(_U16.unpack_from(data)[0]) if len(data) >= _U16.size else None


@dataclass(frozen=True, slots=True)
class MetaContext:
    """NBD_REP_META_CONTEXT ("Option reply types").

    ::

        0   4   context id
        4   -   name
    """

    id: int
    name: bytes

    def pack(self) -> bytes:
        """Returns the bytes on the wire."""
        return _U32.pack(self.id) + self.name

    @classmethod
    def unpack(cls, data: Received) -> MetaContext | None:
        """Takes it apart; None if it has no room for an id and a name, or the name is too long."""
        if not _U32.size < len(data) <= _U32.size + MAX_STRING:
            return None
        return cls(_U32.unpack_from(data)[0], bytes(data[_U32.size :]))


def printable(text: bytes, limit: int = MAX_STRING) -> str:
    """Returns text from the other side so that it can be shown: nothing that a terminal obeys, and not endless."""
    # An escape is longer than what it stands for, so the limit is kept twice.
    return escaped(text[:limit].decode("utf-8", errors="replace")).strip()[:limit]
