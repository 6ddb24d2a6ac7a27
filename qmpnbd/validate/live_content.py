"""Bytes of a disk that is being written, over the rounds of `validate.live`.

For each piece in a round::

    served  ->  from the files  ->  served again, if the two differ     (all after the flush, while the watch is on)

    a piece agrees if the files' bytes are those served before or after. A run of blocks that differs from both, was
    served alike before and after, and in which nothing was written in the round is a discrepancy; any other piece that
    differs is read again in the next round.

It is the rule for the maps (`validate.compare`), applied to bytes. A range of which all pieces agreed at once in the
first round that counts, and in which nothing was written all that round, has a hash (`validate.hashes`); to settle that
is left to who watches.
"""

from __future__ import annotations

from collections import deque

from qmpnbd.extents import ExtentMap
from qmpnbd.validate.choice import Choice
from qmpnbd.validate.content import ContentDifference, differences
from qmpnbd.validate.content_judgement import ContentJudgement, Range, Read


class LiveContent(ContentJudgement):
    """The judgement on bytes over some rounds."""

    def __init__(self, choice: Choice) -> None:
        super().__init__(choice)
        self._candidates: dict[Range, list[ContentDifference]] = {}

    async def read(self, depth: ExtentMap, alignment: int, served: Read, computed: Read) -> None:
        """Reads what is still open.

        Args:
            depth: the allocation depth of both sides (`sample.both`), by which a sample is chosen.
            alignment: reads begin and end at multiples of so many bytes.
            served: reads from the server.
            computed: reads from the files.
        """
        self._candidates = {}
        still_open = self._still_open(depth, alignment)
        self.hashes.begin()
        for offset, length in still_open:
            first = await served(offset, length)
            own = await computed(offset, length)
            if first == own:
                self.hashes.add(offset, first)
                continue
            self.hashes.lose(offset)
            again = await served(offset, length)
            if again != own:
                self._candidates[offset, length] = _stable(offset, first, own, again)

    def judge(self, touched: ExtentMap | None) -> None:
        """Judges what was read in the round; nothing, if nothing was open any more.

        Args:
            touched: not 0 for every byte that was written during the round; None if nobody watched.
        """
        if self.settled:
            return
        still_open: deque[Range] = deque()
        for (offset, length), runs in self._candidates.items():
            at_rest = touched is not None and not touched.clip(offset, offset + length).values.any()
            if at_rest and runs:
                self.found += runs
            else:
                still_open.append((offset, length))
        self._open = still_open


def _stable(
    offset: int, first: bytes | bytearray, own: bytes | bytearray, again: bytes | bytearray
) -> list[ContentDifference]:
    """Returns the runs that differ from the files' bytes; none if the server itself told two things."""
    return list(differences(offset, memoryview(first), own)) if first == again else []
