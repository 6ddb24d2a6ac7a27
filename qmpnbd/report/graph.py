"""From a QEMU's inventory to the document of ``qmpnbd graph``; pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from qmpnbd.qmp.capabilities import Abilities, hazards_of
from qmpnbd.qmp.graph import BlockGraph, Node
from qmpnbd.qmp.inventory import Inventory
from qmpnbd.qmp.models import BlockExportInfo
from qmpnbd.qmp.numbering import kind_of, report_of
from qmpnbd.report.model import (
    ChildEntry,
    DepthEntry,
    ExportReport,
    GraphDiskEntry,
    GraphDocument,
    GraphNodeEntry,
)


@dataclass(frozen=True, slots=True)
class Seen:
    """What was asked of a QEMU.

    Attributes:
        monitor: the QMP address.
        guest: the guest's status.
        abilities: what it can do.
        inventory: its disks and nodes.
        devices: QOM path -> sort of device.
        exports: its block exports.
    """

    monitor: str
    guest: str
    abilities: Abilities
    inventory: Inventory
    devices: Mapping[str, str]
    exports: Sequence[BlockExportInfo]


def graph_document(seen: Seen) -> GraphDocument:
    """Describes the block graph of a QEMU."""
    graph = seen.inventory.graph
    return GraphDocument(
        monitor=seen.monitor,
        qemu=str(seen.abilities.version),
        guest=seen.guest,
        capabilities=tuple(sorted(each.value for each in seen.abilities.found)),
        hazards=tuple(hazard.name for hazard in hazards_of(seen.abilities.version)),
        disks=tuple(_disks(seen)),
        nodes=tuple(_node(node, graph, seen.exports) for node in graph.nodes.values()),
    )


def _disks(seen: Seen) -> Iterable[GraphDiskEntry]:
    for disk in seen.inventory.disks:
        yield GraphDiskEntry(
            name=disk.name,
            attached=disk.attached,
            qdev=disk.qdev,
            qom_path=disk.qom_path,
            device=seen.devices.get(disk.qom_path, ""),
            drive=disk.drive,
            node_name=disk.node_name,
        )


def _node(node: Node, graph: BlockGraph, exports: Iterable[BlockExportInfo]) -> GraphNodeEntry:
    kind = kind_of(node)
    report = report_of(graph, node.name)
    return GraphNodeEntry(
        node_name=node.name,
        driver=node.driver,
        kind=kind,
        file=node.filename if kind == "protocol" else "",
        size=node.virtual_size,
        read_only=node.read_only,
        children=tuple(ChildEntry(role=role, node_name=name) for role, name in node.children.items()),
        exports=tuple(export.id for export in exports if export.node_name == node.name),
        bitmaps=node.bitmaps,
        report=ExportReport(
            numbering=report.numbering,
            layers=tuple(DepthEntry(node_name=name, allocation_depth=depth) for name, depth in report.depths),
            note=report.note,
        ),
    )
