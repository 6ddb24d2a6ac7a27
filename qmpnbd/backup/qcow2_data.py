"""How the data of a qcow2 image gets into its file: each cluster to its place, or compressed and packed.

::

    plain     cluster 1 + n is the n-th cluster of data, whenever it comes
    packed    |####|@@@@@@|%%~~~~~|  PLAIN CLUSTER  |$$$       as it comes; what zstd does not make smaller stays plain
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from qmpnbd.backup.newfile import NewFile
from qmpnbd.backup.qcow2_layout import COPIED, Layout, compressed_entry
from qmpnbd.backup.zstd import Compress
from qmpnbd.errors import UsageError
from qmpnbd.extents import U64

LANES: Final = 4
"""Threads that compress: more than cores, as some of them wait for the disk."""


class Runs:
    """What is to be written, gathered where it lies beside each other in the file."""

    def __init__(self) -> None:
        self._runs: list[tuple[int, list[memoryview | bytes]]] = []
        self._end = -1

    def add(self, place: int, part: memoryview | bytes) -> None:
        """Adds what belongs at `place`."""
        if place != self._end:
            self._runs.append((place, []))
        self._runs[-1][1].append(part)
        self._end = place + len(part)

    def write(self, file: NewFile) -> None:
        """Writes all of it."""
        for place, parts in self._runs:
            file.write_parts(place, parts)


class PlainData:
    """Data that has its place before it comes.

    Attributes:
        places: the L2 entries of data; None, because they follow from the layout.
    """

    lanes = 1
    places: U64 | None = None

    def __init__(self, file: NewFile, layout: Layout) -> None:
        self._file = file
        self._layout = layout
        self.end = 1 + layout.data_clusters

    def write(self, offset: int, data: memoryview) -> None:
        """Writes bytes of the disk, which lie in clusters of data.

        Raises:
            UsageError: some of them do not.
            TargetError: it is full, or an I/O error.
        """
        size = self._layout.cluster_size
        while data:
            cluster, inside = divmod(offset, size)
            rank, count = self._layout.rank(cluster)
            if not count:
                raise _no_data(offset, self._file.where)
            length = min(len(data), count * size - inside)
            self._file.write((1 + rank) * size + inside, data[:length])
            offset, data = offset + length, data[length:]

    def write_batch(self, batch: Sequence[tuple[int, memoryview]]) -> None:
        """Writes pieces; those that are neighbours in the file, as scattered clusters are, together."""
        size, runs = self._layout.cluster_size, Runs()
        for offset, data in sorted(batch, key=_offset):
            cluster, inside = divmod(offset, size)
            rank, count = self._layout.rank(cluster)
            if inside + len(data) <= count * size:
                runs.add((1 + rank) * size + inside, data)
            else:
                self.write(offset, data)
        runs.write(self._file)


class PackedData:
    """Data that is compressed, and lies in the file in the order in which it came.

    Attributes:
        places: the L2 entry of each cluster of data; 0 where none has come yet.
        end: the cluster after the last one used.
    """

    lanes = LANES

    def __init__(self, file: NewFile, layout: Layout, make: Callable[[], Compress], disk_size: int) -> None:
        self._file = file
        self._layout = layout
        self._disk_size = disk_size
        self._make = make
        self._own = threading.local()
        self._lock = threading.Lock()
        self._at = self._limit = layout.cluster_size  # where what is compressed goes, and the end of the room for it
        self.places: U64 | None = np.zeros(layout.data_clusters, np.uint64)
        self.end = 1

    def write(self, offset: int, data: memoryview) -> None:
        """Compresses and writes whole clusters of data.

        Raises:
            UsageError: they are none.
            TargetError: it is full, or an I/O error.
        """
        size, end = self._layout.cluster_size, offset + len(data)
        if offset % size or (end % size and end != self._disk_size):
            raise UsageError(f"{len(data)} bytes at {offset}: not made of clusters", where=self._file.where)
        compress = self._compress()
        frames: list[tuple[int, memoryview | bytes]] = []
        for start in range(0, len(data), size):
            rank, count = self._layout.rank((offset + start) // size)
            if not count:
                raise _no_data(offset + start, self._file.where)
            cluster = data[start : start + size]
            if len(cluster) < size:
                cluster = memoryview(bytes(cluster).ljust(size, b"\0"))
            frame = compress(cluster)
            frames.append((rank, frame if len(frame) < size else cluster))
        self._put(frames)

    def write_batch(self, batch: Sequence[tuple[int, memoryview]]) -> None:
        """Compresses and writes pieces; as `write`."""
        for offset, data in batch:
            self.write(offset, data)

    def _compress(self) -> Compress:
        found: Compress | None = getattr(self._own, "compress", None)
        if found is None:
            found = self._own.compress = self._make()
        return found

    def _put(self, frames: list[tuple[int, memoryview | bytes]]) -> None:
        """Gives each frame a place, and writes those that lie beside each other together."""
        size, bits = self._layout.cluster_size, self._layout.cluster_bits
        runs, entries = Runs(), []
        with self._lock:
            for _, frame in frames:
                packed = len(frame) < size
                place = self._packed_place(len(frame)) if packed else self._plain_place()
                entries.append(compressed_entry(place, len(frame), bits) if packed else place | COPIED)
                runs.add(place, frame)
        runs.write(self._file)
        if self.places is not None:
            self.places[[rank for rank, _ in frames]] = np.array(entries, np.uint64)

    def _packed_place(self, length: int) -> int:
        size = self._layout.cluster_size
        if self._at + length > self._limit:
            end = self.end * size
            if self._limit != end:  # a plain cluster lies behind the room that is left
                self._at = end
            self.end = -(-(self._at + length) // size)
            self._limit = self.end * size
        place = self._at
        self._at += length
        return place

    def _plain_place(self) -> int:
        self.end += 1
        return (self.end - 1) * self._layout.cluster_size


def _no_data(offset: int, where: str) -> UsageError:
    return UsageError(f"the content says that there is no data at {offset:#x}", where=where)


def _offset(piece: tuple[int, memoryview]) -> int:
    return piece[0]
