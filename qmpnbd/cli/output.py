"""Results to stdout, everything else to stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

from qmpnbd.cli.exit_codes import BROKEN_PIPE
from qmpnbd.errors import ReportFileError
from qmpnbd.printable import printable


def write(pieces: Iterable[str | bytes]) -> None:
    """Writes a result to stdout; text of our own making may come as bytes.

    Renderers make foreign names fit to be shown; should one slip through, it must not stop the output.

    Raises:
        ReportFileError: it cannot be written.
        BrokenPipeError: nobody reads it any more.
    """
    for piece in pieces:
        _write(piece if isinstance(piece, bytes) else piece.encode("utf-8", "backslashreplace"))
    _write(b"", flush=True)


def _write(piece: bytes, *, flush: bool = False) -> None:
    try:
        sys.stdout.buffer.write(piece)
        if flush:
            sys.stdout.buffer.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise ReportFileError(
            f"cannot write the result: {error.strerror}",
            where="stdout",
            remedy="Make room, or send it elsewhere; backups and files that were made stay.",
        ) from error


def colours() -> bool:
    """Returns whether stdout is a terminal that shows colours, and nobody wants none (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def complain(error: BaseException) -> None:
    """Tells an error or a signal on stderr: one line, and one for each thing that was left behind."""
    tell(str(error), *getattr(error, "__notes__", ()))


def tell(*lines: str) -> None:
    """Writes lines for people to stderr."""
    show("".join(f"qmpnbd: {printable(line)}\n" for line in lines))


def show(text: str) -> None:
    """Writes text for people to stderr as it is.

    That nobody can read it neither stops the work nor changes how it ends.
    """
    import contextlib  # not sooner: help needs none of it

    with contextlib.suppress(OSError):
        print(text, end="", file=sys.stderr, flush=True)


def settle() -> int:
    """Writes out what is still buffered, or gives it up: at its exit Python would try once more, and end with 120.

    Returns:
        The exit code if text for stdout was lost, else 0.
    """
    code = 0
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            if stream is sys.stdout:
                code = BROKEN_PIPE if isinstance(error, BrokenPipeError) else ReportFileError.exit_code
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code


def take_standard_streams() -> None:
    """Opens those of stdin, stdout and stderr that whoever started us closed.

    Else what is opened next, by us or by a QEMU that we start, would have their numbers, and messages would be written
    into an image. Writing a result to a stdout that was closed is an error, as it is for other tools.
    """
    if sys.stdin and sys.stdout and sys.stderr:
        return
    for number, mode in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, mode), True)  # the lowest number that is free: this one
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
