"""The scratch node through which extents get into a dirty bitmap on stock QEMU.

No released QEMU has a command that sets bits of a bitmap. But a bitmap records writes, bitmaps of nodes of the same
size can be merged, and a null-co node takes writes and keeps nothing::

    blockdev-add null-co ── block-dirty-bitmap-add ── block-export-add writable ── NBD: write zeroes at the extents
                                                                                              │
                                  the disk's bitmap  <── block-dirty-bitmap-merge ────────────┘

All of it carries the run's name and is taken down again; the merge is one command, done or not done.
"""

from __future__ import annotations

from dataclasses import dataclass

from qmpnbd.deadline import Deadline
from qmpnbd.errors import BitmapError, CommandFailedError
from qmpnbd.qmp.bitmaps import add_bitmap
from qmpnbd.qmp.inventory import read_nodes
from qmpnbd.qmp.models import BlockDirtyInfo
from qmpnbd.qmp.monitor import Monitor, finish
from qmpnbd.qmp.naming import bitmap_name, scratch_name


@dataclass(frozen=True, slots=True)
class Scratch:
    """The names of a run's scratch node.

    Attributes:
        node: its node-name.
        bitmap: its bitmap.
    """

    node: str
    bitmap: str

    @classmethod
    def of_run(cls, run: str) -> Scratch:
        """Returns the names for a run."""
        return cls(scratch_name(run, 0), bitmap_name(run, 0))


async def add_scratch(monitor: Monitor, scratch: Scratch, size: int, granularity: int, deadline: Deadline) -> None:
    """Makes the node and its bitmap.

    Args:
        monitor: the QEMU.
        scratch: the names.
        size: bytes; that of the disk, or QEMU refuses to merge.
        granularity: that of the bitmap to be filled, so that the merge marks nothing else.
        deadline: for QEMU's replies.

    Raises:
        MonitorError: QEMU refused or is gone.
        DeadlineError: no reply in time.
    """
    node = {"driver": "null-co", "node-name": scratch.node, "size": size, "read-zeroes": True}
    await finish(monitor.execute("blockdev-add", node, deadline=deadline))
    await add_bitmap(monitor, scratch.node, scratch.bitmap, deadline, granularity=granularity)


async def remove_scratch(monitor: Monitor, scratch: Scratch, deadline: Deadline) -> None:
    """Removes the node, and with it its bitmap; one that does not exist is gone.

    Raises:
        CommandFailedError: QEMU refused: it is still exported.
        MonitorLostError: the connection ended.
        DeadlineError: no reply in time.
    """
    try:
        await finish(monitor.execute("blockdev-del", {"node-name": scratch.node}, deadline=deadline))
    except CommandFailedError as error:
        if "find" not in error.description:  # "Failed to find node with node-name=", "Cannot find node"
            raise


async def find_bitmap(monitor: Monitor, node: str, name: str, deadline: Deadline) -> BlockDirtyInfo | None:
    """Returns what QEMU says of a bitmap of a node, or None if there is none of that name.

    Raises:
        MonitorError: QEMU refused or is gone.
        DeadlineError: no reply in time.
    """
    for info in await read_nodes(monitor, deadline):
        if info.node_name == node:
            return next((bitmap for bitmap in info.dirty_bitmaps if bitmap.name == name), None)
    return None


async def require_marked(monitor: Monitor, scratch: Scratch, expected: int, deadline: Deadline) -> None:
    """Makes sure that the scratch bitmap holds what was written, before anything is merged.

    Args:
        monitor: the QEMU.
        scratch: the names.
        expected: bytes marked, in whole granules.
        deadline: for QEMU's reply.

    Raises:
        BitmapError: it holds something else: somebody writes to our node.
        MonitorError: QEMU refused or is gone.
        DeadlineError: no reply in time.
    """
    found = await find_bitmap(monitor, scratch.node, scratch.bitmap, deadline)
    if found is None or found.count != expected:
        told = "nothing" if found is None else f"{found.count} bytes"
        raise BitmapError(
            f"QEMU marked {told} where {expected} bytes were written",
            where=f"node {scratch.node}",
            remedy="Nothing was merged. Somebody else may have written to this node: run again.",
        )


def merge_actions(node: str, name: str, scratch: Scratch) -> list[dict[str, object]]:
    """Returns the action that adds the extents to a bitmap that exists."""
    return [_merge(node, name, [{"node": scratch.node, "name": scratch.bitmap}])]


def birth_actions(
    node: str, name: str, scratch: Scratch, watch: str, *, granularity: int, persistent: bool
) -> list[dict[str, object]]:
    """Returns the actions that make a bitmap of the extents and of what the guest wrote while they were found.

    Until this transaction there is no bitmap of that name, so nobody ever sees one that is half full.

    Args:
        node: the disk's node.
        name: the bitmap.
        scratch: the extents.
        watch: the run's bitmap that has recorded on the disk's node since before the extents were looked at.
        granularity: bytes.
        persistent: whether it shall survive the end of QEMU.
    """
    added = {"node": node, "name": name, "granularity": granularity, "persistent": persistent}
    return [
        {"type": "block-dirty-bitmap-add", "data": added},
        _merge(node, name, [watch, {"node": scratch.node, "name": scratch.bitmap}]),
        {"type": "block-dirty-bitmap-remove", "data": {"node": node, "name": watch}},
    ]


def _merge(node: str, target: str, sources: list[object]) -> dict[str, object]:
    return {"type": "block-dirty-bitmap-merge", "data": {"node": node, "target": target, "bitmaps": sources}}
