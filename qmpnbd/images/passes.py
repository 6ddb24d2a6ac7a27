"""One pass over all layers of a chain, window by window.

::

    guest         |  window  |          |  window  |window|   only where some layer has tables
    layer 0       |##--##----|                                read first
    layer 1       |--##------|          |----##----|          only tables that hold something still undecided
    layer 2, raw  |##########|##########|##########|######|   what is left is decided here
    decided       | 0 1 0 2  |    2     | 2 1 2    |  2   |

A window is a few columns with one row for each smallest granule of the layers in it, so that memory does not depend
on the size of the disk, and the work not on the number of runs. Past the end of a layer, that layer decides: QEMU makes
up zeroes there and looks no deeper (`images.depth` draws it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from qmpnbd.extents import U64
from qmpnbd.images.qcow2 import BEYOND, U8, Flags
from qmpnbd.images.sources import Block, Sketch, Solid, Source
from qmpnbd.images.status import Status

U16: TypeAlias = npt.NDArray[np.uint16]

NOBODY = 0xFFFF
"""Of `Window.layers`: no layer holds it."""
BROKEN = 0xFFFE
"""Of `Window.layers`: QEMU cannot tell who holds it."""
SHORT = 7
"""Of `Window.codes`: past the end of the layer, which therefore decides."""
RESERVED = 8
"""Of `Window.codes`: UNALLOCATED, but the last layer keeps space for it (only with subclusters)."""
SHORT_RESERVED = 9
"""Of `Window.codes`: SHORT, but the layer above keeps space for it."""

_ROWS = 1 << 17  # of a window: some columns of this length stay in the processor's cache
_TOP_ENTRIES = 1 << 20  # entries of all top tables looked at together


@dataclass(frozen=True, slots=True)
class Window:
    """What a part of the disk is.

    Attributes:
        offset: first byte of it.
        end: the byte after the last one.
        base: where row 0 starts, at or before `offset`.
        unit: bytes a row.
        layers: the layer index that decides, or NOBODY or BROKEN.
        codes: its `Status`, or SHORT; a single 0 if no details were asked for.
        shifts: its host offset minus guest offset where it has one, else 0; likewise.
    """

    offset: int
    end: int
    base: int
    unit: int
    layers: U16
    codes: U8
    shifts: U64

    def runs(self) -> tuple[U64, U16, U8, U64]:
        """Returns the rows as runs: ``ends`` in bytes of the disk, layers, codes and shifts."""
        last = np.ones(self.layers.size, dtype=bool)
        np.not_equal(self.layers[1:], self.layers[:-1], out=last[:-1])
        detailed = self.codes.size == self.layers.size
        if detailed:
            last[:-1] |= self.codes[1:] != self.codes[:-1]
            last[:-1] |= self.shifts[1:] != self.shifts[:-1]
        places = np.flatnonzero(last)
        ends = (places.astype(np.uint64) + np.uint64(1)) * np.uint64(self.unit) + np.uint64(self.base)
        if ends[0] <= self.offset:
            first = int(np.searchsorted(ends, np.uint64(self.offset), side="right"))
            places, ends = places[first:], ends[first:]
        np.minimum(ends, np.uint64(self.end), out=ends)
        if detailed:
            return ends, self.layers[places], self.codes[places], self.shifts[places]
        return ends, self.layers[places], self.codes, self.shifts


@dataclass(frozen=True, slots=True)
class Pass:
    """What is asked of a pass.

    Attributes:
        layers: from the active layer down; a solid one ends them.
        visible: bytes of each that can be seen through those above it.
        detailed: whether codes and shifts are wanted too.
        check: called now and then; ends the work by raising.
        reserved: whether RESERVED and SHORT_RESERVED are told apart.
        broken: called with layer index, offset and end of every run QEMU cannot serve.
    """

    layers: Sequence[Source | Solid]
    visible: Sequence[int]
    detailed: bool
    check: Callable[[], None]
    broken: Callable[[int, int, int], None]
    reserved: bool = False

    def windows(self, offset: int, end: int) -> Iterator[Window]:
        """Yields what ``[offset, end)`` is, in order and without gaps.

        Raises:
            ImageError: as the sources raise, and what lies beyond the end of a file.
        """
        cuts = sorted({offset, end, *(size for size in self.visible if offset < size < end)})
        for start, stop in pairwise(cuts):
            seen = sum(size > start for size in self.visible)
            solid = next((k for k, layer in enumerate(self.layers[:seen]) if isinstance(layer, Solid)), None)
            yield from self._segment(start, stop, seen if solid is None else solid, solid)

    def _segment(self, start: int, stop: int, seen: int, solid: int | None) -> Iterator[Window]:
        """Yields a part in which every layer either is everywhere or nowhere."""
        tables = [layer for layer in self.layers[:seen] if not isinstance(layer, Solid)]
        rest = _Rest(NOBODY, Status.UNALLOCATED, 0)
        if solid is not None:
            layer = self.layers[solid]
            shift = layer.shift if isinstance(layer, Solid) else 0
            rest = _Rest(solid, Status.DATA, shift or 0)
        elif seen < len(self.layers):
            rest = _Rest(seen, SHORT, 0)
        # Every layer looks at so many entries of its top table at a time that all together stay within bounds.
        share = _TOP_ENTRIES / sum(1 / layer.span for layer in tables) if tables else 0
        step = max(1, int(share) >> 26) << 26 if tables else stop - start
        for low in range(start, stop, step):
            self.check()
            high = min(low + step, stop)
            sketches = [layer.sketch(low, high) for layer in tables]
            yield from self._described(low, high, tables, sketches, rest)

    def _described(
        self, low: int, high: int, tables: Sequence[Source], sketches: Sequence[Sketch], rest: _Rest
    ) -> Iterator[Window]:
        """Yields windows where there are tables, and the rest as single rows."""
        used = [k for k, sketch in enumerate(sketches) if sketch.starts.size]
        at = low
        if used:
            unit = min(tables[k].granule for k in used)
            alignment = max(tables[k].alignment for k in used)
            step = max(alignment, _ROWS * unit // alignment * alignment)
            for start, stop in _union(sketches, alignment, low, high):
                if start > at:
                    yield self._uniform(at, start, rest)
                for base in range(start // alignment * alignment, stop, step):
                    self.check()
                    edge = min(base + step, stop)
                    yield self._window((max(base, low), edge, base, unit), used, tables, sketches, rest)
                at = stop
        if at < high:
            yield self._uniform(at, high, rest)

    def _uniform(self, start: int, stop: int, rest: _Rest) -> Window:
        code, shift = np.array([rest.code], dtype=np.uint8), np.array([rest.shift], dtype=np.uint64)
        return Window(start, stop, start, stop - start, np.array([rest.layer], dtype=np.uint16), code, shift)

    def _window(
        self,
        place: tuple[int, int, int, int],
        used: Sequence[int],
        tables: Sequence[Source],
        sketches: Sequence[Sketch],
        rest: _Rest,
    ) -> Window:
        offset, end, base, unit = place
        rows = -(-(end - base) // unit)
        layers = np.full(rows, rest.layer, dtype=np.uint16)
        codes = np.full(rows if self.detailed else 1, rest.code, dtype=np.uint8)
        shifts = np.full(rows if self.detailed else 1, rest.shift, dtype=np.uint64)
        undecided = np.ones(rows, dtype=bool)
        undecided[: (offset - base) // unit] = False
        window = Window(offset, end, base, unit, layers, codes, shifts)
        for k in used:
            # The last layer with tables may keep space for what nobody holds.
            reserves = self.reserved and k == len(tables) - 1 and rest.code != Status.DATA
            for start, stop in _pieces(sketches[k], base, end):
                here = slice((start - base) // unit, -(-(stop - base) // unit))
                if undecided[here].any():
                    block = sketches[k].read(start, stop, _by(undecided[here], tables[k].alignment // unit))
                    self._decide(window, k, here, undecided[here], block)
                    if reserves:
                        rows_left = np.flatnonzero(undecided[here])
                        self._reserve(window, here.start, rows_left, block, tables[k].granule // unit)
            if not undecided.any():
                break
        return window

    def _decide(self, window: Window, k: int, here: slice, undecided: Flags, block: Block) -> None:
        """Notes what a block of a layer decides in some rows of a window."""
        factor = self._granule(k) // window.unit
        found = block.codes if factor == 1 else np.repeat(block.codes, factor)
        found = found[: undecided.size]
        taken = undecided & found.view(bool) if factor == 1 and found.max() <= 1 else undecided & (found != 0)
        layers = window.layers[here]
        np.copyto(layers, np.uint16(k), where=taken)
        worst = int(found.max())
        if worst >= Status.UNREADABLE:
            self._refuse(k, window, here.start, (taken & (found >= Status.UNREADABLE), found))
            layers[taken & (found == Status.UNREADABLE)] = BROKEN
        if self.detailed:
            rows = np.flatnonzero(taken)
            window.codes[here][rows] = 1 if worst == 1 else found[rows]
            window.shifts[here][rows] = block.shifts(rows if factor == 1 else rows // factor)
        np.greater(undecided, taken, out=undecided)

    def _granule(self, k: int) -> int:
        table = self.layers[k]
        return 1 if isinstance(table, Solid) else table.granule

    def _reserve(self, window: Window, first: int, rows: npt.NDArray[np.intp], block: Block, factor: int) -> None:
        """Marks what nobody holds though the last layer with tables keeps space for it."""
        kept, kept_shifts = block.reserved(rows // factor)
        rows = rows[kept] + first
        codes = window.codes
        codes[rows] = np.where(codes[rows] == SHORT, np.uint8(SHORT_RESERVED), np.uint8(RESERVED))
        window.shifts[rows] = kept_shifts[kept]

    def _refuse(self, k: int, window: Window, first: int, bad: tuple[Flags, U8]) -> None:
        """Raises for data that lies beyond the end of its file; tells of what is unreadable."""
        (taken, found), unit = bad, window.unit
        base = window.base + first * unit
        rows = np.flatnonzero(taken)
        beyond = rows[found[rows] == BEYOND]
        if beyond.size:
            table = self.layers[k]
            error = None if isinstance(table, Solid) else table.fault(base + int(beyond[0]) * unit)
            if error is not None:  # None: the file has grown since
                raise error
        rows = rows[found[rows] == Status.UNREADABLE]
        for run in np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1):
            if run.size:
                start, stop = base + int(run[0]) * unit, base + (int(run[-1]) + 1) * unit
                if stop > window.offset:
                    self.broken(k, max(start, window.offset), min(stop, window.end))


@dataclass(frozen=True, slots=True)
class _Rest:
    """What is so where no table says anything."""

    layer: int
    code: int
    shift: int


def _union(sketches: Sequence[Sketch], alignment: int, low: int, high: int) -> list[tuple[int, int]]:
    """Returns the parts of ``[low, high)`` that some sketch describes, widened to whole alignments."""
    mask = np.uint64(~(alignment - 1) & (1 << 64) - 1)
    starts = np.concatenate([sketch.starts for sketch in sketches]) & mask
    ends = (np.concatenate([sketch.ends for sketch in sketches]) + np.uint64(alignment - 1)) & mask
    order = np.argsort(starts, kind="stable")
    starts, reach = starts[order], np.maximum.accumulate(ends[order])
    first = np.ones(starts.size, dtype=bool)
    np.greater(starts[1:], reach[:-1], out=first[1:])
    lows = np.clip(starts[first], np.uint64(low), np.uint64(high))
    highs = np.clip(reach[np.append(first[1:], True)], np.uint64(low), np.uint64(high))
    return [pair for pair in zip(lows.tolist(), highs.tolist(), strict=True) if pair[0] < pair[1]]


def _pieces(sketch: Sketch, base: int, end: int) -> list[tuple[int, int]]:
    """Returns the parts of ``[base, end)`` that a sketch describes, neighbours joined."""
    low = int(np.searchsorted(sketch.ends, np.uint64(base), side="right"))
    high = int(np.searchsorted(sketch.starts, np.uint64(end), side="left"))
    if low >= high:
        return []
    starts, ends = sketch.starts[low:high], sketch.ends[low:high]
    if high - low > 1 and int(ends[-1]) - int(starts[0]) != int((ends - starts).sum()):
        first = np.append(True, starts[1:] != ends[:-1])
        starts, ends = starts[first], ends[np.append(first[1:], True)]
        return [(max(a, base), min(b, end)) for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]
    return [(max(int(starts[0]), base), min(int(ends[-1]), end))]


def _by(flags: Flags, factor: int) -> Flags:
    """Returns one flag for `factor` ones: whether any of them is set."""
    if factor == 1:
        return flags
    padded = np.append(flags, np.zeros(-flags.size % factor, dtype=bool))
    joined: Flags = np.logical_or.reduce(padded.reshape(-1, factor), axis=1)
    return joined
