"""A run's private directory: where its NBD socket lies, and whose lock says that the run lives.

::

    BASE/qmpnbd-3f9a01c7/     0700; the run id is also in every name made inside QEMU
        lock                  locked (flock) by the run while it lives; a killed run's lock is free
        nbd.sock              made by QEMU, and removed by it when its NBD server stops
        qemu                  the process id of the QEMU that the run works on, if it is known
        daemon.log            what a QEMU says that the run starts itself, and that ends with it; there from the
                              first moment, for it says that nothing of the run outlives it

A directory gets its name only when it is locked: under the name it is made with, nobody looks at it. So a directory
with a free lock is a dead run's, and never that of a run that is just beginning.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from qmpnbd.errors import UsageError
from qmpnbd.qmp.address import MAX_UNIX_PATH
from qmpnbd.qmp.naming import new_run, run_directory_name, run_of
from qmpnbd.qmp.process import Peer, listener_at

_LOCK = "lock"
_SOCKET = "nbd.sock"
_QEMU = "qemu"
_LOG = "daemon.log"
_UNNAMED = ".new"
_LONGEST_PID = 20
_PROBE_SECONDS = 2.0
_UNNAMED_SECONDS = 60.0


class RunDirectory:
    """The private directory of a run that lives; a context manager that removes it at its end.

    Attributes:
        run: the run id.
        path: the directory.
        keep: whether it stays at the end, as a dead run's: something of the run could not be taken down.
    """

    def __init__(self, run: str, path: Path, lock: int) -> None:
        self.run = run
        self.path = path
        self.keep = False
        self._lock = lock

    @classmethod
    def create(cls, base: str | None = None, *, for_peer: Peer | None = None, for_child: bool = False) -> Self:
        """Makes a fresh directory.

        Args:
            base: where; None for the folder for temporary files.
            for_peer: the process that shall make the socket in it; as root we give the directory to its user.
            for_child: it is for a QEMU that the run starts itself and that ends with it. What killed runs of this kind
                left is removed first: no other QEMU's `recover` comes by it.

        Raises:
            UsageError: `base` is no folder that can be written, or its name is too long for a socket.
        """
        if for_child:
            _remove_ended(base)
        run = new_run()
        path = Path(base or tempfile.gettempdir()).resolve() / run_directory_name(run)
        if len(os.fsencode(path / _SOCKET)) > MAX_UNIX_PATH:
            raise UsageError(
                f"sockets in this folder would have names of more than {MAX_UNIX_PATH} bytes",
                where=str(path.parent),
                remedy="Choose a shorter one with --runtime-dir.",
            )
        unnamed = path.with_name(path.name + _UNNAMED)
        try:
            unnamed.mkdir(mode=0o700)
            lock = os.open(unnamed / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if for_child:
                (unnamed / _LOG).touch()
            if for_peer is not None:
                (unnamed / _QEMU).write_text(str(for_peer.pid))
            if for_peer is not None and os.geteuid() == 0 and (owner := for_peer.user()) is not None:
                os.chown(unnamed, *owner)
            unnamed.rename(path)
        except OSError as error:
            raise UsageError(
                f"cannot make a private directory: {error.strerror}",
                where=str(path.parent),
                remedy="Choose another folder with --runtime-dir.",
            ) from error
        return cls(run, path, lock)

    @property
    def socket_path(self) -> Path:
        """Where the run's NBD server listens."""
        return self.path / _SOCKET

    @property
    def log_path(self) -> Path:
        """Where a QEMU writes its log that the run starts itself, and that ends with it."""
        return self.path / _LOG

    def works_on_another(self, peer: Peer | None) -> bool:
        """Returns whether the run works on another QEMU than `peer`, and that one still runs: what it left is there."""
        try:
            pid = int((self.path / _QEMU).read_text()[:_LONGEST_PID])
        except (OSError, ValueError):
            return False
        return peer is not None and pid != peer.pid and not Peer(pid).has_ended()

    def listener(self) -> Peer | None:
        """Returns the process that listens on the socket, None if nobody does; pid 0 if it cannot be told who."""
        return listener_at(self.socket_path, _PROBE_SECONDS)

    def remove(self) -> None:
        """Removes the directory, unless it shall stay or its socket is still served, and gives up the lock."""
        if not self.keep and self.listener() is None:
            shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


def dead_runs(base: str | None = None, *, for_peer: Peer | None = None) -> Iterator[RunDirectory]:
    """Yields the directories of runs that were killed, each locked while it is looked at.

    Only private directories are considered (mode, no links) that belong to us or, if we are root, to the user of
    `for_peer`.
    """
    owners = {os.geteuid()}
    if os.geteuid() == 0 and for_peer is not None and (user := for_peer.user()) is not None:
        owners.add(user[0])
    folder = Path(base or tempfile.gettempdir()).resolve()
    for path in sorted(folder.glob(run_directory_name("*"))):
        if not _is_private(path, owners):
            continue
        if path.name.endswith(_UNNAMED):
            _remove_unnamed(path)
            continue
        run = run_of(path.name)
        lock = _take_lock(path) if run is not None and path.name == run_directory_name(run) else None
        if run is None or lock is None:
            continue
        dead = RunDirectory(run, path, lock)
        try:
            yield dead
        finally:
            dead.remove()


def _remove_ended(base: str | None) -> None:
    """Removes the directories of killed runs whose QEMU was their own child, and ended with them."""
    for dead in dead_runs(base):
        dead.keep = not dead.log_path.exists()


def is_alive(run: str, base: str | None = None) -> bool | None:
    """Returns whether somebody holds the lock of a run's directory; None if the directory is not here."""
    path = Path(base or tempfile.gettempdir()).resolve() / run_directory_name(run)
    try:
        lock = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(lock)
    return False


def _take_lock(path: Path) -> int | None:
    """Locks a run's directory; None if its run lives or somebody else has just removed it."""
    try:
        lock = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_nlink:
            return lock
    except OSError:
        pass
    os.close(lock)
    return None


def _remove_unnamed(path: Path) -> None:
    """Removes a directory that never got its name: its run was killed in its first millisecond."""
    with contextlib.suppress(OSError):
        if time.time() - path.lstat().st_mtime > _UNNAMED_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


def _is_private(path: Path, owners: Collection[int]) -> bool:
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid in owners and stat.S_IMODE(status.st_mode) == 0o700
