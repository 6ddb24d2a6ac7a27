"""A repository of backups: a folder that stock tools can read, and that is never half changed.

What it holds is known from its names and manifests alone; there is no database to be lost. Order is that of the
numbers in a chain: neither clocks nor the times of files matter.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path

from qmpnbd.backup import durable, repository_lock
from qmpnbd.backup.backups import Backup, read_file
from qmpnbd.backup.chain_order import Found, misplaced, moment_of, not_after
from qmpnbd.backup.draft import Draft
from qmpnbd.backup.journal import roll_forward
from qmpnbd.backup.layout import (
    JOURNAL,
    LOCK,
    MARKER,
    READERS,
    BackupName,
    backup_of,
    is_backup_id,
    is_chain,
    is_unfinished,
)
from qmpnbd.backup.manifest import Marker, now
from qmpnbd.backup.repository_lock import Holder
from qmpnbd.errors import NoSuchBackupError, RepositoryDamagedError, TargetInUseError, UsageError
from qmpnbd.printable import printable

__all__ = ["Found", "Repository", "base_of", "chain_of"]

_MAX_MARKER = 4096
_NEW_MARKER = f".{MARKER}.new"


class Repository:
    """A repository.

    Attributes:
        path: its folder.
        id: 32 hexadecimal digits.
    """

    def __init__(self, path: Path, marker: Marker) -> None:
        self.path = path
        self.id = marker.id
        self._locked = False

    @classmethod
    def create(cls, path: Path) -> Repository:
        """Makes a repository of a folder that is empty or not there yet; only its owner may look into it.

        Raises:
            TargetInUseError: there is something at that place.
            TargetError: the file system refuses.
        """
        with durable.told(path):
            if not path.exists():
                durable.make_folder(path)
            elif not path.is_dir() or any(each.name != _NEW_MARKER for each in path.iterdir()):
                what = "it is a repository already" if (path / MARKER).exists() else "it is no empty folder"
                raise TargetInUseError(what, where=printable(str(path)), remedy="Name another place.")
        marker = Marker(id=secrets.token_hex(16), created=now())
        durable.remove(path / _NEW_MARKER)
        durable.write(path / _NEW_MARKER, marker.to_json())
        durable.rename(path / _NEW_MARKER, path / MARKER)
        return cls(path, marker)

    @classmethod
    def open(cls, path: Path) -> Repository:
        """Opens a repository.

        Raises:
            NoSuchBackupError: there is none.
            RepositoryDamagedError: there is one, and its first file is damaged.
        """
        if not (path / MARKER).is_file():
            remedy = "Make one with 'qmpnbd repository create'."
            raise NoSuchBackupError("there is no repository", where=printable(str(path)), remedy=remedy)
        content = read_file(path / MARKER, _MAX_MARKER)
        return cls(path, Marker.of_json(content, printable(str(path / MARKER))))

    def chains(self) -> list[str]:
        """Returns the chains, by name.

        Raises:
            RepositoryDamagedError: the folder cannot be read.
        """
        return sorted(each.name for each in _listed(self.path) if is_chain(each.name) and _is_folder(each))

    def inspect(self, chain: str) -> tuple[Found, ...]:
        """Looks at everything in a chain that is called like a backup, in order; none if there is no such chain.

        Raises:
            UsageError: no chain can have this name.
            RepositoryDamagedError: the folder cannot be read, or a change that was interrupted is to be recovered.
        """
        folder = self._folder(chain)
        if not folder.exists():
            return ()
        if (folder / JOURNAL).exists():
            what = "pruning was interrupted when it was nearly done"
            remedy = "Run 'qmpnbd repository recover', which brings it to its end."
            raise RepositoryDamagedError(what, where=printable(str(folder)), remedy=remedy)
        names = sorted((name, each) for each in _listed(folder) if (name := backup_of(each.name)) is not None)
        found: list[Found] = []
        for name, path in names:
            try:
                backup = Backup.read(path) if _is_folder(path) else _raise_link(path)
                found.append(Found(name, path, backup, misplaced(backup, found)))
            except RepositoryDamagedError as error:
                found.append(Found(name, path, None, error))
        return tuple(found)

    def backups(self, chain: str) -> tuple[Backup, ...]:
        """Returns the backups of a chain, in order.

        Raises:
            UsageError: no chain can have this name.
            RepositoryDamagedError: one of them is damaged, foreign, or not in its place, or one is missing.
        """
        backups = []
        for found in self.inspect(chain):
            if found.fault is not None:
                raise found.fault
            if found.backup is not None:
                backups.append(found.backup)
        return tuple(backups)

    def find(self, chain: str, what: str) -> Backup:
        """Finds a backup; that others are damaged does not matter.

        Args:
            chain: the chain.
            what: an id, a number, ``latest``, or a time (ISO 8601, UTC unless it says otherwise), which stands for the
                newest backup that is not after it.

        Raises:
            NoSuchBackupError: there is none.
            UsageError: `what` is nothing of the kind, or no chain can have this name.
            RepositoryDamagedError: it is damaged.
        """
        found = self.inspect(chain)
        chosen = [each for each in found if each.name.id == what]
        if not chosen and what == "latest":
            chosen = list(found[-1:])
        elif not chosen and what.isascii() and what.isdecimal():
            chosen = [each for each in found if each.name.number == int(what[:20])]
        elif not chosen and not is_backup_id(what):
            chosen = not_after(found, moment_of(what))
        if not chosen:
            where, remedy = printable(str(self.path / chain)), "See 'qmpnbd repository list'."
            raise NoSuchBackupError(f"there is no backup {printable(what)!r}", where=where, remedy=remedy)
        if len(chosen) > 1:
            raise _twice(chosen)
        return chosen[0].backup or Backup.read(chosen[0].path)

    def newest_number(self, chain: str) -> int:
        """Returns the number of the newest backup of a chain, be it damaged or not; 0 if there is none.

        Raises:
            UsageError: no chain can have this name.
            RepositoryDamagedError: as `inspect`.
        """
        return max((each.name.number for each in self.inspect(chain)), default=0)

    @contextlib.contextmanager
    def lock(self, what: str) -> Iterator[Holder | None]:
        """Holds the repository: only one run at a time writes to it.

        Args:
            what: what it is held for, in words.

        Yields:
            The run that was killed while it held the repository; None if the last one ended in order.

        Raises:
            RepositoryBusyError: another run holds it; the message says which.
            TargetError: the repository cannot be written.
        """
        with repository_lock.holding(self.path / LOCK, what) as killed:
            self._locked = True
            try:
                yield killed
            finally:
                self._locked = False

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Keeps backups from being removed or merged while they are read; new ones may be made meanwhile.

        Raises:
            RepositoryBusyError: some are just being removed.
        """
        with repository_lock.reading(self.path / READERS):
            yield

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps everybody from reading, for changes of backups that are there already; also `lock` it.

        Raises:
            RepositoryBusyError: somebody reads.
            UsageError: the repository is not locked.
            TargetError: the repository cannot be written.
        """
        self._must_be_locked()
        with repository_lock.alone(self.path / READERS):
            yield

    def is_held(self) -> bool:
        """Returns whether a run that lives holds the repository, so that what is unfinished may be its."""
        return repository_lock.is_held(self.path / LOCK)

    def begin(self, chain: str, backup_id: str, number: int) -> Draft:
        """Begins a backup; the repository must be locked.

        Args:
            chain: the chain; made if it is not there.
            backup_id: its id, eight hexadecimal digits.
            number: larger than that of every other backup of the chain.

        Raises:
            UsageError: no chain or backup can be called like that, or the repository is not locked.
            TargetError: the file system refuses.
            RepositoryDamagedError: as `inspect`.
        """
        folder, name = self._folder(chain), BackupName(number, backup_id)
        self._must_be_locked()
        found = self.inspect(chain)
        if backup_of(str(name)) != name or any(
            each.name.id == backup_id or each.name.number >= number for each in found
        ):
            what = f"backup {name} cannot follow {found[-1].name if found else 'nothing'}"
            raise UsageError(what, where=printable(str(folder)), remedy="Numbers rise, and ids are used once.")
        if not folder.exists():
            durable.make_folder(folder)
        whole = [each.backup for each in found if each.backup is not None]
        return Draft(folder, name, whole[-1] if whole else None)

    def recover(self) -> list[str]:
        """Removes what killed runs left, and brings to its end what was decided on; the repository must be locked.

        Returns:
            What was done, a sentence each.

        Raises:
            UsageError: the repository is not locked.
            RepositoryBusyError: somebody reads what is to be changed.
            RepositoryDamagedError: what was decided on cannot be read any more.
            TargetError: the file system refuses.
        """
        self._must_be_locked()
        done = []
        for chain in self.chains():
            if (self.path / chain / JOURNAL).exists():
                with self.alone():
                    done += roll_forward(self.path / chain)
            for each in _listed(self.path / chain):
                if is_unfinished(each.name):
                    durable.remove(each)
                    done.append(f"removed {printable(str(each))}, which a killed run was writing")
        return done

    def _must_be_locked(self) -> None:
        if not self._locked:
            what = "the repository is changed by whoever holds it only"
            raise UsageError(what, where=printable(str(self.path)), remedy="Do it inside 'with repository.lock(...)'.")

    def _folder(self, chain: str) -> Path:
        if not is_chain(chain):
            remedy = "Letters, digits, - and _; 64 at most."
            raise UsageError(f"no chain is called {printable(chain)!r}", where=printable(str(self.path)), remedy=remedy)
        return self.path / chain


def chain_of(backup: Backup, disk: str) -> tuple[Backup, ...]:
    """Returns the backups whose layers make up a disk, newest first down to the full or shallow one.

    Raises:
        NoSuchBackupError: the backup has no disk of that name.
        RepositoryDamagedError: one of them is missing or damaged.
    """
    chain = [backup]
    while (base := base_of(chain[-1], disk)) is not None:
        chain.append(base)
    return tuple(chain)


def base_of(backup: Backup, disk: str) -> Backup | None:
    """Returns the backup that a layer stands on; None for a full or a shallow one.

    Raises:
        NoSuchBackupError: the backup has no disk of that name.
        RepositoryDamagedError: it is missing or damaged.
    """
    base = backup.disk(disk).base
    if base is None:
        return None
    paths = [each for each in _listed(backup.path.parent) if (name := backup_of(each.name)) and name.id == base]
    if len(paths) == 1 and _is_folder(paths[0]):
        found = Backup.read(paths[0])
        if found.manifest.number < backup.manifest.number and any(each.name == disk for each in found.manifest.disks):
            return found
    what = (
        f"disk {printable(disk)} of backup {backup.name} stands on backup {base}, which is missing or does not hold it"
    )
    remedy = "Fetch the missing backup from a copy of the repository."
    raise RepositoryDamagedError(what, where=printable(str(backup.path)), remedy=remedy)


def _twice(found: list[Found]) -> RepositoryDamagedError:
    what = f"{len(found)} backups with one number or id: {', '.join(str(each.name) for each in found)}"
    remedy = "Move away the one that does not belong there."
    return RepositoryDamagedError(what, where=printable(str(found[0].path.parent)), remedy=remedy)


def _raise_link(path: Path) -> Backup:
    remedy = "Remove it; what it leads to belongs into the repository itself."
    raise RepositoryDamagedError("it is no folder", where=printable(str(path)), remedy=remedy)


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        what, remedy = f"it cannot be read: {error.strerror}", "Run as a user who may read it."
        raise RepositoryDamagedError(what, where=printable(str(folder)), remedy=remedy) from error


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
