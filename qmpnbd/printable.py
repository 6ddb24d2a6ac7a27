"""Foreign text made fit to be shown: names of files, words of servers.

A terminal obeys control characters, and a newline in a name could forge a line of a report. What cannot be shown is
written as a backslash escape, so that two names never look alike for it.
"""

from __future__ import annotations


def printable(text: str) -> str:
    """Returns `text` with everything that is not printable (newlines, control characters, lone surrogates) escaped."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
