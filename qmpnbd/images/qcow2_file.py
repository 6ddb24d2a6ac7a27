"""Reading the tables of a qcow2 file: the numbers of `images.qcow2` with the bytes they came from.

The L1 table is read in slices and the L2 tables in batches, into buffers that are used again, so that memory depends
on the number of runs found and not on the size of the disk. Tables that lie beside each other are read at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from qmpnbd.deadline import Deadline
from qmpnbd.errors import ImageTruncatedError, ImageUnsupportedError
from qmpnbd.extents import U64, ExtentMap
from qmpnbd.images import qcow2
from qmpnbd.images.hostfile import HostFile
from qmpnbd.images.qcow2_format import (
    CUT,
    HEADER_MAX,
    unpack_backing_format,
    unpack_header,
)

MAX_RUNS = 1 << 26  # 1 GiB of columns; tables that share their space could ask for more than any memory holds
_L1_SLICE = 1 << 16  # entries of the L1 table looked at together: 512 KiB
_BATCH = 1 << 20  # bytes of L2 tables looked at together; stays in the processor's cache


class Qcow2File:
    """An open qcow2 file.

    Attributes:
        header: the header, read when the file was opened.
        backing_name: the name of the backing file as recorded, "" if there is none.
        backing_format: the format recorded for it, "" if none is.
    """

    def __init__(self, file: HostFile) -> None:
        """Reads the header, its extensions and the backing name.

        Raises:
            ImageError: the branch says what is wrong with the file.
        """
        self._file = file
        self.header = unpack_header(file.read(0, HEADER_MAX), file.where)
        start, end = self.header.header_length, self.header.extensions_end
        area = self._exactly(start, end - start, "its header extensions")
        self.backing_format = unpack_backing_format(area, self.header, file.where)
        self.backing_name = ""
        if self.header.has_backing:
            name = self._exactly(self.header.backing_offset, self.header.backing_length, "its backing name")
            self.backing_name = os.fsdecode(name.split(b"\0")[0])  # QEMU holds it as a C string
        if self.header.l1_entries:
            l1_bytes = 8 * self.header.l1_entries
            if self.header.l1_offset + l1_bytes > file.size():
                raise self._cut(self.header.l1_offset, l1_bytes, "its L1 table")

    def allocated(self, size: int, deadline: Deadline | None) -> ExtentMap:
        """Reads which bytes of ``[0, size)`` are allocated: 1, or 0.

        Raises:
            ImageCorruptError: an entry contradicts the format.
            ImageTruncatedError: a table or the data of a cluster lies beyond the end of the file.
            ImageUnsupportedError: more runs than fit into memory.
            ImageUnreadableError: an I/O error.
            DeadlineError: the time ran out.
        """
        header, where = self.header, self._file.where
        parts, found = [], 0
        for tables in self._batches(-(-size // header.cluster_size), deadline):
            tables.check(header, where)
            tables.check_data(header, where, self._file.size())
            parts.append(tables.runs())
            found += len(parts[-1])
            if found > MAX_RUNS:
                what = f"more than {MAX_RUNS} runs of allocated and unallocated clusters"
                raise ImageUnsupportedError(what, where=where, remedy="Check that the image is genuine.")
        return qcow2.allocated_map(parts, header, size)

    def look_up(self, offset: int) -> tuple[qcow2.Cluster, str]:
        """Reads the entries that a guest offset leads to, anew.

        Returns:
            What the cluster is, and the entries in words.

        Raises:
            ImageError: as `allocated`.
        """
        header, where = self.header, self._file.where
        l1_index, l2_index = qcow2.entry_location(header, offset)
        place = header.l1_offset + 8 * l1_index
        l1 = np.frombuffer(self._exactly(place, 8, f"L1 entry {l1_index}"), qcow2.ENTRY)
        table = int(qcow2.l2_offsets(l1, header, where, l1_index)[0])
        text = f"L1 entry at byte {place:#x} is {int(l1[0]):#018x}: "
        if not table:
            return qcow2.Cluster(qcow2.Kind.UNALLOCATED, 0), text + "no L2 table, not allocated"
        place = table + 8 * l2_index
        entry = np.frombuffer(self._exactly(place, 8, f"L2 entry {l2_index}"), qcow2.ENTRY).reshape(1, 1)
        indexes, offsets = np.array([l1_index], dtype=np.uint64), np.array([table], dtype=np.uint64)
        single = qcow2.Tables(entry, indexes, offsets, l2_index)
        single.check(header, where)
        single.check_data(header, where, self._file.size())
        cluster = qcow2.understood(int(entry[0, 0]), header)
        text += f"L2 table at {table:#x}; L2 entry at byte {place:#x} is {int(entry[0, 0]):#018x}: {cluster}"
        return cluster, text

    def _batches(self, clusters: int, deadline: Deadline | None) -> Iterator[qcow2.Tables]:
        """Yields the L2 tables that describe the first `clusters` guest clusters; each batch reuses the buffer."""
        header, where = self.header, self._file.where
        tables_in_batch = max(1, _BATCH // header.cluster_size)
        buffer = np.empty(0, dtype=np.uint8)
        needed = -(-clusters // header.l2_entries)
        for first in range(0, needed, _L1_SLICE):
            _check(deadline, where)
            count = min(_L1_SLICE, needed - first)
            l1 = np.frombuffer(self._exactly(header.l1_offset + 8 * first, 8 * count, "its L1 table"), qcow2.ENTRY)
            offsets = qcow2.l2_offsets(l1, header, where, first)
            used = np.flatnonzero(offsets)
            for start in range(0, used.size, tables_in_batch):
                _check(deadline, where)
                batch = used[start : start + tables_in_batch]
                if buffer.size < batch.size * header.cluster_size:
                    buffer = np.empty(batch.size * header.cluster_size, dtype=np.uint8)
                indexes = batch.astype(np.uint64) + np.uint64(first)
                tables = self._read_tables(buffer, indexes, offsets[batch])
                behind_end = clusters - int(indexes[-1]) * header.l2_entries
                tables.entries[-1, max(behind_end, 0) :] = 0
                yield tables

    def _read_tables(self, buffer: npt.NDArray[np.uint8], indexes: U64, offsets: U64) -> qcow2.Tables:
        cluster_size = self.header.cluster_size
        view = buffer.data
        jumps = (np.flatnonzero(np.diff(offsets) != cluster_size) + 1).tolist()
        for start, end in pairwise([0, *jumps, len(offsets)]):
            wanted = view[start * cluster_size : end * cluster_size]
            done = self._file.read_into(wanted, int(offsets[start]))
            if done < len(wanted):
                table = start + done // cluster_size
                raise self._cut(int(offsets[table]), cluster_size, f"L2 table {int(indexes[table])}")
        entries = buffer[: len(offsets) * cluster_size].view(qcow2.ENTRY).reshape(len(offsets), -1)
        return qcow2.Tables(entries, indexes, offsets)

    def _exactly(self, offset: int, length: int, what: str) -> bytes:
        data = self._file.read(offset, length)
        if len(data) < length:
            raise self._cut(offset, length, what)
        return data

    def _cut(self, offset: int, length: int, what: str) -> ImageTruncatedError:
        return ImageTruncatedError(
            f"{what} should lie at bytes {offset:#x} to {offset + length:#x}, "
            f"but the file ends at byte {self._file.size():#x}",
            where=self._file.where,
            remedy=CUT,
        )


def _check(deadline: Deadline | None, where: str) -> None:
    if deadline is not None:
        deadline.check("the tables to be read", where)
