"""The layers of a backup, each read alone, and the disk that they make together.

::

    layer 2 (asked for)     |    | D |      | Z |            its pieces, each with its hash
    layer 1                 | D  | D     |      | D |        its pieces, …
    layer 0 (full)          | D  | Z            | D      |   its pieces, …
                            ------------------------------
    the disk                | 1  | 2 | 1 | 0| 0 |1 | 0   |   which layer holds each byte; 0 where it reads as zero

Which layers there are, in which order, and what each of them holds is told by manifests and hash files. The names in
the headers of the images are not followed here: what is read from a layer comes from that one file, is hashed in the
moment it is read, and is handed on only if the hash is the one that the backup recorded. A piece that a higher layer
covers in part is read whole, because only the whole of it has a hash.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

import numpy as np

from qmpnbd.backup.closes import Closes
from qmpnbd.backup.content import ABSENT, DATA, PIECE, ZERO, pieces
from qmpnbd.backup.hashes import Hashes
from qmpnbd.backup.layer import Layer
from qmpnbd.backup.proof import cut, is_zero
from qmpnbd.backup.reads import Buffers
from qmpnbd.backup.sources import Source
from qmpnbd.deadline import Deadline
from qmpnbd.errors import ImageError, RepositoryDamagedError
from qmpnbd.extents import U64, ExtentMap
from qmpnbd.printable import printable

REMEDY = "Restore an earlier backup that does not stand on it, and have the next one be a full one."

_KEPT_PIECES = 16  # pieces that were read whole for the sake of a part, 1 MiB each
_WORDS = {ABSENT: "nothing", DATA: "data", ZERO: "zero"}


class StoredLayer(Closes):
    """The layer of one backup with its hashes; a context manager.

    Attributes:
        where: the file, for messages.
        content: what it must hold, as the backup recorded.
    """

    def __init__(self, layer: Layer, where: str, hashes: Hashes) -> None:
        self.where = where
        self.content = hashes.content
        self.offsets, self.lengths = pieces(hashes.content)
        self._layer = layer
        self._hashes = hashes

    @classmethod
    def open(cls, path: Path, hashes: Hashes, deadline: Deadline) -> Self:
        """Opens it.

        Args:
            path: the file.
            hashes: what it must hold.
            deadline: for all that is read.

        Raises:
            RepositoryDamagedError: it is missing, cannot be read, is no qcow2, or has another size.
            DeadlineError: the time is over.
        """
        where = printable(str(path))
        with _told(where):
            layer = Layer(path, deadline)
        if layer.size != hashes.content.size:
            layer.close()
            raise _damaged(where, f"the disk in it has {layer.size} bytes, and {hashes.content.size} were backed up")
        return cls(layer, where, hashes)

    def close(self) -> None:
        """Closes the file."""
        self._layer.close()

    def require_map(self) -> None:
        """Holds the image's tables against what the backup recorded.

        Where they tell data and zeroes were backed up (which share a cluster with data), the zeroes are read.

        Raises:
            RepositoryDamagedError: they tell something else.
        """
        with _told(self.where):
            held = self._layer.content()
        for each in held.differences(self.content):
            what = f"{_WORDS[each.left]} where {_WORDS[each.right]} was backed up"
            if (each.left, each.right) == (DATA, ZERO):
                parts = (self._read(offset, length) for offset, length in cut(each.offset, each.end))
                if all(map(is_zero, parts)):
                    continue
            raise _damaged(self.where, f"bytes [{each.offset}, {each.end}): {what}")

    def number_at(self, offset: int) -> int:
        """Returns the number of the piece in which a byte of data lies."""
        return int(np.searchsorted(self.offsets, np.uint64(offset), side="right")) - 1

    def piece(self, number: int) -> tuple[int, int]:
        """Returns where a piece is: offset and length."""
        return int(self.offsets[number]), int(self.lengths[number])

    def read_piece(self, number: int, buffer: memoryview) -> None:
        """Fills a buffer as long as the piece with it.

        Raises:
            RepositoryDamagedError: it cannot be read, or is not what was backed up.
        """
        offset, length = self.piece(number)
        with _told(self.where):
            self._layer.read(offset, buffer)
        if hashlib.sha256(buffer).digest() != self._hashes.digest(number):
            raise _damaged(self.where, f"bytes [{offset}, {offset + length}) are not what was backed up")

    def require_hashes(self, deadline: Deadline) -> None:
        """Reads every piece.

        Raises:
            RepositoryDamagedError: one cannot be read, or is not what was backed up.
            DeadlineError: the time is over.
        """
        room = memoryview(bytearray(PIECE))
        for number, length in enumerate(self.lengths.tolist()):
            deadline.check("the pieces to be hashed", self.where)
            self.read_piece(number, room[:length])

    def _read(self, offset: int, length: int) -> memoryview:
        """Reads bytes that no hash proves."""
        buffer = memoryview(bytearray(length))
        with _told(self.where):
            self._layer.read(offset, buffer)
        return buffer


class RestoreSource(Closes):
    """The disk of a backup, put together of its layers and proved while it is read: a `Source`.

    Attributes:
        size: bytes of the disk.
        where: the backup, for messages.
    """

    def __init__(self, layers: Sequence[StoredLayer], where: str, template: Source | None = None) -> None:
        """Takes the layers over.

        Args:
            layers: from the backup asked for down to the full or shallow one.
            where: the backup, for messages.
            template: what the last of them stands on; None if it is a full one.
        """
        self.size = layers[0].content.size
        self.where = where
        self._layers = layers
        self._template = template
        self._files = ExitStack()
        for layer in layers:
            self._files.callback(layer.close)
        if template is not None:
            self._files.callback(template.close)
        self._owners: ExtentMap | None = None
        self._kept: OrderedDict[tuple[int, int], memoryview] = OrderedDict()

    def close(self) -> None:
        """Closes the files."""
        self._files.close()

    def content(self, deadline: Deadline) -> ExtentMap:
        """Returns what the disk holds: `DATA` or `ZERO` for every byte; holds the images' tables against it first.

        Raises:
            RepositoryDamagedError: an image holds something else than what was backed up.
            ImageError: the template cannot be read.
            DeadlineError: the time is over.
        """
        for layer in self._layers:
            deadline.check("the tables to be read", layer.where)
            layer.require_map()
        return self.owners(deadline).mapped(lambda values: np.where(values == 0, ZERO, DATA))

    def owners(self, deadline: Deadline) -> ExtentMap:
        """Returns which layer holds the data of each byte; see `owners_of`.

        Raises:
            ImageError: the template cannot be read.
            DeadlineError: the time is over.
        """
        if self._owners is None:
            below = self._template.content(deadline) if self._template is not None else None
            self._owners = owners_of([layer.content for layer in self._layers], below)
        return self._owners

    def unproved_bytes(self, deadline: Deadline) -> int:
        """Returns how many bytes of data come from the template, which has no hashes of pieces."""
        return self.owners(deadline).totals().get(len(self._layers) + 1, 0)

    def chunks(
        self, ranges: Iterable[tuple[int, int]], deadline: Deadline, buffers: Buffers | None = None
    ) -> Iterator[tuple[int, memoryview]]:
        """Reads ranges, each proved by the hashes of the layers that hold it; see `Source.chunks`.

        Raises:
            RepositoryDamagedError: a layer cannot be read, or holds something else than what was backed up.
            DeadlineError: the time is over.
        """
        room = memoryview(bytearray(PIECE))
        found = self.owners(deadline)
        for offset, length in ranges:
            deadline.check("the backup to be read", self.where)
            buffer = room[:length] if buffers is None else buffers.take(length)
            for start, end, owner in runs(found, offset, offset + length):
                self._put(owner, start, end, buffer[start - offset : end - offset], deadline)
            yield offset, buffer

    def _put(self, owner: int, start: int, end: int, part: memoryview, deadline: Deadline) -> None:
        """Fills a part with the bytes of one layer or of the template; of none with zeroes."""
        if not owner:
            part[:] = bytes(end - start)
            return
        if owner > len(self._layers):
            if self._template is not None:
                for _, data in self._template.chunks([(start, end - start)], deadline):
                    part[:] = data
            return
        layer, at = self._layers[owner - 1], start
        while at < end:
            number = layer.number_at(at)
            offset, length = layer.piece(number)
            stop = min(end, offset + length)
            into = part[at - start : stop - start]
            if (offset, length) == (at, stop - at):
                layer.read_piece(number, into)
            else:
                into[:] = self._whole(owner, layer, number)[at - offset : stop - offset]
            at = stop

    def _whole(self, owner: int, layer: StoredLayer, number: int) -> memoryview:
        """Returns a piece of which only a part is wanted; the last ones are kept, for their other parts."""
        key = (owner, number)
        if key not in self._kept:
            buffer = memoryview(bytearray(layer.piece(number)[1]))
            layer.read_piece(number, buffer)
            self._kept[key] = buffer
            if len(self._kept) > _KEPT_PIECES:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]


def owners_of(contents: Sequence[ExtentMap], below: ExtentMap | None = None) -> ExtentMap:
    """Returns which layer holds the data of each byte of a disk: its place in `contents`, from 1 on; 0 for zeroes.

    Past the end of a layer that is shorter than the one above everything is zero, whatever lies below.

    Args:
        contents: what each layer holds, from the active layer down.
        below: what the template below them holds, which counts as one more layer; None if there is none.
    """
    found = ExtentMap([], [])
    if below is not None:
        found = below.mapped(lambda values: np.where(values == np.uint64(DATA), len(contents) + 1, 0))
    for number in range(len(contents), 0, -1):
        content = contents[number - 1]
        own = np.array([0, number, 0], np.uint64)

        def join(lower: U64, held: U64, own: U64 = own) -> U64:
            return np.where(held == np.uint64(ABSENT), lower, own[held.astype(np.intp)])

        found = found.resized(content.size, 0).combine(content, join)
    return found


def runs(extents: ExtentMap, offset: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yields the runs of a window of a map, without looking at the rest of it: start, end and value of each."""
    index = int(np.searchsorted(extents.ends, np.uint64(offset), side="right"))
    while offset < end:
        stop = min(int(extents.ends[index]), end)
        yield offset, stop, int(extents.values[index])
        offset, index = stop, index + 1


@contextmanager
def _told(where: str) -> Iterator[None]:
    """Has what is wrong with an image told as what it is: damage of the repository."""
    try:
        yield
    except ImageError as error:
        raise _damaged(where, str(error.args[0])) from error


def _damaged(where: str, what: str) -> RepositoryDamagedError:
    return RepositoryDamagedError(what, where=where, remedy=REMEDY)
