"""A block device that is overwritten in place."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from typing import Final

from qmpnbd.backup.newfile import target_failed, told, write_all
from qmpnbd.errors import TargetError, TargetInUseError
from qmpnbd.printable import printable

_BLKZEROOUT: Final = 0x127F  # linux/fs.h; takes start and length, whole sectors
_SECTOR: Final = 512
_ZEROES: Final = memoryview(bytes(1 << 20))


class BlockDeviceTarget:
    """A block device that nobody else has claimed: not mounted, no part of a volume, no other copy's target.

    Args:
        path: the device.
        size: bytes of the disk; the device may have more, which are left alone.
        force: whether it may be overwritten, which cannot be undone.

    Raises:
        TargetInUseError: it is in use, or `force` was not given.
        TargetError: it is too small, or cannot be opened.
    """

    lanes = 1

    def __init__(self, path: str | os.PathLike[str], size: int, *, force: bool) -> None:
        self.where = printable(os.fspath(path))
        self.read_from = os.fspath(path)
        if not force:
            what = "it is a block device, and all that is on it would be lost"
            raise TargetInUseError(what, where=self.where, remedy="Say that it may be overwritten (--force).")
        try:
            # Of a block device O_EXCL without O_CREAT asks the kernel for the claim that a mount has.
            self._fd = os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            if error.errno == errno.EBUSY:
                remedy = "Unmount it, or end what uses it."
                raise TargetInUseError("it is mounted or in use", where=self.where, remedy=remedy) from error
            raise target_failed("cannot be opened", error, self.where) from error
        try:
            self._check(size)
        except BaseException:
            self.discard()
            raise

    def _check(self, size: int) -> None:
        with told("its size cannot be told", self.where):
            if not stat.S_ISBLK(os.fstat(self._fd).st_mode):
                raise TargetError("it is no block device any more", where=self.where)
            room = os.lseek(self._fd, 0, os.SEEK_END)
        if room < size:
            what = f"it has {room} bytes, and the disk {size}"
            raise TargetError(what, where=self.where, remedy="Choose a device that is large enough.")

    def write(self, offset: int, data: memoryview) -> None:
        """Writes bytes of the disk; see `Target.write`."""
        write_all(self._fd, data, offset, self.where)

    def zero(self, offset: int, length: int) -> None:
        """Has the device zero whole sectors itself, and writes zeroes to what is left; see `Target.zero`."""
        end = offset + length
        first, last = -(-offset // _SECTOR) * _SECTOR, end // _SECTOR * _SECTOR
        if first >= last:
            self._write_zeroes(offset, end)
            return
        self._write_zeroes(offset, first)
        with told(f"cannot be zeroed at byte {offset:#x}", self.where):
            fcntl.ioctl(self._fd, _BLKZEROOUT, struct.pack("QQ", first, last - first))
        self._write_zeroes(last, end)

    def _write_zeroes(self, offset: int, end: int) -> None:
        if offset < end:
            write_all(self._fd, _ZEROES[: end - offset], offset, self.where)

    def settle(self) -> None:
        """Brings what was written to the device; see `Target.settle`."""
        if self._fd >= 0:
            with told("cannot be brought to the device", self.where):
                os.fsync(self._fd)

    def finish(self) -> None:
        """Settles the device and lets go of it; see `Target.finish`."""
        self.settle()
        self.discard()

    def discard(self) -> None:
        """Lets go of the device; what was overwritten cannot be brought back."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
