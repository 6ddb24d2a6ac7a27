"""Which bytes of a disk go into its layer: from what was touched and what the disk holds; pure.

Both are maps of their own, read on their own cursors, and combined here byte by byte::

    touched      | yes               | no             | yes    |
    the disk     | DATA   | ZERO     | DATA           | ZERO   |
    the layer    | DATA   | ZERO     | ABSENT         | ZERO   |

What was touched and reads as zeroes is stored as zeroes: left out, the base's old data would come back.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from qmpnbd.backup.content import ABSENT, DATA, ZERO
from qmpnbd.extents import U64, ExtentMap

_READS_AS_ZERO = np.uint64(2)  # NBD_STATE_ZERO


def whole(allocation: ExtentMap) -> ExtentMap:
    """Returns what a disk holds, `DATA` or `ZERO` for every byte, from its map in the context ``base:allocation``."""
    return allocation.mapped(lambda values: np.where(values & _READS_AS_ZERO, np.uint64(ZERO), np.uint64(DATA)))


def touched(size: int, maps: Iterable[ExtentMap]) -> ExtentMap:
    """Returns the union of maps: 1 where any of them is not 0, and where one of them ends before the disk does."""
    found = ExtentMap.uniform(size, 0)
    for each in maps:
        fitting = each.resized(size, 1)
        found = found.combine(fitting, lambda own, other: (own != 0) | (other != 0))
    return found


def held(content: ExtentMap) -> ExtentMap:
    """Returns where a layer holds something itself: 1 there, 0 elsewhere."""
    return content.mapped(lambda values: values != np.uint64(ABSENT))


def at_most(depth: ExtentMap, layers: int) -> ExtentMap:
    """Returns where one of the first `layers` layers holds something: 1 there, by a map of allocation depths."""
    return depth.mapped(lambda values: (values != 0) & (values <= np.uint64(layers)))


def rounded_out(mask: ExtentMap, unit: int) -> ExtentMap:
    """Returns a mask of 0 and 1 in which a unit that is 1 anywhere is 1 everywhere."""
    marked = mask.values != 0
    step = np.uint64(unit)
    starts: U64 = mask.starts[marked] // step * step
    ends: U64 = np.minimum((mask.ends[marked] + (step - np.uint64(1))) // step * step, np.uint64(mask.size))
    edges = np.empty(2 * starts.size + 1, np.uint64)
    edges[0:-1:2], edges[1:-1:2], edges[-1] = starts, ends, mask.size
    values = np.arange(edges.size, dtype=np.uint64) % np.uint64(2)
    values[-1] = 0
    return ExtentMap(np.maximum.accumulate(edges), values)


def zeroed_since(disk: ExtentMap, below: ExtentMap, unit: int) -> ExtentMap:
    """Returns the units that read as zeroes now, and of which the layers below hold data: 1 there, 0 elsewhere.

    Such a unit has to be stored whatever bitmaps say. QEMU marks nothing when a disk is made smaller and larger again:
    what lay past its end has become zeroes, and no bitmap tells (5.2, 7.2, 10.0).
    """
    kept = rounded_out(disk.mapped(lambda values: values != np.uint64(ZERO)), unit)
    gone = kept.combine(below, lambda keep, content: (keep == 0) & (content == np.uint64(DATA)))
    return rounded_out(gone, unit)


def selected(mask: ExtentMap, disk: ExtentMap) -> ExtentMap:
    """Returns the layer's content: the disk's where the mask is not 0, `ABSENT` elsewhere."""
    return mask.combine(disk, lambda chosen, content: np.where(chosen != 0, content, np.uint64(ABSENT)))
