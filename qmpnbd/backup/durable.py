"""Changes of folders that are still there after a power cut.

A file is brought to the disk before it gets its name, and the folder after: otherwise the name may survive and the
content not. Faults of the file system become errors that say what to do.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from qmpnbd.errors import TargetError
from qmpnbd.printable import printable

_REMEDIES = {
    errno.ENOSPC: "Make room, or prune the repository, and run again.",
    errno.EDQUOT: "Raise the quota, or prune the repository, and run again.",
    errno.EROFS: "Mount it writable.",
    errno.EACCES: "Run as a user who may write there.",
    errno.EPERM: "Run as a user who may write there.",
}
_REMEDY = "See the kernel's log for what is wrong with the file system."


@contextlib.contextmanager
def told(where: Path | str) -> Iterator[None]:
    """Turns what the file system refuses into a `TargetError` that concerns `where`."""
    try:
        yield
    except OSError as error:
        what = f"the repository cannot be written: {error.strerror or error}"
        remedy = _REMEDIES.get(error.errno or 0, _REMEDY)
        raise TargetError(what, where=printable(str(where)), remedy=remedy) from error


def sync_file(path: Path) -> None:
    """Brings a file's content to the disk; refuses what is no regular file.

    Raises:
        TargetError: the file system refuses.
    """
    with told(path):
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise OSError(errno.EINVAL, "it is no regular file")
            os.fsync(file)
        finally:
            os.close(file)


def sync_folder(path: Path) -> None:
    """Brings the names in a folder to the disk.

    Raises:
        TargetError: the file system refuses.
    """
    with told(path):
        folder = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def sync_files(folder: Path) -> None:
    """Brings every file in a folder, and their names, to the disk.

    Raises:
        TargetError: the file system refuses, or there is something that is no regular file.
    """
    with told(folder):
        files = sorted(folder.iterdir())
    for file in files:
        sync_file(file)
    sync_folder(folder)


def write(path: Path, content: bytes) -> None:
    """Writes a new file, and brings its content to the disk; its name is not there yet.

    Raises:
        TargetError: the file system refuses, or the file exists.
    """
    with told(path), path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def make_folder(path: Path) -> None:
    """Makes a folder that only its owner may look into, and brings its name to the disk.

    Raises:
        TargetError: the file system refuses, or it exists.
    """
    with told(path):
        path.mkdir(mode=0o700)
    sync_folder(path.parent)


def rename(old: Path, new: Path) -> None:
    """Gives a file or folder another name, replacing a file of that name, and brings both names to the disk.

    Raises:
        TargetError: the file system refuses.
    """
    with told(new):
        old.rename(new)
    sync_folder(new.parent)
    if old.parent != new.parent:
        sync_folder(old.parent)


def remove(path: Path) -> None:
    """Removes a folder and all in it, a file or a link, if it is there; links are not followed.

    Raises:
        TargetError: the file system refuses.
    """
    with told(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    sync_folder(path.parent)
