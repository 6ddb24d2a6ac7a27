"""Where a disk differs from a backup of it: for a disk whose bitmap was lost, so that only that is stored.

::

    the disk      | DATA        | ZERO           | ZERO |
    the backup    | any         | DATA           | ZERO |
    is read       | both        | nothing        | none |
    is stored     | what differs| zeroes         | none |

Bytes are compared, not hashes: the backup may have rotted since, and then what differs is stored as it is on the disk.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qmpnbd.backup.content import DATA, ZERO, aligned
from qmpnbd.backup.pace import Pace
from qmpnbd.backup.proof import ranges_of
from qmpnbd.backup.selection import rounded_out, selected
from qmpnbd.backup.sources import Source
from qmpnbd.deadline import Deadline
from qmpnbd.extents import U64, ExtentMap
from qmpnbd.images.layers import Chain


def differing(
    source: Source, disk: ExtentMap, base: Chain, unit: int, deadline: Deadline, *, pace: Pace | None = None
) -> ExtentMap:
    """Returns what a layer on top of `base` has to hold so that it reads as the disk does.

    Args:
        source: the disk.
        disk: what it holds, `DATA` or `ZERO` for every byte; where a unit has both, all of it counts as data.
        base: an image and what lies behind it, of the disk's size.
        unit: bytes that are stored as a whole, a power of two.
        deadline: for reading both.
        pace: limits what is read of the disk; None for no limit.

    Raises:
        ValueError: the two differ in size.
        NbdError: the disk cannot be read.
        ImageError: the backup cannot be read.
        DeadlineError: the time is over.
    """
    disk = aligned(disk, unit)  # units that are zero in part are compared as a whole
    below = base.base_allocation()
    zeroed = disk.combine(below, lambda own, other: (own == np.uint64(ZERO)) & (other & np.uint64(2) == 0))
    found = []
    for offset, data in source.chunks(ranges_of(disk, DATA), deadline):
        if (each := _different(offset, data, base, unit)).size:
            found.append(each)
        if pace is not None:
            pace.wait(len(data), deadline, source.where)
    starts = np.sort(np.concatenate([np.empty(0, np.uint64), *found]))
    mask = rounded_out(_units(starts, unit, disk.size), unit)
    either = mask.combine(rounded_out(zeroed, unit), lambda own, other: own | other)
    return selected(either, disk)


def _different(offset: int, data: memoryview, base: Chain, unit: int) -> U64:
    """Returns where the units begin, in the disk, of which a chunk of it differs from the base."""
    old = bytearray(len(data))
    base.read_into(offset, old)
    changed = np.frombuffer(data, np.uint8) != np.frombuffer(old, np.uint8)
    if not changed.any():
        return np.empty(0, np.uint64)
    first = -(-offset // unit) * unit - offset  # where the first whole unit begins
    cuts: npt.NDArray[np.intp] = np.unique(np.append(0, np.arange(first, len(data), unit)))
    hit = np.logical_or.reduceat(changed, cuts)
    return (cuts[hit].astype(np.uint64) + np.uint64(offset)) // np.uint64(unit) * np.uint64(unit)


def _units(starts: U64, unit: int, size: int) -> ExtentMap:
    """Returns the mask of units that begin at `starts`, which ascend."""
    edges = np.empty(2 * starts.size + 1, np.uint64)
    edges[0:-1:2], edges[1:-1:2], edges[-1] = starts, np.minimum(starts + np.uint64(unit), np.uint64(size)), size
    values = np.arange(edges.size, dtype=np.uint64) % np.uint64(2)
    return ExtentMap(np.maximum.accumulate(edges), values)
