"""Proof by reading back: what is there now is what was written.

::

    content   | DATA          | ZERO                    | DATA |
    read      | every piece   | what the source calls data     |
    must be   | its hash      | zero                    | hash |

A range that the source itself tells to be zero is believed without reading: its tables or the file system's say so,
and whoever reads later asks the same ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np

from qmpnbd.backup.content import DATA, PIECE, ZERO, pieces
from qmpnbd.backup.hashes import Hashes
from qmpnbd.backup.sources import Source
from qmpnbd.deadline import Deadline
from qmpnbd.errors import NotProvedError
from qmpnbd.extents import ExtentMap

REMEDY = "The medium or what lies before it changes data: do not use what was written; see the kernel's log."


def prove(source: Source, hashes: Hashes, deadline: Deadline) -> int:
    """Reads back everything that was written.

    Args:
        source: what was written, opened anew.
        hashes: what it must hold; bytes that are `ABSENT` are not looked at.
        deadline: for all of it.

    Returns:
        Bytes that were read.

    Raises:
        NotProvedError: something else is there; the error names a range that differs.
        QmpnbdError: it cannot be read.
        DeadlineError: the time is over.
    """
    content = hashes.content
    if source.size < content.size:
        what = f"it has {source.size} bytes, and {content.size} were written"
        raise NotProvedError(what, where=source.where, remedy=REMEDY)
    offsets, lengths = pieces(content)
    done = 0
    for offset, data in source.chunks(zip(offsets.tolist(), lengths.tolist(), strict=True), deadline):
        if hashlib.sha256(data).digest() != hashes.digest(int(np.searchsorted(offsets, np.uint64(offset)))):
            raise _differs(source, offset, len(data), "their hash is another one")
        done += len(data)
    held = source.content(deadline).resized(content.size, ZERO)
    suspect = held.combine(content, lambda there, wanted: (there == np.uint64(DATA)) & (wanted == np.uint64(ZERO)))
    for offset, data in source.chunks(ranges_of(suspect, 1), deadline):
        if not is_zero(data):
            raise _differs(source, offset, len(data), "they must be zero")
        done += len(data)
    return done


def ranges_of(extents: ExtentMap, value: int) -> Iterator[tuple[int, int]]:
    """Yields the runs of a value, cut at multiples of `PIECE`: offset and length of each."""
    for extent in extents:
        if extent.value == value:
            yield from cut(extent.offset, extent.end)


def cut(offset: int, end: int) -> Iterable[tuple[int, int]]:
    """Cuts a range at multiples of `PIECE`: offset and length of each part."""
    while offset < end:
        stop = min(end, (offset // PIECE + 1) * PIECE)
        yield offset, stop - offset
        offset = stop


def is_zero(data: memoryview) -> bool:
    """Returns whether every byte is zero."""
    return not np.frombuffer(data, np.uint8).any()


def _differs(source: Source, offset: int, length: int, why: str) -> NotProvedError:
    what = f"bytes [{offset}, {offset + length}) are not what was written: {why}"
    return NotProvedError(what, where=source.where, remedy=REMEDY)
