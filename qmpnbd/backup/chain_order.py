"""The order of a chain: what its folders hold, whether each is in its place, and which one a time stands for; pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from qmpnbd.backup.backups import Backup
from qmpnbd.backup.layout import BackupName
from qmpnbd.backup.manifest import Manifest
from qmpnbd.errors import RepositoryDamagedError, UsageError
from qmpnbd.printable import printable


@dataclass(frozen=True, slots=True)
class Found:
    """A folder in a chain that is called like a backup.

    Attributes:
        name: number and id, by its name.
        path: the folder.
        backup: what it holds; None if its manifest is damaged.
        fault: what is wrong with the manifest, or with its place in the chain.
    """

    name: BackupName
    path: Path
    backup: Backup | None
    fault: RepositoryDamagedError | None


def misplaced(backup: Backup, older: list[Found]) -> RepositoryDamagedError | None:
    """Returns what is wrong with the place of a backup after the `older` ones; None if nothing is."""
    before, what = backup.manifest.before, ""
    whole = [each.backup.manifest for each in older if each.backup is not None]
    if before is None:
        what = f"it is the first of its chain, and {older[-1].name} lies before it" if whole else ""
    elif before.id not in {each.id for each in whole}:
        if before.id not in {each.name.id for each in older}:
            what = f"the backup before it, {before.id}, is missing"
    elif whole[-1].id != before.id:
        what = f"backup {older[-1].name} is foreign: {before.id} comes before it, and nothing in between"
    elif whole[-1].core_digest != before.core:
        what = f"the backup before it, {before.id}, is not the one that was there when it was written"
    what = what or next(_baseless(backup, whole), "")
    if not what:
        return None
    remedy = "Fetch the chain from a copy of the repository; see 'qmpnbd repository check' for what can be restored."
    return RepositoryDamagedError(what, where=printable(str(backup.path)), remedy=remedy)


def _baseless(backup: Backup, older: list[Manifest]) -> Iterator[str]:
    """Yields, for each disk whose layer stands on what is not among the `older` backups, that it does."""
    held = {(each.id, disk.name) for each in older for disk in each.disks}
    for disk in backup.manifest.disks:
        if disk.base is not None and (disk.base, disk.name) not in held:
            yield f"disk {printable(disk.name)} stands on backup {disk.base}, which is missing or does not hold it"


def not_after(found: Sequence[Found], moment: datetime) -> list[Found]:
    """Returns the newest backup that is not after a moment, if there is one.

    Raises:
        RepositoryDamagedError: it may be one whose manifest does not tell when it was made.
    """
    newest = max(
        (at for at, each in enumerate(found) if each.backup and each.backup.manifest.instant <= moment), default=-1
    )
    for later in found[newest + 1 :]:
        if later.backup is not None:
            break
        if later.fault is not None:
            raise later.fault
    return list(found[newest : newest + 1]) if newest >= 0 else []


def moment_of(text: str) -> datetime:
    """Returns the time that a text tells in ISO 8601; UTC unless it says otherwise.

    Raises:
        UsageError: it tells none.
    """
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        what = f"{printable(text)!r} is no backup"
        remedy = "Give an id, a number, 'latest', or a time: 2026-11-24T12:00:00Z."
        raise UsageError(what, where="backup", remedy=remedy) from error
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
