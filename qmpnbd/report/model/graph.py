"""The document of ``qmpnbd graph``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qmpnbd.report.model.parts import Document, Part


class ChildEntry(Part):
    """What a node stands on.

    Attributes:
        role: ``file``, ``backing``, ``data-file``, ``target`` and others.
        node_name: the child.
    """

    role: str
    node_name: str


class DepthEntry(Part):
    """A layer, and the allocation depth that NBD tells for data it holds."""

    node_name: str
    allocation_depth: int


class ExportReport(Part):
    """What an NBD export of a node would say of allocation depth.

    Attributes:
        numbering: ``plain`` (1, 2, 3, …), ``shifted`` (with gaps, for filters), ``hidden`` (data in backing files is
            told as depth 0), ``unknown``.
        layers: the layers that it counts, top first; empty where that is unknown.
        note: why it is not plain; empty if it is.
    """

    numbering: Literal["plain", "shifted", "hidden", "unknown"]
    layers: tuple[DepthEntry, ...]
    note: str


class GraphNodeEntry(Part):
    """A node of the block graph.

    Attributes:
        node_name: its name.
        driver: its block driver.
        kind: ``filter``, ``format``, ``protocol`` or ``other``.
        file: the image file; empty but for protocol nodes.
        size: bytes.
        read_only: whether it was opened read-only.
        children: what it stands on.
        exports: ids of the block exports that stand on it, anyone's.
        bitmaps: names of its dirty bitmaps.
        report: what an export of it would say.
    """

    node_name: str
    driver: str
    kind: Literal["filter", "format", "protocol", "other"]
    file: str
    size: int
    read_only: bool
    children: tuple[ChildEntry, ...]
    exports: tuple[str, ...]
    bitmaps: tuple[str, ...]
    report: ExportReport


class GraphDiskEntry(Part):
    """A disk of the guest, or a node that nothing uses; fields as for ``qmpnbd.disks/1``."""

    name: str
    attached: bool
    qdev: str
    qom_path: str
    device: str
    drive: str
    node_name: str


class GraphDocument(Document):
    """The result of ``qmpnbd graph``.

    Attributes:
        monitor: the QMP address.
        qemu: QEMU's version.
        guest: the guest's status, or ``storage daemon``.
        capabilities: what this QEMU can do, as docs/controller.md names it.
        hazards: what it does wrong, as docs/controller.md names it.
        disks: the guest's disks, then nodes that nothing uses.
        nodes: all nodes.
    """

    schema_: Literal["qmpnbd.graph/1"] = Field(default="qmpnbd.graph/1", alias="schema")
    monitor: str
    qemu: str
    guest: str
    capabilities: tuple[str, ...]
    hazards: tuple[str, ...]
    disks: tuple[GraphDiskEntry, ...]
    nodes: tuple[GraphNodeEntry, ...]
