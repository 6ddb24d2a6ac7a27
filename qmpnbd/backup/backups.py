"""A backup in a repository: its manifest, and its files, of which none is believed before it was looked at."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from qmpnbd.backup.hashes import Hashes
from qmpnbd.backup.layout import MANIFEST, BackupName, backup_of
from qmpnbd.backup.manifest import MAX_MANIFEST, Manifest, ManifestDisk
from qmpnbd.errors import NoSuchBackupError, RepositoryDamagedError
from qmpnbd.printable import printable


@dataclass(frozen=True, slots=True)
class Backup:
    """A backup whose manifest is whole.

    Attributes:
        manifest: what it is.
        path: its folder.
    """

    manifest: Manifest
    path: Path

    @classmethod
    def read(cls, path: Path) -> Backup:
        """Reads the manifest in a folder, and holds it against the folder's name and that of the chain.

        Raises:
            RepositoryDamagedError: it is missing, cut, edited, or that of another backup.
        """
        manifest = Manifest.of_json(read_file(path / MANIFEST, MAX_MANIFEST), printable(str(path / MANIFEST)))
        if manifest.chain != path.parent.name or BackupName(manifest.number, manifest.id) != backup_of(path.name):
            what = f"it belongs to backup {manifest.number}-{manifest.id} of chain {manifest.chain}"
            remedy = "Put it back to where it belongs; numbers and chains are part of a manifest."
            raise RepositoryDamagedError(what, where=printable(str(path / MANIFEST)), remedy=remedy)
        return cls(manifest, path)

    @property
    def name(self) -> BackupName:
        """Its number and id."""
        return BackupName(self.manifest.number, self.manifest.id)

    def disk(self, name: str) -> ManifestDisk:
        """Returns a disk of the backup.

        Raises:
            NoSuchBackupError: it has no disk of that name.
        """
        for disk in self.manifest.disks:
            if disk.name == name:
                return disk
        names = ", ".join(printable(disk.name) for disk in self.manifest.disks) or "none"
        what = f"the backup has no disk {printable(name)!r}"
        raise NoSuchBackupError(what, where=printable(str(self.path)), remedy=f"Its disks: {names}.")

    def image(self, name: str) -> Path:
        """Returns the image of a disk.

        Raises:
            NoSuchBackupError: the backup has no disk of that name.
            RepositoryDamagedError: the image is missing, is no regular file, or does not have its size.
        """
        disk = self.disk(name)
        return self._file(disk.file, disk.file_bytes)

    def extra_file(self, name: str) -> Path:
        """Returns the file of what is kept beside the disks; as `image`."""
        for each in self.manifest.extras:
            if each.name == name:
                return self._file(each.file, each.bytes)
        raise NoSuchBackupError(f"the backup has no {printable(name)!r}", where=printable(str(self.path)))

    def hashes(self, name: str) -> Hashes:
        """Reads the hashes of a disk, and holds them against the manifest.

        Raises:
            NoSuchBackupError: the backup has no disk of that name.
            RepositoryDamagedError: they are missing, cut, rotten, or not those of the manifest.
        """
        disk = self.disk(name)
        path = self._file(disk.hashes, None)
        found = Hashes.load(path)
        if found.root() != disk.root or found.content.size != disk.size:
            what = "the hashes are not those that the manifest goes with: their root is another one"
            remedy = "Fetch the backup's folder from a copy of the repository."
            raise RepositoryDamagedError(what, where=printable(str(path)), remedy=remedy)
        return found

    def _file(self, name: str, size: int | None) -> Path:
        path = self.path / name
        remedy = "Fetch it from a copy of the repository; what stands on it cannot be restored."
        try:
            status = path.lstat()
        except OSError as error:
            what = f"a file of the backup is missing: {error.strerror}"
            raise RepositoryDamagedError(what, where=printable(str(path)), remedy=remedy) from error
        if not stat.S_ISREG(status.st_mode):
            raise RepositoryDamagedError("it is no regular file", where=printable(str(path)), remedy=remedy)
        if size is not None and status.st_size != size:
            what = f"it has {status.st_size} bytes, and had {size} when it was written"
            raise RepositoryDamagedError(what, where=printable(str(path)), remedy=remedy)
        return path


def read_file(path: Path, limit: int) -> bytes:
    """Reads a small file; no link is followed, and nothing but a regular file is opened.

    Raises:
        RepositoryDamagedError: it is missing, cannot be read, or has more than `limit` bytes.
    """
    where, remedy = printable(str(path)), "Fetch it from a copy of the repository."
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(file, "rb") as opened:
            if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
                raise RepositoryDamagedError("it is no regular file", where=where, remedy=remedy)
            content = opened.read(limit + 1)
    except OSError as error:
        raise RepositoryDamagedError(f"it cannot be read: {error.strerror}", where=where, remedy=remedy) from error
    if len(content) > limit:
        raise RepositoryDamagedError(f"it has more than {limit} bytes", where=where, remedy=remedy)
    return content
