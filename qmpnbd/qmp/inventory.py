"""Reading what a QEMU has: its block graph, its disks, its state."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from qmpnbd.deadline import Deadline
from qmpnbd.errors import CommandFailedError, InterferenceError, UnsafeOperationError
from qmpnbd.qmp.capabilities import IOTHREAD, Abilities, abilities_of
from qmpnbd.qmp.disks import Disk, empty_drives, list_disks, users_of
from qmpnbd.qmp.graph import BlockGraph, build_graph
from qmpnbd.qmp.models import (
    BlockDeviceInfo,
    BlockExportInfo,
    BlockInfo,
    GraphReply,
    MigrationInfo,
    SchemaInfo,
    StatusInfo,
    parse_reply,
)
from qmpnbd.qmp.monitor import Monitor
from qmpnbd.qmp.schema import Schema

STORAGE_DAEMON = "storage daemon"
"""The guest status of a QEMU that has no guest."""

_EXPORTABLE = frozenset(
    {"running", "paused", "prelaunch", "suspended", "watchdog", "guest-panicked", "io-error", "shutdown", "debug"}
)
_MIGRATING = frozenset(
    {"setup", "active", "pre-switchover", "device", "postcopy-active", "postcopy-paused", "postcopy-recover", "colo"}
    | {"postcopy-recover-setup", "postcopy-device", "wait-unplug", "cancelling"}
)
_MAX_READS = 5


@dataclass(frozen=True, slots=True)
class Inventory:
    """The disks of a QEMU and the graph below them, read at one moment.

    Attributes:
        graph: all nodes and edges.
        disks: the guest's disks, then nodes without a device.
        empty: addresses of the guest's drives that have no medium.
    """

    graph: BlockGraph
    disks: tuple[Disk, ...]
    empty: tuple[str, ...] = ()


async def read_graph(monitor: Monitor, deadline: Deadline) -> BlockGraph:
    """Reads all nodes and the edges between them.

    Two commands tell them, so they are asked until nothing changed in between.

    Raises:
        InterferenceError: the graph never stood still.
        MonitorError: QEMU refused.
        DeadlineError: no reply in time.
    """
    command = "x-debug-query-block-graph"
    nodes = await read_nodes(monitor, deadline)
    for _ in range(_MAX_READS):
        reply = await monitor.execute(command, deadline=deadline)
        edges = parse_reply(GraphReply, reply, command=command, where=monitor.where)
        graph = build_graph(nodes, edges)
        nodes = await read_nodes(monitor, deadline)
        if graph == build_graph(nodes, edges):
            return graph
    raise InterferenceError(
        "the block graph changes all the time", where=monitor.where, remedy="Wait for the running block jobs."
    )


async def read_nodes(monitor: Monitor, deadline: Deadline) -> list[BlockDeviceInfo]:
    """Reads all nodes that have a name.

    Raises:
        MonitorError: QEMU refused.
        DeadlineError: no reply in time.
    """
    command = "query-named-block-nodes"
    # Without flat, each node repeats all images below it: quadratic, and more than qemu.qmp's buffer holds.
    reply = await monitor.execute(command, {"flat": True}, deadline=deadline)
    return parse_reply(list[BlockDeviceInfo], reply, command=command, where=monitor.where)


async def read_inventory(monitor: Monitor, deadline: Deadline) -> Inventory:
    """Reads the guest's disks with their whole node graph.

    Raises:
        MonitorError: QEMU refused, or the graph never stood still.
        DeadlineError: no reply in time.
    """
    graph = await read_graph(monitor, deadline)
    reply = await monitor.execute("query-block", deadline=deadline)
    blocks = parse_reply(list[BlockInfo], reply, command="query-block", where=monitor.where)
    return Inventory(graph, tuple(list_disks(blocks, graph)), tuple(empty_drives(blocks)))


async def read_device_types(monitor: Monitor, disks: Iterable[Disk], deadline: Deadline) -> dict[str, str]:
    """Returns what sort of device each disk of the guest is (``virtio-blk-pci``, ``scsi-hd``, …), by its QOM path.

    Raises:
        MonitorError: QEMU refused to tell.
        DeadlineError: no reply in time.
    """
    paths = [disk.qom_path for disk in disks if disk.attached]
    return {path: await _property(monitor, path, "type", deadline) or "" for path in paths}


async def read_exports(monitor: Monitor, deadline: Deadline) -> list[BlockExportInfo]:
    """Reads the block exports, anyone's.

    Raises:
        MonitorError: QEMU refused.
        DeadlineError: no reply in time.
    """
    reply = await monitor.execute("query-block-exports", deadline=deadline)
    return parse_reply(list[BlockExportInfo], reply, command="query-block-exports", where=monitor.where)


async def guest_status(monitor: Monitor, deadline: Deadline) -> str:
    """Returns the guest's status in QEMU's words (``running``, ``paused``, …), or `STORAGE_DAEMON`.

    Raises:
        MonitorError: QEMU refused.
        DeadlineError: no reply in time.
    """
    try:
        reply = await monitor.execute("query-status", deadline=deadline)
    except CommandFailedError as error:
        if error.error_class == "CommandNotFound":
            return STORAGE_DAEMON
        raise
    return parse_reply(StatusInfo, reply, command="query-status", where=monitor.where).status


async def require_safe_moment(monitor: Monitor, deadline: Deadline) -> str:
    """Refuses to touch disks while a migration may hand them over: an export would activate what is another host's.

    Returns:
        The guest's status; see `guest_status`.

    Raises:
        UnsafeOperationError: a migration is under way, or the disks are not this QEMU's own.
        MonitorError: QEMU refused to tell.
        DeadlineError: no reply in time.
    """
    status = await guest_status(monitor, deadline)
    if status == STORAGE_DAEMON:
        return status
    reply = await monitor.execute("query-migrate", deadline=deadline)
    migration = parse_reply(MigrationInfo, reply, command="query-migrate", where=monitor.where).status
    if status not in _EXPORTABLE or migration in _MIGRATING:
        state = f"status {status}" + (f", migration {migration}" if migration else "")
        raise UnsafeOperationError(
            f"the guest is migrating or has migrated ({state}): its disks may be another QEMU's",
            where=monitor.where,
            remedy="Wait until the migration has ended, and ask the QEMU that has the guest then.",
        )
    return status


async def read_abilities(monitor: Monitor, deadline: Deadline) -> Abilities:
    """Finds out what this QEMU can do.

    Raises:
        MonitorError: QEMU refused to tell.
        DeadlineError: no reply in time.
    """
    reply = await monitor.execute("query-qmp-schema", deadline=deadline)
    entries = parse_reply(list[SchemaInfo], reply, command="query-qmp-schema", where=monitor.where)
    return abilities_of(monitor.version, Schema(entries))


async def require_no_iothread_bug(monitor: Monitor, node_name: str, inventory: Inventory, deadline: Deadline) -> None:
    """Refuses nodes in an iothread on a QEMU that aborts when an NBD client of such a node disconnects.

    Taking down closes the export first, which even such a QEMU survives, but a killed client would not. A node runs
    where the disks run that stand on it, so all of those are looked at.

    Raises:
        UnsafeOperationError: this is such a node.
        MonitorError: QEMU refused to tell.
        DeadlineError: no reply in time.
    """
    if not IOTHREAD.applies(monitor.version):
        return
    for disk in users_of(node_name, inventory.disks, inventory.graph):
        iothread = await _iothread_of(monitor, disk, deadline)
        if iothread:
            IOTHREAD.refuse(monitor.version, f"the disk runs in the iothread {iothread}", where=f"disk {disk.name}")


async def _iothread_of(monitor: Monitor, disk: Disk, deadline: Deadline) -> str | None:
    iothread = await _property(monitor, disk.qom_path, "iothread", deadline)
    if iothread is not None:
        return iothread
    # The device has none of its own: scsi disks run where their controller does.
    bus = await _property(monitor, disk.qom_path, "parent_bus", deadline) or ""
    controller = bus.removesuffix("/" + bus.rpartition("/")[2]).removesuffix("/virtio-backend")
    return await _property(monitor, controller, "iothread", deadline) if controller else None


async def _property(monitor: Monitor, path: str, name: str, deadline: Deadline) -> str | None:
    try:
        value = await monitor.execute("qom-get", {"path": path, "property": name}, deadline=deadline)
    except CommandFailedError:
        return None  # no such property
    return value if isinstance(value, str) else None
