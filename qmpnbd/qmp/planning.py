"""From what people ask for and what a QEMU has to the plan of a point in time; asks, and changes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qmpnbd.deadline import Deadline
from qmpnbd.errors import BitmapError, DiskBusyError, NoSuchDiskError, ScratchError
from qmpnbd.qmp.capabilities import IOTHREAD
from qmpnbd.qmp.disks import Disk, find_disk
from qmpnbd.qmp.graph import FILTER_DRIVERS, MAX_CHAIN, BlockGraph
from qmpnbd.qmp.inventory import (
    Inventory,
    read_inventory,
    read_nodes,
    require_no_iothread_bug,
    require_safe_moment,
)
from qmpnbd.qmp.models import BlockDeviceInfo
from qmpnbd.qmp.monitor import Monitor
from qmpnbd.qmp.naming import Role, role_of
from qmpnbd.qmp.plan import Plan, PlannedDisk, Recipe
from qmpnbd.qmp.recipes import OFFLOADS_BEFORE, Surroundings, choose_recipe, make_plan
from qmpnbd.qmp.rundir import RunDirectory
from qmpnbd.qmp.scratch import limit_of, threshold_of

_RAW_UNIT = 65536
_SUBCLUSTERS = 32


@dataclass(frozen=True, slots=True)
class Wishes:
    """How a point in time shall be taken.

    Attributes:
        protect_guest: a scratch that fails must not fail a write of the guest, for which it is paused some
            milliseconds; where QEMU cannot do that, the statement says so.
        exact_chain: the disk's own chain must be exported as it was, the guest writing into an overlay meanwhile.
        depth: whether the exact allocation depth of the instant is wanted; it costs a bitmap and an export a disk.
        scratch_dir: where scratch images lie; None for the run's directory. For `exact_chain` it must be given, and be
            a place that lasts: should QEMU die, the guest's newest data is there.
        scratch_bytes: for all disks together; None for most of what is free.
        bitmaps: disk as named by the caller -> dirty bitmaps to export with it.
        actions: disk as named by the caller -> transaction actions for the instant.
        start_server: whether to start an NBD server; False if one runs already and is shared.
        allow_iothread: work on disks in an iothread although this QEMU is known to abort on them.
        allow: names of hazards to take the risk of (`qmpnbd.qmp.capabilities.HAZARDS`): ``snapshot-access`` has
            `protect_guest` honoured by a QEMU that may show wrong data; ``iothread`` is the same as `allow_iothread`.
    """

    protect_guest: bool = False
    exact_chain: bool = False
    depth: bool = True
    scratch_dir: str | None = None
    scratch_bytes: int | None = None
    bitmaps: Mapping[str, Sequence[str]] = field(default_factory=dict)
    actions: Mapping[str, Sequence[Mapping[str, object]]] = field(default_factory=dict)
    start_server: bool = True
    allow_iothread: bool = False
    allow: frozenset[str] = frozenset()


async def plan_point_in_time(
    monitor: Monitor, disks: Sequence[str], directory: RunDirectory, deadline: Deadline, wishes: Wishes | None = None
) -> Plan:
    """Plans a point in time, and changes nothing: `Plan.commands` is what a dry run prints.

    Args:
        monitor: the QEMU.
        disks: qdev ids, QOM paths or node-names.
        directory: the run's.
        deadline: for QEMU's replies.
        wishes: how.

    Raises:
        QmpnbdError: it cannot be taken: unknown or busy disks, no scratch space, a guest that migrates.
    """
    wished = wishes or Wishes()
    guest = await require_safe_moment(monitor, deadline)
    inventory = await read_inventory(monitor, deadline)
    nodes = {node.node_name: node for node in await read_nodes(monitor, deadline)}
    planned = []
    for name in disks:
        disk = find_disk(name, inventory.disks, inventory.graph, where=monitor.where, empty=inventory.empty)
        if not wished.allow_iothread and IOTHREAD.name not in wished.allow:
            await require_no_iothread_bug(monitor, disk.node_name, inventory, deadline)
        planned.append(_planned(name, disk, inventory, nodes, wished))
    release = (monitor.version.qemu.major, monitor.version.qemu.minor)
    recipe, why = choose_recipe(
        release,
        planned,
        protect_guest=wished.protect_guest,
        exact_chain=wished.exact_chain,
        allow=wished.allow,
    )
    if recipe is Recipe.COPY_BEFORE_WRITE:
        for each in planned:
            _require_disabled(each, nodes[each.node_name])
    if recipe is Recipe.SNAPSHOT and wished.scratch_dir is None:
        raise ScratchError(
            "no place for the overlays that the guest will write into",
            where=monitor.where,
            remedy="Name a folder that lasts, beside the images: should QEMU die, the guest's newest data is there.",
        )
    folder = wished.scratch_dir or str(directory.path)
    threshold = 0 if recipe is Recipe.SNAPSHOT else threshold_of(limit_of(folder, len(planned), wished.scratch_bytes))
    around = Surroundings(
        run=directory.run,
        scratch_dir=folder,
        socket_path=str(directory.socket_path) if wished.start_server else "",
        threshold=threshold,
        depth=wished.depth,
        guest_runs=guest == "running",
        guest_is_well=guest != "io-error",
        offloads=release < OFFLOADS_BEFORE,
    )
    return make_plan(recipe, why, planned, around)


def _planned(
    name: str, disk: Disk, inventory: Inventory, nodes: Mapping[str | None, BlockDeviceInfo], wished: Wishes
) -> PlannedDisk:
    node_name = _format_node(inventory.graph, disk)
    image = nodes[node_name].image
    unit = image.cluster_size or _RAW_UNIT
    if image.format_specific is not None and image.format_specific.data.extended_l2:
        unit //= _SUBCLUSTERS
    protocol = inventory.graph.nodes.get(inventory.graph.nodes[node_name].children.get("file", ""))
    return PlannedDisk(
        name=disk.name,
        qom_path=disk.qom_path,
        node_name=node_name,
        size=image.virtual_size,
        unit=unit,
        filter=disk.node_name if disk.node_name != node_name else "",
        file=(protocol.filename if protocol else image.filename, nodes[node_name].drv),
        bitmaps=tuple(wished.bitmaps.get(name, ())),
        actions=tuple(wished.actions.get(name, ())),
    )


def _require_disabled(disk: PlannedDisk, node: BlockDeviceInfo) -> None:
    """Refuses a bitmap that would not stand still: through snapshot-access QEMU exports one that records, too."""
    disabled = [action["data"] for action in disk.actions if action["type"] == "block-dirty-bitmap-disable"]
    for bitmap in node.dirty_bitmaps:
        chosen = bitmap.name in disk.bitmaps and bitmap.recording
        if chosen and {"node": disk.node_name, "name": bitmap.name} not in disabled:
            raise BitmapError(
                f"the bitmap {bitmap.name} still records, so it would not be that of the instant",
                where=f"disk {disk.name}",
                remedy="Disable it, and have another one go on in the same transaction if nothing may be lost.",
            )


def _format_node(graph: BlockGraph, disk: Disk) -> str:
    """Returns the node below a disk's filters: only from there are allocation depths right."""
    node = graph.nodes.get(disk.node_name)
    for _ in range(MAX_CHAIN):
        if node is None:
            break
        if node.driver not in FILTER_DRIVERS:
            return node.name
        if role_of(node.name) in (Role.FILTER, Role.COPY):
            raise DiskBusyError(
                f"another point in time is held: {node.name}",
                where=f"disk {disk.name}",
                remedy="Wait for its end. If its qmpnbd was killed, run `qmpnbd recover`.",
            )
        node = graph.nodes.get(node.children.get("backing") or node.children.get("file") or "")
    raise NoSuchDiskError("QEMU does not describe its node", where=f"disk {disk.name}")
