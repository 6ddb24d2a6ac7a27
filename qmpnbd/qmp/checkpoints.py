"""Checkpoints in a running QEMU: read, planned, carried out in one transaction.

::

    async with await Monitor.connect("vm.qmp", deadline) as monitor:
        plan = await plan_change(monitor, Change("create", "nightly"), deadline)
        await carry_out(monitor, plan, deadline)        # or: put plan.actions into a transaction of your own
        ...                                             # copy what plan.bitmaps(disk) hold
        done = await plan_change(monitor, Change("commit", "nightly", number=plan.number), deadline)
        await carry_out(monitor, done, deadline)

Nothing is remembered outside QEMU: what there is, and which chain it belongs to, is read from the bitmaps' names.
`change_checkpoints` and `list_checkpoints` are for scripts without an event loop; with one, `changed` and `listed`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from qmpnbd.deadline import Deadline
from qmpnbd.errors import DeadlineError, MonitorLostError, UsageError
from qmpnbd.qmp.bitmaps import transact, transaction
from qmpnbd.qmp.checkpoint_plan import (
    CheckpointPlan,
    Operation,
    plan_abort,
    plan_commit,
    plan_create,
    plan_merge,
    plan_remove,
    require_chain_id,
)
from qmpnbd.qmp.checkpoint_state import DiskCheckpoints, chains_of, disk_checkpoints, layers_of, newest_number
from qmpnbd.qmp.disks import Disk, chosen_disks
from qmpnbd.qmp.inventory import Inventory, read_inventory, read_nodes, require_safe_moment
from qmpnbd.qmp.models import BlockDeviceInfo
from qmpnbd.qmp.monitor import Monitor
from qmpnbd.qmp.naming import new_backup

DEFAULT_SECONDS = 30.0
"""For a change: a transaction takes milliseconds, unless QEMU is busy."""


@dataclass(frozen=True, slots=True)
class Change:
    """What to do to a chain.

    Attributes:
        operation: what; see `qmpnbd.qmp.checkpoint_plan`.
        chain: chain id.
        disks: qdev ids, QOM paths or node-names; none for all of the guest's that can be written.
        number: of the checkpoint; None for the newest (commit, abort) or all (remove); merge needs one.
        granularity: of a new bitmap, in bytes; None for that of the one before it.
        keep: create although an older checkpoint is undecided, which is kept.
        backup: create: id of the backup, eight hexadecimal digits; empty for a fresh one.
        newest: create: the highest number that a catalog knows of this chain.
    """

    operation: Operation
    chain: str
    disks: Sequence[str] = ()
    number: int | None = None
    granularity: int | None = None
    keep: bool = False
    backup: str = ""
    newest: int = 0


@dataclass(frozen=True, slots=True)
class Changed:
    """What was, or in a dry run would be, done.

    Attributes:
        where: the monitor.
        qemu: QEMU's version.
        plan: what each disk's part was.
        commands: the QMP commands, as they were sent.
        dry_run: whether nothing was sent.
        after: the disks afterwards.
    """

    where: str
    qemu: str
    plan: CheckpointPlan
    commands: tuple[dict[str, object], ...]
    dry_run: bool
    after: tuple[DiskCheckpoints, ...]


@dataclass(frozen=True, slots=True)
class Listed:
    """The checkpoints of a QEMU.

    Attributes:
        where: the monitor.
        qemu: QEMU's version.
        disks: an entry for each chain on each disk.
    """

    where: str
    qemu: str
    disks: tuple[DiskCheckpoints, ...]


async def read_checkpoints(
    monitor: Monitor, deadline: Deadline, *, chain: str | None = None, disks: Sequence[str] = ()
) -> tuple[DiskCheckpoints, ...]:
    """Reads which checkpoints there are.

    Args:
        monitor: the QEMU.
        deadline: for its replies.
        chain: chain id; None for all chains that QEMU has.
        disks: qdev ids, QOM paths or node-names; none for all of the guest's.

    Returns:
        An entry for each chain on each disk, disks that have no checkpoint of it included.

    Raises:
        UsageError: not a chain id.
        DiskError: no such disk.
        MonitorError: QEMU refused or is gone.
        DeadlineError: no reply in time.
    """
    if chain is not None:
        require_chain_id(chain)
    inventory = await read_inventory(monitor, deadline)
    chosen = _chosen(disks, inventory, monitor)
    nodes = await read_nodes(monitor, deadline)
    return _states([chain] if chain is not None else chains_of(nodes), chosen, inventory, nodes)


def _states(
    chains: Sequence[str], disks: Sequence[Disk], inventory: Inventory, infos: Sequence[BlockDeviceInfo]
) -> tuple[DiskCheckpoints, ...]:
    nodes = {info.node_name: info for info in infos if info.node_name}
    return tuple(disk_checkpoints(disk, each, inventory.graph, nodes) for each in chains for disk in disks)


async def plan_change(monitor: Monitor, change: Change, deadline: Deadline) -> CheckpointPlan:
    """Reads what there is and plans a change of it; changes nothing.

    Raises:
        UsageError: a change that makes no sense.
        BitmapError: the chain's state does not allow it.
        DiskError: no such disk.
        MonitorError: QEMU refused or is gone.
        DeadlineError: no reply in time.
    """
    require_chain_id(change.chain)
    inventory = await read_inventory(monitor, deadline)
    disks = _chosen(change.disks, inventory, monitor)
    if not change.disks:
        disks = [disk for disk in disks if can_be_written(disk, inventory)]
    nodes = await read_nodes(monitor, deadline)
    states = _states([change.chain], disks, inventory, nodes)
    match change.operation:
        case "create":
            return plan_create(
                change.chain,
                states,
                change.backup or new_backup(),
                newest=max(change.newest, newest_number(change.chain, nodes)),
                granularity=change.granularity,
                keep=change.keep,
            )
        case "commit":
            return plan_commit(change.chain, states, change.number)
        case "abort":
            return plan_abort(change.chain, states, change.number)
        case "remove":
            return plan_remove(change.chain, states, change.number)
        case "merge" if change.number is not None:
            return plan_merge(change.chain, states, change.number)
    raise UsageError("which checkpoint to merge is not told", where=change.chain, remedy="Name it with --number.")


def _chosen(wanted: Sequence[str], inventory: Inventory, monitor: Monitor) -> list[Disk]:
    return chosen_disks(wanted, inventory.disks, inventory.graph, where=monitor.where, empty=inventory.empty)


def can_be_written(disk: Disk, inventory: Inventory) -> bool:
    """Returns whether a disk's active layer can be written: else there is nothing to record."""
    layers = layers_of(inventory.graph, disk.node_name)
    return bool(layers) and not inventory.graph.nodes[layers[0]].read_only


async def carry_out(monitor: Monitor, plan: CheckpointPlan, deadline: Deadline) -> None:
    """Carries out a plan in one transaction: all of it happens, or nothing.

    Raises:
        UnsafeOperationError: the guest is migrating.
        CommandFailedError: QEMU refused; nothing was changed.
        MonitorLostError: the connection ended; whether it happened is unknown.
        DeadlineError: no reply in time; it may happen still.
    """
    if not plan.actions:
        return
    await require_safe_moment(monitor, deadline)
    try:
        await transact(monitor, plan.actions, deadline)
    except (MonitorLostError, DeadlineError) as error:
        error.remedy = (
            f"The {plan.operation} happens on all disks or on none: see `qmpnbd checkpoint list`, and repeat it only "
            "if it did not happen."
        )
        raise


async def changed(
    address: str, change: Change, *, dry_run: bool = False, seconds: float | None = DEFAULT_SECONDS
) -> Changed:
    """Connects, plans, and carries out.

    Args:
        address: where QEMU's monitor listens.
        change: what to do.
        dry_run: plan only.
        seconds: time for everything; None for no bound.

    Raises:
        QmpnbdError: as `plan_change` and `carry_out`.
    """
    deadline = Deadline(seconds)
    async with await Monitor.connect(address, deadline) as monitor:
        plan = await plan_change(monitor, change, deadline)
        commands = (transaction(plan.actions),) if plan.actions else ()
        if not dry_run:
            await carry_out(monitor, plan, deadline)
        chosen = [disk.before.disk for disk in plan.disks]
        after = await read_checkpoints(monitor, deadline, chain=change.chain, disks=chosen) if chosen else ()
        return Changed(monitor.where, str(monitor.version), plan, commands, dry_run, after)


def change_checkpoints(
    address: str, change: Change, *, dry_run: bool = False, seconds: float | None = DEFAULT_SECONDS
) -> Changed:
    """Changes a chain of checkpoints; the blocking twin of `changed`."""
    return asyncio.run(changed(address, change, dry_run=dry_run, seconds=seconds))


async def listed(
    address: str, *, chain: str | None = None, disks: Sequence[str] = (), seconds: float | None = DEFAULT_SECONDS
) -> Listed:
    """Connects and reads which checkpoints there are; see `read_checkpoints`.

    Raises:
        QmpnbdError: as `read_checkpoints`.
    """
    deadline = Deadline(seconds)
    async with await Monitor.connect(address, deadline) as monitor:
        states = await read_checkpoints(monitor, deadline, chain=chain, disks=disks)
        return Listed(monitor.where, str(monitor.version), states)


def list_checkpoints(
    address: str, *, chain: str | None = None, disks: Sequence[str] = (), seconds: float | None = DEFAULT_SECONDS
) -> Listed:
    """Reads which checkpoints there are; the blocking twin of `listed`."""
    return asyncio.run(listed(address, chain=chain, disks=disks, seconds=seconds))
