"""What a backup finds in a QEMU before its instant, and what it clears away that earlier runs have left undecided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qmpnbd.backup.plan import Catalog, DiskNow
from qmpnbd.backup.task import Template
from qmpnbd.deadline import Deadline
from qmpnbd.errors import BitmapError
from qmpnbd.qmp.bitmaps import transact
from qmpnbd.qmp.checkpoint_state import DiskCheckpoints, layers_of
from qmpnbd.qmp.checkpoints import Change, can_be_written, carry_out, plan_change, read_checkpoints
from qmpnbd.qmp.disks import Disk, chosen_disks
from qmpnbd.qmp.graph import BlockGraph, Node
from qmpnbd.qmp.inventory import read_device_types, read_inventory, read_nodes
from qmpnbd.qmp.monitor import Monitor
from qmpnbd.qmp.undecided import undecided_of

_FLASH = ("cfi.pflash01", "cfi.pflash02")
_REMOVABLE = ("ide-cd", "scsi-cd", "floppy")
_MAX_UNDECIDED = 64  # checkpoints of a chain that are decided about before it is told that nobody does so


@dataclass(frozen=True, slots=True)
class Scouted:
    """A disk before the instant.

    Attributes:
        disk: the disk.
        device: the device's type; empty for a node without one.
        node_name: its active layer, which its bitmaps are on.
        now: what is known of it.
        template: what lies below its active layer; None if nothing does.
    """

    disk: Disk
    device: str
    node_name: str
    now: DiskNow
    template: Template | None

    @property
    def is_flash(self) -> bool:
        """Whether it holds firmware or its variables."""
        return self.device in _FLASH


async def scout(
    monitor: Monitor, chain: str, disks: Sequence[str], deadline: Deadline
) -> tuple[tuple[Scouted, ...], Mapping[str, str]]:
    """Finds out what there is; changes nothing.

    Args:
        monitor: the QEMU.
        chain: chain id.
        disks: qdev ids, QOM paths or node-names; none for all of the guest's but those in removable drives.
        deadline: for QEMU's replies.

    Returns:
        The disks; and of others, by name, why they are left out.

    Raises:
        DiskError: no such disk.
        MonitorError: QEMU refused or is gone.
        DeadlineError: no reply in time.
    """
    inventory = await read_inventory(monitor, deadline)
    chosen = chosen_disks(disks, inventory.disks, inventory.graph, where=monitor.where, empty=inventory.empty)
    types = await read_device_types(monitor, chosen, deadline)
    removable = [] if disks else [each.name for each in chosen if types.get(each.qom_path) in _REMOVABLE]
    kept = [each for each in chosen if each.name not in removable]
    states = await read_checkpoints(monitor, deadline, chain=chain, disks=[each.name for each in kept])
    found = []
    for disk, state in zip(kept, states, strict=True):
        read_only, local = not can_be_written(disk, inventory), monitor.peer is not None
        device = types.get(disk.qom_path, "")
        found.append(_scouted(disk, state, inventory.graph, device, read_only=read_only, local=local))
    return tuple(found), dict.fromkeys(removable, "in a removable drive; name it to have it copied")


def _scouted(
    disk: Disk, state: DiskCheckpoints, graph: BlockGraph, device: str, *, read_only: bool, local: bool
) -> Scouted:
    node_name = (layers_of(graph, disk.node_name) or (disk.node_name,))[0]
    node = graph.nodes[node_name]
    template = _template(graph, node) if local else None
    now = DiskNow(
        name=disk.name,
        size=node.virtual_size,
        identity=_identity(graph.nodes.get(node.children.get("file", ""), node).filename, local=local),
        state=state.state,
        counts_from=state.usable[-1].backup if state.usable else None,
        read_only=read_only,
        transient=bool(state.transient_because),
        has_template=template is not None,
    )
    return Scouted(disk, device, node_name, now, template)


def _template(graph: BlockGraph, node: Node) -> Template | None:
    """Returns what lies below an active layer, if it is a file that can be seen from here."""
    below = graph.nodes.get(node.children.get("backing", ""))
    if below is None:
        return None
    path = Path(graph.nodes.get(below.children.get("file", ""), below).filename)
    return Template(str(path), below.driver, below.virtual_size) if path.is_absolute() and path.is_file() else None


def _identity(filename: str, *, local: bool) -> str:
    """Returns what tells an image from others: its name, and the file that it means, if that can be seen from here."""
    path = Path(filename)
    if not local or not path.is_absolute():
        return filename
    try:
        status = path.stat()
    except OSError:
        return filename
    return f"{filename} ({status.st_dev:x}:{status.st_ino:x})"


async def commit_published(monitor: Monitor, catalog: Catalog, deadline: Deadline) -> None:
    """Commits the checkpoint of a run that was killed after its backup had become durable, and before it did so.

    Raises:
        MonitorError: QEMU refused or is gone.
        DeadlineError: no reply in time.
    """
    if not catalog.backups:
        return
    found = undecided_of(catalog.backups[-1].id, await read_nodes(monitor, deadline))
    if found is None or not found.chain:
        return
    try:
        actions = found.commit(keep=False)
    except BitmapError:
        return  # still in use: it is merged back with the other leftovers, which is as safe
    await transact(monitor, actions, deadline)


async def settle(monitor: Monitor, chain: str, catalog: Catalog, disks: Sequence[str], deadline: Deadline) -> None:
    """Decides about checkpoints that nobody has decided about: their run was killed, and QEMU has ended since.

    That of a backup which is in the catalog is committed, another is aborted.

    Raises:
        BitmapError: a bitmap is in use, or there are too many of them.
        MonitorError: QEMU refused or is gone.
        DeadlineError: no reply in time.
    """
    for _ in range(_MAX_UNDECIDED):
        found = await read_checkpoints(monitor, deadline, chain=chain, disks=disks)
        # A mark is that of a run which lives, or may live: it decides for itself.
        pending = [each for each in found if each.state == "pending" and not each.usable[-1].mark]
        if not pending:
            return
        newest = max((each.usable[-1] for each in pending), key=lambda each: each.number)
        names = [each.disk for each in pending if each.usable[-1].number == newest.number]
        safe = catalog.find(newest.backup) is not None
        change = Change("commit" if safe else "abort", chain, names, number=newest.number)
        await carry_out(monitor, await plan_change(monitor, change, deadline), deadline)
    raise BitmapError(
        f"chain {chain} has more than {_MAX_UNDECIDED} checkpoints that nobody has decided about",
        where=monitor.where,
        remedy="Remove them: `qmpnbd checkpoint remove`.",
    )
