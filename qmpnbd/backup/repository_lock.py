"""The locks of a repository: one run writes at a time, and says who it is; who reads keeps files from being removed.

The kernel holds a lock and frees it when the run ends, however it ends: the writer's is one that can be asked for
without taking it (`qmpnbd.backup.locks`), the readers' is shared (flock). What stands in the writer's file is for
people, and for whoever finds it held; where it names a run although the lock is free, that run was killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from qmpnbd.backup.durable import told
from qmpnbd.backup.locks import is_locked, take
from qmpnbd.backup.manifest import now
from qmpnbd.errors import RepositoryBusyError
from qmpnbd.printable import printable

_LONGEST = 4096
_SILENT_SECONDS = 1.0
_LOOK = 0.01
_HIGHEST_PID = (1 << 31) - 1
_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


@dataclass(frozen=True, slots=True)
class Holder:
    """A run that holds a lock, or held it when it was killed.

    Attributes:
        pid: its process.
        host: where that runs.
        since: when it took the lock, in UTC.
        what: what it does.
    """

    pid: int
    host: str
    since: str
    what: str

    def __str__(self) -> str:
        return f"{self.what} (process {self.pid} on {self.host}, since {self.since})"


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Holds a lock together with others who only read.

    Args:
        path: the lock file; in a folder that cannot be written nobody removes anything, and none is needed.

    Raises:
        RepositoryBusyError: somebody has it for himself.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_CREAT | _FLAGS, 0o600)
    except OSError:
        yield
        return
    with _shut(file):
        if not _locked(file, fcntl.LOCK_SH):
            remedy = "Run again when it has ended."
            raise RepositoryBusyError(
                "backups are just being removed", where=printable(str(path.parent)), remedy=remedy
            )
        yield


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Holds the same lock as `reading`, while nobody reads.

    Raises:
        RepositoryBusyError: somebody reads.
        TargetError: the file cannot be made.
    """
    with told(path):
        file = os.open(path, os.O_RDWR | os.O_CREAT | _FLAGS, 0o600)
    with _shut(file):
        if not _locked(file, fcntl.LOCK_EX):
            what = "somebody reads backups (a restore, a check, a machine that runs from one)"
            remedy = "Run again when that has ended."
            raise RepositoryBusyError(what, where=printable(str(path.parent)), remedy=remedy)
        yield


@contextlib.contextmanager
def holding(path: Path, what: str) -> Iterator[Holder | None]:
    """Holds a lock, and gives it up at the end.

    Args:
        path: the lock file; made if it is not there.
        what: what the lock is for, in words; shown to those who find it held.

    Yields:
        The run that was killed while it held the lock; None if the last one ended in order.

    Raises:
        RepositoryBusyError: another run holds it; the message says which.
        TargetError: the file cannot be made or written.
    """
    with told(path):
        file = os.open(path, os.O_RDWR | os.O_CREAT | _FLAGS, 0o600)
    with _shut(file):
        with told(path):
            killed = _taken(file, path)
        with contextlib.suppress(OSError):  # a full disk, on which room is to be made: the lock holds without the note
            _note(file, Holder(os.getpid(), os.uname().nodename, now(), what))
        try:
            yield killed
        finally:
            with contextlib.suppress(OSError):
                os.ftruncate(file, 0)


def is_held(path: Path) -> bool:
    """Returns whether a run that lives holds a lock."""
    try:
        file = os.open(path, os.O_RDONLY | _FLAGS)
    except OSError:
        return False
    with _shut(file):
        return is_locked(file)


@contextlib.contextmanager
def _shut(file: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(file)


def _locked(file: int, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _taken(file: int, path: Path) -> Holder | None:
    """Takes the lock; returns the run that was killed while it held it.

    A run that has just taken it, or is giving it up, does not say who it is: that is waited for.
    """
    end = time.monotonic() + _SILENT_SECONDS
    while not take(file):
        holder = _holder(file)
        if (holder is not None and not _has_ended(holder)) or time.monotonic() > end:
            raise _busy(holder, path)
        time.sleep(_LOOK)
    return _holder(file)


def _has_ended(holder: Holder) -> bool:
    if holder.host != os.uname().nodename:
        return False
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _note(file: int, holder: Holder) -> None:
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps(asdict(holder)).encode(), 0)


def _holder(file: int) -> Holder | None:
    """Returns whom the file names; None if it is empty or says nothing of sense."""
    try:
        told = json.loads(os.pread(file, _LONGEST, 0))
        holder = Holder(int(told["pid"]), str(told["host"]), str(told["since"]), str(told["what"]))
    except (ValueError, OverflowError, TypeError, KeyError, RecursionError):
        return None
    return holder if 0 < holder.pid <= _HIGHEST_PID else None


def _busy(holder: Holder | None, path: Path) -> RepositoryBusyError:
    return RepositoryBusyError(
        f"the repository is held by {printable(str(holder)) if holder else 'a run that does not say who it is'}",
        where=printable(str(path.parent)),
        remedy="Run again when it has ended; if it hangs, end it: nothing of it has to be cleaned up by hand.",
    )
