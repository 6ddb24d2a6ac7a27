"""Layers as a pass over the chain sees them: which parts are described by tables, and what the tables say.

::

    Source      a layer           alignment, granule, size
    Sketch      spans of it       only these can hold anything; the rest is not allocated
    Block       granules of it    a status for each, and on demand where they lie in the file

A solid layer (raw, and every format that QEMU takes for allocated everywhere) has no tables: all of it is data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from qmpnbd.errors import ImageError
from qmpnbd.extents import U64
from qmpnbd.images.qcow2 import U8, Flags
from qmpnbd.images.status import Status


class Block(Protocol):
    """Consecutive granules of a layer."""

    @property
    def codes(self) -> U8:
        """A `Status` for each granule, or `qcow2.BEYOND`."""

    def shifts(self, granules: npt.NDArray[np.intp]) -> U64:
        """Returns host offset minus guest offset of granules, by their place in this block; 0 without a host offset."""

    def reserved(self, granules: npt.NDArray[np.intp]) -> tuple[Flags, U64]:
        """Returns which unallocated granules keep space in the file all the same, and their shifts."""


@dataclass(frozen=True, slots=True)
class Granules:
    """A `Block` whose host offsets are known already, of formats that keep no space for what they do not hold.

    Attributes:
        first: the number of the first granule.
        granule: bytes of one.
        entries: the table's entry for each.
        codes: as `Block.codes`.
        hosts: the host offset of each; those of DATA mean something.
    """

    first: int
    granule: int
    entries: U64
    codes: U8
    hosts: U64

    def shifts(self, granules: npt.NDArray[np.intp]) -> U64:
        """Returns host offset minus guest offset of granules that have a host offset, else 0."""
        guests = (granules.astype(np.uint64) + np.uint64(self.first)) * np.uint64(self.granule)
        return np.where(self.codes[granules] == Status.DATA, self.hosts[granules] - guests, np.uint64(0))

    def reserved(self, granules: npt.NDArray[np.intp]) -> tuple[Flags, U64]:
        """Returns that no space is kept."""
        return np.zeros(granules.size, dtype=bool), np.zeros(granules.size, dtype=np.uint64)

    def said(self, place: int) -> str:
        """Returns in words what the granule at a place of this block is."""
        said = Status(int(self.codes[place])).name.lower().replace("_", " ")
        return f"entry {self.first + place} is {int(self.entries[place]):#x}: {said}"


@dataclass(frozen=True, slots=True)
class Sketch:
    """Which parts of a window of a layer are described by tables.

    Attributes:
        starts: where each part starts in the layer, in bytes, ascending, no two overlap.
        ends: where each ends.
        read: reads what granules are: ``read(offset, end, wanted)`` with an offset at an alignment, and one flag an
            alignment that matters (None for all); the block becomes void at the next call.
    """

    starts: U64
    ends: U64
    read: Callable[[int, int, Flags | None], Block]


class Source(Protocol):
    """A layer with tables.

    Attributes:
        granule: bytes of the smallest part with a status of its own, a power of two.
        alignment: bytes of what one entry describes, a power of two, at least a granule.
        span: bytes of what one entry of the top table describes.
    """

    granule: int
    alignment: int
    span: int

    def sketch(self, offset: int, end: int) -> Sketch:
        """Reads which parts of ``[offset, end)`` are described."""

    def look_up(self, offset: int) -> tuple[bool, str]:
        """Reads the entries that lead to a byte anew; returns whether it is allocated, and the entries in words."""

    def fault(self, offset: int) -> ImageError | None:
        """Reads the entries that lead to a byte anew, and returns what is wrong with them."""


@dataclass(frozen=True, slots=True)
class Solid:
    """A layer that is data everywhere.

    Attributes:
        shift: host offset minus guest offset; None where that is not known here, or not the same everywhere.
    """

    shift: int | None
