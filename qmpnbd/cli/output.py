"""Results to stdout, everything else to stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

from qmpnbd.printable import printable


def write(pieces: Iterable[str | bytes]) -> None:
    """Writes a result to stdout; text of our own making may come as bytes.

    Renderers make foreign names fit to be shown; should one slip through, it must not stop the output.
    """
    for piece in pieces:
        sys.stdout.buffer.write(piece if isinstance(piece, bytes) else piece.encode("utf-8", "backslashreplace"))
    sys.stdout.buffer.flush()


def colours() -> bool:
    """Returns whether stdout is a terminal that shows colours, and nobody wants none (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def complain(error: BaseException) -> None:
    """Tells an error or a signal on stderr: one line, and one for each thing that was left behind."""
    tell(str(error), *getattr(error, "__notes__", ()))


def tell(*lines: str) -> None:
    """Writes lines for people to stderr."""
    for line in lines:
        print(f"qmpnbd: {printable(line)}", file=sys.stderr)
