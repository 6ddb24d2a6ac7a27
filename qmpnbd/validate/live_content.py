"""Bytes of a disk that is being written, over the rounds of `validate.live`.

For each piece in a round::

    served  ->  from the files  ->  served again, if the two differ     (all after the flush, while the watch is on)

    a piece agrees if the files' bytes are those served before or after. A run of blocks that differs from both, was
    served alike before and after, and in which nothing was written in the round is a discrepancy; any other piece that
    differs is read again in the next round.

It is the rule for the maps (`validate.compare`), applied to bytes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TypeAlias

from qmpnbd.extents import ExtentMap
from qmpnbd.validate.choice import Choice
from qmpnbd.validate.content import ContentDifference, differences
from qmpnbd.validate.sample import sample, whole

Read: TypeAlias = Callable[[int, int], Awaitable[bytes | bytearray]]
"""Reads so many bytes from an offset on."""

Range: TypeAlias = tuple[int, int]

_PIECE = 1 << 20


class LiveContent:
    """The judgement on bytes.

    Args:
        choice: how many of them.

    Attributes:
        found: the discrepancies so far.
        note: how the sample was chosen, or why nothing is compared.
        bytes: bytes that are compared.
    """

    def __init__(self, choice: Choice) -> None:
        self.found: list[ContentDifference] = []
        self.note = ""
        self.bytes = 0
        self._choice = choice
        self._open: list[Range] | None = [] if choice.content == "none" else None
        self._candidates: dict[Range, list[ContentDifference]] = {}

    @property
    def settled(self) -> bool:
        """Whether every byte has agreed or is a discrepancy."""
        return self._open is not None and not self._open

    @property
    def set_aside(self) -> int:
        """Bytes that could not be judged."""
        return sum(length for _, length in self._open or ())

    def give_up(self, note: str) -> None:
        """Notes why the bytes cannot be compared."""
        self.note, self.bytes, self._open = note, 0, []

    async def read(self, depth: ExtentMap, alignment: int, served: Read, computed: Read) -> None:
        """Reads what is still open.

        Args:
            depth: the allocation depth of both sides (`sample.both`), by which a sample is chosen.
            alignment: reads begin and end at multiples of so many bytes.
            served: reads from the server.
            computed: reads from the files.
        """
        if self._open is None:
            self._choose(depth, alignment)
        self._candidates = {}
        for offset, length in self._open or ():
            first = await served(offset, length)
            own = await computed(offset, length)
            if first == own:
                continue
            again = await served(offset, length)
            if again != own:
                self._candidates[offset, length] = _stable(offset, first, own, again)

    def judge(self, touched: ExtentMap | None) -> None:
        """Judges what was read.

        Args:
            touched: not 0 for every byte that was written during the round; None if nobody watched.
        """
        still_open: list[Range] = []
        for (offset, length), runs in self._candidates.items():
            at_rest = touched is not None and not touched.clip(offset, offset + length).values.any()
            if at_rest and runs:
                self.found += runs
            else:
                still_open.append((offset, length))
        self._open = still_open

    def _choose(self, depth: ExtentMap, alignment: int) -> None:
        chosen = whole(depth.size) if self._choice.content == "whole" else sample(depth, self._choice.seed, alignment)
        self.note, self.bytes = chosen.note, chosen.bytes
        self._open = list(pieces(chosen.ranges))


def pieces(ranges: Sequence[Range]) -> Iterator[Range]:
    """Cuts ranges (offset and length) into pieces that are read at once."""
    for offset, length in ranges:
        for start in range(offset, offset + length, _PIECE):
            yield start, min(_PIECE, offset + length - start)


def _stable(
    offset: int, first: bytes | bytearray, own: bytes | bytearray, again: bytes | bytearray
) -> list[ContentDifference]:
    """Returns the runs that differ from the files' bytes; none if the server itself told two things."""
    return list(differences(offset, memoryview(first), own)) if first == again else []
