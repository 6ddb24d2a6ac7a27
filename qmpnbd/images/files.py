"""Opening backing chains: from a name, or from a block graph that somebody else told.

::

    open_chain("top.qcow2")        the names in the headers are followed, as QEMU follows them
    open_layers([LayerSpec, ...])  the layers are given; the names in the headers are not looked at

Either way every file is opened once and kept open, so that a chain cannot change its members halfway. QEMU does not
notice a chain that bites its own tail; here it is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import Self

from qmpnbd.deadline import Deadline
from qmpnbd.errors import ChainError, UsageError
from qmpnbd.extents import ExtentMap
from qmpnbd.images import depth
from qmpnbd.images.chain import Explanation, Layer, LayerSpec, Step
from qmpnbd.images.formats import PROBE_LENGTH, probe
from qmpnbd.images.hostfile import HostFile, Identity
from qmpnbd.images.names import Reference, known_format, printable, resolve
from qmpnbd.images.qcow2_file import Qcow2File
from qmpnbd.images.raw import raw_size

MAX_LAYERS = 256  # far beyond what anybody runs, far below what a hostile chain could ask for
_REMEDY_CHAIN = "Correct the backing name of the overlay with 'qemu-img rebase -u'."


@dataclass(frozen=True, slots=True)
class _Member:
    """A layer and what it is read through; `qcow2` is None for raw."""

    layer: Layer
    file: HostFile
    qcow2: Qcow2File | None


class Chain:
    """An open backing chain; a context manager.

    Attributes:
        layers: from the active layer down.
    """

    def __init__(self, members: Sequence[_Member], files: ExitStack, deadline: Deadline | None) -> None:
        self.layers: tuple[Layer, ...] = tuple(member.layer for member in members)
        self._members = tuple(members)
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
        return tuple(member.file.identity for member in self._members)

    def allocated(self, index: int) -> ExtentMap:
        """Reads which bytes of a layer are allocated in it: 1, or 0; over the layer's own size.

        Raises:
            ImageError: the branch says what is wrong with which file.
            DeadlineError: the time ran out.
        """
        return self._allocated(index, self.layers[index].size)

    def allocation_depth(self) -> ExtentMap:
        """Reads the allocation depth of every byte of the disk, as the NBD numbers of the layers; 0 for none.

        Of a layer only the part is read that can be seen through shorter layers above it.

        Raises:
            ImageError: the branch says what is wrong with which file.
            DeadlineError: the time ran out.
        """
        visible = depth.visible_sizes([layer.size for layer in self.layers], self.size)
        maps = [self._allocated(index, size) for index, size in enumerate(visible)]
        numbers = [layer.allocation_depth for layer in self.layers]
        sizes = [layer.size for layer in self.layers]
        return depth.allocation_depth(list(zip(sizes, maps, numbers, strict=True)), self.size)

    def explain(self, offset: int) -> Explanation:
        """Tells which table entry decides the byte at `offset`; reads the entries anew.

        Raises:
            UsageError: outside the disk.
            ImageError: the branch says what is wrong with which file.
        """
        if not 0 <= offset < self.size:
            raise UsageError(f"no byte {offset} in a disk of {self.size} bytes", where=self._members[0].file.where)
        steps: list[Step] = []
        for member in self._members:
            layer = member.layer
            decides, text = _look_up(member, offset)
            steps.append(Step(layer.index, layer.path, decides, text))
            if decides:
                return Explanation(offset, layer.index, layer.path, layer.allocation_depth, tuple(steps))
        return Explanation(offset, None, None, 0, tuple(steps))

    def _allocated(self, index: int, size: int) -> ExtentMap:
        qcow2 = self._members[index].qcow2
        return ExtentMap.uniform(size, 1) if qcow2 is None else qcow2.allocated(size, self._deadline)


def open_chain(
    path: str,
    *,
    format: str | None = None,  # noqa: A002 (the word of QEMU and of its users)
    deadline: Deadline | None = None,
    working_directory: str = "",
) -> Chain:
    """Opens an image and everything behind it, following the names in the headers.

    Args:
        path: the active layer.
        format: its format; None to guess it from the content.
        deadline: for opening, and for all that is read from the chain later.
        working_directory: QEMU's, which some forms of backing names are relative to; "" for the caller's own.

    Raises:
        ImageError: the branch says what is wrong with which file.
        DeadlineError: the time ran out.
    """
    opening = _Opening(deadline)
    where = printable(path)
    reference: Reference | None = Reference(path, known_format(format, where) if format is not None else None)
    with opening.files:
        while reference is not None:
            file = opening.open(reference.path, where)
            found = reference.format or probe(file.read(0, PROBE_LENGTH), reference.path, where)
            number = depth.plain_numbers(MAX_LAYERS)[len(opening.members)]
            spec = LayerSpec(reference.path, found, number, offset=reference.offset, size=reference.size)
            probed, is_last = reference.format is None, reference.is_last or None
            overlay = opening.add(file, spec, probed=probed, is_last=is_last)
            reference = _below(overlay, working_directory)
            where = _named(reference.path, overlay.layer.path) if reference else ""
        return opening.chain()


def open_layers(specs: Sequence[LayerSpec], *, deadline: Deadline | None = None) -> Chain:
    """Opens the layers of a chain known from elsewhere; names in the headers are neither followed nor compared.

    Args:
        specs: the layers from the active one down; the last one ends the chain.
        deadline: for opening, and for all that is read from the chain later.

    Raises:
        UsageError: these can be no chain.
        ImageError: the branch says what is wrong with which file.
        DeadlineError: the time ran out.
    """
    _check_specs(specs)
    opening = _Opening(deadline)
    with opening.files:
        for index, spec in enumerate(specs):
            where = _named(spec.path, specs[index - 1].path if index else None)
            opening.add(opening.open(spec.path, where), spec, is_last=index == len(specs) - 1)
        return opening.chain()


class _Opening:
    """A chain in the making; owns the files until it is done."""

    def __init__(self, deadline: Deadline | None) -> None:
        self.files = ExitStack()
        self.members: list[_Member] = []
        self._deadline = deadline
        self._known: dict[Identity, str] = {}

    def open(self, path: str, where: str) -> HostFile:
        """Opens the file of the next layer, unless it is one of the chain already."""
        if self._deadline is not None:
            self._deadline.check("the files of the chain to be opened", where)
        if len(self.members) >= MAX_LAYERS:
            raise ChainError(f"the chain has more than {MAX_LAYERS} layers", where=where, remedy=_REMEDY_CHAIN)
        file = self.files.enter_context(HostFile(path, where))
        if file.identity in self._known:
            known = printable(self._known[file.identity])
            raise ChainError(f"the chain loops: this is the same file as {known}", where=where, remedy=_REMEDY_CHAIN)
        self._known[file.identity] = path
        return file

    def add(self, file: HostFile, spec: LayerSpec, *, probed: bool = False, is_last: bool | None = None) -> _Member:
        """Adds a layer below those added so far.

        Args:
            file: its file.
            spec: what is known of it.
            probed: its format was guessed.
            is_last: whether the chain ends here; None if the header tells.
        """
        index = len(self.members)
        if spec.format == "qcow2":
            qcow2: Qcow2File | None = (opened := Qcow2File(file))
            size, cluster_size = opened.header.disk_size, opened.header.cluster_size
            has_backing = opened.backing_name != "" if is_last is None else not is_last
        else:
            qcow2, cluster_size, has_backing = None, None, False
            size = raw_size(file.size(), file.where, offset=spec.offset, size=spec.size)
        number = spec.allocation_depth
        layer = Layer(
            index, spec.path, spec.format, probed, size, spec.node_name, number, cluster_size, has_backing, spec.offset
        )
        member = _Member(layer, file, qcow2)
        self.members.append(member)
        return member

    def chain(self) -> Chain:
        """Hands the files over to the finished chain."""
        return Chain(self.members, self.files.pop_all(), self._deadline)


def _named(path: str, overlay: str | None) -> str:
    """Returns a layer's file for messages: its path, and which overlay named it."""
    return printable(path) if overlay is None else f"{printable(path)} (backing file of {printable(overlay)})"


def _check_specs(specs: Sequence[LayerSpec]) -> None:
    if not specs:
        raise UsageError("a chain has at least one layer", where="layers")
    for above, spec in pairwise(specs):
        if spec.allocation_depth <= above.allocation_depth:
            raise UsageError("allocation depths must rise from layer to layer", where=printable(spec.path))
        if above.format == "raw":
            raise UsageError("a raw layer ends the chain, but another follows", where=printable(above.path))
    for spec in specs:
        known_format(spec.format, printable(spec.path))
        if spec.allocation_depth < 1:
            raise UsageError("allocation depths of layers start at 1", where=printable(spec.path))
        if spec.format != "raw" and (spec.offset or spec.size is not None):
            raise UsageError("only a raw layer can be a window on its file", where=printable(spec.path))


def _below(overlay: _Member, working_directory: str) -> Reference | None:
    """Returns where the chain goes on below a layer, as its header says."""
    if overlay.qcow2 is None or not overlay.layer.has_backing:
        return None
    qcow2 = overlay.qcow2
    return resolve(qcow2.backing_name, qcow2.backing_format, overlay.layer.path, overlay.file.where, working_directory)


def _look_up(member: _Member, offset: int) -> tuple[bool, str]:
    """Returns whether a layer decides a byte, and what was read to tell."""
    layer = member.layer
    if offset >= layer.size:
        return True, (
            f"offset {offset:#x} is past the end of this layer, which has {layer.size:#x} bytes: "
            "it reads as zeroes, and counts as allocated here"
        )
    if member.qcow2 is None:
        return True, "raw, every byte of it is allocated"
    cluster, text = member.qcow2.look_up(offset)
    if not cluster.kind.allocated and not layer.has_backing:
        text += "; there is no layer below"
    return cluster.kind.allocated, text
