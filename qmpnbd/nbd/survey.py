"""Reads whole maps: block status over ``[0, size)`` for all metadata contexts of a connection.

One reply covers the contexts unequally (QEMU stops each after 131,072 extents), so each has a cursor of its own and
the next request begins at the lowest one. A context that is ahead gets some bytes told again, which are dropped::

    request at cursor of A            next request
    |                                 |
    A ================================|................
    B ============================================|.....
                                      [already told]

A reply is judged before it is believed ("Structured reply types", NBD_REPLY_TYPE_BLOCK_STATUS of doc/proto.md): one
chunk for each context, no extent of no length, nothing but the last extent past the request, nothing past the export.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt

from qmpnbd.errors import NbdUnsupportedError, UsageError
from qmpnbd.extents import U64, ExtentMap
from qmpnbd.nbd.connection import Connection, Status
from qmpnbd.nbd.constants import Command
from qmpnbd.nbd.wire import Program

MAX_EXTENTS = 2**25
"""Extents of all contexts together. 2 TiB, data and holes alternating every 64 KiB, has so many; they need 400 MiB."""

MAX_SHORT_REPLIES = 2**17
"""Replies that stop before the end of what was asked. QEMU needs 256 of them for MAX_EXTENTS; a server that tells one
extent at a time, as it may, comes to 131,072 extents in about ten seconds."""

SECTOR = 512
"""Bytes. No disk has a status for less ("NBD_CMD_BLOCK_STATUS": lengths SHOULD be multiples of 512), so a server that
needs more replies than the export has sectors, plus some for unaligned ends, is not getting anywhere."""

_GRACE = 1024


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server may make us do.

    Attributes:
        extents: at most so many in all.
        short_replies: at most so many replies that stop early.
    """

    extents: int = MAX_EXTENTS
    short_replies: int = MAX_SHORT_REPLIES


@dataclass(slots=True)
class _Collected:
    """What is known of one context.

    Attributes:
        name: the metadata context.
        cursor: everything before this byte is known.
        ends: where extents end, in pieces.
        values: their status, in pieces.
    """

    name: str
    cursor: int = 0
    ends: list[U64] = field(default_factory=list)
    values: list[npt.NDArray[np.uint32]] = field(default_factory=list)

    def map(self) -> ExtentMap:
        """Makes the map and lets go of the pieces."""
        if not self.ends:
            return ExtentMap([], [])
        ends, values = np.concatenate(self.ends), np.concatenate(self.values)
        self.ends.clear()
        self.values.clear()
        return ExtentMap(ends, values)


def survey(connection: Connection, limits: Limits | None = None) -> Program[dict[str, ExtentMap]]:
    """Reads the map of every metadata context that was agreed on.

    Args:
        connection: an open connection.
        limits: what the server may make us do.

    Returns:
        A map of exactly the export's size for each context.

    Raises:
        UsageError: no context was agreed on.
        NbdRequestError: the server could not tell the status of some range; the connection can be used further.
        NbdProtocolError: a reply that cannot be true, or too many.
        NbdUnsupportedError: more extents than `limits` allows.
    """
    if not connection.export.contexts:
        raise UsageError("no metadata context was asked for, so there is no map to read", where=connection.where)
    return (yield from _Survey(connection, limits or Limits()).run())


class _Survey:
    """One reading of all maps."""

    def __init__(self, connection: Connection, limits: Limits) -> None:
        export = connection.export
        self._connection = connection
        self._limits = limits
        self._size = export.size
        self._block = export.minimum_block
        # The length is 32 bits wide. nbdkit before the fix of CVE-2025-47711 aborts when asked for all of 2**32 - 1.
        self._longest = 2**32 - max(SECTOR, export.minimum_block)
        self._contexts: Mapping[int, _Collected] = {id_: _Collected(name) for name, id_ in export.contexts.items()}
        self._extents = 0
        self._short = 0
        self._most_short = min(limits.short_replies, _GRACE + export.size // SECTOR)

    def run(self) -> Program[dict[str, ExtentMap]]:
        """Asks until every context is known to the end."""
        while (lowest := min(context.cursor for context in self._contexts.values())) < self._size:
            # An extent may end off the blocks that requests must keep to ("Size constraints").
            offset = lowest - lowest % self._block
            length = min(self._longest, self._size - offset)
            reply = _Reply(offset, length)
            yield from self._connection.call(Command.BLOCK_STATUS, offset, length, partial(self._take, reply))
            self._check_complete(reply, lowest)
        return {context.name: context.map() for context in self._contexts.values()}

    def _take(self, reply: _Reply, status: Status) -> None:
        """Books one chunk of a reply."""
        context = self._contexts.get(status.context_id)
        if context is None:
            raise self._nonsense(reply, f"context id {status.context_id}", "none but " + self._expected())
        if status.context_id in reply.seen:
            raise self._nonsense(reply, f"two chunks for {context.name}", "one")
        reply.seen.add(status.context_id)
        pairs = np.frombuffer(status.entries, dtype=">u4")
        lengths, values = pairs[0::2], pairs[1::2].astype(np.uint32)
        self._extents += lengths.size
        if self._extents > self._limits.extents:
            self._connection.lose()
            raise NbdUnsupportedError(
                f"the maps have more than {self._limits.extents} extents", where=self._connection.where
            )
        ends = np.cumsum(lengths, dtype=np.uint64) + np.uint64(reply.offset)
        self._check(context, lengths, ends, reply)
        np.minimum(ends, np.uint64(reply.end), out=ends)
        new = int(np.searchsorted(ends, np.uint64(context.cursor), side="right"))
        if new < ends.size:
            context.ends.append(ends[new:])
            context.values.append(values[new:])
            context.cursor = int(ends[-1])
        reply.short |= int(ends[-1]) < reply.end

    def _check(self, context: _Collected, lengths: npt.NDArray[np.uint32], ends: U64, reply: _Reply) -> None:
        """Judges the extents of one chunk."""
        if not lengths.all():
            first = int(np.flatnonzero(lengths == 0)[0])
            at = int(ends[first])
            raise self._nonsense(reply, f"an extent of length 0 at {at:#x} for {context.name}", "at least 1")
        if ends.size > 1 and int(ends[-2]) >= reply.end:
            got = f"extents for {context.name} that begin at {int(ends[-2]):#x}"
            raise self._nonsense(reply, got, f"none from {reply.end:#x} on")
        if int(ends[-1]) > self._size:
            got = f"an extent for {context.name} up to {int(ends[-1]):#x}"
            raise self._nonsense(reply, got, f"none past the export's end at {self._size:#x}")

    def _check_complete(self, reply: _Reply, lowest: int) -> None:
        """Judges a reply as a whole."""
        missing = [context.name for id_, context in self._contexts.items() if id_ not in reply.seen]
        if missing:
            raise self._nonsense(reply, f"no chunk for {', '.join(missing)}", f"one for each of {self._expected()}")
        if min(context.cursor for context in self._contexts.values()) <= lowest:
            raise self._nonsense(reply, f"nothing beyond {lowest:#x}", f"more than a block of {self._block} bytes")
        self._short += reply.short
        if self._short > self._most_short:
            raise self._nonsense(
                reply, f"short reply number {self._short}", f"at most {self._most_short} for this size"
            )

    def _expected(self) -> str:
        return ", ".join(f"{context.name} (id {id_})" for id_, context in self._contexts.items())

    def _nonsense(self, reply: _Reply, got: str, expected: str) -> Exception:
        """Makes the error for a reply that cannot be true; the connection is dead then."""
        return self._connection.violation(
            f"block status of [{reply.offset:#x}, {reply.end:#x}): got {got}, expected {expected}"
        )


@dataclass(slots=True)
class _Reply:
    """What one request brought so far.

    Attributes:
        offset: first byte asked for.
        length: bytes asked for.
        seen: ids of the contexts that answered.
        short: whether one of them stopped early.
    """

    offset: int
    length: int
    seen: set[int] = field(default_factory=set)
    short: bool = False

    @property
    def end(self) -> int:
        """The byte after the last one asked for."""
        return self.offset + self.length
