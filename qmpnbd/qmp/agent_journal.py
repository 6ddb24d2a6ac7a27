"""Which guests were told to freeze their filesystems: written down before, crossed out after the thaw.

A frozen guest stays frozen when the one who froze it is killed, and on Linux nothing ever thaws it but a command. So::

    DIR/frozen-3f9a01c7.json      {"agent": "/run/vm.ga", "run": "3f9a01c7"}
                                  fsynced before the freeze, removed after the thaw
                                  locked (flock) while its run lives; a free lock means a killed run

The directory must outlive the run, so it is not the run's private one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qmpnbd.errors import UsageError
from qmpnbd.qmp.naming import new_run

MAX_ENTRY = 4096
"""Bytes of an entry: a socket's path has 107 at most."""

_PREFIX = "frozen-"
_SUFFIX = ".json"


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """A guest that may be frozen.

    Attributes:
        agent: the address of its agent.
        path: the entry's file.
        lock: descriptor of that file, which is locked.
    """

    agent: str
    path: Path
    lock: int

    def cross_out(self) -> None:
        """Removes the entry: the guest is thawed."""
        self.path.unlink(missing_ok=True)
        _sync_directory(self.path.parent)

    def let_go(self) -> None:
        """Gives up the lock; an entry that is not crossed out is then found by the next start."""
        os.close(self.lock)


class AgentJournal:
    """The journal in one directory, which is made if need be, for its owner alone.

    Raises:
        UsageError: it cannot be made or is no directory.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise _unusable(directory, error) from error

    def write_down(self, agent: str) -> JournalEntry:
        """Makes an entry that is durable when this returns.

        Raises:
            UsageError: it cannot be written; then nothing may be frozen.
        """
        run = new_run()
        path = self._directory / f"{_PREFIX}{run}{_SUFFIX}"
        unfinished = path.with_suffix(".new")
        try:
            lock = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.write(lock, json.dumps({"agent": agent, "run": run}).encode())
                os.fsync(lock)
                unfinished.rename(path)
                _sync_directory(self._directory)
            except BaseException:
                os.close(lock)
                raise
        except OSError as error:
            raise _unusable(self._directory, error) from error
        return JournalEntry(agent, path, lock)

    def leftovers(self) -> Iterator[JournalEntry]:
        """Yields the entries of killed runs, each locked while it is looked at; what is no entry is left alone."""
        for path in sorted(self._directory.glob(f"{_PREFIX}*{_SUFFIX}")):
            lock = _take_lock(path)
            if lock is None:
                continue
            try:
                agent = _agent(lock)
                if agent is not None:
                    yield JournalEntry(agent, path, lock)
            finally:
                os.close(lock)


def _take_lock(path: Path) -> int | None:
    """Locks an entry; None if its run lives, or if it has just been crossed out."""
    try:
        lock = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    with contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        status = os.fstat(lock)
        if status.st_nlink and status.st_uid == os.geteuid():
            return lock
    os.close(lock)
    return None


def _agent(lock: int) -> str | None:
    try:
        entry = json.loads(os.pread(lock, MAX_ENTRY, 0))
    except (OSError, ValueError, RecursionError):
        return None
    agent = entry.get("agent") if isinstance(entry, dict) else None
    return agent if isinstance(agent, str) else None


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unusable(directory: Path, error: OSError) -> UsageError:
    return UsageError(
        f"the journal of frozen guests cannot be written: {error.strerror}",
        where=str(directory),
        remedy="Choose a folder of your own that survives a reboot.",
    )
