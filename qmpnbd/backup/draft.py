"""A backup that is being written: it has its name when it is whole, and not before."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from qmpnbd.backup import durable
from qmpnbd.backup.backups import Backup
from qmpnbd.backup.layout import MANIFEST, BackupName, backing_name, partial_name, stem_of
from qmpnbd.backup.manifest import Link, Manifest
from qmpnbd.errors import NotProvedError, UsageError
from qmpnbd.printable import printable


class Draft:
    """A backup in the making.

    Args:
        folder: of the chain.
        name: number and id of the backup.
        before: the newest backup of the chain whose manifest is whole.

    Attributes:
        path: where its files are written.
        name: number and id.

    Raises:
        TargetError: the folder cannot be made.
    """

    def __init__(self, folder: Path, name: BackupName, before: Backup | None) -> None:
        self.name = name
        self.path = folder / partial_name(name.id, os.getpid())
        self._before = before
        self._stems: dict[str, str] = {}
        durable.make_folder(self.path)

    def name_files(self, disks: Iterable[str]) -> None:
        """Decides, in this order, how the files of disks are called, so that threads may ask for them in any."""
        for disk in disks:
            self._stem(disk)

    def disk_path(self, disk: str) -> Path:
        """Returns where the image of a disk is to be written; the same for the same disk."""
        return self.path / f"{self._stem(disk)}.qcow2"

    def hashes_path(self, disk: str) -> Path:
        """Returns where the hashes of a disk are to be written."""
        return self.path / f"{self._stem(disk)}.hashes"

    def _stem(self, disk: str) -> str:
        if disk not in self._stems:
            self._stems[disk] = stem_of(disk, self._stems.values())
        return self._stems[disk]

    def backing_name(self, base: Backup, disk: str) -> str:
        """Returns what is to be recorded in the image of a disk as its backing file: the image of `base`.

        Raises:
            NoSuchBackupError: `base` has no disk of that name.
        """
        return backing_name(base.name, base.disk(disk).file)

    def publish(self, manifest: Manifest) -> Backup:
        """Makes the backup durable, and then known.

        Args:
            manifest: what it is; the link to the backup before and the digest are filled in here.

        Raises:
            NotProvedError: the files are not those of the manifest.
            UsageError: it is the manifest of another backup.
            TargetError: the file system refuses; the backup is still a draft.
        """
        place = self.path.with_name(str(self.name))
        if (manifest.number, manifest.id, manifest.chain) != (*self.name, self.path.parent.name):
            raise UsageError(f"the manifest is not that of backup {self.name}", where=printable(str(self.path)))
        before = self._before
        link = Link(id=before.manifest.id, core=before.manifest.core_digest) if before is not None else None
        sealed = manifest.model_copy(update={"before": link}).sealed()
        self._hold_against(sealed)
        durable.write(self.path / MANIFEST, sealed.to_json())
        durable.sync_files(self.path)
        durable.rename(self.path, place)
        return Backup.read(place)

    def _hold_against(self, manifest: Manifest) -> None:
        backup = Backup(manifest, self.path)
        for disk in manifest.disks:
            backup.image(disk.name)
            backup.hashes(disk.name)
        for extra in manifest.extras:
            backup.extra_file(extra.name)
        with durable.told(self.path):
            unknown = {each.name for each in self.path.iterdir()} - {*manifest.files}
        if unknown:
            what = f"files that the manifest does not name: {', '.join(map(printable, sorted(unknown)))}"
            raise NotProvedError(what, where=printable(str(self.path)))

    def discard(self) -> None:
        """Removes what was written; nothing to do for one that was published.

        Raises:
            TargetError: the file system refuses.
        """
        durable.remove(self.path)
