"""What changed between two instants, and whether a dirty bitmap knows of it; pure.

A disk's blocks are hashed as they were at each of two instants. Where the hashes differ the guest has written, and a
bitmap that recorded all the while must be dirty there. That it is dirty elsewhere, too, is no fault: bytes that are
written anew with what they were are changes to a bitmap.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from qmpnbd.extents import ExtentMap
from qmpnbd.report.contexts import DIRTY_BITMAP
from qmpnbd.validate.compare import MapFinding, compared

MAX_BLOCKS = 1 << 24
"""Blocks of a disk that are told apart: 256 MiB of hashes; of a disk of 1 TiB they are 64 KiB each."""

MAX_BLOCK = 256 << 10
"""Bytes of a block where the granularity is larger: what one reply of a server brings."""

_HASH_BYTES = 16


def block_size(size: int, granularity: int) -> int:
    """Returns the bytes of a block for a disk and the finest granularity of its bitmaps: both are powers of two."""
    block = min(granularity, MAX_BLOCK)
    while block * MAX_BLOCKS < size:
        block *= 2
    return block


class Blocks:
    """The blocks of a disk at one instant, as hashes (BLAKE2b, 128 bits).

    Args:
        size: bytes of the disk.
        block: bytes of a block; the last may be cut by the disk's end.
    """

    def __init__(self, size: int, block: int) -> None:
        self.size = size
        self.block = block
        self._hashes = np.zeros((-(-size // block), _HASH_BYTES), np.uint8)

    def add(self, offset: int, piece: memoryview) -> None:
        """Takes note of bytes of the disk: whole blocks, from a multiple of a block on."""
        for start in range(0, len(piece), self.block):
            digest = hashlib.blake2b(piece[start : start + self.block], digest_size=_HASH_BYTES).digest()
            self._hashes[(offset + start) // self.block] = np.frombuffer(digest, np.uint8)

    def changed(self, other: Blocks) -> ExtentMap:
        """Returns 1 for every byte of a block that differs, else 0.

        Raises:
            ValueError: the disk has another size by now.
        """
        if (self.size, self.block) != (other.size, other.block):
            raise ValueError(f"blocks of disks of {self.size} and {other.size} bytes")
        differs: npt.NDArray[np.bool_] = (self._hashes != other._hashes).any(axis=1)
        ends = np.minimum(np.arange(1, len(differs) + 1, dtype=np.uint64) * np.uint64(self.block), np.uint64(self.size))
        return ExtentMap(ends, differs)


def misses(name: str, changed: ExtentMap, dirty: ExtentMap, block: int, note: str) -> MapFinding:
    """Compares a bitmap with what has changed.

    Args:
        name: the bitmap's.
        changed: not 0 where the disk changed, in whole blocks.
        dirty: the bitmap.
        block: bytes of a block; where it is larger than the bitmap's granularity, a single bit in it is enough.
        note: for the report.
    """
    told = _rounded_out(dirty, block)
    wanted = told.combine(changed, lambda has, must: (has != 0) | (must != 0))
    context = DIRTY_BITMAP + name
    return MapFinding(context, told, compared(told, wanted), note, finding="bitmap-misses-change")


def _rounded_out(dirty: ExtentMap, block: int) -> ExtentMap:
    """Returns a map of 0 and 1 in which every block is dirty that has a dirty byte."""
    unit, size, marked = np.uint64(block), np.uint64(dirty.size), dirty.values != 0
    starts = dirty.starts[marked] // unit * unit
    ends = np.minimum((dirty.ends[marked] + unit - np.uint64(1)) // unit * unit, size)
    if not starts.size:
        return ExtentMap.uniform(dirty.size, 0)
    # Neighbours may share a block by now: a run begins where the one before has ended, at the earliest.
    starts = np.maximum(starts, np.concatenate((starts[:1], ends[:-1])))
    edges = np.append(np.stack((starts, ends), axis=1).ravel(), size)
    return ExtentMap(edges, np.arange(edges.size) % 2)
