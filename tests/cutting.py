"""Work on a repository, killed (SIGKILL) before each change of the file system that it makes.

The functions of `os` through which Python changes files and folders count; the work is done once for every count, each
time on a fresh copy, until it comes to its end. Run as a module, because a process that forks must have no threads::

    python -m tests.cutting publish REPOSITORY FOLDER      FOLDER/1, FOLDER/2, …: what each cut left
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy.ma  # noqa: F401 - np.unique loads it at its first use, which each of the forks would pay for

from qmpnbd.backup.copy import CopyOptions
from qmpnbd.backup.prune import carry_out, choose_without
from qmpnbd.backup.repository import Repository
from qmpnbd.deadline import Deadline
from tests.stored import CHAIN, Stored, make_backup

CHANGES = ("rename", "replace", "link", "unlink", "rmdir", "mkdir", "ftruncate")
"""Not fsync, except where there are few of the others: nobody sees after a kill whether it was called."""

MOST = 400
"""Changes of the longest work; far more than there are."""

SMALL = 2 << 20
"""Bytes of the disk, which is read after each of some hundred cuts."""

ADDED = ("write -P 77 1M 512k", "write -z 0 64k")
"""What a backup that is cut holds."""


def publish(repository: Repository) -> None:
    newest = repository.backups(CHAIN)[-1]
    make_backup(repository, {"vd0": Stored(ADDED, newest, size=SMALL)}, extras={"machine.json": b"{}"})


def prune(repository: Repository) -> None:
    """Removes the first two backups in two steps."""
    backups = repository.backups(CHAIN)
    choice = choose_without(backups, {each.manifest.id for each in backups[:2]}, where="test")
    with repository.lock("prune"):
        carry_out(repository, choice, CopyOptions(), Deadline(60))


def recover(repository: Repository) -> None:
    with repository.lock("recover"):
        repository.recover()


WORK = {work.__name__: work for work in (publish, prune, recover)}


def cut_before_each_change(work: str, repository: Path, folder: Path) -> list[Path]:
    """Has a process of its own do the work again and again; returns what each cut left, and then what the end did."""
    command = [sys.executable, "-m", "tests.cutting", work, str(repository), str(folder)]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=100, cwd=Path(__file__).parent.parent
    )
    assert done.returncode == 0, done.stderr
    return sorted(folder.iterdir(), key=lambda path: int(path.name))


def kill_before(count: int, changes: Collection[str]) -> None:
    """Has this process killed before its change number `count`."""
    left = iter(range(count - 1))

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for name in changes:
        setattr(os, name, counting(getattr(os, name)))


def main(work: str, repository: str, folder: str) -> None:
    for count in range(1, MOST):
        copy = Path(folder) / str(count)
        shutil.copytree(repository, copy)
        child = os.fork()
        if not child:
            kill_before(count, {*CHANGES, "fsync"} if work == "publish" else CHANGES)
            WORK[work](Repository.open(copy))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            sys.exit(os.WEXITSTATUS(status))
    sys.exit(f"more than {MOST} changes")


if __name__ == "__main__":
    main(*sys.argv[1:])
