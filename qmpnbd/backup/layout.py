"""Where things lie in a repository, and what their names say; pure.

::

    REPOSITORY/qmpnbd-repository.json          says that it is one
               .lock                           held by the run that writes
               .readers                        held by those who read, or by the one who removes
               CHAIN/0012-5d0e77b2/            a backup: its number in the chain and its id
                     manifest.json             what it is; without one there is no backup
                     vd0.qcow2  vd0.hashes     a disk; backing file ../0011-1f00aa37/vd0.qcow2
                     machine.json ...          what the machine was
               CHAIN/.partial-5d0e77b2-4711/   a backup that is being written
               CHAIN/.pruning-4711/            layers that are being merged
               CHAIN/.journal/                 the same when all of it is on the disk: from then on it is carried out

Backing names are relative, so that a repository can be moved as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final, NamedTuple

from qmpnbd.qmp.naming import CHAIN_ID

MARKER: Final = "qmpnbd-repository.json"
LOCK: Final = ".lock"
READERS: Final = ".readers"
MANIFEST: Final = "manifest.json"
JOURNAL: Final = ".journal"

MAX_FILE_NAME: Final = 128
"""Characters of a file name: half of what file systems take, so that there is room for endings."""

FILE_NAME: Final = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_FILE_NAME - 1}}}", re.ASCII)
"""What a file in a backup is called: never a path, never hidden."""

_BACKUP = re.compile(r"([0-9]{4,18})-([0-9a-f]{8})", re.ASCII)
_ID = re.compile("[0-9a-f]{8}", re.ASCII)
_UNFINISHED = re.compile(r"\.(?:partial-[0-9a-f]{8}|pruning)-[0-9]{1,10}", re.ASCII)
_FOREIGN = re.compile(r"[^A-Za-z0-9._-]+", re.ASCII)
_LONGEST_STEM = 64


class BackupName(NamedTuple):
    """What the name of a backup's folder says.

    Attributes:
        number: in its chain, from 1; orders the backups.
        id: eight hexadecimal digits.
    """

    number: int
    id: str

    def __str__(self) -> str:
        return f"{self.number:04}-{self.id}"


def backup_of(name: str) -> BackupName | None:
    """Returns what the name of a folder says, or None if it is no backup's."""
    match = _BACKUP.fullmatch(name)
    found = BackupName(int(match[1]), match[2]) if match else None
    return found if found is not None and found.number and str(found) == name else None


def is_backup_id(text: str) -> bool:
    """Returns whether a backup can have this id."""
    return _ID.fullmatch(text) is not None


def is_chain(name: str) -> bool:
    """Returns whether a chain can have this name."""
    return CHAIN_ID.fullmatch(name) is not None


def partial_name(backup: str, pid: int) -> str:
    """Returns the name of the folder in which a run writes a backup."""
    return f".partial-{backup}-{pid}"


def pruning_name(pid: int) -> str:
    """Returns the name of the folder in which a run merges layers."""
    return f".pruning-{pid}"


def is_unfinished(name: str) -> bool:
    """Returns whether a folder of this name holds what a run was writing, and nothing that anything stands on."""
    return _UNFINISHED.fullmatch(name) is not None


def backing_name(base: BackupName, file: str) -> str:
    """Returns the name by which an image of another backup of the same chain finds the image `file` of `base`."""
    return f"../{base}/{file}"


def stem_of(disk: str, taken: Collection[str]) -> str:
    """Returns a file name without its ending for a disk, whatever the disk is called.

    Args:
        disk: qdev id, QOM path or node-name.
        taken: those that other disks have; names that differ only in case are the same on some file systems.
    """
    stem = _FOREIGN.sub("_", disk).strip("._-")[:_LONGEST_STEM] or "disk"
    others = {each.casefold() for each in taken}
    found, number = stem, 1
    while found.casefold() in others:
        number += 1
        found = f"{stem}-{number}"
    return found
