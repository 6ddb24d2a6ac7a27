"""What to do to the bitmaps of a chain of checkpoints; pure: states in, transaction actions out.

A checkpoint is a point in time of a chain of backups. Its bitmap records what was written since, until the next point
in time, where it is disabled and the next one begins in the same transaction::

    T1          T2          T3        now
     |--- c1 ---|--- c2 ---|--- c3 --->      since T2 was written: c2 and c3 together

So a name always tells the truth: all that was written since checkpoint N is in the bitmaps N and newer of its chain.
Whoever takes a bitmap away keeps that true:

- create   add the new bitmap, disable the one before. What the one before recorded is the next increment.
- commit   the copy is safe: remove the older bitmaps.
- abort    the copy failed: enable the one before, merge the new one into it, remove the new one.
- merge    the same with a checkpoint in the middle: what it recorded goes to the one before.
- remove   give up a checkpoint, and with it the older ones, which would have a gap.

Each is one transaction over all disks, and QEMU does all of it or nothing. Within it bitmaps overlap (added before
disabled, enabled before merged): where a QEMU lets a write in between two actions, it is recorded twice, never not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from qmpnbd.errors import BitmapError, UsageError
from qmpnbd.qmp.checkpoint_state import REASONS, Checkpoint, DiskCheckpoints
from qmpnbd.qmp.naming import CHAIN_ID, MAX_CHAIN_ID, CheckpointName, checkpoint_of

Operation = Literal["create", "commit", "abort", "merge", "remove"]
Action = dict[str, object]

MIN_GRANULARITY = 512
MAX_GRANULARITY = 1 << 31
"""QEMU takes powers of two in this range ("block-dirty-bitmap-add")."""


@dataclass(frozen=True, slots=True)
class DiskPlan:
    """What is done on one disk.

    Attributes:
        before: the disk as it was found.
        actions: for the transaction, in this order.
        base: since which checkpoint an increment can be made at this point in time (create); None for a full backup.
        reason: why full, or why nothing is done; empty otherwise.
        remedy: what to do about it.
    """

    before: DiskCheckpoints
    actions: tuple[Action, ...] = ()
    base: int | None = None
    reason: str = ""
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class CheckpointPlan:
    """One operation over all disks.

    Attributes:
        operation: what is done.
        chain: chain id.
        number: of the checkpoint; 0 where all are meant.
        disks: each disk's part.
        backup: create: id of the backup that begins; empty otherwise.
    """

    operation: Operation
    chain: str
    number: int
    disks: tuple[DiskPlan, ...]
    backup: str = ""

    @property
    def actions(self) -> list[Action]:
        """All of them, to be put in one transaction with whatever else happens at that instant."""
        return [action for disk in self.disks for action in disk.actions]

    def bitmaps(self, disk: str) -> tuple[str, ...]:
        """Returns the bitmaps whose union is the increment of a disk at a point in time made by `plan_create`."""
        for plan in self.disks:
            if plan.before.disk == disk and plan.base is not None:
                return tuple(each.bitmap for each in plan.before.since(plan.base))
        return ()


def require_chain_id(chain: str) -> None:
    """Refuses what is no chain id.

    Raises:
        UsageError: it is none.
    """
    if not CHAIN_ID.fullmatch(chain):
        raise UsageError(
            "not a chain id",
            where=chain,
            remedy=f"Use 1 to {MAX_CHAIN_ID} letters, digits, - and _, beginning with a letter or digit.",
        )


def require_granularity(granularity: int | None) -> None:
    """Refuses a granularity that QEMU does not take; None leaves the choice to QEMU.

    Raises:
        UsageError: not a power of two from 512 bytes to 2 GiB.
    """
    if granularity is not None and (
        not MIN_GRANULARITY <= granularity <= MAX_GRANULARITY or granularity & (granularity - 1)
    ):
        raise UsageError(
            "not a granularity",
            where=str(granularity),
            remedy=f"A bitmap's granularity is a power of two from {MIN_GRANULARITY} to {MAX_GRANULARITY} bytes.",
        )


def plan_create(
    chain: str,
    disks: Sequence[DiskCheckpoints],
    backup: str,
    *,
    newest: int = 0,
    granularity: int | None = None,
    keep: bool = False,
) -> CheckpointPlan:
    """Plans the next checkpoint.

    Its number is one more than any that is known, so that one number is one instant. A catalog of backups still must
    go by the bitmap's whole name: after a crash of QEMU, all that is known may be forgotten.

    A disk without a usable checkpoint (new, or its bitmap lost) begins anew, and its useless bitmaps are removed.

    Args:
        chain: chain id.
        disks: the chain on each disk.
        backup: id of the backup that begins (`qmpnbd.qmp.naming.new_backup`).
        newest: the highest number known elsewhere: on other disks, in a catalog.
        granularity: bytes; None for that of the disk's newest checkpoint, or QEMU's choice (64 KiB as a rule).
        keep: keep undecided checkpoints, to have a choice of the base of an increment.

    Raises:
        UsageError: a chain id, backup id or granularity that cannot be.
        BitmapError: an older checkpoint is undecided, or a bitmap is in use.
    """
    require_chain_id(chain)
    require_granularity(granularity)
    name = CheckpointName(chain, 1 + max(newest, _newest(disks)), backup)
    if checkpoint_of(str(name)) != name:
        raise UsageError(
            "not a backup id or number", where=str(name), remedy="A backup id has eight hexadecimal digits."
        )
    undecided = [disk.disk for disk in disks if disk.state == "pending"]
    if undecided and not keep:
        raise BitmapError(
            f"the last checkpoint of chain {chain} is undecided",
            where=f"disk {', '.join(undecided)}",
            remedy="Commit it if its backup is safe, abort it if not; or keep it with --keep.",
        )
    plans = tuple(_create(disk, name, granularity) for disk in disks)
    return CheckpointPlan("create", chain, name.number, plans, backup)


def _newest(disks: Iterable[DiskCheckpoints]) -> int:
    return max((each.number for disk in disks for each in (*disk.checkpoints, *disk.displaced)), default=0)


def _create(disk: DiskCheckpoints, name: CheckpointName, granularity: int | None) -> DiskPlan:
    usable = disk.usable
    useless = disk.checkpoints[: len(disk.checkpoints) - len(usable)]
    _require_idle(disk, (*useless, *usable[-1:]))
    added: Action = {
        "node": disk.node_name,
        "name": str(name),
        "persistent": not disk.transient_because,
    }
    if granularity is None and usable:
        granularity = usable[-1].granularity
    if granularity is not None:
        added["granularity"] = granularity
    actions: list[Action] = [
        *_removed(useless),
        {"type": "block-dirty-bitmap-add", "data": added},
        *(_on(each, "disable") for each in usable[-1:]),
    ]
    reason, remedy = ("", "") if usable else REASONS[disk.state]
    return DiskPlan(disk, tuple(actions), usable[-1].number if usable else None, reason, remedy)


def plan_commit(chain: str, disks: Sequence[DiskCheckpoints], number: int | None = None) -> CheckpointPlan:
    """Plans to keep a checkpoint and to remove the older ones: its backup is safe.

    Args:
        chain: chain id.
        disks: the chain on each disk.
        number: the checkpoint; None for the newest.

    Raises:
        BitmapError: there is none, or a bitmap is in use.
    """
    number = _existing(chain, disks, number)

    def commit(disk: DiskCheckpoints) -> DiskPlan:
        if all(each.number != number for each in disk.checkpoints):
            return _nothing(disk, number)
        older = [each for each in disk.checkpoints if each.number < number]
        _require_idle(disk, older)
        decided = [each for each in disk.checkpoints if each.number == number]
        return DiskPlan(disk, (*_removed(older), *_unmarked(decided)))

    return CheckpointPlan("commit", chain, number, tuple(map(commit, disks)))


def plan_abort(chain: str, disks: Sequence[DiskCheckpoints], number: int | None = None) -> CheckpointPlan:
    """Plans to undo the newest checkpoint: its backup failed. What was recorded since is kept by the one before.

    A disk on which it is the only one had none before, and has none afterwards.

    Args:
        chain: chain id.
        disks: the chain on each disk.
        number: the checkpoint; None for the newest, if that is undecided on at least one disk.

    Raises:
        BitmapError: there is none, nothing is undecided, there is a newer one, or a bitmap is in use.
    """
    if number is None and not any(disk.state == "pending" for disk in disks):
        raise BitmapError(
            f"no checkpoint of chain {chain} is undecided",
            where=_names(disks),
            remedy="If the very first backup of a chain failed, name its checkpoint with --number.",
        )
    number = _existing(chain, disks, number)
    if number != _newest(disks):
        raise BitmapError(
            f"checkpoint {number} of chain {chain} is not the newest",
            where=_names(disks),
            remedy="Abort the newest first, or take this one out with `checkpoint merge`.",
        )
    return fold_back(chain, disks, number)


def fold_back(chain: str, disks: Sequence[DiskCheckpoints], number: int) -> CheckpointPlan:
    """Plans to undo a checkpoint wherever it stands: what it recorded goes to the one before.

    A disk on which it is the oldest had none before, and has none of it afterwards.

    Raises:
        BitmapError: a bitmap is in use.
    """
    plans = tuple(_fold(disk, number, first=lambda each: _removed((each,))) for disk in disks)
    return CheckpointPlan("abort", chain, number, plans)


def plan_merge(chain: str, disks: Sequence[DiskCheckpoints], number: int) -> CheckpointPlan:
    """Plans to take a checkpoint out of its chain; what it recorded goes to the one before.

    Raises:
        BitmapError: there is none, it is the oldest, or a bitmap is in use.
    """
    _existing(chain, disks, number)

    def oldest(checkpoint: Checkpoint) -> tuple[Action, ...]:
        raise BitmapError(
            f"checkpoint {number} of chain {chain} is the oldest: there is none to merge it into",
            where=f"node {checkpoint.node_name}",
            remedy="Remove it with `checkpoint remove`.",
        )

    return CheckpointPlan("merge", chain, number, tuple(_fold(disk, number, first=oldest) for disk in disks))


def _fold(disk: DiskCheckpoints, number: int, *, first: Callable[[Checkpoint], tuple[Action, ...]]) -> DiskPlan:
    """Plans to merge a checkpoint into the one before it; `first` tells what is done with one that is the first."""
    numbers = [each.number for each in disk.checkpoints]
    if number not in numbers:
        return _nothing(disk, number)
    index = numbers.index(number)
    checkpoint = disk.checkpoints[index]
    _require_idle(disk, disk.checkpoints[max(0, index - 1) : index + 1])
    if index == 0:
        return DiskPlan(disk, first(checkpoint))
    before = disk.checkpoints[index - 1]
    if checkpoint.inconsistent or before.inconsistent:
        reason, remedy = REASONS["inconsistent"]
        return DiskPlan(disk, _unmarked((checkpoint,)), reason=reason, remedy=remedy)
    merged = {"node": disk.node_name, "target": before.bitmap, "bitmaps": [checkpoint.bitmap]}
    return DiskPlan(
        disk,
        (
            *((_on(before, "enable"),) if checkpoint.recording else ()),
            {"type": "block-dirty-bitmap-merge", "data": merged},
            *_removed((checkpoint,)),
        ),
    )


def plan_remove(chain: str, disks: Sequence[DiskCheckpoints], number: int | None = None) -> CheckpointPlan:
    """Plans to give up checkpoints; those of lower layers are removed where the layer can be written.

    Args:
        chain: chain id.
        disks: the chain on each disk.
        number: the newest to go, the older ones go with it; None for all.

    Raises:
        BitmapError: there is none of this number, or a bitmap is in use.
    """
    if number is not None:
        _existing(chain, disks, number)

    def remove(disk: DiskCheckpoints) -> DiskPlan:
        doomed = [e for e in (*disk.displaced, *disk.checkpoints) if number is None or e.number <= number]
        can_go = [each for each in doomed if each.removable]
        _require_idle(disk, can_go)
        stays = ", ".join(each.bitmap for each in doomed if not each.removable)
        return DiskPlan(
            disk,
            _removed(can_go),
            reason=f"in a layer that is read-only: {stays}" if stays else "",
            remedy="It does no harm there; `qemu-img bitmap --remove` removes it while no QEMU uses the image."
            if stays
            else "",
        )

    return CheckpointPlan("remove", chain, number or 0, tuple(map(remove, disks)))


def _existing(chain: str, disks: Sequence[DiskCheckpoints], number: int | None) -> int:
    require_chain_id(chain)
    wanted = number if number is not None else _newest(disks)
    known = sorted({each.number for disk in disks for each in (*disk.checkpoints, *disk.displaced)})
    if wanted not in known:
        which = f"checkpoint {number}" if number is not None else "checkpoint"
        listed = f"It has {', '.join(map(str, known))}." if known else "`qmpnbd checkpoint list` shows what there is."
        raise BitmapError(f"chain {chain} has no {which}", where=_names(disks), remedy=listed)
    return wanted


def _nothing(disk: DiskCheckpoints, number: int) -> DiskPlan:
    reason, remedy = REASONS[disk.state]
    return DiskPlan(disk, reason=reason or f"the disk has no checkpoint {number}", remedy=remedy)


def _require_idle(disk: DiskCheckpoints, checkpoints: Iterable[Checkpoint]) -> None:
    for each in checkpoints:
        if each.busy:
            raise BitmapError(
                f"the bitmap {each.bitmap} is in use by an export or a job",
                where=f"disk {disk.disk}",
                remedy="End the export or job first: a backup that is still being read is neither safe nor failed.",
            )


def _removed(checkpoints: Iterable[Checkpoint]) -> tuple[Action, ...]:
    """Returns what removes checkpoints, and their marks with them."""
    found = tuple(checkpoints)
    return (*(_on(each, "remove") for each in found), *_unmarked(found))


def _unmarked(checkpoints: Iterable[Checkpoint]) -> tuple[Action, ...]:
    """Returns what says that checkpoints have been decided about; in the same transaction as the decision."""
    return tuple(bitmap_action("remove", each.node_name, each.mark) for each in checkpoints if each.mark)


def _on(checkpoint: Checkpoint, verb: str) -> Action:
    return bitmap_action(verb, checkpoint.node_name, checkpoint.bitmap)


def bitmap_action(verb: str, node_name: str, name: str) -> Action:
    """Returns the transaction action that does something to one bitmap."""
    return {"type": f"block-dirty-bitmap-{verb}", "data": {"node": node_name, "name": name}}


def _names(disks: Iterable[DiskCheckpoints]) -> str:
    return "disk " + (", ".join(disk.disk for disk in disks) or "none")
