"""A run's private directory: where its NBD socket lies, and whose lock says that the run lives.

::

    BASE/qmpnbd-3f9a01c7/     0700, owned by us; the run id is also in every name made inside QEMU
        lock                  locked (flock) by the run while it lives; a killed run's lock is free
        nbd.sock              made by QEMU, and removed by it when its NBD server stops
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import stat
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from qmpnbd.errors import UsageError
from qmpnbd.qmp.address import MAX_UNIX_PATH
from qmpnbd.qmp.naming import new_run, run_directory_name, run_of

_LOCK = "lock"
_SOCKET = "nbd.sock"
_PROBE_SECONDS = 2.0


class RunDirectory:
    """The private directory of a run that lives; a context manager that removes it at its end.

    Attributes:
        run: the run id.
        path: the directory.
    """

    def __init__(self, run: str, path: Path, lock: int) -> None:
        self.run = run
        self.path = path
        self._lock = lock

    @classmethod
    def create(cls, base: str | None = None) -> Self:
        """Makes a fresh directory.

        Args:
            base: where; None for the folder for temporary files.

        Raises:
            UsageError: `base` is no folder that can be written, or its name is too long for a socket.
        """
        run = new_run()
        path = Path(base or tempfile.gettempdir()).resolve() / run_directory_name(run)
        if len(os.fsencode(path / _SOCKET)) > MAX_UNIX_PATH:
            raise UsageError(
                f"sockets in this folder would have names of more than {MAX_UNIX_PATH} bytes",
                where=str(path.parent),
                remedy="Choose a shorter one with --runtime-dir.",
            )
        try:
            path.mkdir(mode=0o700)
            lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise UsageError(
                f"cannot make a private directory: {error.strerror}",
                where=str(path.parent),
                remedy="Choose another folder with --runtime-dir.",
            ) from error
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return cls(run, path, lock)

    @property
    def socket_path(self) -> Path:
        """Where the run's NBD server listens."""
        return self.path / _SOCKET

    def listener_pid(self) -> int | None:
        """Returns the process that listens on the socket (0 if the kernel does not tell), None if nobody does."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, contextlib.suppress(OSError):
            probe.settimeout(_PROBE_SECONDS)
            probe.connect(str(self.socket_path))
            credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            pid: int = struct.unpack("3i", credentials)[0]
            return pid
        return None

    def remove(self) -> None:
        """Removes the directory, unless its socket is still served, and gives up the lock."""
        if self.listener_pid() is None:
            shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


def dead_runs(base: str | None = None) -> Iterator[RunDirectory]:
    """Yields the directories of runs that were killed, each locked while it is looked at.

    Only directories that are ours (owner, mode, no links) are considered.
    """
    folder = Path(base or tempfile.gettempdir()).resolve()
    for path in sorted(folder.glob(run_directory_name("*"))):
        run = run_of(path.name)
        if run is None or not _is_private(path):
            continue
        try:
            lock = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)  # its run lives
            continue
        dead = RunDirectory(run, path, lock)
        try:
            yield dead
        finally:
            dead.remove()


def _is_private(path: Path) -> bool:
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and stat.S_IMODE(status.st_mode) == 0o700
