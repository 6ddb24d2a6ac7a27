"""Where everything lies in a qcow2 file that is written in one go: pure arithmetic on columns.

::

    cluster 0   1 … D                  then, in this order, up to the end of the file
    header      data, in guest order   L2 tables | L1 table | refcount table | refcount blocks

Which clusters hold data is known before the first byte is: so each has its place, data can come in any order, and the
tables follow when it is all there. Compressed data has no place before it was compressed; it is packed from cluster 1
on, as it comes, and its L2 entries are collected meanwhile.

Source: "Qcow2 Image File Format" of QEMU's interoperability documents.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from qmpnbd.backup.content import DATA, ZERO
from qmpnbd.extents import U64, ExtentMap

I64: TypeAlias = npt.NDArray[np.int64]

COPIED: Final = 1 << 63
COMPRESSED: Final = 1 << 62
ZERO_PLAIN: Final = 1
REFCOUNT_ORDER: Final = 4  # 16 bits: also enough for a cluster full of compressed ones
SECTOR: Final = 512

_TABLES: Final = 16  # L2 tables made at a time
_ONE: Final = np.uint64(1)


class Layout:
    """The clusters of an image.

    Args:
        clusters: `DATA`, `ZERO` or `ABSENT` for every byte, each run made of whole clusters.
        cluster_bits: of the size of a cluster.
        writes_zeroes: whether zeroes need an entry, because something below would show.

    Attributes:
        cluster_size: bytes.
        data_clusters: how many hold data.
        l1_entries: of the L1 table.
    """

    def __init__(self, clusters: ExtentMap, cluster_bits: int, *, writes_zeroes: bool) -> None:
        self.cluster_size = 1 << cluster_bits
        self.cluster_bits = cluster_bits
        self._entries = self.cluster_size // 8
        size = np.uint64(self.cluster_size)
        self._ends = -(-clusters.ends.astype(np.int64) // np.int64(size)).astype(np.int64)
        self._values = clusters.values
        starts = self._starts = np.concatenate((np.zeros(min(1, self._ends.size), np.int64), self._ends[:-1]))
        data = self._values == np.uint64(DATA)
        counts = np.where(data, self._ends - starts, 0)
        self._ranks = np.cumsum(counts) - counts - starts  # of a run's first cluster, less its number
        self.data_clusters = int(counts.sum())
        self._writes_zeroes = writes_zeroes
        self.l1_entries = -(-int(self._ends[-1] if self._ends.size else 0) // self._entries)
        used = data | (self._values == np.uint64(ZERO)) if writes_zeroes else data
        self.tables = _touched(starts[used] // self._entries, (self._ends[used] - 1) // self._entries, self.l1_entries)
        self._data_starts = memoryview(starts[data])
        self._data_ends = memoryview(self._ends[data])
        self._data_ranks = memoryview(self._ranks[data])

    def rank(self, cluster: int) -> tuple[int, int]:
        """Finds a cluster among those that hold data.

        Returns:
            Its number among them, and how many from it on lie beside each other; -1 and 0 if it holds no data.
        """
        run = bisect_right(self._data_starts, cluster) - 1
        if run < 0 or cluster >= self._data_ends[run]:
            return -1, 0
        return self._data_ranks[run] + cluster, self._data_ends[run] - cluster

    def l2_tables(self, places: U64 | None) -> Iterator[bytes]:
        """Makes the L2 tables that are needed, in order, some at a time.

        Args:
            places: the L2 entry of each data cluster; None if they lie in order from cluster 1 on.
        """
        for first in range(0, self.tables.size, _TABLES):
            part = self.tables[first : first + _TABLES]
            entries = np.zeros(part.size * self._entries, np.uint64)
            at, ranks = self._clusters(part, DATA)
            if places is None:
                entries[at] = (ranks.astype(np.uint64) + _ONE) << np.uint64(self.cluster_bits) | np.uint64(COPIED)
            else:
                entries[at] = places[ranks]
            if self._writes_zeroes:
                entries[self._clusters(part, ZERO)[0]] = ZERO_PLAIN
            yield entries.byteswap(inplace=True).tobytes()

    def _clusters(self, part: I64, kind: int) -> tuple[I64, I64]:
        """Finds the clusters of a kind in some L2 tables.

        Returns:
            The number of each one's entry in these tables, and of data, its rank.
        """
        low, high = part[0] * self._entries, (part[-1] + 1) * self._entries
        runs = np.arange(np.searchsorted(self._ends, low, "right"), np.searchsorted(self._starts, high, "left"))
        runs = runs[self._values[runs] == np.uint64(kind)]
        begins = np.maximum(self._starts[runs], low)
        counts = np.minimum(self._ends[runs], high) - begins
        clusters = np.repeat(begins - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
        at = np.searchsorted(part, clusters // self._entries) * self._entries + clusters % self._entries
        return at, np.repeat(self._ranks[runs], counts) + clusters

    def l1_table(self, first_table: int) -> bytes:
        """Makes the L1 table; the L2 tables lie beside each other from cluster `first_table` on."""
        entries = np.zeros(self.l1_entries, np.uint64)
        places = np.arange(first_table, first_table + self.tables.size, dtype=np.uint64)
        entries[self.tables] = places << np.uint64(self.cluster_bits) | np.uint64(COPIED)
        return entries.astype(">u8").tobytes()


def compressed_entry(offset: int, length: int, cluster_bits: int) -> int:
    """Returns the L2 entry of a compressed cluster: bit 62, one less than its sectors, and its offset."""
    sectors = (offset + length - 1) // SECTOR - offset // SECTOR
    return COMPRESSED | sectors << _sectors_shift(cluster_bits) | offset


def refcounts(clusters: int, data_end: int, places: U64 | None, cluster_bits: int) -> npt.NDArray[np.uint16]:
    """Counts how often each of the first `data_end` clusters is used, and takes all others as used once.

    Args:
        clusters: of the file.
        data_end: the cluster after the last one of data.
        places: the L2 entries of data, if some of it is compressed.
        cluster_bits: of the size of a cluster.
    """
    counts = np.ones(clusters, np.uint16)
    if places is None:
        return counts
    counts[1:data_end] = 0
    packed = places[places & np.uint64(COMPRESSED) != 0]
    plain = places[places & np.uint64(COMPRESSED) == 0] & np.uint64(COPIED - 1)
    counts[(plain >> np.uint64(cluster_bits)).astype(np.int64)] = 1
    shift = np.uint64(_sectors_shift(cluster_bits))
    starts = packed & ((_ONE << shift) - _ONE)
    sectors = (packed & np.uint64(COMPRESSED - 1)) >> shift
    first = (starts >> np.uint64(cluster_bits)).astype(np.int64)
    last = ((starts // np.uint64(SECTOR) + sectors) * np.uint64(SECTOR) >> np.uint64(cluster_bits)).astype(np.int64)
    np.add.at(counts, first, 1)
    np.add.at(counts, last[last != first], 1)
    return counts


def refcount_clusters(others: int, cluster_size: int) -> tuple[int, int]:
    """Returns the clusters that the refcount table and the refcount blocks take beside `others`, themselves counted."""
    table = blocks = 0
    while True:
        wanted = -(-(others + table + blocks) // (cluster_size // 2))
        if wanted == blocks and table == -(-8 * blocks // cluster_size):
            return table, blocks
        blocks, table = wanted, -(-8 * wanted // cluster_size)


def _sectors_shift(cluster_bits: int) -> int:
    return 62 - (cluster_bits - 8)


def _touched(firsts: I64, lasts: I64, count: int) -> I64:
    """Returns which of `count` things are in one of some ranges, both ends included."""
    change = np.zeros(count + 1, np.int64)
    np.add.at(change, firsts, 1)
    np.add.at(change, lasts + 1, -1)
    return np.flatnonzero(np.cumsum(change[:-1]) > 0)
