"""The door to one file on this machine: opened without being fooled, read without running away.

A backing name comes from an image, and an image is not to be trusted: it may name a FIFO (opening one can wait for
ever), a terminal or a directory. Only regular files and block devices are opened, for reading only.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Self, TypeAlias

from qmpnbd.errors import ImageMissingError, ImageTruncatedError, ImageUnreadableError, ImageUnsupportedError
from qmpnbd.extents import ExtentMap
from qmpnbd.images.qcow2_format import CUT

Identity: TypeAlias = tuple[str, int, int]

MAX_PIECES = 1 << 22  # 100 bytes of memory each while they are collected

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
}
_REMEDY_KIND = "Only regular files and block devices are read."
# Without O_NONBLOCK a name swapped for a FIFO between stat and open would wait for a writer.
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


class HostFile:
    """An open file.

    Attributes:
        path: as it was given.
        where: the file for messages: its path, and which overlay named it.
        identity: equal for two paths that lead to one file.
    """

    def __init__(self, path: str, where: str) -> None:
        """Opens a file.

        Raises:
            ImageMissingError: there is no such file.
            ImageUnreadableError: not permitted, no regular file and no block device, or an I/O error.
        """
        self.path = path
        self.where = where
        self._fd = -1
        try:
            _refuse_kind(os.stat(path), where)  # noqa: PTH116 (a name as QEMU has it is text, not a tidied path)
            self._fd = os.open(path, _FLAGS)
            status = os.fstat(self._fd)
            _refuse_kind(status, where)
        except (FileNotFoundError, NotADirectoryError) as error:
            remedy = "Check the name; if it was moved, tell its overlay with 'qemu-img rebase -u'."
            raise ImageMissingError("no such file", where=where, remedy=remedy) from error
        except OSError as error:
            self.close()
            raise self._unreadable("cannot be opened", error) from error
        except ValueError as error:
            what = f"no file can have this name ({error})"
            raise ImageUnreadableError(what, where=where, remedy="Check the name.") from error
        except ImageUnreadableError:
            self.close()
            raise
        self._is_device = stat.S_ISBLK(status.st_mode)
        # Two device nodes can lead to one device.
        self.identity: Identity = (
            ("device", status.st_rdev, 0) if self._is_device else ("file", status.st_dev, status.st_ino)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; may be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def size(self) -> int:
        """Returns the bytes in the file now; a running QEMU may make it grow.

        Raises:
            ImageUnreadableError: an I/O error.
        """
        try:
            return os.lseek(self._fd, 0, os.SEEK_END) if self._is_device else os.fstat(self._fd).st_size
        except OSError as error:
            raise self._unreadable("its size cannot be told", error) from error

    def status(self) -> os.stat_result:
        """Returns what the kernel knows of the open file now, whatever its name leads to.

        Raises:
            ImageUnreadableError: an I/O error.
        """
        try:
            return os.fstat(self._fd)
        except OSError as error:
            raise self._unreadable("its status cannot be told", error) from error

    def allocated_bytes(self) -> int:
        """Returns the bytes that the file takes of its file system.

        Raises:
            ImageUnreadableError: an I/O error.
        """
        try:
            return os.fstat(self._fd).st_blocks * 512
        except OSError as error:
            raise self._unreadable("its size cannot be told", error) from error

    def holes(self) -> ExtentMap:
        """Returns where the file holds data (1), and where nothing (0), as its file system tells.

        Raises:
            ImageUnsupportedError: more pieces than any sane file has.
            ImageUnreadableError: an I/O error.
        """
        size, at = self.size(), 0
        ends: list[int] = []
        values: list[int] = []
        while at < size and len(ends) < 2 * MAX_PIECES:
            data = self._seek(at, os.SEEK_DATA, size)
            hole = self._seek(data, os.SEEK_HOLE, size) if data < size else size
            ends += [data, hole]
            values += [0, 1]
            at = hole
        if at < size:
            what = f"it is in more than {MAX_PIECES} pieces"
            raise ImageUnsupportedError(what, where=self.where, remedy="Copy it to make it whole.")
        return ExtentMap(ends, values)

    def _seek(self, offset: int, whence: int, size: int) -> int:
        try:
            return min(os.lseek(self._fd, offset, whence), size)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no more data
                return size
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):  # a file system that does not tell: all is data
                return offset if whence == os.SEEK_DATA else size
            raise self._unreadable(f"its holes cannot be told from byte {offset:#x} on", error) from error

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fills `buffer` from `offset` on.

        Returns:
            The bytes read; fewer than asked for only at the end of the file.

        Raises:
            ImageUnreadableError: an I/O error.
        """
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._fd, [buffer[done:]], offset + done)
            except OSError as error:
                raise self._unreadable(f"cannot be read at byte {offset + done:#x}", error) from error
            if count == 0:
                break
            done += count
        return done

    def read(self, offset: int, length: int) -> bytes:
        """Returns `length` bytes from `offset` on, fewer only at the end of the file.

        Raises:
            ImageUnreadableError: an I/O error.
        """
        buffer = bytearray(length)
        return bytes(buffer[: self.read_into(memoryview(buffer), offset)])

    def exactly(self, offset: int, length: int, what: str) -> bytes:
        """Returns `length` bytes.

        Args:
            offset: where they start.
            length: how many; bounded by the caller.
            what: the structure they are, for messages.

        Raises:
            ImageTruncatedError: the file ends before.
            ImageUnreadableError: an I/O error.
        """
        # Some file systems refuse to be asked for bytes far beyond the end.
        data = self.read(offset, length) if offset <= self.size() else b""
        if len(data) < length:
            raise self.cut(offset, length, what)
        return data

    def cut(self, offset: int, length: int, what: str) -> ImageTruncatedError:
        """Returns the error for a structure that lies beyond the end of the file; as `exactly`."""
        return ImageTruncatedError(
            f"{what} should lie at bytes {offset:#x} to {offset + length:#x}, "
            f"but the file ends at byte {self.size():#x}",
            where=self.where,
            remedy=CUT,
        )

    def _unreadable(self, what: str, error: OSError) -> ImageUnreadableError:
        denied = isinstance(error, PermissionError)
        remedy = "Run as a user who may read it." if denied else "See the kernel's log for what is wrong with it."
        return ImageUnreadableError(f"{what}: {error.strerror or error}", where=self.where, remedy=remedy)


def _refuse_kind(status: os.stat_result, where: str) -> None:
    kind = stat.S_IFMT(status.st_mode)
    if kind not in (stat.S_IFREG, stat.S_IFBLK):
        what = _KINDS.get(kind, "no regular file")
        raise ImageUnreadableError(f"it is {what}", where=where, remedy=_REMEDY_KIND)
