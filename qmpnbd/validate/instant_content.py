"""Bytes of a disk that is held at one instant, against its files, which the guest goes on writing; pure.

What is served stands still. In the files a byte of the instant is in the scratch image, once the guest has overwritten
it, and in the disk's own files before. Some pieces at a time::

    served  ->  from the files  ->  if they differ: flush the scratch, read it again, and what it holds by now

    the scratch holds the byte now       it does so for ever: what it says counts
    it does not hold it even now         nothing was written there when the files were read first: what they said counts

So every byte can be judged, however hard the guest writes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from itertools import islice
from typing import TypeAlias

from qmpnbd.extents import ExtentMap
from qmpnbd.validate.content import differences
from qmpnbd.validate.content_judgement import ContentJudgement, Range, Read

ReadFiles: TypeAlias = Callable[[Sequence[Range]], Awaitable[list[bytearray]]]
"""Reads ranges from the files as they are now."""

ReadAgain: TypeAlias = Callable[[Sequence[Range]], Awaitable[list[tuple[bytearray, ExtentMap]]]]
"""Flushes the scratch image and reads ranges once more, each with what the scratch holds of it: not 0 where it does."""

_AT_ONCE = 32
"""Pieces that are held in memory."""


class InstantContent(ContentJudgement):
    """The judgement on bytes that stand still."""

    async def read(self, depth: ExtentMap, alignment: int, served: Read, files: ReadFiles, again: ReadAgain) -> None:
        """Reads and judges what is still open; after an error, what was judged stays so.

        Args:
            depth: the allocation depth of both sides (`sample.both`), by which a sample is chosen.
            alignment: reads begin and end at multiples of so many bytes.
            served: reads from the server.
            files: reads from the files.
            again: reads from them once more.
        """
        still_open = self._still_open(depth, alignment)
        while still_open:
            some = list(islice(still_open, _AT_ONCE))
            told = [await served(offset, length) for offset, length in some]
            own = await files(some)
            differing = set()
            doubtful = [(each, first, mine) for each, first, mine in zip(some, told, own, strict=True) if first != mine]
            if doubtful:
                second = await again([each for each, _, _ in doubtful])
                for (each, first, mine), (now, held) in zip(doubtful, second, strict=True):
                    _take_over(mine, now, held)
                    if first != mine:
                        self.found += differences(each[0], memoryview(first), mine)
                        differing.add(each)
            for each, first in zip(some, told, strict=True):
                if each in differing:
                    self.hashes.lose(each[0])
                else:
                    self.hashes.add(each[0], first)
                still_open.popleft()
        self.hashes.settle(ExtentMap.uniform(depth.size, 0))


def _take_over(own: bytearray, now: bytearray, held: ExtentMap) -> None:
    """Takes from the second reading what the scratch image holds by now."""
    for run in held:
        if run.value:
            own[run.offset : run.end] = now[run.offset : run.end]
