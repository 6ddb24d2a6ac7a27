"""Text for a terminal of so many columns: tables, and lines that are folded where it ends; pure.

A character takes no column (combining marks), one, or two (Chinese, Japanese and Korean ones, most emoji), as Unicode's
East Asian Width has it (https://www.unicode.org/reports/tr11/).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence

_HANGING = 4
"""How far what follows is indented below the beginning of its line."""

_LEAST = 20
"""Columns that text is folded to at least: in fewer, nothing can be read anyway."""

_NO_COLUMN = ("Mn", "Me", "Cf")


def columns(text: str) -> int:
    """Returns how many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    return sum(map(_columns, text))


def _columns(character: str) -> int:
    if unicodedata.category(character) in _NO_COLUMN:
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def folded(line: str, width: int | None) -> Iterator[str]:
    """Yields a line in pieces that fit, those after the first one indented.

    It is broken at blanks, or behind a slash, and only where there is neither in the midst of a word.

    Args:
        line: without a newline.
        width: columns there are; None for as many as it takes.
    """
    if width is None or columns(line) <= width:
        yield line
        return
    width = max(width, _LEAST)
    indent = min(len(line) - len(line.lstrip()) + _HANGING, width // 2)
    while columns(line) > width:
        end = _fitting(line, width)
        yield line[:end].rstrip()
        line = " " * indent + line[end:].lstrip()
    yield line


def _fitting(line: str, width: int) -> int:
    """Returns where to break a line that is too long."""
    used = 0
    blank = slash = 0
    first = len(line) - len(line.lstrip())
    for index, character in enumerate(line):
        used += _columns(character)
        if used > width:
            break
        if index > first and character == " ":
            blank = index
        elif index > first and character == "/":
            slash = index + 1
    # A blank far to the left would leave most of the line empty, as in front of a long name.
    least = first + (index - first) // 2
    return next((place for place in (blank, slash) if place > least), index)


def table(rows: Sequence[Sequence[str]], right: Iterable[int] = (), width: int | None = None) -> Iterator[str]:
    """Yields lines of aligned columns.

    Where they do not fit side by side, the last column goes to lines of its own below the others; where even that does
    not do, every cell goes to a line of its own behind its heading.

    Args:
        rows: the heading first.
        right: columns to align on the right.
        width: columns of the terminal; None for as many as it takes.
    """
    widths = [max(map(columns, column)) for column in zip(*rows, strict=True)]
    to_the_right = set(right)
    if width is None or sum(widths) + 2 * (len(widths) - 1) <= width:
        yield from (_row(row, widths, to_the_right) for row in rows)
    elif sum(widths[:-1]) + 2 * (len(widths) - 2) <= width:
        for row in rows:
            yield _row(row[:-1], widths[:-1], to_the_right)
            yield from folded(" " * _HANGING + row[-1], width)
    else:
        heading, *others = rows
        longest = max(map(columns, heading))
        for row in others:
            for name, cell in zip(heading, row, strict=True):
                yield from folded(f"{_padded(name, longest)}  {cell}", width)


def _row(row: Sequence[str], widths: Sequence[int], right: set[int]) -> str:
    cells = [
        _padded(cell, width, right=index in right) for index, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()


def _padded(cell: str, width: int, *, right: bool = False) -> str:
    blanks = " " * (width - columns(cell))
    return blanks + cell if right else cell + blanks
