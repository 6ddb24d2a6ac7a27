"""Opening backing chains: from a name, or from a block graph that somebody else told.

::

    open_chain("top.qcow2")        the names in the headers are followed, as QEMU follows them
    open_layers([LayerSpec, ...])  the layers are given; the names in the headers are not looked at

Either way every file is opened once and kept open, so that a chain cannot change its members halfway. QEMU does not
notice a chain that bites its own tail; here it is refused.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise

from qmpnbd.deadline import Deadline
from qmpnbd.errors import ChainError, UsageError
from qmpnbd.images import depth
from qmpnbd.images.block_source import open_blocks, open_vpc
from qmpnbd.images.chain import Layer, LayerSpec
from qmpnbd.images.formats import PROBE_LENGTH, probe
from qmpnbd.images.hostfile import HostFile, Identity
from qmpnbd.images.layers import Chain
from qmpnbd.images.members import Member
from qmpnbd.images.names import Reference, known_format, resolve, resolve_data_file, resolve_extent
from qmpnbd.images.otherformats import HEADER_LENGTH, SPARSE_MAGICS, luks_size
from qmpnbd.images.qcow2_file import Qcow2File
from qmpnbd.images.qcow2_metadata import select_snapshot
from qmpnbd.images.qcow2_source import Qcow2Source
from qmpnbd.images.raw import raw_size, rounded_up
from qmpnbd.images.sources import Solid, Source
from qmpnbd.images.tabled_source import TabledSource, open_qed, open_vmdk
from qmpnbd.images.vmdk_flat import MAX_LENGTH, flat_extents
from qmpnbd.printable import printable

__all__ = ["MAX_LAYERS", "Chain", "open_chain", "open_layers"]

MAX_LAYERS = 256  # far beyond what anybody runs, far below what a hostile chain could ask for
_REMEDY_CHAIN = "Correct the backing name of the overlay with 'qemu-img rebase -u'."


def open_chain(
    path: str,
    *,
    format: str | None = None,  # noqa: A002 (the word of QEMU and of its users)
    deadline: Deadline | None = None,
    working_directory: str = "",
    snapshot: str | None = None,
) -> Chain:
    """Opens an image and everything behind it, following the names in the headers.

    Args:
        path: the active layer.
        format: its format; None to guess it from the content.
        deadline: for opening, and for all that is read from the chain later.
        working_directory: QEMU's, which some forms of names are relative to; "" for the caller's own.
        snapshot: id or name of an internal snapshot of the active layer to read instead of its disk.

    Raises:
        UsageError: there is no such snapshot.
        ImageError: the branch says what is wrong with which file.
        DeadlineError: the time ran out.
    """
    opening = _Opening(deadline, working_directory)
    where = printable(path)
    reference: Reference | None = Reference(path, known_format(format, where) if format is not None else None)
    with opening.files:
        while reference is not None:
            file = opening.open(reference.path, where)
            found = reference.format or probe(file.read(0, PROBE_LENGTH), reference.path, where)
            number = depth.plain_numbers(MAX_LAYERS)[len(opening.members)]
            spec = LayerSpec(reference.path, found, number, offset=reference.offset, size=reference.size)
            probed, is_last = reference.format is None, reference.is_last or None
            overlay = opening.add(file, spec, probed=probed, is_last=is_last, snapshot=snapshot)
            snapshot = None
            reference = _below(overlay, working_directory)
            where = _named(reference.path, overlay.layer.path) if reference else ""
        return opening.chain()


def open_layers(specs: Sequence[LayerSpec], *, deadline: Deadline | None = None, working_directory: str = "") -> Chain:
    """Opens the layers of a chain known from elsewhere; names in the headers are neither followed nor compared.

    Args:
        specs: the layers from the active one down; the last one ends the chain.
        deadline: for opening, and for all that is read from the chain later.
        working_directory: QEMU's, which names of external data files are relative to; "" for the caller's own.

    Raises:
        UsageError: these can be no chain.
        ImageError: the branch says what is wrong with which file.
        DeadlineError: the time ran out.
    """
    _check_specs(specs)
    opening = _Opening(deadline, working_directory)
    with opening.files:
        for index, spec in enumerate(specs):
            where = _named(spec.path, specs[index - 1].path if index else None)
            opening.add(opening.open(spec.path, where), spec, is_last=index == len(specs) - 1)
        return opening.chain()


@dataclass(frozen=True, slots=True)
class _Body:
    """What a layer that is not qcow2 is read through, and what its header says; as `Member` and `Layer`."""

    source: Source | Solid
    size: int
    cluster_size: int | None = None
    backing_name: str = ""
    outside: HostFile | None = None


class _Opening:
    """A chain in the making; owns the files until it is done."""

    def __init__(self, deadline: Deadline | None, working_directory: str) -> None:
        self.files = ExitStack()
        self.members: list[Member] = []
        self._deadline = deadline
        self._working_directory = working_directory
        self._known: dict[Identity, str] = {}

    def open(self, path: str, where: str) -> HostFile:
        """Opens the file of the next layer, unless it is one of the chain already."""
        if self._deadline is not None:
            self._deadline.check("the files of the chain to be opened", where)
        if len(self.members) >= MAX_LAYERS:
            raise ChainError(f"the chain has more than {MAX_LAYERS} layers", where=where, remedy=_REMEDY_CHAIN)
        return self._new_file(path, where)

    def _new_file(self, path: str, where: str) -> HostFile:
        file = self.files.enter_context(HostFile(path, where))
        if file.identity in self._known:
            known = printable(self._known[file.identity])
            raise ChainError(f"the chain loops: this is the same file as {known}", where=where, remedy=_REMEDY_CHAIN)
        self._known[file.identity] = path
        return file

    def add(
        self,
        file: HostFile,
        spec: LayerSpec,
        *,
        probed: bool = False,
        is_last: bool | None = None,
        snapshot: str | None = None,
    ) -> Member:
        """Adds a layer below those added so far.

        Args:
            file: its file.
            spec: what is known of it.
            probed: its format was guessed.
            is_last: whether the chain ends here; None if the header tells.
            snapshot: the internal snapshot to read.
        """
        index, outside = len(self.members), None
        if spec.format == "qcow2":
            qcow2: Qcow2File | None = (opened := Qcow2File(file))
            if snapshot is not None:
                select_snapshot(opened, snapshot)
            if opened.extensions.data_file is not None:
                opened.data = self._data_file(spec.data_file, opened.extensions.data_file, file)
            source: Source | Solid = Qcow2Source(opened)
            size = opened.header.disk_size
            cluster_size: int | None = opened.header.cluster_size
            has_backing = opened.backing_name != "" if is_last is None else not is_last
        else:
            if snapshot is not None:
                raise UsageError(f"no internal snapshot {snapshot}: it is {spec.format}", where=file.where)
            qcow2 = None
            body = self._body(file, spec)
            outside = body.outside
            source, size, cluster_size = body.source, body.size, body.cluster_size
            has_backing = body.backing_name != "" if is_last is None else not is_last
        number = spec.allocation_depth
        layer = Layer(
            index, spec.path, spec.format, probed, size, spec.node_name, number, cluster_size, has_backing, spec.offset
        )
        member = Member(layer, file, source, qcow2, outside)
        self.members.append(member)
        return member

    def _data_file(self, known: str, name: bytes, image: HostFile) -> HostFile:
        """Opens the external data file of an image; QEMU looks for it beside its working directory, not the image's."""
        path = known or resolve_data_file(os.fsdecode(name), image.where, self._working_directory)
        return self._new_file(path, f"{printable(path)} (data file of {printable(image.path)})")

    def _body(self, file: HostFile, spec: LayerSpec) -> _Body:
        """Reads the header of a layer that is not qcow2."""
        if spec.format == "raw":
            return _Body(Solid(spec.offset), raw_size(file.size(), file.where, offset=spec.offset, size=spec.size))
        if spec.format == "luks":
            return _Body(Solid(None), luks_size(file.read(0, HEADER_LENGTH), file.size(), file.where))
        if spec.format == "vmdk" and file.read(0, 4) not in SPARSE_MAGICS:
            return self._flat_vmdk(file)
        if spec.format in ("qed", "vmdk"):
            tabled = open_qed(file) if spec.format == "qed" else open_vmdk(file)
            return _Body(tabled, tabled.tabled.size, tabled.granule, backing_name=tabled.tabled.backing_name)
        blocks = open_vpc(file) if spec.format == "vpc" else open_blocks(file, spec.format)
        if isinstance(blocks, int):
            return _Body(Solid(0), blocks)
        return _Body(blocks, blocks.blocks.size, blocks.granule)

    def _flat_vmdk(self, descriptor: HostFile) -> _Body:
        """Opens the files that a vmdk descriptor names, which lie beside it."""
        extents, files = flat_extents(descriptor.read(0, MAX_LENGTH + 1), descriptor.where), []
        for extent in extents:
            path = resolve_extent(extent.name, descriptor.path, descriptor.where)
            file = self._new_file(path, f"{printable(path)} (extent of {printable(descriptor.path)})")
            if extent.offset + extent.size > rounded_up(file.size()):
                raise file.cut(extent.offset, extent.size, "the extent")
            files.append(file)
        size = sum(extent.size for extent in extents)
        if len(extents) > 1:
            return _Body(Solid(None), size)
        return _Body(Solid(extents[0].offset), size, outside=files[0])

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
        if above.format not in ("qcow2", "qed", "vmdk"):
            raise UsageError(f"a {above.format} layer ends the chain, but another follows", where=printable(above.path))
    for spec in specs:
        known_format(spec.format, printable(spec.path))
        if spec.allocation_depth < 1:
            raise UsageError("allocation depths of layers start at 1", where=printable(spec.path))
        if spec.format != "raw" and (spec.offset or spec.size is not None):
            raise UsageError("only a raw layer can be a window on its file", where=printable(spec.path))


def _below(overlay: Member, working_directory: str) -> Reference | None:
    """Returns where the chain goes on below a layer, as its header says."""
    if not overlay.layer.has_backing:
        return None
    name, recorded = "", ""
    if overlay.qcow2 is not None:
        name, recorded = overlay.qcow2.backing_name, overlay.qcow2.backing_format
    elif isinstance(overlay.source, TabledSource):
        name, recorded = overlay.source.tabled.backing_name, overlay.source.tabled.backing_format
    return resolve(name, recorded, overlay.layer.path, overlay.file.where, working_directory)
