"""What a check makes of L1 and L2 entries: which host clusters they use, and what is wrong with them. Pure.

::

    L2 entry                 uses                                     wrong if
    standard, zero with host one host cluster                         inside a cluster; bits 1-8 or 56-61 set
    compressed               each host cluster its sectors touch      copied flag set; in an image with a data file
    zero without host, none  nothing                                  bits 1-8 or 56-61 set

    subcluster bitmap (extended L2 entries)                           both bits of a subcluster set; allocation bits
                                                                      without a host cluster; any with a compressed one

The copied flag says 'the refcount is exactly one', so it is held against the refcount as stored; only in the active
L1 and L2 tables, for a snapshot's are not kept up to date.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from qmpnbd.extents import U64
from qmpnbd.images.check import I64, Findings, Flags, Ledger, Rule, Use

HOST_MASK = 0x00FF_FFFF_FFFF_FE00
COPIED = 1 << 63
_COMPRESSED = 1 << 62
_ZERO = 1 << 0
_L1_RESERVED = 0x7F00_0000_0000_01FF
_L2_RESERVED = 0x3F00_0000_0000_01FE
_SECTOR = 512
_LOW_WORD = np.uint64(0xFFFF_FFFF)


@dataclass
class Fragmentation:
    """Guest clusters of the active layer that have data.

    Attributes:
        allocated: with a host cluster, or compressed.
        fragmented: whose host cluster does not follow that of the one before; all compressed ones.
        compressed: compressed ones.
    """

    allocated: int = 0
    fragmented: int = 0
    compressed: int = 0


@dataclass(frozen=True, slots=True)
class Rows:
    """Some L2 tables with what their entries are; rows are tables, columns guest clusters.

    Attributes:
        entries: the entries, in this machine's byte order.
        bitmaps: their subcluster bitmaps; None without extended L2 entries.
        places: where each table lies in the file.
        data_file: guest data lies in another file, so entries use no host cluster of this one.
        compressed: which entries are compressed clusters.
        hosts: the host offsets, also of what is not `placed`.
        placed: which entries have a host cluster of their own.
    """

    entries: U64
    bitmaps: U64 | None
    places: I64
    data_file: bool
    compressed: Flags
    hosts: I64
    placed: Flags

    def place(self, index: int) -> int:
        """Returns where in the file the entry with a flat index lies."""
        row, column = divmod(index, int(self.entries.shape[1]))
        size = 8 if self.bitmaps is None else 16
        return int(self.places[row]) + size * column

    def entry_words(self, index: int) -> tuple[int, str]:
        """Returns where an entry lies and what it is, as an example of a finding."""
        place, entry = self.place(index), int(self.entries.reshape(-1)[index])
        bitmap = "" if self.bitmaps is None else f", subclusters {int(self.bitmaps.reshape(-1)[index]):#018x}"
        return place, f"L2 entry at {place:#x} is {entry:#018x}{bitmap}"


def understand(tables: npt.NDArray[np.uint8], places: I64, *, extended: bool, data_file: bool) -> Rows:
    """Reads L2 tables.

    Args:
        tables: their bytes, one table a row.
        places: where each lies in the file.
        extended: the entries are extended ones, of 16 bytes.
        data_file: guest data lies in another file.
    """
    words = tables.view(">u8").astype(np.uint64)
    entries, bitmaps = (words[:, 0::2], words[:, 1::2]) if extended else (words, None)
    compressed = (entries & np.uint64(_COMPRESSED)) != 0
    hosts = (entries & np.uint64(HOST_MASK)).astype(np.int64)
    placed = ~compressed & (hosts != 0)
    if data_file:
        # Host offset 0 is a place like any other there; the copied flag tells it from 'nothing here'.
        kept = (entries & np.uint64(COPIED)) != 0
        placed |= ~compressed & kept & (extended | ((entries & np.uint64(_ZERO)) == 0))
    return Rows(entries, bitmaps, places, data_file, compressed, hosts, placed)


def l2_tables(l1: U64, place: int, cluster_size: int, findings: Findings) -> I64:
    """Judges entries of an L1 table and returns where the L2 tables lie, unaligned ones included.

    Args:
        l1: the entries, in this machine's byte order.
        place: where the first of them lies in the file.
        cluster_size: bytes in a cluster.
        findings: where corruptions go.

    Returns:
        Offsets of tables, 0 for an entry that has none.
    """
    offsets = (l1 & np.uint64(HOST_MASK)).astype(np.int64)

    def example(index: int) -> tuple[int, str]:
        return place + 8 * index, f"L1 entry at {place + 8 * index:#x} is {int(l1[index]):#018x}"

    findings.add_many(Rule.RESERVED, (l1 & np.uint64(_L1_RESERVED)) != 0, example)
    findings.add_many(Rule.UNALIGNED, offsets & (cluster_size - 1) != 0, example)
    return offsets


def judge_rows(rows: Rows, cluster_size: int, findings: Findings) -> Rows:
    """Finds what is wrong with entries by themselves; returns the rows without those that use nothing any more."""
    entries = rows.entries

    def flat(rule: Rule, wrong: Flags) -> None:
        findings.add_many(rule, wrong.reshape(-1), rows.entry_words)

    plain = ~rows.compressed
    reserved = (entries & np.uint64(_L2_RESERVED)) != 0
    if reserved.any():
        flat(Rule.RESERVED, plain & reserved)
    compressed, placed = rows.compressed, rows.placed
    if compressed.any():
        flat(Rule.COMPRESSED, compressed & ((entries & np.uint64(COPIED)) != 0))
        impossible = compressed & (rows.data_file | (False if rows.bitmaps is None else rows.bitmaps != 0))
        flat(Rule.COMPRESSED, impossible)
        compressed = compressed & ~impossible
    if rows.bitmaps is not None:
        both = placed & ((rows.bitmaps >> np.uint64(32)) & rows.bitmaps & _LOW_WORD != 0)
        nowhere = plain & ~placed & (rows.bitmaps & _LOW_WORD != 0)
        flat(Rule.SUBCLUSTERS, both | nowhere)
    flat(Rule.UNALIGNED, placed & (rows.hosts & (cluster_size - 1) != 0))
    return replace(rows, compressed=compressed)


def count_rows(rows: Rows, cluster_bits: int, ledger: Ledger, findings: Findings) -> None:
    """Counts the references of entries that `judge_rows` left."""
    if not rows.data_file:
        ledger.add_many(Use.DATA, rows.hosts[rows.placed], 1 << cluster_bits, findings)
    if rows.compressed.any():
        offsets, sizes = compressed_places(rows.entries[rows.compressed], cluster_bits)
        ledger.add_many(Use.COMPRESSED_DATA, offsets, sizes, findings)


def compressed_places(entries: U64, cluster_bits: int) -> tuple[I64, I64]:
    """Returns where compressed data starts, and at most how long it is: to the end of its last sector."""
    length_bits = cluster_bits - 8
    offset_bits = 62 - length_bits
    offsets = (entries & np.uint64((1 << offset_bits) - 1)).astype(np.int64)
    sectors = ((entries >> np.uint64(offset_bits)) & np.uint64((1 << length_bits) - 1)).astype(np.int64) + 1
    return offsets, sectors * _SECTOR - (offsets & (_SECTOR - 1))


def judge_copied(rows: Rows, tables: Flags, ledger: Ledger, findings: Findings) -> None:
    """Holds copied flags of entries against refcounts.

    Args:
        rows: as `understand` made them.
        tables: those whose entries are judged.
        ledger: the refcounts.
        findings: where corruptions go.
    """
    copied = (rows.entries & np.uint64(COPIED)) != 0
    if rows.data_file:
        wrong = rows.placed & ~copied if ledger.first == 0 else np.zeros_like(rows.placed)
    else:
        wrong = rows.placed & ledger.copied_is_wrong(rows.hosts, copied)
    findings.add_many(Rule.COPIED, (wrong & tables[:, None]).reshape(-1), rows.entry_words)


def count_fragments(rows: Rows, cluster_size: int, found: Fragmentation) -> None:
    """Counts guest clusters that have data; what follows what is judged within a table."""
    table, _ = np.nonzero(rows.placed)
    hosts = rows.hosts[rows.placed]
    jumps = (hosts[1:] != hosts[:-1] + cluster_size) & (table[1:] == table[:-1])
    compressed = int(rows.compressed.sum())
    found.allocated += int(hosts.size) + compressed
    found.fragmented += int(jumps.sum()) + compressed
    found.compressed += compressed


def judge_l1_copied(l1: U64, tables: I64, place: int, ledger: Ledger, findings: Findings) -> None:
    """Holds copied flags of L1 entries against refcounts.

    Args:
        l1: the entries.
        tables: as `l2_tables` returned them.
        place: where the first entry lies in the file.
        ledger: the refcounts.
        findings: where corruptions go.
    """
    wrong = (tables != 0) & ledger.copied_is_wrong(tables, (l1 & np.uint64(COPIED)) != 0)
    findings.add_many(
        Rule.COPIED,
        wrong,
        lambda index: (place + 8 * index, f"L1 entry at {place + 8 * index:#x} is {int(l1[index]):#018x}"),
    )
