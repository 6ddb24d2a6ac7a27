"""A member of an open chain, and what QEMU looks at to tell its block status."""

from __future__ import annotations

from dataclasses import dataclass

from qmpnbd.errors import ImageUnsupportedError
from qmpnbd.images import qcow2_metadata
from qmpnbd.images.block_source import BlockSource
from qmpnbd.images.chain import Layer
from qmpnbd.images.hostfile import HostFile
from qmpnbd.images.mapentries import Place
from qmpnbd.images.qcow2_file import Qcow2File
from qmpnbd.images.raw import rounded_up
from qmpnbd.images.sources import Solid, Source

_SILENT = ("luks", "vhdx")
"""Formats whose drivers in QEMU tell nothing of block status: all of it is data, at no offset."""


@dataclass(frozen=True, slots=True)
class Member:
    """A layer and what it is read through.

    Attributes:
        layer: what is known of it.
        file: its file.
        source: its tables, or that it has none.
        qcow2: more of it; None for other formats.
        outside: the file that holds the data of a flat vmdk; None for other formats.
    """

    layer: Layer
    file: HostFile
    source: Source | Solid
    qcow2: Qcow2File | None = None
    outside: HostFile | None = None

    @property
    def is_placed(self) -> bool:
        """Whether host offsets are known."""
        return not isinstance(self.source, Solid) or self.source.shift is not None

    @property
    def data(self) -> HostFile:
        """The file that host offsets count in."""
        return self.qcow2.data if self.qcow2 is not None else self.outside or self.file


def place(member: Member, *, holes_in_data: bool = True) -> Place:
    """Finds out where QEMU looks for holes.

    Args:
        member: the layer.
        holes_in_data: whether under the data of a qcow2 layer that looks preallocated, too.

    Raises:
        ImageUnsupportedError: the data of the layer is in several files.
        ImageUnreadableError: an I/O error.
    """
    if member.layer.format in _SILENT:
        return Place(None, silent=True)
    if not member.is_placed:
        what = f"where a {member.layer.format} of several files places its data is not read here"
        raise ImageUnsupportedError(what, where=member.file.where, remedy="Ask for the allocation depth only.")
    if member.qcow2 is not None:
        encrypted = member.qcow2.header.crypt_method > 0
        sparse = holes_in_data and not encrypted and qcow2_metadata.looks_preallocated(member.qcow2)
        return Place(member.data.holes() if sparse else None, hidden=encrypted)
    if isinstance(member.source, Solid):
        holes = member.data.holes()
        return Place(holes.resized(rounded_up(holes.size), 0), raw=member.layer.format == "raw")
    is_static = isinstance(member.source, BlockSource) and member.source.blocks.is_static
    return Place(member.data.holes() if is_static else None)
