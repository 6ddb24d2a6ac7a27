"""Backups removed from a chain; those that stay read the same as before, byte for byte.

A layer that others stand on is merged into theirs, which makes a full backup of an increment where the full one goes:
the machine is not asked for anything. Each step (`qmpnbd.backup.prune_plan`) is carried out whole or not at all.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from qmpnbd.backup import durable
from qmpnbd.backup.backups import Backup
from qmpnbd.backup.chain_order import Found
from qmpnbd.backup.check import Checked
from qmpnbd.backup.copy import CopyOptions
from qmpnbd.backup.journal import Change
from qmpnbd.backup.layout import MANIFEST, BackupName
from qmpnbd.backup.manifest import Link, Manifest, ManifestDisk
from qmpnbd.backup.merge import merged
from qmpnbd.backup.prune_plan import Step, steps
from qmpnbd.backup.repository import Repository
from qmpnbd.backup.retention import Moment, Policy, kept
from qmpnbd.deadline import Deadline
from qmpnbd.errors import RepositoryDamagedError, UsageError
from qmpnbd.printable import printable

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Choice:
    """What is to happen to a chain.

    Attributes:
        backups: all whose manifests are whole, in order.
        rules: id -> the rules that keep it; of those that stay.
        steps: how the others go.
        dropped: backups without a manifest that can be read, which go first.
    """

    backups: tuple[Backup, ...]
    rules: dict[str, tuple[str, ...]]
    steps: tuple[Step, ...]
    dropped: tuple[Found, ...] = ()


def choose(backups: Sequence[Backup], policy: Policy, *, where: str) -> Choice:
    """Decides which backups of a chain go.

    Args:
        backups: all of them, in order.
        policy: which ones stay.
        where: the chain, for messages.

    Raises:
        UsageError: no rule was given.
    """
    if policy.keeps_nothing:
        remedy = "Say how many backups to keep, with --keep-last for one."
        raise UsageError("nothing says which backups are to be kept", where=where, remedy=remedy)
    numbers = kept((Moment(each.manifest.number, each.manifest.instant) for each in backups), policy)
    rules = {each.manifest.id: numbers[each.manifest.number] for each in backups if each.manifest.number in numbers}
    return _choice(backups, rules)


def choose_without(backups: Sequence[Backup], removed: Collection[str], *, where: str) -> Choice:
    """Decides that certain backups of a chain go.

    Args:
        backups: all of them, in order.
        removed: ids of those that go.
        where: the chain, for messages.

    Raises:
        UsageError: the newest one is among them.
    """
    if backups and backups[-1].manifest.id in removed:
        remedy = "The next increment stands on it: make another backup first."
        raise UsageError(f"{backups[-1].name} is the newest backup", where=where, remedy=remedy)
    return _choice(backups, {each.manifest.id: () for each in backups if each.manifest.id not in removed})


def choose_restorable(checked: Checked, chain: str, *, where: str) -> Choice:
    """Decides that those backups of a chain go of which a disk cannot be restored and proved; the newest may be one.

    Args:
        checked: what a check found, with all content read.
        chain: the chain.
        where: the chain, for messages.

    Raises:
        UsageError: nothing would be left.
        RepositoryDamagedError: two backups have one id.
    """
    found = checked.found[chain]
    if len({each.name.id for each in found}) < len(found):
        remedy = "Move away the one that does not belong there."
        raise RepositoryDamagedError("two backups have the same id", where=where, remedy=remedy)
    broken = {backup for in_chain, backup, _ in checked.broken if in_chain == chain}
    whole = [each.backup for each in found if each.backup is not None]
    if not {each.manifest.id for each in whole} - broken:
        remedy = (
            "Begin another chain. Restore the disks that are whole before you remove the folder of this one: "
            "'qmpnbd repository check --content' tells the others."
        )
        raise UsageError("no backup of the chain can be restored with all its disks", where=where, remedy=remedy)
    choice = _choice(whole, {each.manifest.id: () for each in whole if each.manifest.id not in broken})
    dropped = tuple(each for each in found if each.backup is None)
    # A step without merges even where nothing goes: the links across what is missing are made anew.
    return replace(choice, steps=(Step(None, (), ()), *choice.steps), dropped=dropped)


def _choice(backups: Sequence[Backup], rules: dict[str, tuple[str, ...]]) -> Choice:
    removed = {each.manifest.id for each in backups} - rules.keys()
    return Choice(tuple(backups), rules, steps([each.manifest for each in backups], removed))


def carry_out(repository: Repository, choice: Choice, options: CopyOptions, deadline: Deadline) -> None:
    """Removes what was chosen; the repository must be locked.

    Args:
        repository: that the backups are in.
        choice: what goes.
        options: of the copies that merging needs; hashes are always made.
        deadline: how long it may take; what was done by then stays done.

    Raises:
        UsageError: the repository is not locked.
        RepositoryBusyError: somebody reads.
        RepositoryDamagedError: something that is needed is missing, cut or rotten; nothing of that step was done.
        NotProvedError: a merged layer does not read as it was written; nothing of that step was done.
        TargetError: no room for the merged layers, or the file system refuses; nothing of that step was done.
        ImageError: the branch says what is wrong with which image.
        DeadlineError: the time ran out.
    """
    with repository.alone():
        backups, dropped = choice.backups, [each.name for each in choice.dropped]
        for step in choice.steps:
            deadline.check("backups to be removed", printable(str(repository.path)))
            backups = _carry_out(backups, step, dropped, options, deadline)
            dropped = []


def _carry_out(
    backups: Sequence[Backup], step: Step, dropped: Sequence[BackupName], options: CopyOptions, deadline: Deadline
) -> tuple[Backup, ...]:
    """Carries out a step, and drops what is not among the backups; returns those that are there afterwards."""
    others = {each.manifest.id: each for each in backups}
    change = Change(backups[0].path.parent)
    try:
        replaced: dict[BackupName, list[str]] = {}
        after: list[Backup] = []
        for backup in (each for each in backups if each.manifest.id not in step.removes):
            manifest, files = backup.manifest, list[str]()
            if manifest.id == step.backup:
                place = change.place(backup.name)
                disks = {
                    each.disk: merged(backup, each, others, place=place, options=options, deadline=deadline)
                    for each in step.merges
                }
                manifest = _with_disks(manifest, disks)
                files = [name for disk in disks.values() for name in (disk.file, disk.hashes)]
            manifest = _linked(manifest, after[-1].manifest if after else None)
            after.append(Backup(manifest, backup.path))
            if manifest != backup.manifest:
                durable.write(change.place(backup.name) / MANIFEST, manifest.to_json())
                replaced[backup.name] = [*files, MANIFEST]
        removed = [*dropped, *(others[each].name for each in step.removes)]
        change.commit(replaced, removed)
    finally:
        change.discard()
    log.info("merged into %s, removed %s", step.backup or "nothing", ", ".join(map(str, removed)) or "nothing")
    return tuple(after)


def _with_disks(manifest: Manifest, disks: Mapping[str, ManifestDisk]) -> Manifest:
    return manifest.model_copy(update={"disks": tuple(disks.get(each.name, each) for each in manifest.disks)})


def _linked(manifest: Manifest, before: Manifest | None) -> Manifest:
    """Returns the manifest with the right backup before it, and its digest."""
    link = Link(id=before.id, core=before.core_digest) if before is not None else None
    return manifest.model_copy(update={"before": link}).sealed()
