"""Results to stdout, everything else to stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterable


def write(pieces: Iterable[str | bytes]) -> None:
    """Writes a result to stdout; text of our own making may come as bytes.

    Names of files and texts of servers are foreign: characters that a terminal would obey are shown as escapes, and
    bytes that are no characters do not stop the output.
    """
    for piece in pieces:
        if isinstance(piece, bytes):
            sys.stdout.flush()
            sys.stdout.buffer.write(piece)
        else:
            sys.stdout.write(printable(piece))
    sys.stdout.flush()


def complain(error: BaseException) -> None:
    """Tells an error or a signal on stderr: one line, and one for each thing that was left behind."""
    for line in (str(error), *getattr(error, "__notes__", ())):
        print(f"qmpnbd: {printable(line)}", file=sys.stderr)


def printable(text: str) -> str:
    """Returns `text` with control characters and lone surrogates as backslash escapes; newlines stay."""
    if text.isascii() and text.replace("\n", "").isprintable():
        return text
    return "".join(char if char == "\n" or char.isprintable() else ascii(char)[1:-1] for char in text)
