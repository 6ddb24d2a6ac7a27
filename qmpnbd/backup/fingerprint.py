"""The SHA-256 of a whole file, and that of the disk that an image holds."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Final

from qmpnbd.backup.content import DATA, PIECE, aligned
from qmpnbd.backup.proof import is_zero, ranges_of
from qmpnbd.backup.sources import Source
from qmpnbd.deadline import Deadline
from qmpnbd.images.hostfile import HostFile
from qmpnbd.printable import printable

_CHUNK: Final = 1 << 20


def chunks_of(path: str, deadline: Deadline) -> Iterator[tuple[int, memoryview]]:
    """Yields a file from its beginning to its end: offset and bytes, which are good until the next are asked for.

    Raises:
        ImageError: the file is missing, cannot be read, or is no file.
        DeadlineError: the time ran out.
    """
    where = printable(path)
    buffer = memoryview(bytearray(_CHUNK))
    with HostFile(path, where) as file:
        at = 0
        while count := file.read_into(buffer, at):
            deadline.check("a file to be read", where)
            yield at, buffer[:count]
            at += count


def sha256_of(path: str, deadline: Deadline) -> str:
    """Returns the SHA-256 of a file as hexadecimal digits; raises as `chunks_of`."""
    found = hashlib.sha256()
    for _, data in chunks_of(path, deadline):
        found.update(data)
    return found.hexdigest()


def sha256_of_disk(source: Source, deadline: Deadline) -> str:
    """Returns the SHA-256 of what a guest reads from a disk, as hexadecimal digits.

    It is that of the size, and of the offset and the bytes of each piece (`PIECE`, on a grid of it) that is not all
    zeroes, numbers as eight bytes, little-endian. So it does not matter which zeroes are holes.

    Raises:
        QmpnbdError: the disk cannot be read.
        DeadlineError: the time ran out.
    """
    found = hashlib.sha256(source.size.to_bytes(8, "little"))
    whole = aligned(source.content(deadline), PIECE)
    for offset, data in source.chunks(ranges_of(whole, DATA), deadline):
        if not is_zero(data):
            found.update(offset.to_bytes(8, "little"))
            found.update(data)
    return found.hexdigest()
