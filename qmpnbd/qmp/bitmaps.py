"""Dirty bitmaps that tell what was written during a while; transient, and taken down with everything else."""

from __future__ import annotations

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


async def disable_bitmap(monitor: Monitor, node_name: str, name: str, deadline: Deadline) -> None:
    """Ends the recording, so that the bitmap can be exported.

    Raises:
        CommandFailedError: QEMU refused.
        MonitorLostError: the connection ended.
        DeadlineError: no reply in time.
    """
    arguments = {"node": node_name, "name": name}
    await finish(monitor.execute("block-dirty-bitmap-disable", arguments, deadline=deadline))


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
