"""Allocation depth: which layer of a backing chain decides a byte.

::

    layer 0, number 1   |####----####--------|      # allocated
    layer 1, number 2   |--####------|              - not allocated
    layer 2, number 3   |####################|
    allocation depth     11112233111122222222
                                     ^ past the end of layer 1: QEMU makes up zeroes there and calls them allocated
                                       in layer 1; nothing deeper is looked at

The NBD context ``qemu:allocation-depth`` counts the nodes of QEMU's block graph from 1; 0 means that no layer holds
the byte. Filter nodes count too, so the number of a layer is data that comes with it. ``qemu-img map`` counts layers
from 0 and knows no filters: that is the layer index.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qmpnbd.extents import ExtentMap


def allocation_depth(layers: Sequence[tuple[int, ExtentMap, int]], size: int) -> ExtentMap:
    """Computes the allocation depth of a chain.

    Args:
        layers: ``(size in bytes, map that is not 0 where allocated, number)`` from the active layer down. A map
            must cover what can be seen of its layer: `visible_sizes`.
        size: bytes of the disk, at most the active layer's.

    Returns:
        A map of `size` bytes whose values are numbers of `layers`, or 0 where no layer is allocated.

    Raises:
        ValueError: there are no layers, the disk is larger than the active layer, or a map is too short.
    """
    if not layers or size > layers[0][0]:
        raise ValueError(f"{len(layers)} layers cannot make a disk of {size} bytes")
    visible = visible_sizes([own_size for own_size, _, _ in layers], size)
    below: ExtentMap | None = None
    for index in reversed(range(len(layers))):
        _, allocated, number = layers[index]
        if allocated.size < visible[index]:
            raise ValueError(f"layer {index}: a map of {allocated.size} bytes, {visible[index]} can be seen")
        decided = _numbered(allocated.resized(visible[index], 0), number)
        if below is not None:
            decided = below.overlay(decided)
        # What the layer above can see of this one and of all below it; past the end the short layer itself decides.
        below = decided.resized(visible[index - 1] if index else size, number)
    return below if below is not None else ExtentMap.uniform(size, 0)


def visible_sizes(sizes: Sequence[int], size: int) -> list[int]:
    """Returns how many bytes of each layer can be seen through those above it.

    Args:
        sizes: bytes of each layer, from the active layer down.
        size: bytes of the disk.
    """
    visible = []
    for own_size in sizes:
        size = min(size, own_size)
        visible.append(size)
    return visible


def plain_numbers(count: int) -> range:
    """Returns the numbers of `count` layers in a graph without filters, from the active layer down."""
    return range(1, count + 1)


def layer_index(depth: int, numbers: Sequence[int]) -> int | None:
    """Converts an allocation depth to a layer index; the one place where the two numberings meet.

    Args:
        depth: NBD's number.
        numbers: the number of each layer, from the active layer down; the way back is ``numbers[index]``.

    Returns:
        The layer index, or None for 0: no layer holds the byte.

    Raises:
        ValueError: no layer has that number.
    """
    if depth == 0:
        return None
    if depth not in numbers:
        raise ValueError(f"no layer has the allocation depth {depth}; there are {list(numbers)}")
    return numbers.index(depth)


def _numbered(allocated: ExtentMap, number: int) -> ExtentMap:
    return allocated.mapped(lambda values: np.where(values != 0, np.uint64(number), np.uint64(0)))
