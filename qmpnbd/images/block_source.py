"""Layers of formats with one table of blocks (vdi, vpc, vhdx, parallels), read for a pass over the chain."""

from __future__ import annotations

import numpy as np

from qmpnbd.errors import ImageCorruptError, ImageError
from qmpnbd.extents import U64
from qmpnbd.images.blocks import Blocks
from qmpnbd.images.hostfile import HostFile
from qmpnbd.images.parallels import unpack_parallels
from qmpnbd.images.qcow2 import BEYOND, Flags
from qmpnbd.images.qcow2_format import CHECK
from qmpnbd.images.sources import Granules, Sketch
from qmpnbd.images.status import Status
from qmpnbd.images.vdi import unpack_vdi
from qmpnbd.images.vhdx import MAX_METADATA, START, unpack_metadata, unpack_regions
from qmpnbd.images.vpc import FOOTER, HEADER, unpack_dynamic, unpack_footer

_SPAN = 1 << 20  # blocks looked at together


def open_blocks(file: HostFile, image_format: str) -> BlockSource:
    """Reads the header of a vdi, parallels or vhdx file."""
    if image_format == "vdi":
        return BlockSource(file, unpack_vdi(file.read(0, 512), file.where))
    if image_format == "parallels":
        return BlockSource(file, unpack_parallels(file.read(0, 512), file.where))
    regions = unpack_regions(file.read(0, START), file.where)
    offset, length = regions.metadata
    metadata = file.exactly(offset, min(length, MAX_METADATA), "its metadata")
    return BlockSource(file, unpack_metadata(metadata, regions, file.where))


def open_vpc(file: HostFile) -> BlockSource | int:
    """Reads footer and header of a vpc file; returns the bytes of the disk if it is a fixed one."""
    start, size = file.read(0, FOOTER), file.size()
    at = 0 if start[:8] == b"conectix" else max(size - FOOTER, 0)
    footer = unpack_footer(start if at == 0 else file.read(at, FOOTER), at, file.where)
    if footer.header_offset is None:
        if footer.size > at:
            raise file.cut(0, footer.size, "its data")
        return footer.size
    header = file.exactly(footer.header_offset, HEADER, "its header")
    return BlockSource(file, unpack_dynamic(header, footer, file.where))


class BlockSource:
    """A layer; see `sources.Source`."""

    def __init__(self, file: HostFile, blocks: Blocks) -> None:
        """Takes a header's word for the table.

        Raises:
            ImageTruncatedError: the table lies beyond the end of the file.
        """
        self.file = file
        self.blocks = blocks
        self.granule = self.alignment = blocks.granule
        self.span = blocks.granule * _SPAN
        self._entry = np.dtype(blocks.entry)
        length = self._entry.itemsize * (blocks.slot(blocks.entries - 1) + 1 if blocks.entries else 0)
        if blocks.table_offset + length > file.size():
            raise file.cut(blocks.table_offset, length, "its table of blocks")

    def sketch(self, offset: int, end: int) -> Sketch:
        """Returns that all of ``[offset, end)`` is described."""
        start, stop = offset // self.granule, -(-end // self.granule)
        bounds = np.array([start, stop], dtype=np.uint64) * np.uint64(self.granule)
        return Sketch(bounds[:1], bounds[1:], self._read)

    def look_up(self, offset: int) -> tuple[bool, str]:
        """Returns whether a byte is allocated, and what was read to tell."""
        block = self._read(offset, offset + 1)
        error = self._fault(offset, block)
        if error is not None:
            raise error
        return bool(block.codes[0]), block.said(0)

    def fault(self, offset: int) -> ImageError | None:
        """Reads the entry that leads to a byte anew, and returns what is wrong with it."""
        return self._fault(offset, self._read(offset, offset + 1))

    def _read(self, low: int, high: int, _: Flags | None = None) -> Granules:
        blocks, first = self.blocks, low // self.granule
        count = -(-high // self.granule) - first
        entries = np.zeros(count, dtype=np.uint64)
        known = max(min(count, blocks.entries - first), 0)
        if known:
            start, stop = blocks.slot(first), blocks.slot(first + known - 1) + 1
            place, size = blocks.table_offset + start * self._entry.itemsize, self._entry.itemsize
            data = self.file.exactly(place, (stop - start) * size, "its table of blocks")
            numbers = np.arange(first, first + known)
            slots = numbers + (numbers // blocks.stride if blocks.stride else 0)
            entries[:known] = np.frombuffer(data, self._entry)[slots - start]
        codes, hosts = blocks.places(entries)
        codes[(codes == Status.DATA) & self._beyond(hosts, first)] = BEYOND
        return Granules(first, self.granule, entries, codes, hosts)

    def _beyond(self, hosts: U64, first: int) -> Flags:
        """Returns which blocks do not lie in the file as far as the disk goes."""
        guests = (np.arange(hosts.size, dtype=np.uint64) + np.uint64(first)) * np.uint64(self.granule)
        size = np.uint64(self.file.size())
        needed = np.minimum(np.uint64(self.granule), np.uint64(self.blocks.size) - guests)
        beyond: Flags = size - np.minimum(hosts, size) < needed
        return beyond

    def _fault(self, offset: int, block: Granules) -> ImageError | None:
        code, entry, number = int(block.codes[0]), int(block.entries[0]), block.first
        if code == BEYOND:
            return self.file.cut(int(block.hosts[0]), self.granule, f"the data of guest offset {offset:#x}")
        if code != Status.UNREADABLE:
            return None
        place = self.blocks.table_offset + self.blocks.slot(number) * self._entry.itemsize
        what = f"what it says of guest offset {offset:#x} is no state of a block"
        return ImageCorruptError(
            what, where=self.file.where, structure="table of blocks", offset=place, value=entry, remedy=CHECK
        )
