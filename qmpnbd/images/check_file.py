"""Checking a qcow2 file: the walk through its structures, with the counting of `images.check`.

::

    for each window of host clusters
        refcount table, refcount blocks            -> refcounts
        header, L1 tables, L2 tables, snapshots,
        encryption header, bitmaps, refcounts      -> references
        compare

Memory is bounded by the window: 2**24 clusters (1 TiB of 64 KiB clusters) at up to 18 bytes each, usually 8; larger
files are walked once more for each further window. Nothing is ever written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from qmpnbd.deadline import Deadline
from qmpnbd.errors import ImageCorruptError, ImageUnsupportedError
from qmpnbd.images import check_tables
from qmpnbd.images.check import I64, Findings, Ledger, Rule, Severity, Use
from qmpnbd.images.check_metadata import BitmapTable, SnapshotTable, bitmap_clusters, read_bitmaps, read_snapshots
from qmpnbd.images.formats import PROBE_LENGTH, probe
from qmpnbd.images.hostfile import HostFile
from qmpnbd.images.qcow2_format import (
    BITMAPS_BIT,
    CHECK,
    CORRUPT_BIT,
    DIRTY_BIT,
    HEADER_MAX,
    Qcow2Header,
    unpack_extensions,
    unpack_header,
)
from qmpnbd.images.raw import rounded_up
from qmpnbd.images.refcounts import BLOCK_MASK, MAX_ORDER, RESERVED_MASK, block_entries, unpack_refcounts
from qmpnbd.printable import printable

WINDOW = 1 << 24  # host clusters counted at a time
MAX_CLUSTERS = (1 << 31) - 1  # QEMU's limit
MAX_TABLE_BYTES = 8 << 20  # QEMU's limit for the refcount table
_L1_SLICE = 1 << 16  # entries of an L1 table looked at together
_BATCH = 1 << 20  # bytes of tables or refcount blocks looked at together


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What a check found; the numbers are those of ``qemu-img check``.

    Attributes:
        path: the file.
        cluster_size: bytes in a cluster.
        file_size: bytes in the file.
        image_end_offset: where the last cluster in use ends.
        total_clusters: guest clusters of the disk.
        allocated_clusters: of those, with data of their own.
        fragmented_clusters: of those, not behind the one before.
        compressed_clusters: of those, compressed.
        dirty: the header says that refcounts may be behind (lazy refcounts, and QEMU did not close the image).
        marked_corrupt: QEMU marked the image as corrupt.
        findings: what is wrong.
    """

    path: str
    cluster_size: int
    file_size: int
    image_end_offset: int
    total_clusters: int
    allocated_clusters: int
    fragmented_clusters: int
    compressed_clusters: int
    dirty: bool
    marked_corrupt: bool
    findings: Findings

    @property
    def corruptions(self) -> int:
        """Contradictions that can lose data."""
        return self.findings.total(Severity.CORRUPTION)

    @property
    def leaks(self) -> int:
        """Clusters that are counted as used, and are not."""
        return self.findings.total(Severity.LEAK)

    @property
    def errors(self) -> int:
        """Clusters that could not be judged."""
        return self.findings.total(Severity.ERROR)

    @property
    def overlaps(self) -> int:
        """Clusters that several structures claim; QEMU only sees them where refcounts differ."""
        return self.findings.total(Severity.OVERLAP)


def check_image(path: str, *, image_format: str | None = None, deadline: Deadline | None = None) -> CheckResult:
    """Checks a qcow2 file; reads it, changes nothing.

    Args:
        path: the file.
        image_format: its format; None to guess it from the content.
        deadline: for all of it.

    Raises:
        ImageUnsupportedError: not qcow2, or something that cannot be checked here.
        ImageError: it cannot be opened; the branch says why.
        DeadlineError: the time ran out.
    """
    where = printable(path)
    with HostFile(path, where) as file:
        found = image_format or probe(file.read(0, PROBE_LENGTH), path, where)
        if found != "qcow2":
            what = f"the format {found} has no refcounts that could be checked"
            raise ImageUnsupportedError(what, where=where, remedy="Only qcow2 images are checked.")
        return _Check(file, deadline).run()


@dataclass(frozen=True, slots=True)
class _Padded:
    """A file behind whose end zeroes go on for ever; offsets in an image can be anything."""

    file: HostFile
    size: int

    def read(self, offset: int, length: int) -> bytes:
        """Returns `length` bytes from `offset` on."""
        data = self.file.read(offset, min(length, self.size - offset)) if offset < self.size else b""
        return data.ljust(length, b"\0")


class _Check:
    """A check under way.

    Attributes:
        header: the image's header.
        size: bytes in the file when the check began; QEMU counts whole sectors.
    """

    def __init__(self, file: HostFile, deadline: Deadline | None) -> None:
        self._file, self._deadline = file, deadline
        self.header = unpack_header(file.read(0, HEADER_MAX), file.where)
        _refuse_refcounts(self.header, file.where)
        self.size = rounded_up(file.size())
        self._padded = _Padded(file, self.size)
        start, end = self.header.header_length, self.header.extensions_end
        self._extensions = unpack_extensions(file.read(start, end - start), self.header, file.where)
        self._fragments = check_tables.Fragmentation()
        self._unknown_blocks = self._find_unknown_blocks()

    def run(self) -> CheckResult:
        """Walks the file, once for each window of host clusters."""
        header = self.header
        clusters = -(-self.size // header.cluster_size)
        if clusters > MAX_CLUSTERS:
            what = f"the file has {clusters} clusters, more than can be checked"
            raise ImageUnsupportedError(what, where=self._file.where, remedy="Check that the image is genuine.")
        findings, last = Findings(), 0
        # One cluster behind the end may be referred to, and refcounts of a whole block may be asked for.
        covered = -(-(clusters + 1) // self._block_entries) * self._block_entries
        for first in range(0, covered, WINDOW):
            self._check_time()
            ledger = Ledger(
                first,
                min(WINDOW, covered - first),
                findings,
                is_last=first + WINDOW >= covered,
                cluster_bits=header.cluster_bits,
                order=header.refcount_order,
                file_size=self.size,
            )
            # What is wrong by itself is counted in the first window only.
            self._walk(ledger, findings, Findings() if first else findings)
            last = max(last, ledger.compare(clusters))
        fragments = self._fragments
        return CheckResult(
            path=self._file.path,
            cluster_size=header.cluster_size,
            file_size=self._file.size(),
            image_end_offset=(last + 1) * header.cluster_size,
            total_clusters=-(-header.disk_size // header.cluster_size),
            allocated_clusters=fragments.allocated,
            fragmented_clusters=fragments.fragmented,
            compressed_clusters=fragments.compressed,
            dirty=bool(header.incompatible & DIRTY_BIT),
            marked_corrupt=bool(header.incompatible & CORRUPT_BIT),
            findings=findings,
        )

    @property
    def _block_entries(self) -> int:
        return block_entries(self.header.cluster_size, self.header.refcount_order)

    def _walk(self, ledger: Ledger, findings: Findings, once: Findings) -> None:
        """Fills a ledger.

        Args:
            ledger: the window.
            findings: for what concerns clusters of the window.
            once: for what would be found again in every window.
        """
        header = self.header
        self._load_refcounts(ledger)
        ledger.add_range(Use.HEADER, 0, header.cluster_size, once)
        self._l1(ledger, header.l1_offset, header.l1_entries, findings, once, active=True)
        snapshots = SnapshotTable()
        if header.snapshot_count:
            snapshots = read_snapshots(self._padded, header, self._file.where, once)
        for l1_offset, l1_entries in snapshots.l1_tables:
            self._l1(ledger, l1_offset, l1_entries, findings, once, active=False)
        ledger.add_range(Use.SNAPSHOT_TABLE, header.snapshots_offset, snapshots.size, once)
        encryption = self._extensions.encryption or b""
        if len(encryption) >= 16:
            offset, length = int.from_bytes(encryption[:8], "big"), int.from_bytes(encryption[8:16], "big")
            ledger.add_range(Use.ENCRYPTION_HEADER, offset, length, once)
        self._bitmaps(ledger, once)
        self._refcount_structures(ledger, once)

    def _l1(
        self, ledger: Ledger, offset: int, entries: int, findings: Findings, once: Findings, *, active: bool
    ) -> None:
        header = self.header
        ledger.add_range(Use.L1_TABLE, offset, 8 * entries, once)
        for first in range(0, entries, _L1_SLICE):
            self._check_time()
            place = offset + 8 * first
            l1 = self._words(place, min(_L1_SLICE, entries - first))
            tables = check_tables.l2_tables(l1, place, header.cluster_size, once)
            used = np.flatnonzero(l1)
            ledger.add_many(Use.L2_TABLE, tables[used], header.cluster_size, once)
            if active:
                check_tables.judge_l1_copied(l1, tables, place, ledger, findings)
            for rows in self._tables(tables[used]):
                self._rows(rows, ledger, findings, once, active=active)

    def _rows(
        self, rows: check_tables.Rows, ledger: Ledger, findings: Findings, once: Findings, *, active: bool
    ) -> None:
        header = self.header
        if active:
            # An L1 entry with flags and no offset leads to the header; its bytes are counted as entries, but have no
            # flags. QEMU does not look into a table either whose own refcount cannot be read.
            judged = (rows.places != 0) & ~self._is_unknown(rows.places)
            check_tables.judge_copied(rows, judged, ledger, findings)
        rows = check_tables.judge_rows(rows, header.cluster_size, once)
        check_tables.count_rows(rows, header.cluster_bits, ledger, once)
        if active and ledger.first == 0:
            check_tables.count_fragments(rows, header.cluster_size, self._fragments)

    def _tables(self, offsets: I64) -> Iterator[check_tables.Rows]:
        """Yields L2 tables in batches; what lies behind the end of the file is zeroes."""
        header = self.header
        in_batch = max(1, _BATCH // header.cluster_size)
        for start in range(0, offsets.size, in_batch):
            self._check_time()
            batch = offsets[start : start + in_batch]
            tables = self._clusters(batch)
            yield check_tables.understand(tables, batch, extended=header.extended_l2, data_file=header.has_data_file)

    def _bitmaps(self, ledger: Ledger, once: Findings) -> None:
        extension = self._extensions.bitmaps
        # Without the autoclear bit a bitmap may be out of date; QEMU does not look at any then.
        if extension is None or not self.header.autoclear & BITMAPS_BIT:
            return
        offset, size, tables = read_bitmaps(self._padded, extension, self._file.where)
        ledger.add_range(Use.BITMAP_DIRECTORY, offset, size, once)
        for table in tables:
            self._bitmap(table, ledger, once)

    def _bitmap(self, table: BitmapTable, ledger: Ledger, once: Findings) -> None:
        ledger.add_range(Use.BITMAP_TABLE, table.offset, 8 * table.entries, once)
        for first in range(0, table.entries, _L1_SLICE):
            self._check_time()
            place = table.offset + 8 * first
            words = self._words(place, min(_L1_SLICE, table.entries - first))
            offsets = bitmap_clusters(words, place, self.header.cluster_size, once)
            ledger.add_many(Use.BITMAP_DATA, offsets, self.header.cluster_size, once)

    def _load_refcounts(self, ledger: Ledger) -> None:
        header, per_block = self.header, self._block_entries
        first = ledger.first // per_block
        end = -(-(ledger.first + ledger.references.size) // per_block)
        table = self._table(first, end - first)
        offsets = (table & np.uint64(BLOCK_MASK)).astype(np.int64)
        indexes = np.flatnonzero(offsets)
        unknown = np.isin(indexes + first, self._unknown_blocks)
        for index in indexes[unknown].tolist():
            ledger.set_unknown((first + index) * per_block, per_block)
        indexes = indexes[~unknown]
        in_batch = max(1, _BATCH // header.cluster_size)
        for start in range(0, indexes.size, in_batch):
            self._check_time()
            batch = indexes[start : start + in_batch]
            blocks = self._clusters(offsets[batch])
            for index, block in zip(batch.tolist(), blocks, strict=True):
                counts = unpack_refcounts(block, header.refcount_order)
                ledger.set_refcounts((first + index) * per_block, counts)

    def _find_unknown_blocks(self) -> I64:
        """Returns the indexes of refcount blocks that cannot be read because of where they are said to be."""
        header = self.header
        table = self._table(0, header.refcount_table_clusters * header.cluster_size // 8) & np.uint64(BLOCK_MASK)
        unaligned = (table & np.uint64(header.cluster_size - 1)) != 0
        return np.flatnonzero(unaligned | (table >> np.uint64(63) != 0))

    def _is_unknown(self, offsets: I64) -> np.typing.NDArray[np.bool_]:
        return np.isin(offsets // (self.header.cluster_size * self._block_entries), self._unknown_blocks)

    def _refcount_structures(self, ledger: Ledger, once: Findings) -> None:
        header = self.header
        size = header.refcount_table_clusters * header.cluster_size
        ledger.add_range(Use.REFCOUNT_TABLE, header.refcount_table_offset, size, once)
        table = self._table(0, size // 8)
        offsets = table & np.uint64(BLOCK_MASK)
        end = -(-self.size // header.cluster_size) * header.cluster_size

        def example(index: int) -> tuple[int, str]:
            place = header.refcount_table_offset + 8 * index
            return place, f"refcount table entry at {place:#x} is {int(table[index]):#018x}"

        reserved = (table & np.uint64(RESERVED_MASK)) != 0
        unaligned = ~reserved & (offsets & np.uint64(header.cluster_size - 1) != 0)
        beyond = ~reserved & ~unaligned & (offsets >= np.uint64(end))
        once.add_many(Rule.RESERVED, reserved, example)
        once.add_many(Rule.UNALIGNED, unaligned, example)
        once.add_many(Rule.BEYOND_END, beyond, example)
        good = ~(reserved | unaligned | beyond) & (offsets != 0)
        ledger.add_blocks(offsets[good].astype(np.int64))

    def _table(self, first: int, count: int) -> np.typing.NDArray[np.uint64]:
        """Returns entries of the refcount table; those behind its end are 0."""
        header = self.header
        entries = header.refcount_table_clusters * header.cluster_size // 8
        known = max(0, min(count, entries - first))
        table = np.zeros(count, dtype=np.uint64)
        table[:known] = self._words(header.refcount_table_offset + 8 * first, known)
        return table

    def _words(self, offset: int, count: int) -> np.typing.NDArray[np.uint64]:
        """Reads big-endian words; what lies behind the end of the file is zeroes, as QEMU has it."""
        return np.frombuffer(self._padded.read(offset, 8 * count), dtype=">u8").astype(np.uint64)

    def _clusters(self, offsets: I64) -> np.typing.NDArray[np.uint8]:
        """Reads clusters, a row each; those that lie side by side at once."""
        size = self.header.cluster_size
        rows = np.zeros((offsets.size, size), dtype=np.uint8)
        view = rows.reshape(-1).data
        edges = [0, *(np.flatnonzero(np.diff(offsets) != size) + 1).tolist(), offsets.size]
        for start, end in pairwise(edges):
            if end > start and offsets[start] < self.size:
                self._file.read_into(view[start * size : end * size], int(offsets[start]))
        return rows

    def _check_time(self) -> None:
        if self._deadline is not None:
            self._deadline.check("the image to be checked", self._file.where)


def _refuse_refcounts(header: Qcow2Header, where: str) -> None:
    """Refuses what QEMU does not open, even for a check."""
    size = header.refcount_table_clusters * header.cluster_size
    if header.refcount_order > MAX_ORDER:
        field, at, what = "refcount_order", 96, f"not within 0 to {MAX_ORDER}"
    elif size > MAX_TABLE_BYTES:
        field, at, what = "refcount_table_clusters", 56, f"the refcount table is larger than {MAX_TABLE_BYTES} bytes"
    elif header.refcount_table_offset % header.cluster_size:
        field, at, what = "refcount_table_offset", 48, "not at the start of a cluster"
    else:
        return
    structure, value = f"header field {field}", int(getattr(header, field))
    raise ImageCorruptError(what, where=where, structure=structure, offset=at, value=value, remedy=CHECK)
