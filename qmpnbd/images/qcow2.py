"""From qcow2's tables to what each cluster is. Arrays in, arrays out; no I/O.

::

    guest offset   | L1 index | L2 index | in cluster |
                        |          |
    L1 table  [ e e e e * e ]      |            bits 9-55: host offset of an L2 table, 0 = none
                        |          |
    L2 table            [ e e e e e * e e ]     one cluster of entries, each describes a guest cluster

    L2 entry   63       62          61-56  55 ............ 9  8-1   0
               copied   compressed  -      host offset        -     zero flag

    bit 62 set                   compressed; the rest is an offset and a length in other units    allocated
    else bit 0 set               reads as zeroes, with or without a host cluster                  allocated
    else host offset not 0       standard cluster                                                 allocated
    else                         nothing here: the backing file decides                           not allocated

    extended L2 entry (16 bytes) adds a word   63 ............ 32  31 ............. 0
    for 32 subclusters; bit 0 of the first      reads as zeroes     allocated
    word means nothing then                     subcluster 31 - 0   subcluster 31 - 0

With an external data file an entry without a host offset is a standard cluster at offset 0 if bit 63 is set, and host
and guest offset must be the same. Source: "L1/L2 tables" and "Extended L2 Entries" of the qcow2 specification.

One mask tells whether a standard entry is allocated, and it can be applied to the table as it lies in the file, by
byteswapping the mask instead of the table; only entries that say more than that are looked at one by one.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from qmpnbd.extents import U64
from qmpnbd.images.qcow2_format import SUBCLUSTERS, Qcow2Header
from qmpnbd.images.status import Status

U8: TypeAlias = npt.NDArray[np.uint8]
Flags: TypeAlias = npt.NDArray[np.bool_]
Entries: TypeAlias = npt.NDArray[
    np.uint64
]  # of dtype ENTRY, as in the file; numpy's types do not tell byte orders apart

ENTRY = np.dtype(">u8")
HOST_MASK = 0x00FF_FFFF_FFFF_FE00
COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO = 1 << 0
BEYOND = 6
"""Of `Clusters.codes`: data that starts beyond the end of its file. QEMU reads zeroes there; it may be what a torn copy
left of data, so it is not called right, and no map is made of it."""

_ALLOCATED = HOST_MASK | COMPRESSED | ZERO
_HALF = (1 << 32) - 1


class Kind(Enum):
    """What an L2 entry says about its guest cluster."""

    UNALLOCATED = "not allocated"
    STANDARD = "standard cluster"
    ZERO_PLAIN = "zero cluster"
    ZERO_ALLOCATED = "zero cluster that keeps its space"
    COMPRESSED = "compressed cluster"

    @property
    def allocated(self) -> bool:
        """Whether the search for data ends here."""
        return self is not Kind.UNALLOCATED


_KINDS = {
    Status.UNALLOCATED: Kind.UNALLOCATED,
    Status.DATA: Kind.STANDARD,
    Status.ZERO: Kind.ZERO_PLAIN,
    Status.ZERO_ALLOCATED: Kind.ZERO_ALLOCATED,
    Status.COMPRESSED: Kind.COMPRESSED,
}


@dataclass(frozen=True, slots=True)
class Cluster:
    """An L2 entry, understood.

    Attributes:
        kind: what it is, or the subcluster that was asked for.
        host: where its data starts in the file, in bytes; 0 if it has none there.
    """

    kind: Kind
    host: int

    def __str__(self) -> str:
        return f"{self.kind.value} at host offset {self.host:#x}" if self.host else self.kind.value


@dataclass(frozen=True, slots=True)
class Clusters:
    """Consecutive guest clusters of one layer.

    Attributes:
        header: the image's header.
        first: the number of the first guest cluster.
        words: the entries as they lie in the file, in a view of this machine's byte order; with extended L2 entries
            two in a row: the entry and its bitmap.
        codes: a `Status` for each granule (a cluster, or 32 subclusters a cluster), or `BEYOND`.
    """

    header: Qcow2Header
    first: int
    words: U64
    codes: U8

    @property
    def entries(self) -> U64:
        """The L2 entry of each cluster, in this machine's byte order; 0 where there is no L2 table."""
        return _swap(self.words[:: 2 if self.header.extended_l2 else 1])

    @property
    def bitmaps(self) -> U64 | None:
        """The subcluster bitmap of each cluster; None without extended L2 entries."""
        return _swap(self.words[1::2]) if self.header.extended_l2 else None

    @property
    def hosts(self) -> U64:
        """The host offset of each cluster that is not compressed, 0 for none; of those meaning is in `entries`."""
        entries = self.entries
        return np.where(entries & np.uint64(COMPRESSED), np.uint64(0), entries & np.uint64(HOST_MASK))

    def shifts(self, granules: npt.NDArray[np.intp]) -> U64:
        """Returns host offset minus guest offset (modulo 2**64) of granules that have a host offset, else 0."""
        shifts, _ = self._shifts(granules)
        codes = self.codes[granules]
        shifts[(codes != Status.DATA) & (codes != Status.ZERO_ALLOCATED)] = 0
        return shifts

    def reserved(self, granules: npt.NDArray[np.intp]) -> tuple[Flags, U64]:
        """Returns which granules are unallocated in a cluster that has a host offset, and their shifts."""
        shifts, held = self._shifts(granules)
        kept: Flags = held & (self.codes[granules] == Status.UNALLOCATED)
        return kept, shifts

    def _shifts(self, granules: npt.NDArray[np.intp]) -> tuple[U64, Flags]:
        step = self.header.subclusters
        clusters = granules // step if step > 1 else granules
        entries = _swap(self.words[clusters * 2] if self.header.extended_l2 else self.words[clusters])
        guests = (clusters.astype(np.uint64) + np.uint64(self.first)) * np.uint64(self.header.cluster_size)
        return (entries & np.uint64(HOST_MASK)) - guests, _held(entries, self.header)


def decode(words: U64, header: Qcow2Header, first: int, file_size: int) -> Clusters:
    """Tells what clusters are.

    Args:
        words: as `Clusters.words`.
        header: the image's header.
        first: the number of the first guest cluster.
        file_size: bytes of the file that holds the data, asked for after the tables were read: it may be growing.
    """
    if header.extended_l2:
        return Clusters(header, first, words, _decode_extended(words, header, first, file_size))
    # The common case costs two passes over the table as it lies: all entries or-ed, and one mask.
    union = _swapped(int(np.bitwise_or.reduce(words))) if words.size else 0
    codes = ((words & np.uint64(_swapped(_ALLOCATED))) != 0).view(np.uint8)
    special = ZERO | COMPRESSED | (HOST_MASK & (header.cluster_size - 1))
    if header.has_data_file:
        special = _ALLOCATED | COPIED
    elif (
        words.size and union & HOST_MASK >= file_size and int((_swap(words) & np.uint64(HOST_MASK)).max()) >= file_size
    ):
        special = _ALLOCATED  # no entry is larger than all of them or-ed together, which costs less to know
    if union & special:
        which = np.flatnonzero(words & np.uint64(_swapped(special)))
        codes[which] = _statuses(_swap(words[which]), header, which.astype(np.uint64) + np.uint64(first), file_size)
    return Clusters(header, first, words, codes)


def _statuses(entries: U64, header: Qcow2Header, clusters: U64, file_size: int) -> U8:
    """The rules for standard entries, in QEMU's order."""
    hosts = entries & np.uint64(HOST_MASK)
    zero = (entries & np.uint64(ZERO)) != 0
    compressed = (entries & np.uint64(COMPRESSED)) != 0
    held = _held(entries, header) & ~compressed
    codes: U8 = held.astype(np.uint8)  # DATA or UNALLOCATED
    codes[zero] = Status.UNREADABLE if header.version == 2 else Status.ZERO
    if header.version > 2:
        codes[zero & (hosts != 0)] = Status.ZERO_ALLOCATED
    codes[(codes == Status.DATA) & (hosts >= np.uint64(file_size))] = BEYOND
    plain_zero = zero & (hosts == 0)
    codes[_misplaced(hosts, header, clusters) & held & ~plain_zero] = Status.UNREADABLE
    codes[compressed] = Status.UNREADABLE if header.has_data_file else Status.COMPRESSED
    return codes


def _decode_extended(words: U64, header: Qcow2Header, first: int, file_size: int) -> U8:
    count = words.size // 2
    codes = np.zeros((count, SUBCLUSTERS), dtype=np.uint8)
    used = np.flatnonzero(words[::2] | words[1::2])
    if used.size == 0:
        return codes.reshape(-1)
    entries, bitmaps = _swap(words[used * 2]), _swap(words[used * 2 + 1])
    bits = np.unpackbits(bitmaps.astype(ENTRY).view(np.uint8).reshape(-1, 8), axis=1)  # column 0 is bit 63
    zero, data = bits[:, 31::-1] != 0, bits[:, :31:-1] != 0
    compressed = (entries & np.uint64(COMPRESSED)) != 0
    held = _held(entries, header)[:, None]
    rows = np.where(data, np.uint8(Status.DATA), np.uint8(Status.UNALLOCATED))
    rows[zero & held] = Status.ZERO_ALLOCATED
    rows[zero & ~held] = Status.ZERO
    hosts = entries & np.uint64(HOST_MASK)
    inside = np.arange(SUBCLUSTERS, dtype=np.uint64) * np.uint64(header.granule)
    rows[(rows == Status.DATA) & (hosts[:, None] + inside >= np.uint64(file_size))] = BEYOND
    clusters = used.astype(np.uint64) + np.uint64(first)
    both = np.where(held[:, 0], bitmaps >> np.uint64(32), np.uint64(_HALF))
    bad = (bitmaps & both & np.uint64(_HALF)) != 0
    bad |= held[:, 0] & _misplaced(hosts, header, clusters)
    rows[bad] = Status.UNREADABLE
    rows[compressed] = Status.UNREADABLE if header.has_data_file else Status.COMPRESSED
    codes[used] = rows
    return codes.reshape(-1)


def _held(entries: U64, header: Qcow2Header) -> Flags:
    """Which entries have a host cluster, compressed ones aside."""
    mask = HOST_MASK | COPIED if header.has_data_file else HOST_MASK
    held: Flags = (entries & np.uint64(mask)) != 0
    return held


def _misplaced(hosts: U64, header: Qcow2Header, clusters: U64) -> Flags:
    """Which host offsets cannot be: inside a cluster, or with a data file another than the guest offset."""
    misplaced: Flags = (
        hosts != clusters * np.uint64(header.cluster_size)
        if header.has_data_file
        else (hosts & np.uint64(header.cluster_size - 1)) != 0
    )
    return misplaced


def fault(entry: int, bitmap: int, header: Qcow2Header) -> str:
    """Says what is wrong with an entry whose status is UNREADABLE."""
    host = entry & HOST_MASK
    if entry & COMPRESSED:
        return "a compressed cluster in an image with an external data file"
    if host & (header.cluster_size - 1):
        return "the host offset lies inside a cluster"
    if not header.extended_l2 and entry & ZERO and header.version == 2:
        return "a zero flag, which version 2 of the format does not have"
    if header.extended_l2 and bitmap & bitmap >> 32 & _HALF:
        return f"subclusters are marked as data and as zeroes at once, in the bitmap {bitmap:#018x}"
    if header.extended_l2 and not host and bitmap & _HALF and not header.has_data_file:
        return f"subclusters are marked as data without a host cluster, in the bitmap {bitmap:#018x}"
    return "the host offset is not the guest offset, as the external data file demands"


def l2_offsets(l1: Entries, header: Qcow2Header) -> tuple[U64, Flags]:
    """Returns where the L2 tables lie, 0 where there is none; and which of the offsets lie inside a cluster."""
    offsets = l1.astype(np.uint64) & np.uint64(HOST_MASK)
    return offsets, (offsets & np.uint64(header.cluster_size - 1)) != 0


def entry_location(header: Qcow2Header, offset: int) -> tuple[int, int]:
    """Returns the L1 index and the L2 index that a guest offset leads to."""
    return divmod(offset // header.cluster_size, header.l2_entries)


def understood(entry: int, header: Qcow2Header, status: Status | None = None) -> Cluster:
    """Returns what a readable L2 entry says, in words.

    Args:
        entry: the entry.
        header: the image's header.
        status: of the subcluster; None to tell it from a standard entry.
    """
    if status is None:
        word = np.array([entry], dtype=ENTRY).view(np.uint64)
        status = Status(int(decode(word, header, 0, 1 << 63).codes[0]))
    if status is Status.COMPRESSED:
        return Cluster(_KINDS[status], compressed_offset(entry, header))
    return Cluster(_KINDS[status], entry & HOST_MASK)


def compressed_offset(entry: int, header: Qcow2Header) -> int:
    """Returns where the data of a compressed cluster starts in the file."""
    # The descriptor's offset grows as the length field beside it shrinks with the cluster size.
    return entry & ((1 << (62 - (header.cluster_bits - 8))) - 1)


def _swap(words: U64) -> U64:
    """Turns words as they lie in the file into numbers."""
    return words.byteswap() if sys.byteorder == "little" else words.copy()


def _swapped(number: int) -> int:
    """Turns a number in this machine's byte order into one in the file's, and back."""
    return int.from_bytes(number.to_bytes(8, "big"), sys.byteorder)
