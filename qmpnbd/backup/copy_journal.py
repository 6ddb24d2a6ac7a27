"""What a copy that can be resumed has on the medium: a hash for each piece, written after the piece was brought there.

The file, all numbers little-endian::

    0       8   magic "QMPNBDJ1"
    8      32   key: what is copied (`qmpnbd.backup.resumable`)
    40      4   CRC-32 of the 40 bytes before
    44     48*n records:  8 offset | 4 length | 32 SHA-256 of the piece | 4 CRC-32 of the 44 bytes before

A record that was cut, or does not have its checksum, is none; a piece that does not have its hash was not copied. So
nothing here needs to be believed.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qmpnbd.backup.newfile import told, write_all
from qmpnbd.printable import printable

KEY: Final = 32
"""Bytes of a key."""

_MAGIC: Final = b"QMPNBDJ1"
_RECORD: Final = struct.Struct("<QI32s")
_CRC: Final = struct.Struct("<I")
_HEAD: Final = len(_MAGIC) + KEY + _CRC.size
_SIZE: Final = _RECORD.size + _CRC.size
_FLAGS: Final = os.O_CLOEXEC | os.O_NOFOLLOW


@dataclass(frozen=True, slots=True)
class Written:
    """A piece that is on the medium.

    Attributes:
        offset: its first byte.
        length: its bytes.
        digest: its SHA-256.
    """

    offset: int
    length: int
    digest: bytes


def read_journal(path: Path, most: int) -> tuple[bytes, Mapping[int, Written]] | None:
    """Reads a journal.

    Args:
        path: the file.
        most: records there can be; more are not looked at.

    Returns:
        Its key, and the last record of each offset; None if there is none that makes sense.

    Raises:
        TargetError: it cannot be read.
    """
    with told("what was copied cannot be told", printable(str(path))):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | _FLAGS)
        except FileNotFoundError:
            return None
        with os.fdopen(fd, "rb") as file:
            head, body = file.read(_HEAD), file.read(_SIZE * most)
    if len(head) < _HEAD or not head.startswith(_MAGIC) or not _has_checksum(head):
        return None
    records = (body[at : at + _SIZE] for at in range(0, len(body) - _SIZE + 1, _SIZE))
    found = (Written(*_RECORD.unpack_from(record)) for record in records if _has_checksum(record))
    return head[len(_MAGIC) : -_CRC.size], {each.offset: each for each in found}


class CopyJournal:
    """A journal that is written; made anew, durably, under its name.

    Args:
        path: the file; replaced.
        key: what is copied.
        records: pieces that were copied before, and proved.

    Raises:
        TargetError: it cannot be written.
    """

    def __init__(self, path: Path, key: bytes, records: Sequence[Written]) -> None:
        self._path = path
        self._where = printable(str(path))
        self._fd = -1
        new = path.with_name(f"{path.name}.new")
        with told("what is copied cannot be noted", self._where):
            new.unlink(missing_ok=True)
            self._fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | _FLAGS, 0o600)
            self._end = 0
        try:
            self._append(_with_checksum(_MAGIC + key))
            self.append(records)
            with told("what is copied cannot be noted", self._where):
                new.replace(path)
        except BaseException:
            self.close()
            new.unlink(missing_ok=True)
            raise

    def append(self, records: Sequence[Written]) -> None:
        """Notes pieces that are on the medium, durably.

        Raises:
            TargetError: it cannot be written.
        """
        self._append(b"".join(_with_checksum(_RECORD.pack(each.offset, each.length, each.digest)) for each in records))

    def _append(self, content: bytes) -> None:
        write_all(self._fd, memoryview(content), self._end, self._where)
        with told("what is copied cannot be noted", self._where):
            os.fdatasync(self._fd)
        self._end += len(content)

    def close(self) -> None:
        """Closes it; may be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _with_checksum(content: bytes) -> bytes:
    return content + _CRC.pack(zlib.crc32(content))


def _has_checksum(content: bytes) -> bool:
    return content[-_CRC.size :] == _CRC.pack(zlib.crc32(content[: -_CRC.size]))
