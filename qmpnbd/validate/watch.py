"""What is written in the layers of a disk while they are looked at.

A dirty bitmap records on every writable layer. It is not read where it is: while a bitmap is exported, QEMU (5.2 to
10.0) aborts, guest and all, when its node goes, and a commit of somebody else's takes away the nodes above its base at
any moment. So it is merged into one of a node of our own, which nobody takes away, and that is exported::

    layer of the guest   watch bitmap ── disable ── block-dirty-bitmap-merge ──> bitmap
                                                                                   │
    null-co of our own   ──────────────────────────────────────────────────────────┴── block-export-add, NBD
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import NamedTuple

import numpy as np

from qmpnbd.errors import InterferenceError
from qmpnbd.extents import ExtentMap
from qmpnbd.qmp.bitmaps import add_bitmap, disable_bitmaps, remove_bitmap, transact
from qmpnbd.qmp.inventory import read_nodes
from qmpnbd.qmp.models import BlockDirtyInfo
from qmpnbd.qmp.naming import bitmap_name, scratch_name
from qmpnbd.qmp.populate import Scratch, add_scratch, merge_actions, remove_scratch
from qmpnbd.validate.window import Place, open_window

DIRTY = "qemu:dirty-bitmap:"


class _Recorded(NamedTuple):
    """A bitmap that does not record any more.

    Attributes:
        watch: its node and its name.
        size: bytes of the node.
        told: what QEMU says of it.
    """

    watch: Scratch
    size: int
    told: BlockDirtyInfo


class Watch:
    """Bitmaps that record on the layers of one disk.

    Args:
        place: where.
        stack: takes everything down.
    """

    def __init__(self, place: Place, stack: AsyncExitStack) -> None:
        self._place = place
        self._stack = stack
        self._bitmaps: list[Scratch] = []

    async def begin(self, node: str) -> None:
        """Has a bitmap record what is written through a node from now on.

        Raises:
            MonitorError: QEMU refused or is gone.
            DeadlineError: no reply in time.
        """
        monitor, name = self._place.monitor, bitmap_name(self._place.run, next(self._place.numbers))
        work = partial(remove_bitmap, monitor, node, name)
        self._stack.push_async_callback(self._place.take_down.step, f"bitmap {name} of node {node}", work)
        await add_bitmap(monitor, node, name, self._place.deadline)
        self._bitmaps.append(Scratch(node, name))

    async def touched(self, size: int) -> ExtentMap:
        """Ends it, and returns what was written through any of the nodes: 1, or 0.

        Args:
            size: bytes of the map.

        Raises:
            InterferenceError: a node has gone, and with it what was recorded.
            MonitorError: QEMU refused or is gone.
            NbdError: a bitmap cannot be read.
            DeadlineError: the time is over.
        """
        await disable_bitmaps(
            self._place.monitor, [(each.node, each.bitmap) for each in self._bitmaps], self._place.deadline
        )
        touched = ExtentMap.uniform(size, 0)
        for recorded in await self._recorded():
            if recorded.told.count:
                touched = touched.combine((await self._read(recorded)).resized(size, 0), np.maximum)
        return touched

    async def _recorded(self) -> Sequence[_Recorded]:
        nodes = {each.node_name: each for each in await read_nodes(self._place.monitor, self._place.deadline)}
        found = []
        for watch in self._bitmaps:
            node = nodes.get(watch.node)
            bitmaps = node.dirty_bitmaps if node is not None else []
            told = next((each for each in bitmaps if each.name == watch.bitmap), None)
            if node is None or told is None:
                what = "the layer was taken out of the chain while it was looked at"
                raise InterferenceError(what, where=f"node {watch.node}", remedy="Run again.")
            found.append(_Recorded(watch, node.image.virtual_size, told))
        return found

    async def _read(self, recorded: _Recorded) -> ExtentMap:
        """Reads a bitmap by way of a copy; what the guest's nodes have is not in use for a moment longer."""
        place, watch = self._place, recorded.watch
        number = next(place.numbers)
        copy = Scratch(scratch_name(place.run, number), bitmap_name(place.run, number))
        work = partial(remove_scratch, place.monitor, copy)
        self._stack.push_async_callback(place.take_down.step, f"node {copy.node}", work)
        await add_scratch(place.monitor, copy, recorded.size, recorded.told.granularity, place.deadline)
        await transact(place.monitor, merge_actions(copy.node, copy.bitmap, watch), place.deadline)
        await disable_bitmaps(place.monitor, [(copy.node, copy.bitmap)], place.deadline)
        window = await open_window(place, self._stack, copy.node, [DIRTY + copy.bitmap], [copy.bitmap])
        return (await window.client.maps(deadline=place.deadline))[DIRTY + copy.bitmap]
