"""What a validation of one disk has found so far, over its rounds; pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from qmpnbd.errors import QmpnbdError
from qmpnbd.extents import ExtentMap
from qmpnbd.validate.compare import Comparison, Discrepancy
from qmpnbd.validate.reading import Reading

Unfinished = Literal["", "written", "graph"]


class Findings:
    """Collects rounds.

    Attributes:
        size: bytes of the disk as served.
        rounds: rounds that could be judged.
        reading: the image files as read in the last judged round; None before the first.
        served: the served map of that round; None before the first.
        verified: whether the files were seen to be those that QEMU has open, in every judged round.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.rounds = 0
        self.reading: Reading | None = None
        self.served: ExtentMap | None = None
        self.verified = True
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
        before: ExtentMap,
        after: ExtentMap | None,
        touched: ExtentMap | None,
        *,
        verified: bool,
    ) -> None:
        """Judges a round; see `Comparison.add`. Differing sizes count if they are seen twice running."""
        self._failure = None
        self.rounds += 1
        self.reading, self.served = reading, before
        self.verified = self.verified and verified
        if reading.depth.size != self.size:
            self._other_sizes += 1
            return
        self._other_sizes = 0
        self._comparison.add(before, reading.depth, after, touched)

    @property
    def sizes_differ(self) -> bool:
        """Whether the disk has another size according to its files, twice seen."""
        return self._other_sizes > 1

    @property
    def settled(self) -> bool:
        """Whether another round would tell nothing new."""
        return self.sizes_differ or (self._other_sizes == 0 and self._comparison.settled)

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
        """Returns what is not 0 for every byte of a discrepancy, and 0 elsewhere."""
        return self._comparison.discrepancy_map()

    def discrepancy_totals(self) -> tuple[int, int]:
        """Returns the number of discrepancies and the bytes in them."""
        return self._comparison.discrepancy_totals()

    def set_aside(self) -> ExtentMap:
        """Returns 1 for every byte that could not be judged, 0 elsewhere."""
        return ExtentMap.uniform(self.size, 0) if self.sizes_differ else self._comparison.set_aside()
