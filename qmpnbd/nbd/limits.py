"""The budget of a conversation: what a server may make us do and hold, whatever it says.

The bounds in `qmpnbd.nbd.constants` hold always; a `Limits` can only be narrower. Time has a budget of its own, the
`Deadline` of each call.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final

from qmpnbd.errors import UsageError
from qmpnbd.nbd import constants

MAX_EXTENTS: Final = 2**25
"""Extents of all contexts together. 2 TiB, data and holes alternating every 64 KiB, has so many; they need 400 MiB."""

MAX_SHORT_REPLIES: Final = 2**17
"""Replies that stop before the end of what was asked. QEMU needs 256 of them for MAX_EXTENTS; a server that tells one
extent at a time, as it may, comes to 131,072 extents in about ten seconds."""

STATUS_IN_FLIGHT: Final = 16
"""Requests for block status in flight at most: as many as QEMU works on at a time."""

EXTENT_BYTES: Final = 40
"""Bytes that an extent of a map costs at the worst moment, when what was received is joined."""

MAX_MEMORY: Final = MAX_EXTENTS * EXTENT_BYTES
"""Bytes: as many as MAX_EXTENTS cost."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server may make us do, and hold. Zero allows none.

    Attributes:
        extents: of one map, in all its contexts together.
        short_replies: of one map: replies that stop before the end of what was asked.
        extra_chunks: of one reply, beyond those that its request needs.
        option_replies: to one option: exports of a list, contexts, infos.
        memory: bytes of what one call or one option collects, beside buffers that the caller knows of.
        in_flight: requests of one map at a time. Fewer are made where the server is quicker with fewer
            (`qmpnbd.nbd.pace`). At least one.

    Raises:
        UsageError: one of them is negative, or nothing could be asked.
    """

    extents: int = MAX_EXTENTS
    short_replies: int = MAX_SHORT_REPLIES
    extra_chunks: int = constants.MAX_EXTRA_CHUNKS
    option_replies: int = constants.MAX_EXPORTS
    memory: int = MAX_MEMORY
    in_flight: int = STATUS_IN_FLIGHT

    def __post_init__(self) -> None:
        for each in fields(self):
            if (value := getattr(self, each.name)) < 0:
                raise UsageError(f"{each.name}={value} is no limit", where="limits")
        if not self.in_flight:
            raise UsageError("in_flight=0 lets nothing be asked", where="limits")

    @property
    def affordable_extents(self) -> int:
        """Extents that both their number and their memory allow."""
        return min(self.extents, self.memory // EXTENT_BYTES)


DEFAULT_LIMITS: Final = Limits()
