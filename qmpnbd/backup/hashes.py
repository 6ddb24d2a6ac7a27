"""The hashes of a layer: one for each piece of data, and a Merkle root over them and over what the layer holds.

The file, all numbers little-endian::

    0       8   magic "QMPNBDH1"
    8       8   algorithm, "sha256" and zeroes
    16      8   runs
    24      8   pieces
    32      8*runs     where each run of the content ends
    ..      1*runs     what it is: 0 not in this layer, 1 data, 2 zeroes
    ..      32*pieces  digest of each piece (`qmpnbd.backup.content.pieces`), in order
    ..      32         SHA-256 of everything before

The root is that of RFC 6962 section 2.1 over the digests and one more leaf, the SHA-256 of the columns of the content:
so it also says where the data lies, and how large the disk is.
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np

from qmpnbd.backup import durable
from qmpnbd.backup.content import ZERO, piece_count
from qmpnbd.errors import RepositoryDamagedError
from qmpnbd.extents import ExtentMap
from qmpnbd.printable import printable

DIGEST: Final = 32
"""Bytes of a digest."""

MAX_FILE: Final = 4 << 30
"""Bytes of a file of hashes that is read: 128 TiB of data."""

_HEAD = struct.Struct("<8s8sQQ")
_MAGIC = b"QMPNBDH1"
_ALGORITHM = b"sha256\0\0"
_REMEDY = "Fetch the file from a copy of the repository; without it the backup cannot be proved."


@dataclass(frozen=True, slots=True)
class Hashes:
    """What a layer holds, and the digest of each piece of it.

    Attributes:
        content: ABSENT, DATA or ZERO for every byte of the disk.
        digests: `DIGEST` bytes for each piece, in order.
        algorithm: of the digests.

    Raises:
        ValueError: not as many digests as there are pieces.
    """

    content: ExtentMap
    digests: bytes
    algorithm: Literal["sha256"] = "sha256"

    def __post_init__(self) -> None:
        count = piece_count(self.content)
        if len(self.digests) != count * DIGEST:
            raise ValueError(f"{len(self.digests)} bytes of digests for {count} pieces")

    def digest(self, index: int) -> bytes:
        """Returns the digest of a piece.

        Raises:
            IndexError: there is no such piece.
        """
        if not 0 <= index < len(self.digests) // DIGEST:
            raise IndexError(f"no piece {index} of {len(self.digests) // DIGEST}")
        return self.digests[index * DIGEST : (index + 1) * DIGEST]

    def root(self) -> str:
        """Returns the Merkle root as hexadecimal digits."""
        leaves = [self.digests[at : at + DIGEST] for at in range(0, len(self.digests), DIGEST)]
        leaves.append(hashlib.sha256(self._columns()).digest())
        level = [hashlib.sha256(b"\0" + leaf).digest() for leaf in leaves]
        while len(level) > 1:
            pairs = zip(level[::2], level[1::2], strict=False)
            # A last one without a partner goes up as it is: the tree that RFC 6962 describes from the top.
            level = [hashlib.sha256(b"\1" + left + right).digest() for left, right in pairs] + level[len(level) & ~1 :]
        return level[0].hex()

    def save(self, path: Path) -> None:
        """Writes a new file, and brings it to the disk.

        Raises:
            TargetError: it cannot be written.
        """
        head = _HEAD.pack(_MAGIC, _ALGORITHM, len(self.content), len(self.digests) // DIGEST)
        body = head + self._columns() + self.digests
        durable.write(path, body + hashlib.sha256(body).digest())

    @classmethod
    def load(cls, path: Path) -> Hashes:
        """Reads a file.

        Raises:
            RepositoryDamagedError: it is missing, cut, rotten, or no such file.
        """
        content = _read(path)
        runs, count = _counts(content, path)
        ends = np.frombuffer(content, "<u8", runs, _HEAD.size)
        values = np.frombuffer(content, np.uint8, runs, _HEAD.size + 8 * runs)
        extents = ExtentMap(ends, values.astype(np.uint64)) if bool(np.all(ends[1:] > ends[:-1])) else None
        if extents is None or len(extents) != runs or bool(np.any(values > ZERO)):
            raise _damaged("its runs are in no order that is written here", path)
        if piece_count(extents) != count:
            raise _damaged("it does not have one hash for each piece of data", path)
        start = _HEAD.size + 9 * runs
        return cls(extents, content[start : start + DIGEST * count])

    def _columns(self) -> bytes:
        ends, values = self.content.ends, self.content.values
        return ends.astype("<u8").tobytes() + values.astype(np.uint8).tobytes()


def _read(path: Path) -> bytes:
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(file, "rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            if size > MAX_FILE:
                raise _damaged(f"it has more than {MAX_FILE} bytes", path)
            return opened.read(size)
    except OSError as error:
        raise _damaged(f"it cannot be read: {error.strerror}", path) from error


def _counts(content: bytes, path: Path) -> tuple[int, int]:
    """Returns the numbers of runs and pieces of a file that is as long as they say and is not rotten."""
    if len(content) < _HEAD.size + DIGEST:
        raise _damaged(f"it is cut: it has {len(content)} bytes", path)
    magic, algorithm, runs, count = _HEAD.unpack_from(content)
    if (magic, algorithm) != (_MAGIC, _ALGORITHM):
        raise _damaged("it is no file of SHA-256 hashes", path)
    size = _HEAD.size + 9 * runs + DIGEST * count + DIGEST
    if len(content) != size:
        raise _damaged(f"it should have {size} bytes and has {len(content)}", path)
    if hashlib.sha256(memoryview(content)[:-DIGEST]).digest() != content[-DIGEST:]:
        raise _damaged("it is rotten: the checksum at its end is another one", path)
    return runs, count


def _damaged(what: str, path: Path) -> RepositoryDamagedError:
    return RepositoryDamagedError(f"hashes: {what}", where=printable(str(path)), remedy=_REMEDY)
