"""A line for people on stderr that tells how far work is: in place on a terminal, else one a minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from qmpnbd.cli import output, terminal

TERMINAL_SECONDS = 0.5
LINE_SECONDS = 60.0
_COLUMNS = 80
_CLEAR = "\r\x1b[K"


class Line:
    """The line; a context manager that takes it away in the end."""

    def __init__(self) -> None:
        self.on_terminal = sys.stderr.isatty()
        self.seconds = TERMINAL_SECONDS if self.on_terminal else LINE_SECONDS
        self._shown = time.monotonic()

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        if self.on_terminal:
            output.show(_CLEAR)

    def show(self, line: Callable[[], str]) -> None:
        """Shows what `line` returns, unless the one before is still new."""
        if time.monotonic() - self._shown >= self.seconds:
            self._shown = time.monotonic()
            self.put(line())

    def put(self, text: str) -> None:
        """Shows a text at once."""
        if self.on_terminal:
            room = (terminal.width(sys.stderr) or _COLUMNS) - 1
            output.show(f"{_CLEAR}{text[:room]}")
        else:
            output.tell(text)
