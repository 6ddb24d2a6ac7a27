"""What a server's bytes say, read by somebody else: the specification in few lines, to judge the client's results by.

Nothing of the package is used, and nothing is judged here: what cannot be read ends the reading.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

NONE, DATA, HOLE, STATUS, STATUS_EXT = 0, 1, 2, 5, 6
SIMPLE, CHUNK, EXTENDED_CHUNK = 0x67446698, 0x668E33EF, 0x6E8A278C
_LAYOUTS = {SIMPLE: ">IQ", CHUNK: ">HHQI", EXTENDED_CHUNK: ">HHQQQ"}


@dataclass
class Told:
    """What was said in reply to one request, up to the chunk that is the last one.

    Attributes:
        offset: first byte asked about.
        data: the bytes told.
        times: how often each of them was told.
        statuses: context id, offset, length and status of each extent.
        failed: an error was told.
        done: the reply is complete.
    """

    offset: int
    data: bytearray
    times: bytearray
    statuses: list[tuple[int, int, int, int]] = field(default_factory=list)
    failed: bool = False
    done: bool = False

    def put(self, start: int, content: bytes) -> None:
        """Books content, as far as it is about what was asked."""
        first, end = max(start, self.offset), min(start + len(content), self.offset + len(self.data))
        if first < end:
            place = slice(first - self.offset, end - self.offset)
            self.data[place] = content[first - start : end - start]
            self.times[place] = self.times[place].translate(_ONE_MORE)


_ONE_MORE = bytes([*range(1, 256), 255])


@dataclass(frozen=True)
class Asked:
    """A request: its cookie, what it is about, and whether it wants the data."""

    cookie: int
    offset: int
    length: int
    reads: bool


def heard(stream: bytes, asked: list[Asked]) -> dict[int, Told]:
    """Returns what a stream of replies says about each request, by cookie."""
    told = {
        each.cookie: Told(each.offset, bytearray(each.length * each.reads), bytearray(each.length * each.reads))
        for each in asked
    }
    for kind, flags, cookie, payload in messages(stream, {each.cookie: each.length for each in asked if each.reads}):
        reply = told.get(cookie)
        if reply is not None and not reply.done:
            try:
                _book(reply, kind, payload)
            except struct.error:
                reply.failed = True  # nothing that can be read
            reply.done = bool(flags & 1)
    return told


def messages(stream: bytes, reads: dict[int, int]) -> Iterator[tuple[int, int, int, bytes]]:
    """Yields type, flags, cookie and payload of each message; a simple reply is an error, or data, or nothing."""
    at = 0
    while len(stream) - at >= 4:
        layout = struct.Struct(_LAYOUTS.get(int.from_bytes(stream[at : at + 4], "big"), ""))
        if not layout.size or len(stream) - at < 4 + layout.size:
            return
        fields = layout.unpack_from(stream, at + 4)
        at += 4 + layout.size
        if layout.size == 12:
            error, cookie = fields
            length = 0 if error else reads.get(cookie, 0)
            kind = 0x8001 if error else SIMPLE
            flags = 1
        else:
            (flags, kind, cookie, *_), length = fields, fields[-1]
        if len(stream) - at < length:
            return
        yield kind, flags, cookie, stream[at : at + length]
        at += length


def _book(reply: Told, kind: int, payload: bytes) -> None:
    if kind & 0x8000 and kind != SIMPLE:
        reply.failed = True
    elif kind == SIMPLE:
        reply.put(reply.offset, payload)
    elif kind == DATA:
        reply.put(int.from_bytes(payload[:8], "big"), payload[8:])
    elif kind == HOLE:
        start, length = struct.unpack(">QI", payload)
        reply.put(start, bytes(min(length, len(reply.data))))
    elif kind in (STATUS, STATUS_EXT):
        head, pair = (4, ">II") if kind == STATUS else (8, ">QQ")
        offset = reply.offset
        for length, status in struct.iter_unpack(pair, payload[head:]):
            reply.statuses.append((int.from_bytes(payload[:4], "big"), offset, length, status))
            offset += length


def fields_of(stream: bytes) -> list[tuple[int, int]]:
    """Returns offset and width of every number that frames a recorded session: greeting, options, replies."""
    found = [(0, 8), (8, 8), (16, 2)]
    at = 18
    while stream[at : at + 8] == bytes.fromhex("0003e889045565a9"):
        option, kind, length = struct.unpack_from(">III", stream, at + 8)
        found += [(at, 8), (at + 8, 4), (at + 12, 4), (at + 16, 4), *((at + 20 + n, 2) for n in range(0, length, 2))]
        at += 20 + length
        if (option, kind) == (7, 1):
            break
    while len(stream) - at >= 4:
        magic = int.from_bytes(stream[at : at + 4], "big")
        layout = struct.Struct(_LAYOUTS[magic])
        (*_, length) = layout.unpack_from(stream, at + 4)
        found += [(at, 4), *((at + 4 + n, 2) for n in range(0, layout.size, 2)), (at + 4 + layout.size - 4, 4)]
        at += 4 + layout.size
        if magic == SIMPLE:
            return found  # what follows depends on what was asked
        found += [(at + n, 4) for n in range(0, min(length, 64), 4)]
        at += length
    return found
