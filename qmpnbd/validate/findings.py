"""What a validation of one disk has found so far, over its rounds; pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from qmpnbd.errors import QmpnbdError
from qmpnbd.extents import ExtentMap
from qmpnbd.images.mapentries import NBD_ZERO
from qmpnbd.validate.choice import Choice
from qmpnbd.validate.compare import Comparison, Discrepancy, MapFinding, marked
from qmpnbd.validate.content_judgement import ContentJudgement
from qmpnbd.validate.reading import Reading


@dataclass(frozen=True, slots=True)
class Served:
    """What an export served at one moment.

    Attributes:
        depth: allocation depth.
        base: base:allocation; None if not asked for.
    """

    depth: ExtentMap
    base: ExtentMap | None

    def agrees(self, reading: Reading) -> bool:
        """Returns whether the files say the same."""
        if reading.depth != self.depth:
            return False
        return self.base is None or reading.base is None or self.base_beside(reading.base) == reading.base

    def base_beside(self, computed: ExtentMap) -> ExtentMap | None:
        """Returns base:allocation as it can be compared, if there is any: where the files say data, zeroes are data.

        QEMU looks once, and remembers, whether to ask the file system for holes under the data of a qcow2 layer; what
        it found then cannot be told from the files now.
        """
        if self.base is None:
            return None
        zero, data = np.uint64(NBD_ZERO), np.uint64(0)
        return self.base.combine(computed, lambda told, own: np.where((own == data) & (told == zero), data, told))


Unfinished = Literal["", "written", "graph"]


class Findings:
    """Collects rounds.

    Attributes:
        size: bytes of the disk as served.
        rounds: rounds that could be judged.
        reading: the image files as read in the last judged round; None before the first.
        served: the served map of that round; None before the first.
        verified: whether the files were seen to be those that QEMU has open, in every judged round.
        base: the judgement on base:allocation; None if it is not compared.
        with_depth: whether the allocation depth is compared.
        base_refused: why base:allocation is not compared although it was to be; empty otherwise.
        content: that on bytes.
        bitmaps: what was found of dirty bitmaps.

    Args:
        size: see above.
        choice: what to compare.
        base_refused: see above.
        content: see above.
    """

    def __init__(self, size: int, choice: Choice, base_refused: str, content: ContentJudgement) -> None:
        self.size = size
        self.rounds = 0
        self.reading: Reading | None = None
        self.served: ExtentMap | None = None
        self.verified = True
        self.base_refused = base_refused if choice.base else ""
        self.base = Comparison(size) if choice.base and not base_refused else None
        self.content = content
        self.bitmaps: list[MapFinding] = []
        self.with_depth = choice.depth
        self._comparison = Comparison(size)
        self._failure: QmpnbdError | None = None
        self._other_sizes = 0

    def add_failure(self, failure: QmpnbdError) -> None:
        """Records that a round could not be carried out: perhaps something moved while it was looked at.

        Raises:
            QmpnbdError: `failure`, if the round before failed as well, so that it is no accident, and nothing has been
                found that would be lost.
        """
        if self._failure is not None and not self.discrepancy_totals()[0]:
            raise failure
        self._failure = failure

    def add_void(self) -> None:
        """Records a round that says nothing, because the block graph changed meanwhile."""
        self._failure = None

    def add(
        self,
        reading: Reading,
        before: Served,
        after: Served | None,
        touched: ExtentMap | None,
        *,
        verified: bool,
    ) -> None:
        """Judges a round; see `Comparison.add`. Differing sizes count if they are seen twice running."""
        self._failure = None
        self.rounds += 1
        self.reading, self.served = reading, before.depth
        self.verified = self.verified and verified
        if reading.depth.size != self.size:
            self._other_sizes += 1
            return
        self._other_sizes = 0
        computed = reading.depth if self.with_depth else before.depth  # which is to find nothing
        self._comparison.add(before.depth, computed, None if after is None else after.depth, touched)
        first = None if reading.base is None else before.base_beside(reading.base)
        if self.base is not None and reading.base is not None and first is not None:
            again = None if after is None else after.base_beside(reading.base)
            self.base.add(first, reading.base, again, touched)
        self.content.judge(touched)

    def leave_open(self, where: ExtentMap) -> None:
        """Sets aside bytes of which neither side's map can be known; see `Comparison.leave_open`."""
        if self.with_depth:
            self._comparison.leave_open(where)
        if self.base is not None:
            self.base.leave_open(where)

    @property
    def sizes_differ(self) -> bool:
        """Whether the disk has another size according to its files, twice seen."""
        return self._other_sizes > 1

    @property
    def settled(self) -> bool:
        """Whether another round would tell nothing new."""
        if self.sizes_differ or self._other_sizes:
            return self.sizes_differ
        base = self.base is None or self.reading is None or self.reading.base is None or self.base.settled
        return self._comparison.settled and base and self.content.settled

    @property
    def unfinished(self) -> Unfinished:
        """Why not everything was judged: the guest wrote there, or the block graph (or the size) never stood still."""
        if self.settled:
            return ""
        return "written" if self.rounds and not self._other_sizes else "graph"

    def discrepancies(self) -> Iterator[Discrepancy]:
        """Yields every discrepancy, in order."""
        return self._comparison.discrepancies()

    def discrepancy_map(self) -> ExtentMap:
        """Returns 1 for every byte of a discrepancy, whatever was compared, and 0 elsewhere."""
        comparisons = [self._comparison, self.base, *(each.comparison for each in self.bitmaps)]
        return marked(self.size, comparisons, self.content.found)

    def discrepancy_totals(self) -> tuple[int, int]:
        """Returns the number of discrepancies and the bytes in them."""
        return self._comparison.discrepancy_totals()

    def set_aside(self) -> ExtentMap:
        """Returns 1 for every byte that could not be judged, 0 elsewhere."""
        return ExtentMap.uniform(self.size, 0) if self.sizes_differ else self._comparison.set_aside()
