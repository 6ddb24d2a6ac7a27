"""Layers of formats with two levels of plain tables (qed, vmdk), read for a pass over the chain."""

from __future__ import annotations

import numpy as np

from qmpnbd.errors import ImageCorruptError, ImageError
from qmpnbd.extents import U64
from qmpnbd.images.hostfile import HostFile
from qmpnbd.images.otherformats import (
    HEADER_LENGTH,
    Tabled,
    VmdkHeader,
    qed_backing,
    unpack_qed,
    unpack_vmdk,
    vmdk_backing,
)
from qmpnbd.images.qcow2 import U8, Flags
from qmpnbd.images.qcow2_format import CHECK
from qmpnbd.images.sources import Block, Granules, Sketch
from qmpnbd.images.status import Status


def open_qed(file: HostFile) -> TabledSource:
    """Reads the header of a QED file."""
    data = file.read(0, HEADER_LENGTH)
    return TabledSource(file, unpack_qed(data, file.read(*qed_backing(data, file.where)), file.where))


def open_vmdk(file: HostFile) -> TabledSource:
    """Reads header, footer and descriptor of a vmdk file with a single sparse extent."""
    header: VmdkHeader = unpack_vmdk(file.read(0, HEADER_LENGTH), file.where)
    tabled = header.tabled
    if header.at_end:
        tabled = unpack_vmdk(file.read(max(file.size() - header.at_end, 0), HEADER_LENGTH), file.where).tabled
    name = vmdk_backing(file.read(*header.descriptor), file.where)
    values = {field: getattr(tabled, field) for field in tabled.__slots__}
    return TabledSource(file, Tabled(**{**values, "backing_name": name}))


class TabledSource:
    """A layer; see `sources.Source`."""

    def __init__(self, file: HostFile, tabled: Tabled) -> None:
        self.file = file
        self.tabled = tabled
        self.granule = tabled.granule
        self.alignment = tabled.granule
        self.span = tabled.granule * tabled.per_table

    def sketch(self, offset: int, end: int) -> Sketch:
        """Reads the part of the first-level table that describes ``[offset, end)``."""
        tabled = self.tabled
        start, stop = offset // self.span, min(-(-end // self.span), tabled.top_entries)
        kind = np.dtype(tabled.entry)
        data = self.file.exactly(
            tabled.top_offset + start * kind.itemsize, max(stop - start, 0) * kind.itemsize, "table"
        )
        places = np.frombuffer(data, kind).astype(np.uint64) * np.uint64(tabled.scale)
        used = np.flatnonzero(places)
        indexes, places = used.astype(np.uint64) + np.uint64(start), places[used]
        starts = indexes * np.uint64(self.span)

        def read(low: int, high: int, wanted: Flags | None) -> Block:
            return self._read(indexes, places, low, high, wanted)

        return Sketch(starts, starts + np.uint64(self.span), read)

    def _read(self, indexes: U64, places: U64, low: int, high: int, wanted: Flags | None) -> Block:
        tabled, kind = self.tabled, np.dtype(self.tabled.entry)
        first, count = low // self.granule, -(-high // self.granule) - low // self.granule
        entries = np.zeros(count, dtype=np.uint64)
        codes = np.zeros(count, dtype=np.uint8)
        file_size = self.file.size()
        for index, place in zip(indexes.tolist(), places.tolist(), strict=True):
            begin = max(index * tabled.per_table - first, 0)
            stop = min((index + 1) * tabled.per_table - first, count)
            if begin >= stop or (wanted is not None and not wanted[begin:stop].any()):
                continue
            if tabled.bounded and place % tabled.granule:
                codes[begin:stop] = Status.UNREADABLE
                continue
            within = first + begin - index * tabled.per_table
            size = (stop - begin) * kind.itemsize
            data = self.file.exactly(place + within * kind.itemsize, size, f"table {index}")
            entries[begin:stop] = np.frombuffer(data, kind)
            codes[begin:stop] = self._statuses(entries[begin:stop], file_size)
        return Granules(first, self.granule, entries, codes, entries * np.uint64(tabled.scale))

    def _statuses(self, entries: U64, file_size: int) -> U8:
        tabled = self.tabled
        data = Status.COMPRESSED if tabled.compressed else Status.DATA
        codes = np.where(entries != 0, np.uint8(data), np.uint8(0))
        if tabled.zeroes:
            codes[entries == 1] = Status.ZERO
        if tabled.bounded:
            hosts = entries * np.uint64(tabled.scale)
            wrong = ((hosts & np.uint64(tabled.granule - 1)) != 0) | (hosts >= np.uint64(file_size))
            codes[wrong & (codes == data)] = Status.UNREADABLE
        return codes

    def look_up(self, offset: int) -> tuple[bool, str]:
        """Returns whether a byte is allocated, and what was read to tell."""
        block = self._block_at(offset)
        if block is None:
            return False, f"no table describes entry {offset // self.granule}: unallocated"
        if block.codes[0] == Status.UNREADABLE:
            raise self._wrong(offset, int(block.entries[0]))
        return bool(block.codes[0]), block.said(0)

    def host(self, offset: int) -> int:
        """Returns the host offset that the entry of an allocated granule tells, read anew; 0 if there is none now."""
        block = self._block_at(offset)
        return 0 if block is None else int(block.hosts[0])

    def fault(self, offset: int) -> ImageError | None:
        """Reads the entries that lead to a byte anew, and returns what is wrong with them."""
        block = self._block_at(offset)
        wrong = block is not None and block.codes[0] == Status.UNREADABLE
        return self._wrong(offset, 0 if block is None else int(block.entries[0])) if wrong else None

    def _block_at(self, offset: int) -> Granules | None:
        start = offset // self.granule * self.granule
        sketch = self.sketch(start, start + 1)
        block = sketch.read(start, start + 1, None) if sketch.starts.size else None
        return block if isinstance(block, Granules) else None

    def _wrong(self, offset: int, entry: int) -> ImageCorruptError:
        return ImageCorruptError(
            f"what it says of guest offset {offset:#x} lies at no place for a cluster",
            where=self.file.where,
            structure="table",
            offset=self.tabled.top_offset,
            value=entry,
            remedy=CHECK,
        )
