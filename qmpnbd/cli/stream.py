"""Writing to a FIFO, a pipe or a terminal, without waiting for ever for whoever should read."""

from __future__ import annotations

import errno
import os
import select
import time
from pathlib import Path

READER_SECONDS = 10.0
"""For a FIFO to get a reader, and for a reader to take something: what a busy machine needs, many times over."""


class Stream:
    """An open FIFO, pipe or character device.

    Args:
        place: its name.

    Raises:
        OSError: it cannot be opened; of kind ENXIO or ETIMEDOUT if nobody reads.
    """

    def __init__(self, place: Path) -> None:
        self._seconds = READER_SECONDS
        self._descriptor = -1
        end = time.monotonic() + self._seconds
        while True:
            try:
                self._descriptor = os.open(place, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
            except OSError as error:
                if error.errno != errno.ENXIO or time.monotonic() > end:
                    raise OSError(error.errno, _words(error)) from error
                time.sleep(_PAUSE)
            else:
                return

    def write(self, piece: bytes) -> None:
        """Writes all of a piece.

        Raises:
            OSError: it cannot be written, or nobody takes it.
        """
        left = memoryview(piece)
        waiting = select.poll()
        waiting.register(self._descriptor, select.POLLOUT)
        while left:
            try:
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:
                if not waiting.poll(self._seconds * 1000):
                    raise OSError(errno.ETIMEDOUT, "nobody takes what is written") from None
            except BrokenPipeError:
                # Not the BrokenPipeError of stdout, whose reader decides when all of it ends.
                raise OSError(0, "its reader is gone") from None

    def flush(self) -> None:
        """Does nothing: what was written is out."""

    def fileno(self) -> int:
        """Returns the descriptor."""
        return self._descriptor

    def close(self) -> None:
        """Closes it; may be called twice."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


_PAUSE = 0.05


def _words(error: OSError) -> str:
    return "nobody reads it" if error.errno == errno.ENXIO else error.strerror or str(error)
