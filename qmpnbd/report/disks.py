"""From a QEMU's inventory to the document of ``qmpnbd disks``; pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from qmpnbd.errors import QmpnbdError
from qmpnbd.qmp.disks import Disk
from qmpnbd.qmp.graph import BlockGraph, chain_of
from qmpnbd.report.model import DiskEntry, DisksDocument, ErrorEntry, NodeEntry


def disks_document(
    monitor: str, qemu: str, guest: str, disks: Iterable[Disk], graph: BlockGraph, *, devices: Mapping[str, str]
) -> DisksDocument:
    """Describes the disks of a QEMU.

    Args:
        monitor: the QMP address.
        qemu: QEMU's version.
        guest: the guest's status.
        disks: the guest's disks, and nodes without a device.
        graph: the graph they stand on.
        devices: QOM path -> sort of device.
    """
    entries = tuple(_entry(disk, graph, devices.get(disk.qom_path, "")) for disk in disks)
    return DisksDocument(monitor=monitor, qemu=qemu, guest=guest, disks=entries)


def _entry(disk: Disk, graph: BlockGraph, device: str) -> DiskEntry:
    node = graph.nodes.get(disk.node_name)
    layers: tuple[NodeEntry, ...] = ()
    problem: ErrorEntry | None = None
    try:
        layers = tuple(
            NodeEntry(
                allocation_depth=link.allocation_depth,
                node_name=link.node_name,
                format=link.format,
                file=link.filename,
            )
            for link in chain_of(graph, disk.node_name)
        )
    except QmpnbdError as error:
        problem = ErrorEntry.of(error)
    return DiskEntry(
        name=disk.name,
        attached=disk.attached,
        qdev=disk.qdev,
        qom_path=disk.qom_path,
        device=device,
        drive=disk.drive,
        node_name=disk.node_name,
        driver=node.driver if node else "",
        size=node.virtual_size if node else 0,
        read_only=node.read_only if node else False,
        layers=layers,
        problem=problem,
    )
