"""The document of ``qmpnbd disks``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qmpnbd.report.model.parts import Document, ErrorEntry, Part


class NodeEntry(Part):
    """A layer as QEMU's block graph shows it."""

    allocation_depth: int
    node_name: str
    format: str
    file: str


class DiskEntry(Part):
    """A disk of the guest, or a node without a device.

    Attributes:
        name: the shortest address that means it.
        attached: whether a guest device stands on it.
        qdev: the device's id; may be empty.
        qom_path: the device's QOM path; may be empty.
        device: what sort of device it is, ``virtio-blk-pci`` for one; empty for a node without a device.
        drive: the id of the legacy drive that the node belongs to; empty for a node of its own.
        node_name: the node.
        driver: the node's block driver.
        size: bytes.
        read_only: whether the node was opened read-only.
        layers: the chain that an export of the node counts.
        problem: why the chain cannot be read here; null if it can.
    """

    name: str
    attached: bool
    qdev: str
    qom_path: str
    device: str
    drive: str
    node_name: str
    driver: str
    size: int
    read_only: bool
    layers: tuple[NodeEntry, ...]
    problem: ErrorEntry | None


class DisksDocument(Document):
    """The result of ``qmpnbd disks``."""

    schema_: Literal["qmpnbd.disks/1"] = Field(default="qmpnbd.disks/1", alias="schema")
    monitor: str
    qemu: str
    guest: str
    disks: tuple[DiskEntry, ...]
