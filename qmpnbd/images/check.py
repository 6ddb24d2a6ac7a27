"""Refcounts against references: what a check of a qcow2 file counts. Arrays in, findings out; no I/O.

::

    host cluster          0   1   2   3   4   5   6   7
    refcount, as stored   1   1   1   1   2   1   1   0
    references found      1   1   1   1   1   0   1   1
                                          |   |       |
                                          |   |       refcount too low: corruption, a write may destroy it
                                          leaks: space that nothing uses, harmless

References are counted for a window of host clusters at a time, in arrays; the tables are walked once for each window,
so that memory does not depend on the image. What is counted, and how often, is what ``qemu-img check`` counts.
Overlaps are counted apart: a cluster that two different structures claim can have a matching refcount.
Source: "Qcow2 Image File Format" of QEMU's interoperability documents, and experiments with QEMU 7.2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, IntFlag
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from qmpnbd.images.refcounts import Refcounts, refcount_dtype, refcount_limit

I64: TypeAlias = npt.NDArray[np.int64]
Flags: TypeAlias = npt.NDArray[np.bool_]

MAX_EXAMPLES = 10
"""Places kept for each rule; what is beyond is only counted."""

_WIDE = 5  # from this refcount_order on, 32 bits could overflow before a clamp


class Use(IntFlag):
    """What a host cluster is used for."""

    HEADER = 1 << 0
    L1_TABLE = 1 << 1
    L2_TABLE = 1 << 2
    DATA = 1 << 3
    COMPRESSED_DATA = 1 << 4
    SNAPSHOT_TABLE = 1 << 5
    REFCOUNT_TABLE = 1 << 6
    REFCOUNT_BLOCK = 1 << 7
    BITMAP_DIRECTORY = 1 << 8
    BITMAP_TABLE = 1 << 9
    BITMAP_DATA = 1 << 10
    ENCRYPTION_HEADER = 1 << 11

    @property
    def words(self) -> str:
        """What they are, in the specification's words."""
        return " and ".join(_words(str(use.name)) for use in self)


_SHAREABLE = Use.L2_TABLE | Use.DATA | Use.COMPRESSED_DATA  # by snapshots, or by compressed clusters side by side


class Severity(Enum):
    """What a finding means."""

    CORRUPTION = "corruption"
    OVERLAP = "overlap"
    LEAK = "leak"
    ERROR = "error"


class Rule(Enum):
    """What can be wrong: how bad it is, and in words."""

    REFCOUNT_LOW = (Severity.CORRUPTION, "refcount too low")
    REFCOUNT_FULL = (Severity.CORRUPTION, "more references than a refcount can hold")
    BEYOND_END = (Severity.CORRUPTION, "points beyond the end of the file")
    COPIED = (Severity.CORRUPTION, "copied flag contradicts the refcount")
    RESERVED = (Severity.CORRUPTION, "reserved bits are set")
    UNALIGNED = (Severity.CORRUPTION, "points inside a cluster")
    BLOCK = (Severity.CORRUPTION, "refcount block is used by something else too")
    COMPRESSED = (Severity.CORRUPTION, "impossible compressed cluster")
    SUBCLUSTERS = (Severity.CORRUPTION, "impossible subcluster bitmap")
    SNAPSHOT = (Severity.CORRUPTION, "bad snapshot")
    BITMAP = (Severity.CORRUPTION, "bad bitmap")
    OVERLAP = (Severity.OVERLAP, "used by structures that exclude each other")
    LEAK = (Severity.LEAK, "leaked cluster")
    NO_REFCOUNT = (Severity.ERROR, "refcount cannot be read")

    @property
    def severity(self) -> Severity:
        """How bad it is."""
        return self.value[0]

    @property
    def words(self) -> str:
        """What is wrong."""
        return self.value[1]


@dataclass(frozen=True, slots=True)
class Example:
    """One place where a rule is broken: a byte of the file, and what is there."""

    offset: int
    text: str


@dataclass
class Findings:
    """What was found, counted by rule, with the first places of each."""

    counts: dict[Rule, int] = field(default_factory=dict)
    examples: dict[Rule, list[Example]] = field(default_factory=dict)

    def add(self, rule: Rule, offset: int, text: str, count: int = 1) -> None:
        """Counts a finding; `count` equal ones with the place of the first."""
        self.counts[rule] = self.counts.get(rule, 0) + count
        places = self.examples.setdefault(rule, [])
        if len(places) < MAX_EXAMPLES:
            places.append(Example(offset, text))

    def add_many(self, rule: Rule, wrong: Flags, example: Callable[[int], tuple[int, str]]) -> None:
        """Counts a finding for every True; `example` tells place and text of one index."""
        indexes = np.flatnonzero(wrong)
        if not indexes.size:
            return
        self.counts[rule] = self.counts.get(rule, 0) + int(indexes.size)
        places = self.examples.setdefault(rule, [])
        for index in indexes[: MAX_EXAMPLES - len(places)].tolist():
            places.append(Example(*example(index)))

    def total(self, severity: Severity) -> int:
        """Returns how many findings have a severity."""
        return sum(count for rule, count in self.counts.items() if rule.severity is severity)


class Ledger:
    """Refcounts and references of a window of host clusters.

    Args:
        first: the window's first cluster.
        count: clusters in it.
        findings: where goes what concerns its clusters.
        is_last: no window follows.
        cluster_bits: of the image.
        order: the refcount_order of the image.
        file_size: bytes in the file.

    Attributes:
        first: the window's first cluster.
        refcounts: as stored in the file, one a cluster of the window; filled by `set_refcounts`.
        references: as found, at most what a refcount can hold.
        uses: what refers to each, as bits of `Use`.
    """

    def __init__(
        self,
        first: int,
        count: int,
        findings: Findings,
        *,
        is_last: bool,
        cluster_bits: int,
        order: int,
        file_size: int,
    ) -> None:
        self.first = first
        self.refcounts: Refcounts = np.zeros(count, dtype=refcount_dtype(order))
        self.references: Refcounts = np.zeros(count, dtype=np.dtype(np.uint64 if order >= _WIDE else np.uint32))
        self.uses = np.zeros(count, dtype=np.uint16)
        self._unknown = np.zeros(0, dtype=np.int64)
        self._bits = cluster_bits
        self._findings = findings
        self._is_last = is_last
        self._limit = refcount_limit(order)
        self._file_size = file_size

    def set_refcounts(self, first: int, counts: Refcounts) -> None:
        """Stores the refcounts of host clusters from `first` on; those outside the window are left out."""
        start, end = self._inside(first, first + counts.size)
        if end > start:
            self.refcounts[start:end] = counts[start + self.first - first : end + self.first - first]

    def set_unknown(self, first: int, count: int) -> None:
        """Notes that the refcounts of `count` clusters cannot be read; they stay 0."""
        start, end = self._inside(first, first + count)
        self._unknown = np.concatenate((self._unknown, np.arange(start, max(start, end), dtype=np.int64)))

    def add_range(self, use: Use, offset: int, size: int, findings: Findings) -> None:
        """Counts a reference to each cluster that ``[offset, offset + size)`` of the file touches.

        Args:
            use: what it is.
            offset: first byte.
            size: bytes.
            findings: where goes what points beyond the end of the file; every window finds it anew.
        """
        if size <= 0:
            return
        if offset + size - self._file_size >= 1 << self._bits:
            findings.add(Rule.BEYOND_END, offset, _beyond(use, offset, size, self._file_size))
            return
        start, end = self._inside(offset >> self._bits, ((offset + size - 1) >> self._bits) + 1)
        if end > start:
            self._count_slice(use, start, end)

    def add_many(self, use: Use, offsets: I64, sizes: I64 | int, findings: Findings) -> None:
        """As `add_range`, for many."""
        beyond = offsets + sizes - self._file_size >= 1 << self._bits
        if beyond.any():
            all_sizes = np.broadcast_to(np.asarray(sizes), offsets.shape)
            findings.add_many(
                Rule.BEYOND_END,
                beyond,
                lambda index: (
                    int(offsets[index]),
                    _beyond(use, int(offsets[index]), int(all_sizes[index]), self._file_size),
                ),
            )
            offsets, sizes = offsets[~beyond], all_sizes[~beyond]
        if not offsets.size:
            return
        firsts = offsets >> self._bits
        lasts = (offsets + sizes - 1) >> self._bits
        for step in range(int((lasts - firsts).max()) + 1):
            clusters = firsts[firsts + step <= lasts] + step if step else firsts
            clusters = clusters - self.first
            inside = (clusters >= 0) & (clusters < self.references.size)
            self._count(use, clusters if inside.all() else clusters[inside])

    def add_blocks(self, offsets: I64) -> None:
        """Counts the refcount blocks, which must come last: nothing else may refer to them."""
        clusters = (offsets >> self._bits) - self.first
        clusters = clusters[(clusters >= 0) & (clusters < self.references.size)]
        again = np.ones(clusters.size, dtype=bool)
        again[np.unique(clusters, return_index=True)[1]] = False
        wrong = again | (self.references[clusters] > 0)
        self._count(Use.REFCOUNT_BLOCK, clusters)
        if self._limit > 1:  # with refcounts of one bit, more than one reference is another finding already
            places = (clusters + self.first) << self._bits
            self._findings.add_many(
                Rule.BLOCK, wrong, lambda index: (int(places[index]), f"refcount block at {int(places[index]):#x}")
            )

    def copied_is_wrong(self, offsets: I64, copied: Flags) -> Flags:
        """Tells for which of `offsets`, if in the window, the flag is not the same as 'refcount is 1'.

        The last window answers for everything behind it too: refcounts there are 0.
        """
        clusters = (offsets >> self._bits) - self.first
        inside = (clusters >= 0) & (clusters < self.references.size)
        if self._unknown.size:
            inside &= ~np.isin(clusters, self._unknown)
        wrong: Flags = inside & ((self.refcounts[np.where(inside, clusters, 0)] == 1) != copied)
        if self._is_last:
            wrong |= copied & (clusters >= self.references.size)
        return wrong

    def compare(self, limit: int) -> int:
        """Holds refcounts against references, and uses against each other.

        Args:
            limit: clusters of the file; what lies behind is only judged where something refers to it.

        Returns:
            The last cluster that is in use, counted from the start of the file; 0 if there is none.
        """
        end = max(min(limit - self.first, self.references.size), _last(self.references) + 1, 0)
        refcounts, references, uses = self.refcounts[:end], self.references[:end], self.uses[:end]
        unknown = self._unknown[self._unknown < end]

        def example(index: int) -> tuple[int, str]:
            counted = f"refcount {int(refcounts[index])}, {int(references[index])} references"
            by = Use(int(uses[index])).words
            return (self.first + index) << self._bits, f"{counted} ({by})" if by else counted

        if unknown.size:
            self._findings.add_many(
                Rule.NO_REFCOUNT,
                np.isin(np.arange(end), unknown),
                lambda index: ((self.first + index) << self._bits, "its refcount block is not at a cluster"),
            )
            # They are neither right nor wrong, and do not count as used.
            references = references.copy()
            references[unknown] = refcounts[unknown]
        self._findings.add_many(Rule.REFCOUNT_LOW, refcounts < references, example)
        self._findings.add_many(Rule.LEAK, refcounts > references, example)
        alone = (uses & (uses - np.uint16(1))) == 0
        shared = (references > 1) & ((uses & np.uint16(~int(_SHAREABLE) & 0xFFFF)) != 0)
        self._findings.add_many(
            Rule.OVERLAP,
            ~alone & (uses != 0) | shared,
            lambda index: (
                (self.first + index) << self._bits,
                f"{Use(int(uses[index])).words}, {int(references[index])} references",
            ),
        )
        used = max(_last(refcounts), _last(references))
        return self.first + used if used >= 0 else 0

    def _count(self, use: Use, clusters: I64) -> None:
        np.add.at(self.references, clusters, self.references.dtype.type(1))
        self.uses[clusters] |= np.uint16(use)
        if int(self.references[clusters].max(initial=0)) > self._limit:
            self._clamp(np.unique(clusters))

    def _count_slice(self, use: Use, start: int, end: int) -> None:
        self.references[start:end] += self.references.dtype.type(1)
        self.uses[start:end] |= np.uint16(use)
        if int(self.references[start:end].max(initial=0)) > self._limit:
            self._clamp(np.arange(start, end, dtype=np.int64))

    def _clamp(self, clusters: I64) -> None:
        full = clusters[self.references[clusters] > self._limit]
        more = int(self.references[full].sum(dtype=np.uint64)) - self._limit * int(full.size)
        place = (self.first + int(full[0])) << self._bits
        self._findings.add(Rule.REFCOUNT_FULL, place, f"more than {self._limit} references to a cluster", more)
        self.references[full] = self._limit

    def _inside(self, first: int, end: int) -> tuple[int, int]:
        return max(first - self.first, 0), min(end - self.first, self.references.size)


def _words(name: str) -> str:
    return name.lower().replace("_", " ").replace("l1", "L1").replace("l2", "L2")


def _beyond(use: Use, offset: int, size: int, file_size: int) -> str:
    return f"{use.words} of {size:#x} bytes at {offset:#x}, but the file ends at {file_size:#x}"


def _last(values: npt.NDArray[np.unsignedinteger[Any]]) -> int:
    """Returns the index of the last number that is not 0, or -1."""
    # From behind in slices: the end of a window is nearly always in use.
    for end in range(values.size, 0, -(1 << 16)):
        start = max(0, end - (1 << 16))
        found = np.flatnonzero(values[start:end])
        if found.size:
            return start + int(found[-1])
    return -1
