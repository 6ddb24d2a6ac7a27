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

So one mask tells whether a cluster is allocated, and it can be applied to the table as it lies in the file, by
byteswapping the mask instead of the table. The entries are only swapped where one of them may be wrong.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from qmpnbd.errors import ImageCorruptError, ImageTruncatedError
from qmpnbd.extents import U64, ExtentMap
from qmpnbd.images.qcow2_format import CHECK, CUT, Qcow2Header

Entries: TypeAlias = npt.NDArray[
    np.uint64
]  # of dtype ENTRY, as in the file; numpy's types do not tell byte orders apart

ENTRY = np.dtype(">u8")
HOST_MASK = 0x00FF_FFFF_FFFF_FE00
COMPRESSED = 1 << 62
ZERO = 1 << 0
_ALLOCATED = HOST_MASK | COMPRESSED | ZERO


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


@dataclass(frozen=True, slots=True)
class Cluster:
    """An L2 entry, understood.

    Attributes:
        kind: what it is.
        host: where its data starts in the file, in bytes; 0 if it has none there.
    """

    kind: Kind
    host: int

    def __str__(self) -> str:
        return f"{self.kind.value} at host offset {self.host:#x}" if self.host else self.kind.value


def l2_offsets(l1: Entries, header: Qcow2Header, where: str, first: int = 0) -> U64:
    """Returns where the L2 tables lie, 0 where there is none.

    Args:
        l1: entries of the L1 table.
        header: the image's header.
        where: the file, for messages.
        first: the index of the first of `l1` in the table.

    Raises:
        ImageCorruptError: a table does not start at a cluster.
    """
    offsets = l1.astype(np.uint64) & np.uint64(HOST_MASK)
    unaligned = np.flatnonzero(offsets & np.uint64(header.cluster_size - 1))
    if unaligned.size:
        index = int(unaligned[0])
        raise ImageCorruptError(
            f"L2 table {first + index} does not start at a cluster",
            where=where,
            structure="L1 entry",
            offset=header.l1_offset + 8 * (first + index),
            value=int(l1[index]),
            remedy=CHECK,
        )
    return offsets


@dataclass(frozen=True, slots=True)
class Tables:
    """A batch of L2 tables, in guest order.

    Attributes:
        entries: one row a table, as in the file; entries behind the end of the disk must be 0.
        indexes: the L1 index of each.
        offsets: where each lies in the file.
        first: the L2 index of the first column; more than 0 only where single entries are looked at.
    """

    entries: Entries
    indexes: U64
    offsets: U64
    first: int = 0

    def check(self, header: Qcow2Header, where: str) -> None:
        """Refuses entries that contradict the format.

        Raises:
            ImageCorruptError: a host offset inside a cluster, or a zero flag in an image of version 2.
        """
        inside = HOST_MASK & (header.cluster_size - 1)
        suspicious = inside | (ZERO if header.version == 2 else 0)
        if not self._union() & suspicious:
            return
        entries = self.entries.astype(np.uint64)
        plain = (entries & np.uint64(COMPRESSED)) == 0
        bad = np.flatnonzero(plain & ((entries & np.uint64(suspicious)) != 0))
        if bad.size:
            table, column = divmod(int(bad[0]), entries.shape[1])
            entry = int(entries[table, column])
            unaligned = "the host offset lies inside a cluster"
            raise ImageCorruptError(
                unaligned if entry & inside else "a zero flag, which version 2 of the format does not have",
                where=where,
                structure="L2 entry",
                offset=int(self.offsets[table]) + 8 * (self.first + column),
                value=entry,
                remedy=CHECK,
            )

    def check_data(self, header: Qcow2Header, where: str, file_size: int) -> None:
        """Refuses standard clusters that lie wholly beyond the end of the file.

        QEMU reads zeroes there. That may be what a torn copy left of data, so it is not called right.

        Args:
            header: the image's header.
            where: the file, for messages.
            file_size: bytes in the file, asked for after the tables were read: the file may be growing.

        Raises:
            ImageTruncatedError: there is such a cluster.
        """
        if self._union() & HOST_MASK < file_size:  # no entry is larger than all of them or-ed together
            return
        entries = self.entries.astype(np.uint64)
        standard = (entries & np.uint64(COMPRESSED | ZERO)) == 0
        hosts = entries & np.uint64(HOST_MASK)
        beyond = np.flatnonzero(standard & (hosts >= np.uint64(file_size)) & (hosts != 0))
        if beyond.size:
            table, column = divmod(int(beyond[0]), entries.shape[1])
            guest = (int(self.indexes[table]) * header.l2_entries + self.first + column) * header.cluster_size
            raise ImageTruncatedError(
                f"the data of guest offset {guest:#x} should lie at host offset {int(hosts[table, column]):#x}, "
                f"but the file ends at byte {file_size:#x}",
                where=where,
                remedy=CUT,
            )

    def runs(self) -> ExtentMap:
        """Returns which guest clusters are allocated, from the disk's start to the end of the last table.

        Guest clusters without a table are not allocated. The unit is one cluster, not one byte.
        """
        tables, width = self.entries.shape
        # Column 0 of each row stands for the clusters between the previous table and this one.
        allocated = np.zeros((tables, width + 1), dtype=bool)
        as_they_lie = self.entries.view(np.uint64)
        np.not_equal(as_they_lie & np.uint64(_swapped(_ALLOCATED)), 0, out=allocated[:, 1:])
        run_ends = np.ones_like(allocated)
        np.not_equal(allocated[:, :-1], allocated[:, 1:], out=run_ends[:, :-1])
        places = np.flatnonzero(run_ends)
        rows, columns = np.divmod(places, width + 1)
        ends = self.indexes[rows] * np.uint64(width) + columns.astype(np.uint64)
        return ExtentMap(ends, allocated.reshape(-1)[places])

    def _union(self) -> int:
        return _swapped(int(np.bitwise_or.reduce(self.entries.view(np.uint64), axis=None)))


def _swapped(number: int) -> int:
    """Turns a number in this machine's byte order into one in the file's, and back."""
    return int.from_bytes(number.to_bytes(8, "big"), sys.byteorder)


def allocated_map(parts: list[ExtentMap], header: Qcow2Header, size: int) -> ExtentMap:
    """Joins what `Tables.runs` said of consecutive batches into a map of the disk.

    Args:
        parts: one map a batch, in guest order.
        header: the image's header.
        size: bytes of the disk to cover.

    Returns:
        A map in bytes: 1 where allocated, 0 where not.
    """
    behind = ExtentMap.uniform(-(-size // header.cluster_size), 0)  # what no table describes
    ends = np.concatenate([*(part.ends for part in parts), behind.ends])
    np.minimum(ends * np.uint64(header.cluster_size), np.uint64(size), out=ends)
    return ExtentMap(ends, np.concatenate([*(part.values for part in parts), behind.values]))


def entry_location(header: Qcow2Header, offset: int) -> tuple[int, int]:
    """Returns the L1 index and the L2 index that a guest offset leads to."""
    return divmod(offset // header.cluster_size, header.l2_entries)


def understood(entry: int, header: Qcow2Header) -> Cluster:
    """Returns what an L2 entry says; it must have passed `Tables.check`."""
    if entry & COMPRESSED:
        # The descriptor's offset grows as the length field beside it shrinks with the cluster size.
        offset_bits = 62 - (header.cluster_bits - 8)
        return Cluster(Kind.COMPRESSED, entry & ((1 << offset_bits) - 1))
    host = entry & HOST_MASK
    if entry & ZERO:
        return Cluster(Kind.ZERO_ALLOCATED if host else Kind.ZERO_PLAIN, host)
    return Cluster(Kind.STANDARD if host else Kind.UNALLOCATED, host)
