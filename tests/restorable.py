"""A chain of backups to restore and to damage: a full one and two increments; the first has zeroes over data."""

from __future__ import annotations

import shutil
from pathlib import Path

from qmpnbd.backup.backups import Backup
from qmpnbd.backup.point import Wanted
from qmpnbd.backup.repository import Repository
from qmpnbd.images.chain import LayerSpec
from qmpnbd.images.files import open_layers
from tests.stored import CHAIN, Stored, make_backup

DISK = "vda"
WRITES = (
    ("write -P 1 0 3M", "write -P 2 5M 200k", "write -z 6M 128k"),
    ("write -P 3 64k 64k", "write -z 1M 192k", "write -P 4 7M 64k"),
    ("write -P 5 128k 64k", "write -P 6 1088k 64k", "write -z 5M 64k"),
)
DATA_AT = (2 << 20, 7 << 20, 128 << 10)
"""Of each layer a byte that no layer above has."""

BECAME_ZERO = 1 << 20
"""Data in the full backup, and zero in all later ones, for 64 KiB."""


def make_chain(folder: Path) -> tuple[Repository, list[Backup]]:
    """Makes the repository."""
    repository = Repository.create(folder)
    backups: list[Backup] = []
    for writes in WRITES:
        base = backups[-1] if backups else None
        backups.append(make_backup(repository, {DISK: Stored(writes, base)}))
    return repository, backups


def copy_of(repository: Repository, folder: Path) -> tuple[Repository, list[Backup]]:
    """Returns a copy of a repository, to be damaged."""
    copied = Repository.open(Path(shutil.copytree(repository.path, folder)))
    return copied, list(copied.backups(CHAIN))


def wanted(repository: Repository, which: int | str = "latest") -> Wanted:
    """Returns a disk of a backup."""
    return Wanted(str(repository.path), str(which), CHAIN, DISK)


def flip(backup: Backup, offset: int) -> None:
    """Flips a bit of a byte of the disk in the layer of a backup."""
    image = backup.image(DISK)
    with open_layers([LayerSpec(str(image), "qcow2", 1)]) as layer:
        place = layer.locate(offset)
    assert place is not None
    assert place[2] is not None
    with image.open("r+b") as file:
        file.seek(place[2])
        byte = file.read(1)[0]
        file.seek(place[2])
        file.write(bytes([byte ^ 4]))
