"""A qcow2 file as a layer that a pass over the chain reads."""

from __future__ import annotations

import numpy as np

from qmpnbd.errors import ImageError
from qmpnbd.extents import U64
from qmpnbd.images.qcow2 import Flags
from qmpnbd.images.qcow2_file import Outline, Qcow2File
from qmpnbd.images.sources import Block, Sketch


class Qcow2Source:
    """A qcow2 layer; see `Source`."""

    def __init__(self, file: Qcow2File) -> None:
        self.file = file
        header = file.header
        self.granule = header.granule
        self.alignment = header.cluster_size
        self.span = header.cluster_size * header.l2_entries
        self._buffer: U64 = np.empty(0, dtype=np.uint64)

    def sketch(self, offset: int, end: int) -> Sketch:
        """Reads the slice of the L1 table that describes ``[offset, end)``."""
        first = offset // self.alignment
        outline = self.file.outline(first, -(-end // self.alignment) - first)
        starts = outline.indexes * np.uint64(self.span)

        def read(start: int, stop: int, wanted: Flags | None) -> Block:
            return self._read(outline, start, stop, wanted)

        return Sketch(starts, starts + np.uint64(self.span), read)

    def look_up(self, offset: int) -> tuple[bool, str]:
        """Reads the entries that lead to a byte anew; returns whether it is allocated, and the entries in words."""
        cluster, text = self.file.look_up(offset)
        return cluster.kind.allocated, text

    def fault(self, offset: int) -> ImageError | None:
        """Reads the entries that lead to a byte anew, and returns what is wrong with them."""
        return self.file.fault(offset)

    def _read(self, outline: Outline, offset: int, end: int, wanted: Flags | None) -> Block:
        first = offset // self.alignment
        count = -(-end // self.alignment) - first
        needed = count * (self.file.header.entry_size // 8)
        if self._buffer.size < needed:
            self._buffer = np.empty(needed, dtype=np.uint64)
        return self.file.clusters(first, count, outline, wanted, self._buffer)
