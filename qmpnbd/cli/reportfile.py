"""Report files that are whole or not there.

A report is written beside its place, brought to the disk, and renamed: whoever looks there finds the old one or the
new one. The file beside is made before the work begins, so that a folder that cannot be written to is told at once and
not after hours. It is locked while its writer lives; what a killed one left is removed by the next that writes the same
report. ``-`` is stdout; to a FIFO or a terminal is written as it is (`qmpnbd.cli.stream`).
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import logging
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from qmpnbd.cli.stream import Stream
from qmpnbd.errors import ReportFileError

log = logging.getLogger(__name__)


class ReportFile:
    """A report that is being written.

    Args:
        name: where it belongs; ``-`` for stdout.

    Raises:
        ReportFileError: it cannot be written there.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._beside: Path | None = None
        self._written = 0
        with self._told():
            self._file = self._open()

    @classmethod
    @contextlib.contextmanager
    def open(cls, name: str) -> Iterator[ReportFile]:
        """Makes a report; at the end removes it if it was not finished."""
        file = cls(name)
        try:
            yield file
        finally:
            file.drop()

    def _open(self) -> IO[bytes] | Stream:
        if self.name == "-":
            return sys.stdout.buffer
        place = Path(self.name)
        mode = place.stat().st_mode if place.exists() else stat.S_IFREG
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(0, "that is a folder")
        if stat.S_ISBLK(mode):
            raise OSError(0, "that is a block device")
        if not stat.S_ISREG(mode):
            return Stream(place)
        place = place.resolve()
        _remove_stale(place)
        self._beside = place.with_name(f".{place.name}.{os.getpid()}.part")
        file = self._beside.open("xb")
        with contextlib.suppress(OSError):  # some file systems know no locks; then the number of the process must do
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        if stat.S_IMODE(mode):
            os.fchmod(file.fileno(), stat.S_IMODE(mode))
        return file

    def add(self, piece: str | bytes) -> None:
        """Writes a piece, and leaves nothing of it in memory: it is there if the process is killed.

        Raises:
            ReportFileError: it cannot be written.
        """
        content = piece if isinstance(piece, bytes) else piece.encode("utf-8", "backslashreplace")
        with self._told():
            self._file.write(content)
            self._file.flush()
        self._written += len(content)

    def finish(self, pieces: Iterable[str | bytes] = ()) -> None:
        """Writes what is missing and puts the file in its place.

        Raises:
            ReportFileError: it cannot be written; what was in its place is unchanged.
        """
        for piece in pieces:
            self.add(piece)
        if self.name == "-":
            return
        with self._told():
            if self._beside is not None:
                os.fsync(self._file.fileno())
                self._beside.rename(Path(self.name).resolve())
            self._beside = None
            self._file.close()
        log.info("wrote %s", self.name)

    def keep(self) -> Path | None:
        """Keeps the pieces that were written as a whole, as ``NAME.partial``, where the report cannot be finished.

        Returns:
            The file; None if there is nothing to keep, or it cannot be kept.
        """
        if self._beside is None or not self._written:
            return None
        partial = Path(self.name).resolve()
        partial = partial.with_name(f"{partial.name}.partial")
        with contextlib.suppress(OSError):
            self._file.close()  # which tries once more to write what could not be written
        try:
            os.truncate(self._beside, self._written)
            self._beside.rename(partial)
        except OSError:
            return None
        self._beside = None
        return partial

    def drop(self) -> None:
        """Removes what has been written beside, unless it was finished."""
        if self.name != "-":
            with contextlib.suppress(OSError):
                self._file.close()
        if self._beside is not None:
            self._beside.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            raise ReportFileError(
                f"cannot write the report: {error.strerror}",
                where=self.name,
                remedy="Choose another place, or make room; what was there before is unchanged.",
            ) from error


def _remove_stale(place: Path) -> None:
    """Removes what killed writers of this report left beside it: files of ours whose process is gone."""
    for path in place.parent.glob(f".{glob.escape(place.name)}.*.part"):
        number = path.name.removeprefix(f".{place.name}.").removesuffix(".part")
        if not number.isascii() or not number.isdecimal() or len(number) > _LONGEST_NUMBER or _lives(int(number)):
            continue
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                status = os.fstat(descriptor)
                if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
                    # A process of another container may bear any number here, but holds its lock.
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
                    log.warning("removed what a killed run had left: %s", path)
            finally:
                os.close(descriptor)


_LONGEST_NUMBER = 10


def _lives(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
