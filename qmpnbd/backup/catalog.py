"""What a repository holds of a chain, as far as something can be put on top of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qmpnbd.backup.backups import Backup
from qmpnbd.backup.plan import Catalog, KnownBackup, KnownDisk
from qmpnbd.backup.repository import Found, Repository
from qmpnbd.errors import RepositoryDamagedError


@dataclass(frozen=True, slots=True)
class Shelf:
    """The backups of a chain.

    Attributes:
        catalog: what can be built on.
        backups: the same, by id, to be read.
        newest: id of the newest backup whose manifest is whole; None if there is none.
        faults: what is damaged, a sentence each. Nothing is built on that.
    """

    catalog: Catalog
    backups: Mapping[str, Backup]
    newest: str | None
    faults: tuple[str, ...]


def shelf_of(repository: Repository, chain: str) -> Shelf:
    """Looks at a chain. A disk is left out of a backup if its layer, or one below it, is not there or not whole.

    Raises:
        UsageError: no chain can have this name.
        RepositoryDamagedError: the repository is to be recovered.
    """
    found = repository.inspect(chain)
    backups: dict[str, Backup] = {}
    known: list[KnownBackup] = []
    faults = [str(each.fault) for each in found if each.fault is not None]
    for each in found:
        if each.backup is None:
            continue
        disks = _sound(each.backup, known, faults)
        backups[each.backup.manifest.id] = each.backup
        known.append(KnownBackup(each.backup.manifest.id, each.backup.manifest.number, disks))
    catalog = Catalog(tuple(known), newest=max((each.name.number for each in found), default=0))
    return Shelf(catalog, backups, _newest(found), tuple(faults))


def _newest(found: Sequence[Found]) -> str | None:
    return next((each.backup.manifest.id for each in reversed(found) if each.backup is not None), None)


def _sound(backup: Backup, older: Sequence[KnownBackup], faults: list[str]) -> dict[str, KnownDisk]:
    """Returns the disks of a backup whose image is there, down to the one that stands on nothing."""
    below = {each.id: each.disks for each in older}
    found = {}
    for disk in backup.manifest.disks:
        try:
            backup.image(disk.name)
        except RepositoryDamagedError as error:
            faults.append(str(error))
            continue
        base = below.get(disk.base, {}).get(disk.name) if disk.base is not None else None
        if disk.base is None or (base is not None and base.size == disk.size):
            found[disk.name] = KnownDisk(disk.size, disk.base, disk.identity)
    return found
