"""What QEMU says of block status: the lines of ``qemu-img map``, and the flags of ``base:allocation``. Pure.

::

    what decides                  depth   present  zero  data  offset   base:allocation   up to 5.2
    data                          layer      x            x      x       0                 0
    data, its host range a hole   layer      x       x    x      x       2 (ZERO)          2
    compressed                    layer      x            x              0                 0
    zero cluster                  layer      x       x         if kept   3 (HOLE, ZERO)    2
    raw, a hole in the file       layer      x       x           x       3                 2
    luks, vhdx: anything          layer      x            x              0                 0
    nobody                        last               x                   3                 3
    past the end of layer k       k - 1              x                   3                 2

``depth`` counts layers from 0, as `layer_index` does. QEMU looks for holes in the file of raw layers always, and under
the data of a qcow2 layer only if it takes it for preallocated, of vdi only if it is static, and always under that of
fixed vpc and flat vmdk. All of it observed with QEMU 7.2 and 10.0; the last
column was observed with 5.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from qmpnbd.extents import U64, ExtentMap
from qmpnbd.images.passes import BROKEN, NOBODY, RESERVED, SHORT, SHORT_RESERVED, U16, Window
from qmpnbd.images.qcow2 import U8, Flags
from qmpnbd.images.status import UNREADABLE_DEPTH, Status

Generation: TypeAlias = Literal["5.2", "7.2", "10.0"]

PRESENT, ZERO, DATA, COMPRESSED, OFFSET = 1, 2, 4, 8, 16
NBD_HOLE, NBD_ZERO = 1, 2

_FLAGS = {
    Status.UNALLOCATED: ZERO,
    Status.DATA: PRESENT | DATA | OFFSET,
    Status.ZERO: PRESENT | ZERO,
    Status.ZERO_ALLOCATED: PRESENT | ZERO | OFFSET,
    Status.COMPRESSED: PRESENT | DATA | COMPRESSED,
    SHORT: ZERO,
    RESERVED: ZERO | OFFSET,
    SHORT_RESERVED: ZERO | OFFSET,
}
_BATCH = 1 << 16  # entries handed out together, more or less


@dataclass(frozen=True, slots=True)
class Place:
    """How a layer's data lies in its file.

    Attributes:
        holes: where the file holds data (1) or nothing (0), if QEMU looks for that; else None.
        raw: a hole makes no data; otherwise it is data that reads as zeroes.
        hidden: the data is encrypted, so that QEMU names no offsets.
        silent: QEMU's driver tells nothing: all of it is data, at no offset.
    """

    holes: ExtentMap | None
    raw: bool = False
    hidden: bool = False
    silent: bool = False


@dataclass(frozen=True, slots=True)
class MapBatch:
    """Consecutive entries of a map; columns of one length.

    Attributes:
        starts: first byte of each.
        lengths: bytes of each.
        depths: the layer index as ``qemu-img map`` prints it.
        flags: PRESENT, ZERO, DATA, COMPRESSED and OFFSET.
        offsets: where it starts in the file of its layer, 0 without OFFSET.
    """

    starts: U64
    lengths: U64
    depths: U16
    flags: U8
    offsets: U64

    def has(self, flag: int) -> Flags:
        """Returns which entries have a flag."""
        which: Flags = (self.flags & np.uint8(flag)) != 0
        return which


_Columns: TypeAlias = tuple[U64, U16, U8, U64]  # ends, depths, flags, shifts


def map_batches(
    windows: Iterable[Window], places: Sequence[Place], offset: int, generation: Generation
) -> Iterator[MapBatch]:
    """Yields the entries of ``qemu-img map``, neighbours merged as it merges them.

    Args:
        windows: of a detailed pass.
        places: one a layer.
        offset: where the windows start.
        generation: QEMU 10.0 keeps compressed clusters apart; 5.2 does not know PRESENT.
    """
    start, pending = offset, None
    known = np.uint8(0xFF ^ PRESENT if generation == "5.2" else 0xFF)
    for ends, depths, flags, shifts in _large(_statuses(windows, places, generation)):
        columns: _Columns = (ends, depths, flags & known, shifts)
        pending = columns if pending is None else _joined([pending, columns])
        pending = _merged(pending)
        ready = pending[0].size - 1  # the last one may go on in the next batch
        if ready >= _BATCH:
            yield _batch(start, _cut(pending, 0, ready))
            start = int(pending[0][ready - 1])
            pending = _cut(pending, ready, ready + 1)
    if pending is not None and pending[0].size:
        yield _batch(start, pending)


def base_allocation(windows: Iterable[Window], places: Sequence[Place], size: int, generation: Generation) -> ExtentMap:
    """Returns the flags that an NBD export of QEMU's would serve as ``base:allocation``.

    What QEMU could not serve, which a pass leaves in only if it is told to go on, is UNREADABLE_DEPTH.
    """
    table = np.zeros(32, dtype=np.uint64)
    for flags in range(32):
        hole = not flags & DATA
        if generation == "5.2":
            hole = not flags & PRESENT
        table[flags] = (NBD_HOLE if hole else 0) | (NBD_ZERO if flags & ZERO else 0)
    ends, values = [np.empty(0, dtype=np.uint64)], [np.empty(0, dtype=np.uint64)]
    for columns in _statuses(windows, places, generation, short_is_present=generation == "5.2"):
        flags_or_broken = np.where(columns[1] == BROKEN, np.uint64(UNREADABLE_DEPTH), table[columns[2]])
        part = ExtentMap(columns[0], flags_or_broken)
        ends.append(part.ends)
        values.append(part.values)
    return ExtentMap(np.concatenate(ends), np.concatenate(values)).resized(size, 0)


def _statuses(
    windows: Iterable[Window], places: Sequence[Place], generation: Generation, *, short_is_present: bool = False
) -> Iterator[_Columns]:
    """Turns windows into columns of what QEMU says."""
    table = np.zeros(256, dtype=np.uint8)
    for code, meaning in _FLAGS.items():
        table[code] = meaning
    if generation != "10.0":
        table[Status.COMPRESSED] = PRESENT | DATA
    if short_is_present:
        table[[SHORT, SHORT_RESERVED]] |= PRESENT
    hidden = [index for index, place in enumerate(places) if place.hidden]
    silent = [index for index, place in enumerate(places) if place.silent]
    for window in windows:
        ends, layers, codes, shifts = window.runs()
        flags = table[codes]
        if silent:
            flags[np.isin(layers, silent) & (codes < SHORT)] = PRESENT | DATA
            shifts = np.where(flags & OFFSET, shifts, np.uint64(0))
        depths = np.where(layers == NOBODY, np.uint16(len(places) - 1), layers)
        depths = np.where((codes == SHORT) | (codes == SHORT_RESERVED), depths - np.uint16(1), depths)
        columns: _Columns = (ends, depths, flags, shifts)
        for index, place in enumerate(places):
            if place.holes is not None:
                columns = _with_holes(columns, window.offset, index, place, place.holes)
        if hidden:
            flags = np.where(np.isin(columns[1], hidden), columns[2] & np.uint8(0xFF ^ OFFSET), columns[2])
            columns = (columns[0], columns[1], flags, np.where(flags & OFFSET, columns[3], np.uint64(0)))
        yield columns


def _with_holes(columns: _Columns, offset: int, index: int, place: Place, holes: ExtentMap) -> _Columns:
    """Cuts the data of a layer where holes in its file begin and end."""
    ends, depths, flags, shifts = columns
    concerned = (depths == index) & ((flags & DATA) != 0) & ((flags & OFFSET) != 0)
    if not concerned.any() or not len(holes):
        return columns
    starts = np.concatenate((np.array([offset], dtype=np.uint64), ends[:-1]))
    first = np.searchsorted(holes.ends, starts + shifts, side="right")
    last = np.searchsorted(holes.ends, ends + shifts, side="left")
    pieces = np.where(concerned, np.maximum(last - first, 0) + 1, 1)
    rows = np.repeat(np.arange(ends.size), pieces)
    nth = np.arange(rows.size) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    which = np.minimum(first[rows] + nth, len(holes) - 1)
    cut = concerned[rows] & (nth < pieces[rows] - 1)
    new_ends = np.where(cut, holes.ends[which] - shifts[rows], ends[rows])
    # What lies past the end of the file is a hole too.
    within = first[rows] + nth < len(holes)
    empty = concerned[rows] & ~(within & (holes.values[which] != 0))
    hole = PRESENT | ZERO | OFFSET | (0 if place.raw else DATA)
    return new_ends, depths[rows], np.where(empty, np.uint8(hole), flags[rows]), shifts[rows]


def _large(parts: Iterable[_Columns]) -> Iterator[_Columns]:
    """Joins small parts, so that what follows is done rarely."""
    waiting: list[_Columns] = []
    count = 0
    for part in parts:
        waiting.append(part)
        count += part[0].size
        if count >= _BATCH:
            yield _joined(waiting)
            waiting, count = [], 0
    if waiting:
        yield _joined(waiting)


def _joined(parts: Sequence[_Columns]) -> _Columns:
    ends, depths, flags, shifts = zip(*parts, strict=True)
    return np.concatenate(ends), np.concatenate(depths), np.concatenate(flags), np.concatenate(shifts)


def _merged(columns: _Columns) -> _Columns:
    ends, depths, flags, shifts = columns
    last = np.ones(ends.size, dtype=bool)
    last[:-1] = (depths[1:] != depths[:-1]) | (flags[1:] != flags[:-1]) | (shifts[1:] != shifts[:-1])
    return columns if last.all() else (ends[last], depths[last], flags[last], shifts[last])


def _cut(columns: _Columns, start: int, end: int) -> _Columns:
    ends, depths, flags, shifts = columns
    return ends[start:end], depths[start:end], flags[start:end], shifts[start:end]


def _batch(start: int, columns: _Columns) -> MapBatch:
    ends, depths, flags, shifts = columns
    starts = np.concatenate((np.array([start], dtype=np.uint64), ends[:-1]))
    offsets: npt.NDArray[np.uint64] = np.where((flags & OFFSET) != 0, starts + shifts, np.uint64(0))
    return MapBatch(starts, ends - starts, depths, flags, offsets)
