"""How wide a terminal is."""

from __future__ import annotations

import os
from typing import TextIO

_MAX_COLUMNS = 1 << 15


def width(stream: TextIO) -> int | None:
    """Returns how many columns the terminal has that a stream goes to; None if it goes elsewhere.

    COLUMNS in the environment counts before what the terminal says (POSIX, Environment Variables).
    """
    try:
        if not stream.isatty():
            return None
        told = os.environ.get("COLUMNS", "")
        if told.isascii() and told.isdecimal() and 0 < int(told) < _MAX_COLUMNS:
            return int(told)
        return os.get_terminal_size(stream.fileno()).columns or None
    except (OSError, ValueError):
        return None
