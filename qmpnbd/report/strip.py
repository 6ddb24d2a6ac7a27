"""A map in small: equal parts of the disk, and the status that most bytes of each part have."""

from __future__ import annotations

import numpy as np

from qmpnbd.extents import ExtentMap

STRIP_CELLS = 64
"""Parts of a disk in a report; fits a terminal with room for a frame."""


def dominant(extents: ExtentMap, cells: int) -> tuple[int, ...]:
    """Returns the status that most bytes have in each of `cells` equal parts (fewer on a disk of fewer bytes).

    The smallest of several equally frequent ones.
    """
    size = extents.size
    cells = min(cells, size)
    if not cells:
        return ()
    # Python integers: size * cells can pass 2**64.
    edges = np.array([size * (cell + 1) // cells for cell in range(cells)], dtype=np.uint64)
    ends, cell_ends, values = ExtentMap(edges, np.arange(cells)).aligned(extents)
    lengths = np.diff(ends, prepend=np.uint64(0))
    statuses, which = np.unique(values, return_inverse=True)
    shares = np.zeros((cells, statuses.size), dtype=np.uint64)
    np.add.at(shares, (cell_ends.astype(np.intp), which), lengths)
    return tuple(statuses[shares.argmax(axis=1)].tolist())
