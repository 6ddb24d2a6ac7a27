"""What a layer says about a byte: the status values, and the two maps that hold them.

::

    guest    0        64K      128K     192K     256K
    statuses | DATA            | ZERO   | UNALLOCATED    two clusters that lie beside each other in the file too
    shifts   | 0x50000         | 0      | 0              are one extent: host offset - guest offset does not change

A host offset itself differs from byte to byte, a shift does not: ``host offset = (guest offset + shift) mod 2**64``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from qmpnbd.extents import ExtentMap

UNREADABLE_DEPTH = 1 << 32
"""The allocation depth of what QEMU cannot serve; larger than any number that fits into NBD's 32 bits."""

MAX_UNREADABLE = 1000
"""Unreadable ranges kept with their reasons; the map marks all of them."""


class Status(IntEnum):
    """What a layer holds at a byte."""

    UNALLOCATED = 0
    """Nothing: the layer below decides."""
    DATA = 1
    """Data in the clear (or encrypted) at a host offset."""
    ZERO = 2
    """Reads as zeroes, no space in the file."""
    ZERO_ALLOCATED = 3
    """Reads as zeroes, and keeps space in the file at a host offset."""
    COMPRESSED = 4
    """Compressed data; the entry tells where."""
    UNREADABLE = 5
    """QEMU answers with EIO: the entry contradicts the format."""


@dataclass(frozen=True, slots=True)
class LayerMap:
    """A window of one layer, from its `offset` on.

    Attributes:
        offset: where in the layer byte 0 of the maps is.
        statuses: a `Status` for every byte.
        shifts: host offset minus guest offset, modulo 2**64, where the status is DATA or ZERO_ALLOCATED; else 0.
    """

    offset: int
    statuses: ExtentMap
    shifts: ExtentMap


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A range QEMU cannot serve.

    Attributes:
        layer: the layer index.
        path: its file.
        offset: first byte of the range, in the guest.
        end: the byte after the last one.
        reason: which entry of the file is wrong and how, without a full stop.
    """

    layer: int
    path: str
    offset: int
    end: int
    reason: str
