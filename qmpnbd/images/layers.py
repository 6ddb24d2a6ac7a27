"""An open backing chain, and what it answers. `images.files` opens chains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from qmpnbd.deadline import Deadline
from qmpnbd.errors import ImageError, UsageError
from qmpnbd.extents import ExtentMap
from qmpnbd.images import depth, mapentries, qcow2_metadata, views
from qmpnbd.images.chain import Explanation, Layer, Step
from qmpnbd.images.content import Content, Origin
from qmpnbd.images.hostfile import Identity
from qmpnbd.images.mapentries import Generation, MapBatch
from qmpnbd.images.members import Member, place
from qmpnbd.images.passes import NOBODY, Pass, Window
from qmpnbd.images.qcow2_bitmaps import BitmapInfo
from qmpnbd.images.qcow2_metadata import Qcow2Facts
from qmpnbd.images.sources import Solid
from qmpnbd.images.status import MAX_UNREADABLE, LayerMap, Status, Unreadable

PIECE = 1 << 22
"""Bytes read at once where the caller does not say: they fit into a processor's cache."""


class Chain:
    """An open backing chain; a context manager.

    Attributes:
        layers: from the active layer down.
        members: what they are read through.
    """

    def __init__(self, members: Sequence[Member], files: ExitStack, deadline: Deadline | None) -> None:
        self.layers: tuple[Layer, ...] = tuple(member.layer for member in members)
        self.members = tuple(members)
        self._files = files
        self._deadline = deadline

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files; may be called twice."""
        self._files.close()

    @property
    def size(self) -> int:
        """Bytes of the disk: those of the active layer."""
        return self.layers[0].size

    @property
    def identities(self) -> tuple[Identity, ...]:
        """What the file of each layer is to the kernel, whatever its name leads to now."""
        return tuple(member.file.identity for member in self.members)

    def allocated(self, index: int) -> ExtentMap:
        """Reads which bytes of a layer are allocated in it: 1, or 0; over the layer's own size.

        Raises:
            ImageError: the branch says what is wrong with which file.
            DeadlineError: the time ran out.
        """
        windows = self._windows(self._refuse, 0, self.layers[index].size, only=index)
        return views.depth_map(windows, [1], self.members[index].file.where)

    def statuses(self, index: int, offset: int = 0, length: int | None = None) -> LayerMap:
        """Reads what a layer itself holds, whatever lies above it.

        Args:
            index: the layer index.
            offset: first byte of the window; large disks are read window by window.
            length: bytes of it; None for the rest of the layer.

        Raises:
            UsageError: the window is not inside the layer.
            ImageError: the branch says what is wrong with which file; entries that QEMU answers with EIO for are
                marked in the map instead.
            DeadlineError: the time ran out.
        """
        end = self.layers[index].size if length is None else offset + length
        if not 0 <= offset <= end <= self.layers[index].size:
            what = f"[{offset}, {end}) is not inside a layer of {self.layers[index].size} bytes"
            raise UsageError(what, where=self.members[index].file.where)
        windows = self._windows(lambda *_: None, offset, end, only=index, detailed=True)
        return views.layer_map(windows, offset, self.members[index].file.where)

    def allocation_depth(self) -> ExtentMap:
        """Reads the allocation depth of every byte of the disk, as the NBD numbers of the layers; 0 for none.

        Only what can be seen is read: not what lies past the end of shorter layers above, nor tables that describe
        only what layers above hold.

        Raises:
            ImageError: the branch says what is wrong with which file.
            DeadlineError: the time ran out.
        """
        windows = self._windows(self._refuse, 0, self.size)
        return views.depth_map(windows, self._numbers, self.members[0].file.where)

    def depth_with_errors(self) -> tuple[ExtentMap, list[Unreadable]]:
        """Reads the allocation depth as `allocation_depth`, but goes on where QEMU would answer with EIO.

        Returns:
            The map, with UNREADABLE_DEPTH where QEMU cannot tell, and the reasons: the first `MAX_UNREADABLE` ranges.

        Raises:
            ImageError: a file is cut or cannot be read at all.
            DeadlineError: the time ran out.
        """
        found: list[Unreadable] = []
        windows = self._windows(self._keeper(found), 0, self.size)
        return views.depth_map(windows, self._numbers, self.members[0].file.where), found

    def map_entries(self, generation: Generation = "7.2") -> Iterator[MapBatch]:
        """Reads what ``qemu-img map`` of a generation of QEMU says, in batches whose size does not depend on the disk.

        Raises:
            ImageUnsupportedError: a layer of a format whose data is placed by tables that are not read here.
            ImageError: the branch says what is wrong with which file.
            DeadlineError: the time ran out.
        """
        windows = self._windows(self._refuse, 0, self.size, detailed=True, reserved=True)
        return mapentries.map_batches(windows, [place(member) for member in self.members], 0, generation)

    def base_allocation(self, generation: Generation = "7.2", *, holes_in_data: bool = True) -> ExtentMap:
        """Reads what an export by a generation of QEMU would serve as ``base:allocation``: 1 hole, 2 zero, 3 both, 0.

        Args:
            generation: of QEMU.
            holes_in_data: whether to look for holes of the file system under the data of a qcow2 layer that looks
                preallocated now, as QEMU does if it looked so when that was first asked for.

        Raises:
            ImageUnsupportedError: a layer of a format whose data is placed by tables that are not read here.
            ImageError: the branch says what is wrong with which file.
            DeadlineError: the time ran out.
        """
        windows = self._windows(self._refuse, 0, self.size, detailed=True)
        places = [place(member, holes_in_data=holes_in_data) for member in self.members]
        return mapentries.base_allocation(windows, places, self.size, generation)

    def base_allocation_with_errors(self, generation: Generation = "7.2") -> tuple[ExtentMap, list[Unreadable]]:
        """Reads ``base:allocation`` as `base_allocation`, but goes on where QEMU would answer with EIO.

        Returns:
            As `depth_with_errors`.

        Raises:
            ImageUnsupportedError: a layer of a format whose data is placed by tables that are not read here.
            ImageError: a file is cut or cannot be read at all.
            DeadlineError: the time ran out.
        """
        found: list[Unreadable] = []
        windows = self._windows(self._keeper(found), 0, self.size, detailed=True)
        places = [place(member) for member in self.members]
        return mapentries.base_allocation(windows, places, self.size, generation), found

    def locate(self, offset: int) -> tuple[int, str, int | None] | None:
        """Finds what holds a byte.

        Returns:
            The layer index, the file (the external data file if there is one) and the host offset, or None for that
            where the data has none: zeroes, compressed data, past a short layer's end. None if no layer holds it.

        Raises:
            UsageError: outside the disk.
            ImageError: the branch says what is wrong with which file.
        """
        if not 0 <= offset < self.size:
            raise UsageError(f"no byte {offset} in a disk of {self.size} bytes", where=self.members[0].file.where)
        (window,) = self._windows(self._refuse, offset, offset + 1, detailed=True)
        _, layers, codes, shifts = window.runs()
        if layers[0] == NOBODY:
            return None
        member = self.members[int(layers[0])]
        placed = codes[0] in (Status.DATA, Status.ZERO_ALLOCATED) and member.is_placed
        return member.layer.index, member.data.path, (offset + int(shifts[0])) % (1 << 64) if placed else None

    def explain(self, offset: int) -> Explanation:
        """Tells which table entry decides the byte at `offset`; reads the entries anew.

        Raises:
            UsageError: outside the disk.
            ImageError: the branch says what is wrong with which file.
        """
        if not 0 <= offset < self.size:
            raise UsageError(f"no byte {offset} in a disk of {self.size} bytes", where=self.members[0].file.where)
        steps: list[Step] = []
        for member in self.members:
            layer = member.layer
            decides, text = _look_up(member, offset)
            steps.append(Step(layer.index, layer.path, decides, text))
            if decides:
                return Explanation(offset, layer.index, layer.path, layer.allocation_depth, tuple(steps))
        return Explanation(offset, None, None, 0, tuple(steps))

    def facts(self, index: int) -> Qcow2Facts | None:
        """Reads what a layer's file records beside the disk; None if it is not qcow2.

        Raises:
            ImageError: the branch says what is wrong with the file.
        """
        qcow2 = self.members[index].qcow2
        return None if qcow2 is None else qcow2_metadata.facts(qcow2)

    def bitmaps(self, index: int) -> tuple[BitmapInfo, ...]:
        """Reads which persistent bitmaps a layer has.

        Raises:
            ImageError: the branch says what is wrong with the file.
        """
        qcow2 = self.members[index].qcow2
        return () if qcow2 is None else qcow2_metadata.bitmaps(qcow2)

    def bitmap(self, index: int, name: str, *, inconsistent: bool = False) -> ExtentMap:
        """Reads a persistent bitmap of a layer: 1 where it is dirty, else 0; over the layer's own size.

        Args:
            index: the layer index.
            name: the bitmap.
            inconsistent: whether one that was in use when the image was last closed will do.

        Raises:
            UsageError: there is none of that name.
            ImageUnsupportedError: it is inconsistent, or has extra data that is not known.
            ImageError: the branch says what is wrong with the file.
            DeadlineError: the time ran out.
        """
        qcow2 = self.members[index].qcow2
        if qcow2 is None:
            raise UsageError(f"no bitmap {name!r}: it is not qcow2", where=self.members[index].file.where)
        return qcow2_metadata.bitmap(qcow2, name, inconsistent=inconsistent, check=self._check)

    def read(self, offset: int, length: int) -> bytearray:
        """Reads what a guest would read: `length` bytes of the disk from `offset` on.

        Raises:
            UsageError: not a range inside the disk.
            ImageUnsupportedError: the data is encrypted, or cannot be unpacked here.
            ImageError: the branch says what is wrong with which file.
            DeadlineError: the time ran out.
        """
        self._inside(offset, length)
        buffer = bytearray(length)
        for _ in self._pieces(offset, length, memoryview(buffer), is_zeroed=True):
            pass
        return buffer

    def read_into(self, offset: int, buffer: bytearray | memoryview) -> None:
        """Fills a buffer with what a guest would read from `offset` on; otherwise as `read`."""
        view = memoryview(buffer).cast("B")
        self._inside(offset, len(view))
        for _ in self._pieces(offset, len(view), view, is_zeroed=False):
            pass

    def read_pieces(self, offset: int, length: int, size: int = PIECE) -> Iterator[memoryview]:
        """Reads what a guest would read in one go, piece by piece: faster than `read` for each, in the same memory.

        Args:
            offset: the first byte.
            length: how many.
            size: bytes of a piece; only the last one may be shorter.

        Yields:
            Each piece; it becomes void with the next one.

        Raises:
            UsageError: not a range inside the disk, or pieces without bytes.
            ImageError, DeadlineError: as `read`.
        """
        self._inside(offset, length)
        if size < 1:
            raise UsageError(f"no pieces of {size} bytes", where=self.members[0].file.where)
        return self._pieces(offset, length, memoryview(bytearray(min(size, length))), is_zeroed=True)

    def _pieces(self, offset: int, length: int, view: memoryview, *, is_zeroed: bool) -> Iterator[memoryview]:
        origins = [
            Origin(member.layer.format, member.data, member.is_placed, member.source, member.qcow2)
            for member in self.members
        ]
        content = Content(origins, view, offset, is_zeroed=is_zeroed)
        return content.pieces(self._windows(self._refuse, offset, offset + length, detailed=True))

    def _inside(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            what = f"[{offset}, {offset + length}) is not inside a disk of {self.size} bytes"
            raise UsageError(what, where=self.members[0].file.where)

    @property
    def _numbers(self) -> list[int]:
        return [layer.allocation_depth for layer in self.layers]

    def _windows(
        self,
        broken: Callable[[int, int, int], None],
        offset: int,
        end: int,
        *,
        only: int | None = None,
        detailed: bool = False,
        reserved: bool = False,
    ) -> Iterator[Window]:
        """One pass over the chain, or over one layer as if it were alone."""
        members = self.members if only is None else self.members[only : only + 1]
        sizes = [member.layer.size for member in members]
        visible = depth.visible_sizes(sizes, sizes[0])
        work = Pass(
            [member.source for member in members],
            visible,
            detailed,
            self._check,
            broken if only is None else lambda _, start, stop: broken(only, start, stop),
            reserved,
        )
        return work.windows(offset, end)

    def _check(self) -> None:
        if self._deadline is not None:
            self._deadline.check("the tables to be read", self.members[0].file.where)

    def _refuse(self, index: int, start: int, _end: int) -> None:
        error = self._fault(index, start)
        if error is not None:
            raise error

    def _keeper(self, found: list[Unreadable]) -> Callable[[int, int, int], None]:
        """Returns what keeps unreadable ranges in `found`, neighbours joined."""

        def keep(index: int, start: int, end: int) -> None:
            last = found[-1] if found else None
            if last is not None and (last.layer, last.end) == (index, start):
                found[-1] = Unreadable(index, last.path, last.offset, end, last.reason)
            elif len(found) < MAX_UNREADABLE:
                error = self._fault(index, start)
                reason = str(error.args[0]) if error is not None else "the entry was wrong, and has changed since"
                found.append(Unreadable(index, self.layers[index].path, start, end, reason))

        return keep

    def _fault(self, index: int, offset: int) -> ImageError | None:
        source = self.members[index].source
        return None if isinstance(source, Solid) else source.fault(offset)


def _look_up(member: Member, offset: int) -> tuple[bool, str]:
    """Returns whether a layer decides a byte, and what was read to tell."""
    layer = member.layer
    if offset >= layer.size:
        return True, (
            f"offset {offset:#x} is past the end of this layer, which has {layer.size:#x} bytes: "
            "it reads as zeroes, and counts as allocated here"
        )
    if isinstance(member.source, Solid):
        return True, f"{layer.format}, every byte of it is allocated"
    allocated, text = member.source.look_up(offset)
    return allocated, text if allocated or layer.has_backing else f"{text}; there is no layer below"
