"""A checkpoint begun at a point in time, and decided about when its backup is safe, or has failed.

::

    async with checkpoint_at(monitor, disks, directory, NextCheckpoint("nightly"), deadline) as begun:
        wishes = begun.wishes(Wishes())
        before = begun.before(deadline)
        async with point_in_time(monitor, disks, directory, deadline, wishes=wishes, before=before) as point:
            ...                             # copy what begun.disks[n].increment tell, or everything
        ...                                 # what was read holds: make the backup durable
        await begun.commit(deadline)        # or abort, or leave

In the transaction of the instant the bitmap that recorded until then is disabled, and the next one begins. Until it is
decided about, everything is there twice; whoever leaves the context undecided, and `qmpnbd recover` for whoever was
killed, merges it back (`qmpnbd.qmp.undecided`): nothing is lost, and the next increment holds it again.

`qmpnbd.export.session.exporting` does all of this in one call.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial

from qmpnbd.deadline import Deadline
from qmpnbd.errors import BitmapError, DeadlineError, LeftBehindError, MonitorLostError
from qmpnbd.qmp.bitmaps import transact
from qmpnbd.qmp.checkpoint_plan import Action, CheckpointPlan, DiskPlan
from qmpnbd.qmp.checkpoint_state import DiskCheckpoints
from qmpnbd.qmp.checkpoints import Change, can_be_written, plan_change, read_checkpoints
from qmpnbd.qmp.disks import find_disk
from qmpnbd.qmp.inventory import read_inventory, read_nodes
from qmpnbd.qmp.monitor import Monitor
from qmpnbd.qmp.naming import CheckpointName
from qmpnbd.qmp.plan import Offer
from qmpnbd.qmp.planning import Wishes
from qmpnbd.qmp.pointintime import Before
from qmpnbd.qmp.rundir import RunDirectory
from qmpnbd.qmp.teardown import TakeDown
from qmpnbd.qmp.undecided import Undecided, mark, undecided_of
from qmpnbd.qmp.undo import AbortCheckpoint
from qmpnbd.qmp.undoing import take_down

_READ_ONLY = "the disk is read-only: there is nothing to record"


@dataclass(frozen=True, slots=True)
class NextCheckpoint:
    """Which checkpoint to begin.

    Attributes:
        chain: chain id.
        granularity: of its bitmaps, in bytes; None for that of the ones before.
        keep: begin it although an older one is undecided, and keep the older ones when it is committed.
        newest: the highest number that a catalog knows of this chain.
        since: the checkpoint that increments shall count from; None for the newest. A disk without it is to be
            copied in full.
    """

    chain: str
    granularity: int | None = None
    keep: bool = False
    newest: int = 0
    since: int | None = None


@dataclass(frozen=True, slots=True)
class BegunDisk:
    """A disk's part in a checkpoint.

    Attributes:
        disk: the disk as it is addressed.
        node_name: the node whose bitmaps these are.
        bitmap: the one that records from the instant on; empty for a disk that is read-only.
        base: the checkpoint that the increment counts from; None for a full backup.
        increment: the bitmaps whose union is the increment, disabled at the instant; none for a full backup.
        reason: why full; empty for an increment.
        remedy: what to do about it.
        transient_because: why `bitmap` vanishes with QEMU; empty if it persists.
    """

    disk: str
    node_name: str
    bitmap: str
    base: CheckpointName | None
    increment: tuple[str, ...]
    reason: str
    remedy: str
    transient_because: str


class BegunCheckpoint:
    """A checkpoint that is begun at the instant of a point in time; made by `checkpoint_at`.

    Attributes:
        chain: chain id.
        number: of the checkpoint.
        backup: id of the backup that begins with it: the run id.
        disks: each disk's part, in the order of the caller's disks.
        decision: ``commit``, ``abort`` or ``leave`` once it is decided about; empty before.
    """

    def __init__(
        self, monitor: Monitor, plan: CheckpointPlan, wish: NextCheckpoint, disks: Mapping[str, BegunDisk]
    ) -> None:
        self.chain = plan.chain
        self.number = plan.number
        self.backup = plan.backup
        self.disks = tuple(disks.values())
        self.decision = ""
        self._monitor = monitor
        self._plan = plan
        self._wish = wish
        self._by_name = disks

    def wishes(self, wishes: Wishes) -> Wishes:
        """Returns wishes for a point in time that begins this checkpoint, and exports what was recorded until then."""
        plans = {each.before.disk: each for each in self._plan.disks}
        actions: dict[str, tuple[Mapping[str, object], ...]] = {}
        bitmaps: dict[str, tuple[str, ...]] = {}
        for number, (name, disk) in enumerate(self._by_name.items()):
            begun = plans[disk.disk].actions if disk.bitmap else ()
            marked = (mark(self.backup, number, disk.node_name),) if disk.bitmap else ()
            actions[name] = (*wishes.actions.get(name, ()), *begun, *marked)
            bitmaps[name] = tuple(dict.fromkeys((*wishes.bitmaps.get(name, ()), *disk.increment)))
        return replace(wishes, actions=actions, bitmaps=bitmaps)

    def before(self, deadline: Deadline, more: Before | None = None) -> Before:
        """Returns what is to be done just before the instant: `more`, then make sure that the plan still holds."""

        async def work(offers: Sequence[Offer]) -> None:
            if more is not None:
                await more(offers)
            planned = [each.before for each in self._plan.disks]
            names = [each.disk for each in planned]
            now = await read_checkpoints(self._monitor, deadline, chain=self.chain, disks=names)
            if [_content(each) for each in now] != [_content(each) for each in planned]:
                raise BitmapError(
                    f"somebody has changed the checkpoints of chain {self.chain} meanwhile",
                    where=self._monitor.where,
                    remedy="Try again.",
                )

        return work

    async def commit(self, deadline: Deadline) -> None:
        """The backup is safe: removes the older checkpoints, unless they shall be kept.

        Raises:
            BitmapError: a bitmap is in use, or the checkpoint is not there (any more).
            CommandFailedError: QEMU refused; nothing was changed.
            MonitorLostError: the connection ended; whether it happened is unknown.
            DeadlineError: no reply in time; it may happen still.
        """
        await self._decide("commit", partial(Undecided.commit, keep=self._wish.keep), deadline)

    async def abort(self, deadline: Deadline) -> None:
        """The backup has failed: merges what was recorded since into the checkpoint before.

        Raises:
            QmpnbdError: as `commit`.
        """
        await self._decide("abort", Undecided.abort, deadline)

    async def leave(self, deadline: Deadline) -> None:
        """Leaves it ``pending``: ``qmpnbd checkpoint commit`` or ``abort`` shall decide.

        Raises:
            QmpnbdError: as `commit`.
        """
        await self._decide("leave", Undecided.leave, deadline)

    async def _decide(self, decision: str, actions: Callable[[Undecided], list[Action]], deadline: Deadline) -> None:
        found = undecided_of(self.backup, await read_nodes(self._monitor, deadline))
        if found is None:
            raise BitmapError(
                f"checkpoint {self.number} of chain {self.chain} was not begun, or has been decided about",
                where=self._monitor.where,
                remedy="See `qmpnbd checkpoint list`.",
            )
        try:
            await transact(self._monitor, actions(found), deadline)
        except (MonitorLostError, DeadlineError) as error:
            error.remedy = f"The {decision} happens on all disks or on none: see `qmpnbd checkpoint list`."
            raise
        self.decision = decision


def _content(disk: DiskCheckpoints) -> tuple[object, ...]:
    """Returns what must not change between planning and the instant."""
    found = [(each.bitmap, each.recording, each.inconsistent) for each in disk.checkpoints]
    return disk.node_name, found


@asynccontextmanager
async def checkpoint_at(
    monitor: Monitor, disks: Sequence[str], directory: RunDirectory, wish: NextCheckpoint, deadline: Deadline
) -> AsyncIterator[BegunCheckpoint]:
    """Plans the next checkpoint of a chain, to be begun by a point in time, and merges it back if nobody decides.

    Args:
        monitor: the QEMU.
        disks: qdev ids, QOM paths or node-names, as they are given to the point in time.
        directory: the run's; kept at its end if something could not be taken down.
        wish: which checkpoint.
        deadline: for planning. Merging back has its own time.

    Yields:
        The checkpoint; in QEMU from the instant on.

    Raises:
        UsageError: a chain id or granularity that cannot be.
        BitmapError: an older checkpoint is undecided, a bitmap is in use, or no disk can be written.
        LeftBehindError: it could not be merged back; a note on any other error.
        QmpnbdError: see `qmpnbd.errors`.
    """
    begun = await _planned(monitor, disks, directory.run, wish, deadline)
    steps = TakeDown(monitor.has_gone)
    undo = AbortCheckpoint(directory.run, f"checkpoint {begun.number} of chain {begun.chain}", ())
    try:
        try:
            yield begun
        finally:
            if not begun.decision:
                await steps.step(str(undo), partial(take_down, monitor, undo, directory))
            directory.keep = directory.keep or bool(steps.left)
    except BaseException as error:
        for note in steps.left:
            error.add_note(note)
        raise
    if steps.left:
        raise LeftBehindError("; ".join(steps.left), where=monitor.where, remedy="Run `qmpnbd recover`.")


async def _planned(
    monitor: Monitor, names: Sequence[str], run: str, wish: NextCheckpoint, deadline: Deadline
) -> BegunCheckpoint:
    inventory = await read_inventory(monitor, deadline)
    found = {
        name: find_disk(name, inventory.disks, inventory.graph, where=monitor.where, empty=inventory.empty)
        for name in names
    }
    writable = [disk.name for disk in found.values() if can_be_written(disk, inventory)]
    if not writable:
        raise BitmapError(
            "no disk can be written", where=f"disk {', '.join(names)}", remedy="Leave the checkpoint out."
        )
    change = Change(
        "create",
        wish.chain,
        writable,
        granularity=wish.granularity,
        keep=wish.keep,
        backup=run,
        newest=wish.newest,
    )
    plan = _since(await plan_change(monitor, change, deadline), wish.since)
    plans = {each.before.disk: each for each in plan.disks}
    begun = {
        name: _begun(plan, plans[disk.name])
        if disk.name in plans
        else BegunDisk(disk.name, disk.node_name, "", None, (), _READ_ONLY, "Make a full backup of it.", "")
        for name, disk in found.items()
    }
    return BegunCheckpoint(monitor, plan, wish, begun)


def _since(plan: CheckpointPlan, number: int | None) -> CheckpointPlan:
    """Returns the plan with increments counted from another checkpoint."""
    if number is None:
        return plan

    def counted(disk: DiskPlan) -> DiskPlan:
        if disk.before.since(number):
            return replace(disk, base=number)
        reason = disk.reason or f"the disk has no checkpoint {number} that is usable"
        return replace(disk, base=None, reason=reason, remedy=disk.remedy or "Make a full backup of it.")

    return replace(plan, disks=tuple(map(counted, plan.disks)))


def _begun(plan: CheckpointPlan, disk: DiskPlan) -> BegunDisk:
    before = disk.before
    base = next((each for each in before.usable if each.number == disk.base), None)
    return BegunDisk(
        disk=before.disk,
        node_name=before.node_name,
        bitmap=str(CheckpointName(plan.chain, plan.number, plan.backup)),
        base=CheckpointName(plan.chain, base.number, base.backup) if base else None,
        increment=plan.bitmaps(before.disk),
        reason=disk.reason,
        remedy=disk.remedy,
        transient_because=before.transient_because,
    )
