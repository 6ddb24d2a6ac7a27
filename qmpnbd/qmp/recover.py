"""What killed runs left in a QEMU: found by its names, and taken down."""

from __future__ import annotations

from qmpnbd.deadline import Deadline
from qmpnbd.qmp.bitmaps import remove_bitmap
from qmpnbd.qmp.exports import remove_export
from qmpnbd.qmp.inventory import read_exports, read_nodes
from qmpnbd.qmp.monitor import Monitor
from qmpnbd.qmp.naming import run_of
from qmpnbd.qmp.rundir import RunDirectory, dead_runs
from qmpnbd.qmp.server import is_ours, stop_server


async def remove_leftovers(monitor: Monitor, base: str | None, deadline: Deadline) -> list[str]:
    """Takes down what killed runs of this user left in this QEMU.

    A run is dead when nobody holds the lock of its directory; what belongs to it is known from names. Runs that
    live, and runs whose directory is not here, are left alone.

    Args:
        monitor: the QEMU.
        base: where runs make their directories; None for the folder for temporary files.
        deadline: for all of it.

    Returns:
        What was taken down, for people.

    Raises:
        MonitorError: QEMU refused or is gone.
        DeadlineError: no reply in time.
    """
    removed: list[str] = []
    for dead in dead_runs(base, for_peer=monitor.peer):
        removed += await _remove_run(monitor, dead, deadline)
    return removed


async def _remove_run(monitor: Monitor, dead: RunDirectory, deadline: Deadline) -> list[str]:
    removed = []
    for export in await read_exports(monitor, deadline):
        if run_of(export.id) == dead.run:
            await remove_export(monitor, export.id, deadline)
            removed.append(f"export {export.id}")
    for node in await read_nodes(monitor, deadline):
        for bitmap in node.dirty_bitmaps:
            if node.node_name and bitmap.name and run_of(bitmap.name) == dead.run:
                await remove_bitmap(monitor, node.node_name, bitmap.name, deadline)
                removed.append(f"bitmap {bitmap.name}")
    if await is_ours(monitor, dead, deadline) and await stop_server(monitor, dead, deadline):
        removed.append(f"NBD server at {dead.socket_path}")
    return removed
