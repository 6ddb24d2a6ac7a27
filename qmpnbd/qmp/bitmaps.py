"""Dirty bitmaps that tell what was written during a while; transient, and taken down with everything else."""

from __future__ import annotations

from collections.abc import Sequence

from qmpnbd.deadline import Deadline
from qmpnbd.errors import CommandFailedError
from qmpnbd.qmp.monitor import Monitor, finish


async def add_bitmap(monitor: Monitor, node_name: str, name: str, deadline: Deadline) -> None:
    """Makes a bitmap that records from now on what is written, zeroed or discarded through a node.

    Raises:
        CommandFailedError: QEMU refused.
        MonitorLostError: the connection ended.
        DeadlineError: no reply in time.
    """
    arguments = {"node": node_name, "name": name, "persistent": False}
    await finish(monitor.execute("block-dirty-bitmap-add", arguments, deadline=deadline))


async def disable_bitmaps(monitor: Monitor, bitmaps: Sequence[tuple[str, str]], deadline: Deadline) -> None:
    """Ends the recording of several bitmaps at one moment, so that they can be exported.

    A write under way sets its bit only when it has ended; a transaction waits for all of these first.

    Args:
        monitor: the QEMU.
        bitmaps: node-name and name of each; with none, nothing is done.
        deadline: for QEMU's reply.

    Raises:
        CommandFailedError: QEMU refused.
        MonitorLostError: the connection ended.
        DeadlineError: no reply in time.
    """
    kind = "block-dirty-bitmap-disable"
    actions = [{"type": kind, "data": {"node": node, "name": name}} for node, name in bitmaps]
    if actions:
        await finish(monitor.execute("transaction", {"actions": actions}, deadline=deadline))


async def remove_bitmap(monitor: Monitor, node_name: str, name: str, deadline: Deadline) -> None:
    """Removes a bitmap; one that does not exist, or whose node is gone, is gone.

    Raises:
        CommandFailedError: QEMU refused: it is in use.
        MonitorLostError: the connection ended.
        DeadlineError: no reply in time.
    """
    try:
        arguments = {"node": node_name, "name": name}
        await finish(monitor.execute("block-dirty-bitmap-remove", arguments, deadline=deadline))
    except CommandFailedError as error:
        if not any(words in error.description for words in ("not found", "Cannot find")):
            raise
