"""A disk that stands still: an export of image files that nobody writes; blocking work, run in a thread.

::

    look at the files  ->  computed: maps from the files  ->  look at the files again
                       ->  served: maps and bytes over NBD    (not the same: nothing is said)

The export may be that of a storage daemon of ours (`validate.daemon`) or of any NBD server. Of a server that is not
QEMU, or whose version is not known, base:allocation is held against what every known generation of QEMU would serve.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

from qmpnbd.deadline import Deadline
from qmpnbd.errors import ImageUnsupportedError, QmpnbdError
from qmpnbd.extents import ExtentMap
from qmpnbd.images.chain import Explanation, Layer
from qmpnbd.images.layers import Chain
from qmpnbd.images.mapentries import Generation
from qmpnbd.nbd.client import Client
from qmpnbd.nbd.constants import ALLOCATION_DEPTH, BASE_ALLOCATION
from qmpnbd.nbd.limits import Limits
from qmpnbd.report.model import RangeHashEntry
from qmpnbd.validate.choice import Choice
from qmpnbd.validate.compare import Comparison, Discrepancy, MapFinding, compared, marked
from qmpnbd.validate.content import ContentDifference, compare_content
from qmpnbd.validate.sample import Sample, both, sample, whole
from qmpnbd.validate.stamps import Stamp, require_unchanged

DIRTY = "qemu:dirty-bitmap:"
GENERATIONS: tuple[Generation, ...] = ("10.0", "7.2", "5.2")
"""Those whose base:allocation is known, and differs."""


@dataclass(frozen=True, slots=True)
class ContentFinding:
    """What the comparison of bytes found.

    Attributes:
        sample: which were compared.
        differences: where they differ.
        hashes: the ranges of the sample, with the hash of each.
        note: why none were compared; may be empty.
    """

    sample: Sample
    differences: Sequence[ContentDifference] = ()
    hashes: tuple[RangeHashEntry, ...] = ()
    note: str = ""


@dataclass(frozen=True, slots=True)
class StillFindings:
    """What was found of a disk that stands still.

    Attributes:
        size: bytes as served.
        computed_size: bytes according to the files.
        layers: of the chain, active layer first.
        depth: the computed allocation depth.
        maps: one for each context that was to be compared.
        content: None if no bytes were to be compared.
        stamps: the files as they were read.
        explained: the first discrepancies of the allocation depth, with the table entries that decide.
    """

    size: int
    computed_size: int
    layers: Sequence[Layer]
    depth: ExtentMap
    maps: Sequence[MapFinding]
    content: ContentFinding | None
    stamps: Sequence[Stamp]
    explained: Sequence[tuple[Discrepancy, Explanation | None]] = field(default=())

    @property
    def served_depth(self) -> ExtentMap | None:
        """The allocation depth as served, if it was compared."""
        return next((found.served for found in self.maps if found.context == ALLOCATION_DEPTH), None)

    def discrepancy_map(self) -> ExtentMap:
        """Returns 1 for every byte of a discrepancy, whatever was compared, and 0 elsewhere."""
        differences = () if self.content is None else self.content.differences
        return marked(self.size, (found.comparison for found in self.maps), differences)


@dataclass(frozen=True, slots=True)
class Terms:
    """How a disk is to be judged.

    Attributes:
        choice: what to compare.
        listed: how many discrepancies of a comparison to explain.
        deadline: for all of it.
        on_bytes: told how many more bytes of content have been compared, and how many there are.
    """

    choice: Choice
    listed: int
    deadline: Deadline
    on_bytes: Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class StillDisk:
    """What is to be judged.

    Attributes:
        chain: the open files.
        terms: how.
        generation: of the QEMU that serves; None if that is not known.
    """

    chain: Chain
    terms: Terms
    generation: Generation | None = None

    def contexts(self) -> list[str]:
        """Returns the metadata contexts that are needed."""
        wanted = [ALLOCATION_DEPTH] if self.terms.choice.depth else []
        wanted += [BASE_ALLOCATION] if self.terms.choice.base else []
        return wanted + [DIRTY + name for name in self.bitmaps()]

    def bitmaps(self) -> list[str]:
        """Returns the persistent bitmaps of the active layer whose bits can be relied on."""
        if not self.terms.choice.bitmaps:
            return []
        return [info.name for info in self.chain.bitmaps(0) if not info.inconsistent and _is_text(info.name)]

    def judge(self, client: Client, stamps: Sequence[Stamp], offered: Sequence[str] | None = None) -> StillFindings:
        """Compares what an export serves with what the files hold.

        Args:
            client: of the export, with `contexts`, or with those of them that are `offered`.
            stamps: the files when they were opened.
            offered: the contexts that the server has; None for all of them, if it is a storage daemon of ours.

        Raises:
            ImageChangedError: somebody else changed a file meanwhile.
            QmpnbdError: one side cannot be read.
        """
        depth = self.chain.allocation_depth()
        contexts = self.contexts()
        named = [context for context in contexts if offered is None or context in offered]
        # A daemon of ours is near, and its layers get into each other's way; of a server elsewhere nothing is known.
        limits = Limits(in_flight=1) if offered is None and len(self.chain.layers) > 1 else None
        served = client.maps(contexts=named, deadline=self.terms.deadline, limits=limits) if named else {}
        size = client.export.size
        maps, content = [], None
        if size == depth.size:
            maps = [self._map(context, served.get(context), depth) for context in contexts]
            content = self._content(client, depth, served.get(ALLOCATION_DEPTH, depth))
        explained = tuple(self._explained(maps))
        require_unchanged(self.chain, stamps)
        return StillFindings(size, depth.size, self.chain.layers, depth, maps, content, stamps, explained)

    def _map(self, context: str, served: ExtentMap | None, depth: ExtentMap) -> MapFinding:
        if served is None:
            return MapFinding(context, None, None, "the server does not offer it")
        if context == ALLOCATION_DEPTH:
            return MapFinding(context, served, compared(served, depth))
        if context.startswith(DIRTY):
            return MapFinding(context, served, compared(served, self.chain.bitmap(0, context.removeprefix(DIRTY))))
        try:
            return self._base(served)
        except ImageUnsupportedError as error:
            return MapFinding(context, served, None, error.what)

    def _base(self, served: ExtentMap) -> MapFinding:
        """Compares base:allocation with the generation's, or with the nearest one's."""
        known = (self.generation,) if self.generation is not None else GENERATIONS
        nearest: tuple[int, Generation, Comparison] | None = None
        for generation in known:
            comparison = compared(served, self.chain.base_allocation(generation))
            differing = comparison.discrepancy_totals()[1]
            if nearest is None or differing < nearest[0]:
                nearest = differing, generation, comparison
            if not differing:
                break
        if nearest is None:
            return MapFinding(BASE_ALLOCATION, served, None)
        return MapFinding(BASE_ALLOCATION, served, nearest[2], f"as of QEMU {nearest[1]}")

    def _content(self, client: Client, depth: ExtentMap, served: ExtentMap) -> ContentFinding | None:
        if self.terms.choice.content == "none":
            return None
        export = client.export
        if self.terms.choice.content == "whole":
            chosen = whole(export.size)
        else:
            chosen = sample(both(depth, served), self.terms.choice.seed, export.minimum_block)
        told = partial(self._told, total=chosen.bytes)
        try:
            found, hashes = compare_content(client, self.chain, chosen.ranges, self.terms.deadline, told)
        except ImageUnsupportedError as error:
            return ContentFinding(Sample((), ""), note=error.what)
        return ContentFinding(chosen, found, hashes)

    def _told(self, count: int, total: int) -> None:
        self.terms.on_bytes(count, total)

    def _explained(self, maps: Sequence[MapFinding]) -> Iterator[tuple[Discrepancy, Explanation | None]]:
        """Yields the first discrepancies of the allocation depth and the table entries that decide."""
        for found in maps:
            if found.context == ALLOCATION_DEPTH and found.comparison is not None:
                for each in islice(found.comparison.discrepancies(), self.terms.listed):
                    yield each, self._explanation(each)

    def _explanation(self, each: Discrepancy) -> Explanation | None:
        try:
            return self.chain.explain(each.offset)
        except QmpnbdError:
            return None  # the finding stands without its reason


def _is_text(name: str) -> bool:
    return name.isprintable() and all(not 0xD800 <= ord(letter) < 0xE000 for letter in name)
