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
    for disk in disks:
        if not options.allow_iothread and IOTHREAD.name not in options.allow:
            await require_no_iothread_bug(monitor, disk.node_name, inventory, deadline)
        if depth and any(node.driver == "raw" for node in below(inventory.graph, disk.node_name).values()):
            found = "an export offers both base:allocation and qemu:allocation-depth of a raw file"
            ALLOCATION_AFTER_DEPTH.refuse(monitor.version, found, where=f"disk {disk.name}", allowed=options.allow)
