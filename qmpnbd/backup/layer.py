"""The layer of one backup, read on its own: whatever it stands on is not opened.

A file in a repository may be anybody's: an image is opened by its place, as qcow2, and neither a backing file nor an
external data file that it names is of any interest here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from qmpnbd.backup.closes import Closes
from qmpnbd.backup.content import ABSENT, DATA, PIECE, ZERO, pieces
from qmpnbd.deadline import Deadline
from qmpnbd.errors import ImageUnsupportedError
from qmpnbd.extents import ExtentMap
from qmpnbd.images.chain import LayerSpec
from qmpnbd.images.files import open_layers
from qmpnbd.images.status import Status
from qmpnbd.printable import printable

_CONTENT = {
    Status.UNALLOCATED: ABSENT,
    Status.DATA: DATA,
    Status.ZERO: ZERO,
    Status.ZERO_ALLOCATED: ZERO,
    Status.COMPRESSED: DATA,
    Status.UNREADABLE: DATA,  # reading it tells what is wrong with it
}
_CONTENT_OF_STATUS = np.array([_CONTENT[status] for status in Status], dtype=np.uint64)


class Layer(Closes):
    """An open layer; a context manager.

    Args:
        path: the image.
        deadline: for opening it and all that is read later.

    Attributes:
        size: bytes of the disk.
        backing_name: as the header has it; empty for none.
        backing_format: likewise.
        cluster_size: bytes in a cluster.
        has_snapshots: whether the header speaks of internal snapshots.

    Raises:
        ImageUnsupportedError: its data is in another file.
        ImageError: the branch says what is wrong with the file.
    """

    def __init__(self, path: Path, deadline: Deadline) -> None:
        self._chain = open_layers([LayerSpec(str(path), "qcow2", 1)], deadline=deadline)
        self.size = self._chain.size
        self._where = printable(str(path))
        self._deadline = deadline
        qcow2 = self._chain.members[0].qcow2
        if qcow2 is not None and qcow2.extensions.data_file is not None:
            self.close()
            remedy = "Nothing in a repository is made like this: fetch the file from a copy."
            raise ImageUnsupportedError("its data is in another file", where=self._where, remedy=remedy)
        self.backing_name = qcow2.backing_name if qcow2 is not None else ""
        self.backing_format = qcow2.backing_format if qcow2 is not None else ""
        self.cluster_size = qcow2.header.cluster_size if qcow2 is not None else 0
        self.has_snapshots = qcow2 is not None and bool(qcow2.header.snapshot_count or qcow2.header.snapshots_offset)

    def close(self) -> None:
        """Closes the file; may be called twice."""
        self._chain.close()

    def content(self) -> ExtentMap:
        """Returns what the image itself says it holds; without a backing file, zeroes for what it does not hold.

        Raises:
            ImageError: the branch says what is wrong with the file.
            DeadlineError: the time ran out.
        """
        found = self._chain.statuses(0).statuses.mapped(lambda column: _CONTENT_OF_STATUS[column])
        if self.backing_name:
            return found
        return found.mapped(lambda column: np.where(column == ABSENT, np.uint64(ZERO), column))

    def read(self, offset: int, buffer: memoryview) -> None:
        """Fills a buffer with the bytes of the layer from `offset` on; what it does not hold is zeroes.

        Raises:
            ImageError: the branch says what is wrong with the file.
            DeadlineError: the time ran out.
        """
        self._chain.read_into(offset, buffer)

    def digests(self, content: ExtentMap) -> Iterator[tuple[int, int, bytes]]:
        """Reads every piece, and yields its offset, its length and its SHA-256.

        Raises:
            ImageError: the branch says what is wrong with the file.
            DeadlineError: the time ran out.
        """
        buffer = memoryview(bytearray(PIECE))
        for offset, length in zip(*(column.tolist() for column in pieces(content)), strict=True):
            self._deadline.check("the pieces to be read", self._where)
            self.read(offset, buffer[:length])
            yield offset, length, hashlib.sha256(buffer[:length]).digest()
