"""What every judgement on bytes of a running disk keeps: which are still to be compared, and what was found; pure.

`qmpnbd.validate.live_content` judges a disk that is being written, `qmpnbd.validate.instant_content` one that is held
at one instant.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TypeAlias

from qmpnbd.extents import ExtentMap
from qmpnbd.validate.choice import Choice
from qmpnbd.validate.content import ContentDifference
from qmpnbd.validate.hashes import Hashes
from qmpnbd.validate.sample import sample, whole

Read: TypeAlias = Callable[[int, int], Awaitable[bytes | bytearray]]
"""Reads so many bytes from an offset on."""

Range: TypeAlias = tuple[int, int]

_PIECE = 1 << 20


class ContentJudgement:
    """The judgement on bytes.

    Args:
        choice: how many of them.

    Attributes:
        found: the discrepancies so far.
        note: how the sample was chosen, or why nothing is compared.
        bytes: bytes that are compared.
        hashes: of the ranges that are compared.
    """

    def __init__(self, choice: Choice) -> None:
        self.found: list[ContentDifference] = []
        self.note = ""
        self.bytes = 0
        self.hashes = Hashes()
        self._choice = choice
        self._open: deque[Range] | None = deque() if choice.content == "none" else None

    @property
    def settled(self) -> bool:
        """Whether every byte has agreed or is a discrepancy."""
        return self._open is not None and not self._open

    @property
    def set_aside(self) -> int:
        """Bytes that have not been judged."""
        return sum(length for _, length in self._open or ())

    def give_up(self, note: str) -> None:
        """Notes why the bytes cannot be compared."""
        self.note, self.bytes, self._open = note, 0, deque()
        self.hashes = Hashes()

    def judge(self, touched: ExtentMap | None) -> None:
        """Ends a round; only where what was written meanwhile matters there is something left to do.

        Args:
            touched: not 0 for every byte that was written during the round; None if nobody watched.
        """

    def _still_open(self, depth: ExtentMap, alignment: int) -> deque[Range]:
        """Returns what is to be compared; the first time, all that is chosen.

        Args:
            depth: the allocation depth of both sides (`sample.both`), by which a sample is chosen.
            alignment: reads begin and end at multiples of so many bytes.
        """
        if self._open is None:
            whole_disk = self._choice.content == "whole"
            chosen = whole(depth.size) if whole_disk else sample(depth, self._choice.seed, alignment)
            self.note, self.bytes = chosen.note, chosen.bytes
            self.hashes = Hashes(chosen.ranges)
            self._open = deque(_pieces(chosen.ranges))
        return self._open


def _pieces(ranges: Sequence[Range]) -> Iterator[Range]:
    """Cuts ranges (offset and length) into pieces that are read at once."""
    for offset, length in ranges:
        for start in range(offset, offset + length, _PIECE):
            yield start, min(_PIECE, offset + length - start)
