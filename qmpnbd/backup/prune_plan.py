"""In which steps backups are removed; pure.

::

    before        1 <- 2 <- 3 <- 4        2 and 3 shall go; 5, a differential backup, stands on 3, too
                            3 <- 5
    step 1        1 <- 4' (2 and 3 merged into 4)
                  1 <- 2 <- 3 <- 5
    step 2        1 <- 4'     1 <- 5'     now nothing stands on 2 and 3

Each step is carried out whole or not at all, and after each every layer stands on one that is there. What nothing
stands on goes as soon as possible, so that its room is there for the next step.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from qmpnbd.backup.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Merge:
    """Layers that are merged into that of a backup that stays.

    Attributes:
        disk: the disk.
        over: ids of the backups whose layers go into it, nearest first.
        base: id of the backup on whose layer it stands afterwards; None if it stands on none.
    """

    disk: str
    over: tuple[str, ...]
    base: str | None


@dataclass(frozen=True, slots=True)
class Step:
    """One change of a chain.

    Attributes:
        backup: id of the backup that layers are merged into; None if none are.
        merges: what is merged into it.
        removes: ids of the backups that are removed then.
    """

    backup: str | None
    merges: tuple[Merge, ...]
    removes: tuple[str, ...]


def steps(manifests: Sequence[Manifest], removed: Collection[str]) -> tuple[Step, ...]:
    """Plans the removal of backups.

    Args:
        manifests: of all backups of the chain, in order; every base is among them.
        removed: ids of those that shall go; not the newest one.
    """
    by_id = {manifest.id: manifest for manifest in manifests}
    merging = [
        (manifest.id, merges)
        for manifest in manifests
        if manifest.id not in removed and (merges := _merges(manifest, by_id, removed))
    ]
    gone: set[str] = set()
    found: list[Step] = []
    for position in range(len(merging) + 1):
        backup, merges = merging[position - 1] if position else (None, ())
        needed = _with_bases({each for _, later in merging[position:] for merge in later for each in merge.over}, by_id)
        now = tuple(each.id for each in manifests if each.id in removed and each.id not in needed | gone)
        gone.update(now)
        if merges or now:
            found.append(Step(backup, merges, now))
    return tuple(found)


def _with_bases(backups: set[str], by_id: dict[str, Manifest]) -> set[str]:
    """Returns backups and all that any of their disks stand on: a backup is there with all of its disks or not."""
    found, new = set(backups), set(backups)
    while new:
        new = {disk.base for each in new for disk in by_id[each].disks if disk.base is not None} - found
        found |= new
    return found


def _merges(manifest: Manifest, by_id: dict[str, Manifest], removed: Collection[str]) -> tuple[Merge, ...]:
    found = []
    for disk in manifest.disks:
        over: list[str] = []
        base = disk.base
        while base is not None and base in removed:
            over.append(base)
            base = next(each.base for each in by_id[base].disks if each.name == disk.name)
        if over:
            found.append(Merge(disk.name, tuple(over), base))
    return tuple(found)
