"""``qmpnbd backup`` in a process that is killed, or told to end, after its Nth step; a program.

A step is a QMP command that changes something, a piece that is written, a file that is brought to the disk, or a
renaming. One process that has imported everything reads ``N`` from its input, forks, and says how the child ended.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qmpnbd.backup.newfile import NewFile
from qmpnbd.cli.main import main as command_line
from qmpnbd.qmp.monitor import Monitor
from tests.dying import ASKING


class _Steps:
    """Counts steps, and strikes after the one that it is told."""

    def __init__(self, last: int, number: signal.Signals) -> None:
        self._left = last
        self._signal = number
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self._left -= 1
            if not self._left:
                os.kill(os.getpid(), self._signal)

    def after(self, owner: Any, name: str) -> None:
        """Has every call of a function be a step."""
        original: Callable[..., Any] = getattr(owner, name)

        def counted(*arguments: Any, **more: Any) -> Any:
            try:
                return original(*arguments, **more)
            finally:
                self()

        setattr(owner, name, counted)

    def after_commands(self) -> None:
        """Has every QMP command that changes something be a step."""
        original = Monitor.execute

        async def counted(monitor: Monitor, command: str, *arguments: Any, **more: Any) -> object:
            try:
                return await original(monitor, command, *arguments, **more)
            finally:
                if not command.startswith(ASKING):
                    self()

        Monitor.execute = counted  # type: ignore[method-assign, assignment]


def _child(last: int, number: signal.Signals, arguments: list[str]) -> int:
    steps = _Steps(last, number)
    steps.after_commands()
    steps.after(os, "fsync")
    steps.after(Path, "rename")
    steps.after(NewFile, "write")
    return command_line(["backup", *arguments])


def main(name: str, *arguments: str) -> None:
    """Dies as often as it is told to."""
    for line in sys.stdin:
        child = os.fork()
        if not child:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            code = 70
            with contextlib.suppress(BaseException):
                code = _child(int(line), signal.Signals[name], list(arguments))
            os._exit(code)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        sys.stdout.flush()


class MortalBackup:
    """The program, seen from a test."""

    def __init__(self, child: subprocess.Popen[str]) -> None:
        self._child = child

    def ends_after(self, step: int) -> int:
        """Returns its exit code, below 0 for a signal that killed it."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(f"{step}\n")
        self._child.stdin.flush()
        return int(self._child.stdout.readline())


@contextlib.contextmanager
def mortal_backup(number: signal.Signals, *arguments: str) -> Iterator[MortalBackup]:
    """Runs the program."""
    command = [sys.executable, "-m", "tests.backup_dying", number.name, *arguments]
    root = Path(__file__).parent.parent
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            yield MortalBackup(child)
        finally:
            child.communicate(timeout=30)


if __name__ == "__main__":
    main(*sys.argv[1:])
