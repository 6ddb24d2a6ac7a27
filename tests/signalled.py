"""The real command line, which gets a real signal after its Nth command on the monitor; a program.

As in `tests.dying`, one process that has imported everything forks: the child is the command, with its own signal
handlers and exit code. The signal comes from outside of its event loop, by the kernel.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

from qmpnbd.cli.main import main as qmpnbd
from qmpnbd.qmp.monitor import Monitor
from tests.dying import Counting, Mortal, forked, program


class Signalled(Counting):
    """A monitor whose process gets SIGTERM after its Nth command."""

    def strike(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def main(*arguments: str) -> None:
    """Runs the command as often as it is told to."""

    def command(after: int) -> int:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        Signalled.after = after
        with patch.object(Monitor, "connect", Signalled.connect):
            return qmpnbd(arguments)

    forked(command)


@contextlib.contextmanager
def signalled(*arguments: str | Path) -> Iterator[Mortal]:
    """Runs the program."""
    with program("tests.signalled", *map(str, arguments)) as child:
        yield Mortal(child)


if __name__ == "__main__":
    main(*sys.argv[1:])
