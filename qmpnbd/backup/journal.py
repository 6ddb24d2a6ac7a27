"""A change of backups that are there already, carried out whole or not at all.

New files are written into a folder of their own, with a list of what to do with them. When all of it is on the disk
the folder is renamed: that is the moment of decision. From then on the list is carried out, by this run or, if it is
killed, by the next one; each step of it may be repeated. A merged image takes the name of the one it replaces, and
reads the same, so that what stands on it never notices.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from qmpnbd.backup import durable
from qmpnbd.backup.backups import read_file
from qmpnbd.backup.layout import JOURNAL, BackupName, pruning_name
from qmpnbd.backup.manifest import MAX_MANIFEST, Journal, Replaced
from qmpnbd.errors import RepositoryDamagedError
from qmpnbd.printable import printable

_LIST = "journal.json"


class Change:
    """A change in the making.

    Args:
        folder: of the chain.

    Raises:
        TargetError: its folder cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / pruning_name(os.getpid())
        durable.make_folder(self._path)

    def place(self, name: BackupName) -> Path:
        """Returns the folder for new files of a backup.

        Raises:
            TargetError: it cannot be made.
        """
        place = self._path / str(name)
        if not place.exists():
            durable.make_folder(place)
        return place

    def commit(self, replaced: Mapping[BackupName, Sequence[str]], removed: Sequence[BackupName]) -> None:
        """Decides on the change, and carries it out.

        Args:
            replaced: the new files of each backup, in the order in which they take the place of the old ones.
            removed: the backups that go.

        Raises:
            TargetError: the file system refuses; if that was before the decision, nothing has changed.
        """
        entries = tuple(Replaced(folder=str(name), files=tuple(files)) for name, files in replaced.items())
        journal = Journal(replaced=entries, removed=tuple(map(str, removed)))
        durable.write(self._path / _LIST, journal.to_json())
        for name in replaced:
            durable.sync_files(self.place(name))
        durable.sync_folder(self._path)
        durable.rename(self._path, self._folder / JOURNAL)
        roll_forward(self._folder)

    def discard(self) -> None:
        """Removes what was written; nothing to do once it was decided on.

        Raises:
            TargetError: the file system refuses.
        """
        durable.remove(self._path)


def roll_forward(folder: Path) -> list[str]:
    """Carries out the change of a chain that was decided on, if there is one.

    Args:
        folder: of the chain.

    Returns:
        What was done, a sentence each.

    Raises:
        RepositoryDamagedError: the list of what to do is damaged.
        TargetError: the file system refuses; it can be tried again.
    """
    path = folder / JOURNAL
    if not path.exists():
        return []
    if path.is_symlink():
        remedy = "Remove it; what it leads to is nothing of the repository's."
        raise RepositoryDamagedError("it is no folder", where=printable(str(path)), remedy=remedy)
    where = path / _LIST
    journal = Journal.of_json(read_file(where, MAX_MANIFEST), printable(str(where)))
    done = []
    for entry in journal.replaced:
        for file in entry.files:
            if (path / entry.folder / file).exists():
                durable.rename(path / entry.folder / file, folder / entry.folder / file)
        done.append(f"brought backup {entry.folder} of chain {folder.name} to its new state")
    for name in journal.removed:
        durable.remove(folder / name)
        done.append(f"removed backup {name} of chain {folder.name}")
    # Under this name it is rubbish, whatever is left in it.
    rubbish = folder / pruning_name(os.getpid())
    durable.rename(path, rubbish)
    durable.remove(rubbish)
    return done
