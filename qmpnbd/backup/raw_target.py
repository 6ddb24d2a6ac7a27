"""A raw file that is made."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from qmpnbd.backup.device_target import BlockDeviceTarget
from qmpnbd.backup.newfile import NewFile


class RawTarget:
    """A raw file under its own name only when it is whole, with holes where there are zeroes.

    Args:
        path: the name it is to have.
        size: bytes of the disk.
        force: whether a file of that name may be replaced.

    Raises:
        TargetInUseError: the name is taken, or its file is in use.
        TargetError: it cannot be made.
    """

    lanes = 1

    def __init__(self, path: str | os.PathLike[str], size: int, *, force: bool) -> None:
        self._force = force
        self._file = NewFile(path, force=force)
        self.where = self._file.where
        self.read_from = os.fspath(self._file.beside)
        try:
            self._file.resize(size)
        except BaseException:
            self._file.discard()
            raise

    @classmethod
    def create(cls, path: str | os.PathLike[str], size: int, *, force: bool = False) -> RawTarget | BlockDeviceTarget:
        """Makes a raw file, or opens what is a block device; the arguments are those of the class.

        Raises:
            TargetInUseError: the name is taken, or somebody uses it.
            TargetError: it cannot be made, or the device is too small.
        """
        try:
            is_device = stat.S_ISBLK(Path(path).stat().st_mode)
        except OSError:
            is_device = False
        return BlockDeviceTarget(path, size, force=force) if is_device else cls(path, size, force=force)

    def write(self, offset: int, data: memoryview) -> None:
        """Writes bytes of the disk; see `Target.write`."""
        self._file.write(offset, data)

    def zero(self, offset: int, length: int) -> None:
        """Does nothing: what was never written is a hole."""

    def settle(self) -> None:
        """Brings the file to the disk; see `Target.settle`."""
        self._file.settle()

    def finish(self) -> None:
        """Settles the file and gives it its name; see `Target.finish`."""
        self.settle()
        self._file.publish(force=self._force)

    def discard(self) -> None:
        """Removes the file unless it was finished."""
        self._file.discard()
