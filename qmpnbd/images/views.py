"""From the windows of a pass to maps. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from qmpnbd.errors import ImageUnsupportedError
from qmpnbd.extents import U64, ExtentMap
from qmpnbd.images.passes import BROKEN, U16, Window
from qmpnbd.images.status import UNREADABLE_DEPTH, LayerMap

MAX_RUNS = 1 << 26  # 1 GiB of columns; tables that share their space could ask for more than any memory holds


class _Budget:
    """Counts the runs of a map in the making."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._left = MAX_RUNS

    def spend(self, runs: int) -> None:
        self._left -= runs
        if self._left < 0:
            what = f"more than {MAX_RUNS} runs of allocated and unallocated clusters"
            raise ImageUnsupportedError(what, where=self._where, remedy="Check that the image is genuine.")


def depth_map(windows: Iterable[Window], numbers: Sequence[int], where: str) -> ExtentMap:
    """Makes the map of allocation depths.

    Args:
        windows: of a pass, from byte 0 on.
        numbers: NBD's number of each layer.
        where: the disk, for messages.

    Raises:
        ImageUnsupportedError: more runs than fit into memory.
    """
    budget = _Budget(where)
    all_ends, all_layers = [np.empty(0, dtype=np.uint64)], [np.empty(0, dtype=np.uint16)]
    for window in windows:
        ends, layers, _, _ = window.runs()
        budget.spend(ends.size)
        all_ends.append(ends)
        all_layers.append(layers)
    return ExtentMap(np.concatenate(all_ends), _numbered(np.concatenate(all_layers), numbers))


def _numbered(layers: U16, numbers: Sequence[int]) -> U64:
    table = np.zeros(1 << 16, dtype=np.uint64)  # NOBODY is 0
    table[: len(numbers)] = numbers
    table[BROKEN] = UNREADABLE_DEPTH
    numbered: U64 = table[layers]
    return numbered


def layer_map(windows: Iterable[Window], offset: int, where: str) -> LayerMap:
    """Makes the map of what a layer holds.

    Args:
        windows: of a detailed pass over that layer alone.
        offset: where they start.
        where: the file, for messages.

    Raises:
        ImageUnsupportedError: more runs than fit into memory.
    """
    budget = _Budget(where)
    all_ends, all_shifts = [np.empty(0, dtype=np.uint64)], [np.empty(0, dtype=np.uint64)]
    all_codes = [np.empty(0, dtype=np.uint8)]
    for window in windows:
        ends, _, codes, shifts = window.runs()
        budget.spend(ends.size)
        all_ends.append(ends - np.uint64(offset))
        all_codes.append(codes)
        all_shifts.append(shifts)
    joined = np.concatenate(all_ends)
    statuses, shifted = ExtentMap(joined, np.concatenate(all_codes)), ExtentMap(joined, np.concatenate(all_shifts))
    return LayerMap(offset, statuses, shifted)
