"""A file that appears under its name only when it is whole.

::

    .disk.qcow2.3f9a01c7.part   written, then brought to the disk (settle)
              | rename, the folder brought to the disk (publish)
              v
    disk.qcow2

A run that is killed leaves the name as it was, and beside it a file that the next run for that name removes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from qmpnbd.backup import parts
from qmpnbd.backup.locks import require_unused
from qmpnbd.errors import TargetError, TargetInUseError
from qmpnbd.printable import printable

_MOST_PARTS: Final = 1024  # IOV_MAX of Linux

_REMEDIES: Final = {
    errno.ENOSPC: "Make room, or choose another place.",
    errno.EDQUOT: "Raise the quota, or choose another place.",
    errno.EFBIG: "The file system or a limit of this process (ulimit -f) allows no larger file.",
    errno.EACCES: "Run as a user who may write there.",
    errno.EPERM: "Run as a user who may write there.",
    errno.EROFS: "Choose another place.",
    errno.ENOENT: "Make the folder first.",
}


def target_failed(what: str, error: OSError, where: str) -> TargetError:
    """Returns the error for a target that the kernel does not let us write."""
    remedy = _REMEDIES.get(error.errno or 0, "See the kernel's log for what is wrong with it.")
    return TargetError(f"{what}: {error.strerror or error}", where=where, remedy=remedy)


@contextlib.contextmanager
def told(what: str, where: str) -> Iterator[None]:
    """Has failures of the kernel told as failures of the target."""
    try:
        yield
    except OSError as error:
        raise target_failed(what, error, where) from error


def write_all(fd: int, data: memoryview, offset: int, where: str) -> None:
    """Writes all of `data`.

    Raises:
        TargetError: it is full, or an I/O error; some of it may have been written.
    """
    try:
        done = os.pwrite(fd, data, offset)
        while done < len(data):
            done += os.pwrite(fd, data[done:], offset + done)
    except OSError as error:
        raise target_failed(f"cannot write at byte {offset:#x}", error, where) from error


class NewFile:
    """A file in the making.

    Args:
        path: the name it is to have.
        force: whether a file that has the name may be replaced, in the end.
        resumable: whether to go on with what an earlier run has left, which may be anything, and to keep it (`keep`).

    Attributes:
        fd: what it is written through.
        where: the name it is to have, printable.
        beside: the name it has until it is published.

    Raises:
        TargetInUseError: the name is taken, or its file is in use, or another run goes on with what was left.
        TargetError: it cannot be made.
    """

    def __init__(self, path: str | os.PathLike[str], *, force: bool = False, resumable: bool = False) -> None:
        self.where = printable(os.fspath(path))
        self.fd = -1
        with told("cannot be made", self.where):
            place = Path(path)
            self._place = place.resolve() if place.is_symlink() else place
            mode = self._replaced(force=force)
            parts.clear(self._place)
            made = parts.resume_file(self._place) if resumable else parts.make_file(self._place)
            if made is None:
                what, remedy = "another run copies there", "Wait until it has ended, or choose another name."
                raise TargetInUseError(what, where=self.where, remedy=remedy)
            self.fd, self.beside = made
            os.fchmod(self.fd, mode)

    def _replaced(self, *, force: bool) -> int:
        """Looks at the file that has the name, and returns the mode that the new one is to have."""
        try:
            status = self._place.stat()
        except FileNotFoundError:
            mask = os.umask(0o077)
            os.umask(mask)
            return 0o666 & ~mask
        if not stat.S_ISREG(status.st_mode):
            raise TargetInUseError("it exists and is no file", where=self.where, remedy="Choose another name.")
        if not force:
            raise TargetInUseError(
                "it exists", where=self.where, remedy="Choose another name, or replace it (--force)."
            )
        require_unused(self._place, self.where)
        return stat.S_IMODE(status.st_mode)

    def resize(self, size: int) -> None:
        """Gives the file a size; what is new reads as zeroes and takes no room.

        Raises:
            TargetError: the file system does not let it.
        """
        with told(f"cannot have {size} bytes", self.where):
            os.ftruncate(self.fd, size)

    def write(self, offset: int, data: memoryview) -> None:
        """Writes all of `data`; may be called by several threads.

        Raises:
            TargetError: the file system is full, or an I/O error.
        """
        write_all(self.fd, data, offset, self.where)

    def write_parts(self, offset: int, parts: Sequence[memoryview | bytes]) -> None:
        """Writes parts one behind the other; otherwise as `write`.

        Raises:
            TargetError: the file system is full, or an I/O error.
        """
        for first in range(0, len(parts), _MOST_PARTS):
            some = parts[first : first + _MOST_PARTS]
            length = sum(len(part) for part in some)
            with told(f"cannot write at byte {offset:#x}", self.where):
                done = os.pwritev(self.fd, some, offset)
            if done < length:  # as at the limit of a file system: what is left tells why
                self.write(offset + done, memoryview(b"".join(some))[done:])
            offset += length

    def settle(self) -> None:
        """Brings what was written to the disk.

        Raises:
            TargetError: it does not get there.
        """
        with told("cannot be brought to the disk", self.where):
            os.fsync(self.fd)

    def publish(self, *, force: bool) -> None:
        """Gives the file its name, and brings that to the disk, too; the file must have been settled.

        Raises:
            TargetInUseError: the name has been taken meanwhile, or its file is in use now.
            TargetError: the file system does not let it.
        """
        with told("cannot be given its name", self.where):
            if force:
                if self._place.exists():
                    require_unused(self._place, self.where)
                self.beside.replace(self._place)
            else:
                self._link()
            self._close()
            parts.clear_resumable(self._place)
            folder = os.open(self._place.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def _link(self) -> None:
        """Gives the file its name unless it is taken: a rename would replace what appeared meanwhile."""
        try:
            os.link(self.beside, self._place)
        except FileExistsError as error:
            what = "somebody else has made it meanwhile"
            raise TargetInUseError(what, where=self.where, remedy="Choose another name.") from error
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                raise
            self.beside.rename(self._place)  # a file system without links
        else:
            self.beside.unlink()

    def keep(self) -> None:
        """Closes the file, and leaves it where it is; may be called twice."""
        if self.fd >= 0:
            self._close()

    def discard(self) -> None:
        """Removes the file unless it was published; never fails, may be called twice."""
        if self.fd >= 0:
            self._close()
            with contextlib.suppress(OSError):
                self.beside.unlink()

    def _close(self) -> None:
        os.close(self.fd)
        self.fd = -1
