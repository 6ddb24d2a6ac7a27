"""Report files that are whole or not there.

A report is written beside its place, brought to the disk, and renamed: whoever looks there finds the old one or the
new one. The file beside is made before the work begins, so that a folder that cannot be written to is told at once and
not after hours. ``-`` is stdout; what exists and is no regular file (``/dev/stderr``, a FIFO) is written to as it is.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

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

    def _open(self) -> IO[bytes]:
        if self.name == "-":
            return sys.stdout.buffer
        place = Path(self.name)
        mode = place.stat().st_mode if place.exists() else stat.S_IFREG
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(0, "that is a folder")
        if not stat.S_ISREG(mode):
            return place.open("wb")
        self._beside = place.resolve().with_name(f".{place.name}.{os.getpid()}.part")
        file = self._beside.open("xb")
        if stat.S_IMODE(mode):
            os.fchmod(file.fileno(), stat.S_IMODE(mode))
        return file

    def add(self, piece: str | bytes) -> None:
        """Writes a piece, and leaves nothing of it in memory: it is there if the process is killed.

        Raises:
            ReportFileError: it cannot be written.
        """
        with self._told():
            self._file.write(piece if isinstance(piece, bytes) else piece.encode("utf-8", "backslashreplace"))
            self._file.flush()

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
            self._file.close()
            if self._beside is not None:
                self._beside.rename(Path(self.name).resolve())
        self._beside = None
        log.info("wrote %s", self.name)

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
