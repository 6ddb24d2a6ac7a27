"""What a session of exports refuses on a QEMU that is known to do it wrong."""

from __future__ import annotations

from collections.abc import Iterable

from qmpnbd.deadline import Deadline
from qmpnbd.export.options import Options
from qmpnbd.qmp.capabilities import ALLOCATION_AFTER_DEPTH, IOTHREAD
from qmpnbd.qmp.disks import Disk
from qmpnbd.qmp.graph import below
from qmpnbd.qmp.inventory import Inventory, require_no_iothread_bug
from qmpnbd.qmp.monitor import Monitor


async def require_no_hazard(
    monitor: Monitor, disks: Iterable[Disk], inventory: Inventory, options: Options, deadline: Deadline
) -> None:
    """Refuses disks that cannot be exported safely or truly, unless that was allowed by name.

    Raises:
        UnsafeOperationError: the message names the hazard.
        MonitorError: QEMU refused to tell.
        DeadlineError: no reply in time.
    """
    depth = options.export.allocation_depth if options.instant is None else options.instant.depth
    allowed = {*options.allow, *([IOTHREAD.name] if options.allow_iothread else [])}
    for disk in disks:
        if options.export.iothread and options.instant is None:
            found = "its export is to run in an iothread, wherever its device does"
            IOTHREAD.refuse(monitor.version, found, where=f"disk {disk.name}", allowed=allowed)
        if IOTHREAD.name not in allowed:
            await require_no_iothread_bug(monitor, disk.node_name, inventory, deadline)
        if depth and any(node.driver == "raw" for node in below(inventory.graph, disk.node_name).values()):
            found = "an export offers both base:allocation and qemu:allocation-depth of a raw file"
            ALLOCATION_AFTER_DEPTH.refuse(monitor.version, found, where=f"disk {disk.name}", allowed=allowed)
