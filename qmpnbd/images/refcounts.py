"""Refcounts: how often each host cluster is used, as the file itself counts. Arrays in, arrays out; no I/O.

::

    refcount table     [ e e e * e ]        bits 9-63: host offset of a refcount block, 0 = none, all refcounts are 0
                               |
    refcount block             [ n n n n ]  one cluster of numbers, each the refcount of one host cluster

    refcount_order     0    1    2    3    4    5    6
    bits a refcount    1    2    4    8   16   32   64      in a byte the first refcount is in the lowest bits

Source: "Qcow2 Image File Format", Host cluster management, of QEMU's interoperability documents.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Refcounts: TypeAlias = npt.NDArray[np.unsignedinteger[Any]]

MAX_ORDER = 6  # the format's limit: 64 bits
BLOCK_MASK = 0xFFFF_FFFF_FFFF_FE00
RESERVED_MASK = 0x1FF
_BYTE_ORDER = 3


def block_entries(cluster_size: int, order: int) -> int:
    """Returns how many refcounts a refcount block holds."""
    return cluster_size * 8 >> order


def refcount_limit(order: int) -> int:
    """Returns the largest refcount there is room for."""
    return (1 << (1 << order)) - 1


def refcount_dtype(order: int) -> np.dtype[np.unsignedinteger[Any]]:
    """Returns the smallest type that holds a refcount."""
    return np.dtype(f"u{1 << max(order - _BYTE_ORDER, 0)}")


def unpack_refcounts(blocks: npt.NDArray[np.uint8], order: int) -> Refcounts:
    """Returns the refcounts in the bytes of refcount blocks, in order; the bytes are a whole number of entries."""
    if order >= _BYTE_ORDER:
        kind = refcount_dtype(order)
        return blocks.view(kind.newbyteorder(">")).astype(kind)
    bits = 1 << order
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    mask = np.uint8((1 << bits) - 1)
    return ((blocks[:, None] >> shifts) & mask).reshape(-1)


def pack_refcounts(counts: npt.ArrayLike, order: int) -> bytes:
    """Returns refcounts as they lie in a refcount block; for whole bytes of them."""
    values = np.asarray(counts, dtype=np.uint64)
    if order >= _BYTE_ORDER:
        return values.astype(refcount_dtype(order).newbyteorder(">")).tobytes()
    bits = 1 << order
    per_byte = values.reshape(-1, 8 // bits)
    shifts = np.arange(0, 8, bits, dtype=np.uint64)
    return bytes((per_byte << shifts).sum(axis=1).astype(np.uint8))
