"""Layers of a disk merged into one, without the machine: what a backup holds over what it stood on.

::

    newest    |  D  |  -  |  Z  |  -  |  -  |       D data  Z zeroes  - not in this layer
    next      |  d  |  d  |  d  |  Z  |  -  |
    merged    |  D  |  d  |  Z  |  Z  |  -  |       over what the last one stands on, if it stands on anything

What is read is proved by its hashes before it is written, so that a rotten layer never becomes a merged one with fresh
hashes; and what was written is read again, because the layers it was made of are about to be removed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

from qmpnbd.backup.backups import Backup
from qmpnbd.backup.closes import Closes
from qmpnbd.backup.content import ABSENT, DATA, PIECE, ZERO, aligned, pieces
from qmpnbd.backup.copy import CopyOptions, copy
from qmpnbd.backup.hashes import Hashes
from qmpnbd.backup.layer import Layer
from qmpnbd.backup.layout import backing_name
from qmpnbd.backup.manifest import ManifestDisk
from qmpnbd.backup.prove_layer import file_bytes, prove_layer
from qmpnbd.backup.prune_plan import Merge
from qmpnbd.backup.qcow2_target import Backing, Qcow2Target
from qmpnbd.backup.reads import Buffers
from qmpnbd.deadline import Deadline
from qmpnbd.errors import RepositoryDamagedError
from qmpnbd.extents import ExtentMap
from qmpnbd.printable import printable

_OWNED: Final = 3
"""Data of the layer with index 0; higher ones are those below. Smaller values are as in `qmpnbd.backup.content`."""


@dataclass(frozen=True, slots=True)
class Stacked:
    """A layer to be merged.

    Attributes:
        layer: its image.
        hashes: what it holds.
        where: the image, for messages.
    """

    layer: Layer
    hashes: Hashes
    where: str


class MergedSource(Closes):
    """What several layers hold together; a source of a copy.

    Args:
        stack: the layers, from the newest down.

    Attributes:
        size: bytes of the disk: those of the newest layer.
        where: the image of the newest layer.
    """

    def __init__(self, stack: Sequence[Stacked]) -> None:
        self.size = stack[0].hashes.content.size
        self.where = stack[0].where
        self._owners = _owners([each.hashes.content for each in stack])
        self._windows = [_Window(each) for each in stack]

    def content(self, deadline: Deadline) -> ExtentMap:
        """Returns what the layers hold together; what none of them holds is ABSENT."""
        deadline.check("the layers to be merged", self.where)
        return self._owners.mapped(lambda column: np.where(column >= _OWNED, np.uint64(DATA), column))

    def chunks(
        self, ranges: Iterable[tuple[int, int]], deadline: Deadline, buffers: Buffers | None = None
    ) -> Iterator[tuple[int, memoryview]]:
        """Reads ranges of up to a piece, proved; see `qmpnbd.backup.sources.Source`.

        Raises:
            RepositoryDamagedError: a piece is not what its hash says.
            ImageError: the branch says what is wrong with which image.
            DeadlineError: the time ran out.
        """
        lent = buffers or Buffers()
        for offset, length in ranges:
            deadline.check("the layers to be merged", self.where)
            view = lent.take(length)
            self._fill(offset, view)
            yield offset, view
            if buffers is None:
                lent.give_back(view)

    def _fill(self, offset: int, view: memoryview) -> None:
        ends, values = self._owners.ends, self._owners.values
        run = int(np.searchsorted(ends, np.uint64(offset), side="right"))
        at, end = offset, offset + len(view)
        while at < end:
            stop, owner = min(int(ends[run]), end), int(values[run]) - _OWNED
            part = view[at - offset : stop - offset]
            part[:] = self._windows[owner].read(at, len(part)) if owner >= 0 else bytes(len(part))
            at, run = stop, run + 1

    def close(self) -> None:
        """Does nothing: the layers are the caller's."""


class _Window:
    """The data of a layer between two multiples of a piece, read and proved once for all who ask for parts of it."""

    def __init__(self, stacked: Stacked) -> None:
        self._stacked = stacked
        self._offsets, self._lengths = pieces(stacked.hashes.content)
        self._buffer = memoryview(bytearray(PIECE))
        self._number = -1

    def read(self, offset: int, length: int) -> memoryview:
        """Returns data of the layer; it lies in one window."""
        number, start = divmod(offset, PIECE)
        if number != self._number:
            self._load(number)
            self._number = number
        return self._buffer[start : start + length]

    def _load(self, number: int) -> None:
        base = number * PIECE
        first, last = np.searchsorted(self._offsets, np.array([base, base + PIECE], dtype=np.uint64)).tolist()
        for index in range(first, last):
            offset, length = int(self._offsets[index]), int(self._lengths[index])
            piece = self._buffer[offset - base : offset - base + length]
            self._stacked.layer.read(offset, piece)
            if hashlib.sha256(piece).digest() != self._stacked.hashes.digest(index):
                what = f"the data at [{offset:#x}, {offset + length:#x}) is rotten: its hash is another one"
                remedy = "Fetch the file from a copy of the repository; nothing was changed."
                raise RepositoryDamagedError(what, where=self._stacked.where, remedy=remedy)


def merged(
    backup: Backup, merge: Merge, others: Mapping[str, Backup], *, place: Path, options: CopyOptions, deadline: Deadline
) -> ManifestDisk:
    """Writes the layer that takes the place of a backup's, and its hashes.

    Args:
        backup: that stays.
        merge: what is to be merged into it.
        others: the backups of the chain by id.
        place: the folder that the files are written to.
        options: of the copy.
        deadline: how long it may take.

    Returns:
        The disk as the manifest is to have it.

    Raises:
        RepositoryDamagedError: something that is needed is missing, cut or rotten.
        NotProvedError: what was written does not read the same.
        TargetError: it cannot be written: no room, for one.
        ImageError: the branch says what is wrong with which image.
        DeadlineError: the time ran out.
    """
    disk, lowest = backup.disk(merge.disk), others[merge.over[-1]].disk(merge.disk)
    sources = [backup, *(others[each] for each in merge.over)]
    cluster_size = min(each.disk(merge.disk).cluster_size for each in sources)
    with ExitStack() as opened:
        source = MergedSource([_stacked(each, merge.disk, opened, deadline) for each in sources])
        content = aligned(source.content(deadline), cluster_size)
        target = Qcow2Target.create(
            place / disk.file,
            content,
            backing=_backing(lowest, others.get(merge.base or ""), merge.disk),
            cluster_size=cluster_size,
            compression="zstd" if disk.compression else "",
        )
        opened.callback(target.discard)
        digests = copy(source, target, content, replace(options, hashes=True), deadline).digests
        hashes = Hashes(content, digests or b"")
        target.settle()
        prove_layer(Path(target.read_from), hashes, deadline, read_data=True)
        target.finish()
    hashes.save(place / disk.hashes)
    totals = content.totals()
    kind = disk.kind if merge.base is not None else "shallow" if lowest.template is not None else "full"
    return disk.model_copy(
        update={
            "kind": kind,
            "base": merge.base,
            "template": lowest.template,
            "file_bytes": file_bytes(place / disk.file),
            "data_bytes": totals.get(DATA, 0),
            "zero_bytes": totals.get(ZERO, 0),
            "cluster_size": cluster_size,
            "compression": "zstd" if disk.compression else "",
            "root": hashes.root(),
            "merged": sum(each.disk(merge.disk).merged for each in sources) + len(merge.over),
        }
    )


def _stacked(backup: Backup, disk: str, opened: ExitStack, deadline: Deadline) -> Stacked:
    path = backup.image(disk)
    return Stacked(opened.enter_context(Layer(path, deadline)), backup.hashes(disk), printable(str(path)))


def _backing(lowest: ManifestDisk, base: Backup | None, disk: str) -> Backing | None:
    if base is not None:
        return Backing(backing_name(base.name, base.disk(disk).file), "qcow2", base.disk(disk).size)
    if lowest.template is not None:
        return Backing(lowest.template.path, lowest.template.format, lowest.template.size)
    return None


def _owners(contents: Sequence[ExtentMap]) -> ExtentMap:
    """Returns for every byte ABSENT, ZERO, or whose data it is; the contents are from the newest down."""
    found: ExtentMap | None = None
    for index, content in reversed(list(enumerate(contents))):
        owner = np.array([ABSENT, _OWNED + index, ZERO], dtype=np.uint64)  # by ABSENT, DATA, ZERO
        own = content.mapped(owner.__getitem__)
        # Past the end of a shorter layer there are zeroes, whatever lies below that.
        found = own if found is None else found.resized(content.size, ZERO).overlay(own, ABSENT)
    return found if found is not None else ExtentMap([], [])
