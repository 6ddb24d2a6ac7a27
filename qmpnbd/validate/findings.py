"""What a validation of one disk has found so far, over its rounds; pure."""

from __future__ import annotations

from collections.abc import Iterator

from qmpnbd.errors import ImageError
from qmpnbd.extents import ExtentMap
from qmpnbd.validate.compare import Comparison, Discrepancy
from qmpnbd.validate.reading import Reading


class Findings:
    """Collects rounds.

    Attributes:
        size: bytes of the disk as served.
        rounds: rounds that could be judged.
        reading: the image files as read in the last judged round; None before the first.
        served: the served map of that round; None before the first.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.rounds = 0
        self.reading: Reading | None = None
        self.served: ExtentMap | None = None
        self._comparison = Comparison(size)
        self._failure: ImageError | None = None

    def add_failure(self, failure: ImageError) -> None:
        """Records that the image could not be understood.

        Raises:
            ImageError: it could not in the round before, either, so it is no accident of reading a live image.
        """
        if self._failure is not None:
            raise failure
        self._failure = failure

    def add(self, reading: Reading, before: ExtentMap, after: ExtentMap | None) -> None:
        """Judges a round; see `Comparison.add`. Differing sizes are judged at once."""
        self._failure = None
        self.rounds += 1
        self.reading, self.served = reading, before
        if not self.sizes_differ:
            self._comparison.add(before, reading.depth, after)

    @property
    def sizes_differ(self) -> bool:
        """Whether the disk has another size according to its files."""
        return self.reading is not None and self.reading.depth.size != self.size

    @property
    def settled(self) -> bool:
        """Whether another round would tell nothing new."""
        return self.sizes_differ or self._comparison.settled

    def discrepancies(self) -> Iterator[Discrepancy]:
        """Yields every discrepancy, in order."""
        return self._comparison.discrepancies()

    def discrepancy_totals(self) -> tuple[int, int]:
        """Returns the number of discrepancies and the bytes in them."""
        return self._comparison.discrepancy_totals()

    def set_aside(self) -> ExtentMap:
        """Returns 1 for every byte that could not be judged, 0 elsewhere."""
        return self._comparison.set_aside()
