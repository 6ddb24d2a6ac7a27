"""The numbers of the NBD protocol, and the bounds set on what a server may send.

Names and numbers are those of the specification (doc/proto.md of the NBD project), section "Values".
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Final

# Handshake phase, "Newstyle negotiation" and "Option reply types".
GREETING_MAGIC: Final = b"NBDMAGIC"
OPTION_MAGIC: Final = 0x49484156454F5054  # "IHAVEOPT"
OLDSTYLE_MAGIC: Final = 0x00420281861253
OPTION_REPLY_MAGIC: Final = 0x3E889045565A9

# Transmission phase.
REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY_MAGIC: Final = 0x67446698
CHUNK_MAGIC: Final = 0x668E33EF
EXTENDED_REQUEST_MAGIC: Final = 0x21E41C71
EXTENDED_CHUNK_MAGIC: Final = 0x6E8A278C

DEFAULT_PORT: Final = 10809  # assigned by IANA


class HandshakeFlag(IntFlag):
    """What the server says in its greeting, and the client answers; unknown bits are ignored."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


ZEROES: Final = 124
"""Bytes of padding behind what an oldstyle greeting or EXPORT_NAME tells, unless NO_ZEROES was agreed."""


class Option(IntEnum):
    """What a client can ask while haggling."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class OptionReplyType(IntEnum):
    """What a server can answer to an option; everything with bit 31 is an error, known or not."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = (1 << 31) + 1
    ERR_POLICY = (1 << 31) + 2
    ERR_INVALID = (1 << 31) + 3
    ERR_PLATFORM = (1 << 31) + 4
    ERR_TLS_REQD = (1 << 31) + 5
    ERR_UNKNOWN = (1 << 31) + 6
    ERR_SHUTDOWN = (1 << 31) + 7
    ERR_BLOCK_SIZE_REQD = (1 << 31) + 8
    ERR_TOO_BIG = (1 << 31) + 9
    ERR_EXT_HEADER_REQD = (1 << 31) + 10


OPTION_ERROR_BIT: Final = 1 << 31


class Info(IntEnum):
    """The kinds of information about an export."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class TransmissionFlag(IntFlag):
    """What an export can do; unknown bits are ignored."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12


class Command(IntEnum):
    """What a client can ask of an export."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(IntFlag):
    """How a command is to be done."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5


class ChunkFlag(IntFlag):
    """Flags of a structured reply chunk; unknown bits are ignored."""

    DONE = 1 << 0


class ChunkType(IntEnum):
    """The pieces of a structured reply; everything with bit 15 is an error, known or not."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = (1 << 15) + 1
    ERROR_OFFSET = (1 << 15) + 2


CHUNK_ERROR_BIT: Final = 1 << 15


class WireError(IntEnum):
    """Error numbers on the wire. They are the same on every host, whatever its own errno values are."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


# Context names that QEMU's documentation (docs/interop/nbd.rst) and the specification define.
BASE_ALLOCATION: Final = "base:allocation"
ALLOCATION_DEPTH: Final = "qemu:allocation-depth"
DIRTY_BITMAP_PREFIX: Final = "qemu:dirty-bitmap:"

MAX_STRING: Final = 4096
"""Bytes of any string on the wire ("Conventions")."""

MAX_OPTION_REPLY: Final = 64 * 1024
"""Bytes of one option reply. The longest one the specification has is 4 + 2 * MAX_STRING; the rest is courtesy."""

MAX_OPTION_REPLIES: Final = 64
"""Replies to one GO or INFO. Four kinds of information are defined; what is unknown is ignored, but not forever."""

MAX_EXPORTS: Final = 10_000
"""Exports in one LIST, at most 84 MB of names and descriptions. Servers that list a directory come to hundreds."""

MAX_CONTEXTS: Final = 4096
"""Contexts in one LIST_META_CONTEXT or SET_META_CONTEXT, at most 17 MB. QEMU offers two and one for each bitmap of the
export; a disk with dozens of bitmaps is already slow to write to."""

MAX_EXPORT_SIZE: Final = 2**63 - 1
"""Bytes. No file is larger (off_t is signed), and servers say 2**64 - 1 when they mean 'unknown'."""

MAX_MINIMUM_BLOCK: Final = 64 * 1024
"""Bytes ("Size constraints")."""

DEFAULT_MINIMUM_BLOCK: Final = 1
DEFAULT_PREFERRED_BLOCK: Final = 4096
DEFAULT_MAXIMUM_PAYLOAD: Final = 32 * 1024 * 1024

MAX_STATUS_EXTENTS: Final = 2**20
"""Extents in one BLOCK_STATUS chunk ("Structured reply types"). QEMU stops at 131072."""

MAX_ERROR_CHUNK: Final = 14 + MAX_STRING
"""Bytes of an error chunk: error, message length, message, offset. Also the bound for unknown error types."""

LOOK_AHEAD: Final = 64 * 1024
"""Bytes received at a time where messages are small, to be taken apart afterwards."""

MAX_EXTRA_CHUNKS: Final = 16
"""Chunks of one reply beyond one for each context: an error or two and the final NONE, generously."""

MAX_FINISHED_COOKIES: Final = 1024
"""Finished requests whose late chunks are recognised. They come right behind, so far fewer would do."""

MAX_ABANDONED: Final = 1024
"""Requests that nobody waits for any more and that are not answered. QEMU works on 16 at a time. Of those that somebody
waits for there may be as many as callers make."""

SECTOR: Final = 512
"""Bytes. Lengths of extents SHOULD be multiples of it, and no server cuts data into smaller chunks."""

GREETING_PATIENCE: Final = 10.0
"""Seconds to wait for the greeting. A server at its connection limit accepts and stays silent; QEMU itself gives a
client 10 s for the whole handshake."""

TLS_PATIENCE: Final = 10.0
"""Seconds for the TLS handshake, two round trips and some arithmetic; again as long as QEMU gives for everything."""
