"""A disk at a point in time: found in a repository, and opened for reading.

::

    find        chain, backup, disk  ->  the backups whose layers make up the disk
    open        their files, each once, and their hashes

Nobody prunes meanwhile. Afterwards somebody may: what is open stays what it was.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from qmpnbd.backup.backups import Backup
from qmpnbd.backup.layers import RestoreSource, StoredLayer
from qmpnbd.backup.manifest import ManifestDisk
from qmpnbd.backup.repository import Repository, chain_of
from qmpnbd.backup.template import open_template
from qmpnbd.deadline import Deadline
from qmpnbd.errors import NoSuchBackupError, UsageError
from qmpnbd.printable import printable

LATEST = "latest"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked for.

    Attributes:
        repository: its folder.
        backup: an id, a number, ``latest`` or a time.
        chain: the chain; empty for the only one.
        disk: the disk; empty for the only one.
        template: the image that shallow backups stand on; empty if there is none. The name that a manifest has for it
            is not followed: a repository does not decide which files of this host are read.
    """

    repository: str
    backup: str = LATEST
    chain: str = ""
    disk: str = ""
    template: str = ""


@dataclass(frozen=True, slots=True)
class Point:
    """A disk of a backup.

    Attributes:
        backup: the backup.
        disk: the disk in it.
        layers: the backups whose layers make it up, newest first.
        template: the image that the last of them stands on; empty if there is none.
    """

    backup: Backup
    disk: ManifestDisk
    layers: tuple[Backup, ...]
    template: str

    @property
    def where(self) -> str:
        """The backup and the disk, for messages."""
        return printable(f"{self.backup.path}: disk {self.disk.name}")

    @property
    def image(self) -> Path:
        """The backup's image, the active layer.

        Raises:
            RepositoryDamagedError: it is missing or has another size.
        """
        return self.backup.image(self.disk.name)


def chosen_chain(repository: Repository, chain: str) -> str:
    """Returns a chain, or the only one of a repository.

    Raises:
        NoSuchBackupError: there is none.
        UsageError: there are several, and none was named.
    """
    chains = repository.chains()
    where = printable(str(repository.path))
    if chain:
        if chain not in chains:
            remedy = f"Its chains: {', '.join(chains) or 'none'}."
            raise NoSuchBackupError(f"there is no chain {printable(chain)!r}", where=where, remedy=remedy)
        return chain
    if not chains:
        raise NoSuchBackupError("there is no backup in it", where=where)
    if len(chains) > 1:
        raise UsageError(f"it has {len(chains)} chains", where=where, remedy=f"Give --chain: {', '.join(chains)}.")
    return chains[0]


def find_point(wanted: Wanted) -> Point:
    """Finds a disk of a backup.

    Raises:
        NoSuchBackupError: there is none.
        UsageError: which one is meant is not clear, or a template is needed and not named.
        RepositoryDamagedError: a manifest that it depends on is missing, foreign or damaged.
    """
    repository = Repository.open(Path(wanted.repository))
    backup = repository.find(chosen_chain(repository, wanted.chain), wanted.backup)
    disks = [disk.name for disk in backup.manifest.disks]
    if not wanted.disk and len(disks) != 1:
        names = ", ".join(map(printable, disks))
        remedy = f"Give --disk: {names}; or --machine, for all of them in a folder."
        raise UsageError(f"it has {len(disks)} disks", where=printable(str(backup.path)), remedy=remedy)
    return point_of(backup, wanted.disk or disks[0], wanted.template)


def point_of(backup: Backup, disk: str, template: str) -> Point:
    """Returns a disk of a backup; arguments and errors are those of `find_point`."""
    layers = chain_of(backup, disk)
    needed = layers[-1].disk(disk).template
    point = Point(backup, backup.disk(disk), layers, template if needed is not None else "")
    if needed is not None and not template:
        what = f"the backup is shallow: it stands on a template that is not in the repository, {printable(needed.path)}"
        raise UsageError(what, where=point.where, remedy="Say where it is now with --template FILE.")
    return point


def open_point(wanted: Wanted, deadline: Deadline) -> tuple[Point, RestoreSource]:
    """Finds a disk of a backup and opens everything that it is made of.

    Raises:
        NoSuchBackupError: there is none.
        UsageError: which one is meant is not clear, or a template is needed and not named.
        RepositoryDamagedError: something that it depends on is missing, foreign, cut or rotten.
        RepositoryBusyError: backups are just being removed.
        DeadlineError: the time is over.
    """
    with Repository.open(Path(wanted.repository)).reading():
        point = find_point(wanted)
        return point, opened(point, deadline)


def opened(point: Point, deadline: Deadline) -> RestoreSource:
    """Opens everything that a disk of a backup is made of; the caller closes it.

    Raises:
        RepositoryDamagedError: something is missing, cut or rotten.
        DeadlineError: the time is over.
    """
    with ExitStack() as stack:
        name = point.disk.name
        layers = [stack.enter_context(open_layer(backup, name, deadline)) for backup in point.layers]
        template = point.layers[-1].disk(name).template
        below = open_template(template, point.template, deadline) if template is not None else None
        source = RestoreSource(layers, point.where, below)
        stack.pop_all()
        return source


def open_layer(backup: Backup, disk: str, deadline: Deadline) -> StoredLayer:
    """Opens the layer of a disk that one backup made.

    Raises:
        RepositoryDamagedError: its image or its hashes are missing, cut or rotten.
        DeadlineError: the time is over.
    """
    return StoredLayer.open(backup.image(disk), backup.hashes(disk), deadline)
