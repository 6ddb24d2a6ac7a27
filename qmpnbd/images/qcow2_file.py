"""Reading the tables of a qcow2 file: the numbers of `images.qcow2` with the bytes they came from.

The L1 table is read in slices (`Outline`), the entries of L2 tables straight to where they belong in an array over
consecutive guest clusters. Tables that lie beside each other are read at once.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from qmpnbd.errors import ImageCorruptError, ImageError
from qmpnbd.extents import U64
from qmpnbd.images import qcow2
from qmpnbd.images.hostfile import HostFile
from qmpnbd.images.qcow2_format import (
    CHECK,
    HEADER_MAX,
    unpack_extensions,
    unpack_header,
)
from qmpnbd.images.status import Status

MAX_CLUSTERS = 1 << 22  # asked for in one call: 64 MiB of entries at most


@dataclass(frozen=True, slots=True)
class Outline:
    """A slice of the L1 table: the L2 tables there are.

    Attributes:
        indexes: the L1 index of each, ascending.
        offsets: where each lies in the file.
        misplaced: which of them do not start at a cluster: QEMU cannot read what they would describe.
    """

    indexes: U64
    offsets: U64
    misplaced: npt.NDArray[np.bool_]


class Qcow2File:
    """An open qcow2 file.

    Attributes:
        header: the header, read when the file was opened.
        extensions: what the header extensions say.
        backing_name: the name of the backing file as recorded, "" if there is none.
        data: the file that holds the data: this one, or the external data file once that was opened.
    """

    def __init__(self, file: HostFile) -> None:
        """Reads the header, its extensions and the backing name.

        Raises:
            ImageError: the branch says what is wrong with the file.
        """
        self.file = file
        self.data = file
        self.header = unpack_header(file.read(0, HEADER_MAX), file.where)
        start, end = self.header.header_length, self.header.extensions_end
        area = self.file.exactly(start, end - start, "its header extensions")
        self.extensions = unpack_extensions(area, self.header, file.where)
        self.backing_name = ""
        if self.header.has_backing:
            name = self.file.exactly(self.header.backing_offset, self.header.backing_length, "its backing name")
            self.backing_name = os.fsdecode(name.split(b"\0")[0])  # QEMU holds it as a C string
        if self.header.l1_entries:
            l1_bytes = 8 * self.header.l1_entries
            if self.header.l1_offset + l1_bytes > file.size():
                raise self.file.cut(self.header.l1_offset, l1_bytes, "its L1 table")

    @property
    def backing_format(self) -> str:
        """The format recorded for the backing file, "" if none is."""
        return self.extensions.backing_format

    def outline(self, first: int, count: int) -> Outline:
        """Reads which L2 tables there are for `count` guest clusters from `first` on.

        Raises:
            ImageTruncatedError: the file was cut since it was opened.
            ImageUnreadableError: an I/O error.
        """
        header = self.header
        start = min(first // header.l2_entries, header.l1_entries)
        end = min(-(-(first + count) // header.l2_entries), header.l1_entries)
        place, length = header.l1_offset + 8 * start, 8 * max(end - start, 0)
        l1 = np.frombuffer(self.file.exactly(place, length, "its L1 table"), qcow2.ENTRY)
        offsets, misplaced = qcow2.l2_offsets(l1, header)
        used = np.flatnonzero(offsets)
        return Outline(used.astype(np.uint64) + np.uint64(start), offsets[used], misplaced[used])

    def clusters(
        self,
        first: int,
        count: int,
        outline: Outline | None = None,
        wanted: npt.NDArray[np.bool_] | None = None,
        buffer: U64 | None = None,
    ) -> qcow2.Clusters:
        """Reads what `count` guest clusters from `first` on are.

        Args:
            first: number of the first guest cluster.
            count: how many, at most `MAX_CLUSTERS`; those behind the last L2 table are not allocated.
            outline: a slice of the L1 table that covers them; None to read it.
            wanted: the clusters that matter; L2 tables without one are not read, and say 'not allocated'.
            buffer: memory to use again, for at least ``count`` entries; what was made of it before becomes void.

        Raises:
            ValueError: too many, or too little memory.
            ImageTruncatedError: an L2 table lies beyond the end of the file.
            ImageUnreadableError: an I/O error.
        """
        words_in_entry = self.header.entry_size // 8
        if not 0 <= count <= MAX_CLUSTERS or (buffer is not None and buffer.size < count * words_in_entry):
            raise ValueError(f"{count} clusters are more than {MAX_CLUSTERS}, or than the buffer has room for")
        outline = outline or self.outline(first, count)
        words = np.empty(count * words_in_entry, np.uint64) if buffer is None else buffer[: count * words_in_entry]
        misplaced = self._fill(words, first, count, outline, wanted)
        clusters = qcow2.decode(words, self.header, first, self.data.size())
        for start, end in misplaced:
            clusters.codes[start * self.header.subclusters : end * self.header.subclusters] = Status.UNREADABLE
        return clusters

    def _fill(
        self, words: U64, first: int, count: int, outline: Outline, wanted: npt.NDArray[np.bool_] | None
    ) -> list[tuple[int, int]]:
        """Reads entries to where they belong; returns the ranges whose L2 table does not start at a cluster."""
        per_table, entry_size = self.header.l2_entries, self.header.entry_size
        low = int(np.searchsorted(outline.indexes, np.uint64(first // per_table)))
        high = int(np.searchsorted(outline.indexes, np.uint64(-(-(first + count) // per_table))))
        indexes = outline.indexes[low:high].astype(np.int64)
        starts = np.maximum(indexes * per_table - first, 0)
        ends = np.minimum((indexes + 1) * per_table - first, count)
        places = outline.offsets[low:high].astype(np.int64) + (starts + first - indexes * per_table) * entry_size
        misplaced = outline.misplaced[low:high]
        chosen = ~misplaced
        if wanted is not None and not wanted.all() and indexes.size:
            chosen &= _any_in(wanted, starts, ends)
        bad = list(zip(starts[misplaced].tolist(), ends[misplaced].tolist(), strict=True)) if misplaced.any() else []
        if not chosen.all():
            starts, ends, places, indexes = starts[chosen], ends[chosen], places[chosen], indexes[chosen]
        if not starts.size:
            words[:] = 0
            return bad
        if int((ends - starts).sum()) < count:
            words[:] = 0
        view = words.data.cast("B")
        cuts = [0, starts.size]
        if starts.size > 1:
            follows = (starts[1:] == ends[:-1]) & (places[1:] == places[:-1] + (ends - starts)[:-1] * entry_size)
            cuts[1:1] = (np.flatnonzero(~follows) + 1).tolist()
        for this, following in pairwise(cuts):
            begin, end = int(starts[this]) * entry_size, int(ends[following - 1]) * entry_size
            done = self.file.read_into(view[begin:end], int(places[this]))
            if done < end - begin:
                table = this + int(np.searchsorted(ends[this:following] * entry_size, begin + done, side="right"))
                self._cut_table(int(indexes[table]), outline)
        return bad

    def look_up(self, offset: int) -> tuple[qcow2.Cluster, str]:
        """Reads the entries that a guest offset leads to, anew.

        Returns:
            What the cluster (or subcluster) is, and the entries in words.

        Raises:
            ImageError: the entry contradicts the format, or what it tells of lies beyond the end of the file.
        """
        header = self.header
        number, (l1_index, l2_index) = offset // header.cluster_size, qcow2.entry_location(header, offset)
        place = header.l1_offset + 8 * l1_index
        if l1_index >= header.l1_entries:
            return qcow2.Cluster(qcow2.Kind.UNALLOCATED, 0), f"no L1 entry {l1_index}, not allocated"
        l1 = np.frombuffer(self.file.exactly(place, 8, f"L1 entry {l1_index}"), qcow2.ENTRY)
        text = f"L1 entry at byte {place:#x} is {int(l1[0]):#018x}: "
        outline = self.outline(number, 1)
        if not outline.indexes.size:
            return qcow2.Cluster(qcow2.Kind.UNALLOCATED, 0), text + "no L2 table, not allocated"
        clusters = self.clusters(number, 1, outline)
        code = int(clusters.codes[offset % header.cluster_size // header.granule])
        if code >= Status.UNREADABLE:
            raise self._fault(offset, outline, clusters, code)
        table, entry = int(outline.offsets[0]), int(clusters.entries[0])
        cluster = qcow2.understood(entry, header, Status(code))
        place = table + header.entry_size * l2_index
        more = "" if clusters.bitmaps is None else f" with bitmap {int(clusters.bitmaps[0]):#018x}"
        text += f"L2 table at {table:#x}; L2 entry at byte {place:#x} is {entry:#018x}{more}: {cluster}"
        return cluster, text

    def fault(self, offset: int) -> ImageError | None:
        """Reads the entries that a guest offset leads to anew, and returns what is wrong with them.

        Raises:
            ImageError: the table itself cannot be read.
        """
        number = offset // self.header.cluster_size
        outline = self.outline(number, 1)
        clusters = self.clusters(number, 1, outline)
        code = int(clusters.codes[offset % self.header.cluster_size // self.header.granule])
        return self._fault(offset, outline, clusters, code) if code >= Status.UNREADABLE else None

    def _fault(self, offset: int, outline: Outline, clusters: qcow2.Clusters, code: int) -> ImageError:
        header = self.header
        l1_index, l2_index = qcow2.entry_location(header, offset)
        if outline.misplaced[0]:
            place = header.l1_offset + 8 * l1_index
            what, structure = f"L2 table {l1_index} does not start at a cluster", "L1 entry"
            value = int.from_bytes(self.file.exactly(place, 8, structure), "big")
        elif code == qcow2.BEYOND:
            host = int(clusters.hosts[0]) + offset % header.cluster_size // header.granule * header.granule
            guest = offset // header.granule * header.granule
            return self.data.cut(host, header.granule, f"the data of guest offset {guest:#x}")
        else:
            value, bitmaps = int(clusters.entries[0]), clusters.bitmaps
            place, structure = int(outline.offsets[0]) + header.entry_size * l2_index, "L2 entry"
            what = qcow2.fault(value, 0 if bitmaps is None else int(bitmaps[0]), header)
        return ImageCorruptError(
            what, where=self.file.where, structure=structure, offset=place, value=value, remedy=CHECK
        )

    def _cut_table(self, l1_index: int, outline: Outline) -> None:
        place = int(outline.offsets[np.searchsorted(outline.indexes, l1_index)])
        raise self.file.cut(place, self.header.cluster_size, f"L2 table {l1_index}")


def _any_in(
    wanted: npt.NDArray[np.bool_], starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Returns for ascending ranges that do not overlap whether anything in them is wanted."""
    bounds = np.stack((starts, ends), axis=1).reshape(-1)
    inside: npt.NDArray[np.bool_] = np.logical_or.reduceat(np.append(wanted, False), bounds)[::2]
    return inside
