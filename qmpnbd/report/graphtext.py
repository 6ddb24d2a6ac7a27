"""The block graph as text: a tree below each disk, and what exports of the nodes would say."""

from __future__ import annotations

from collections.abc import Iterator

from qmpnbd.printable import printable as shown
from qmpnbd.report.columns import table
from qmpnbd.report.model import ExportReport, GraphDiskEntry, GraphDocument, GraphNodeEntry
from qmpnbd.report.sizes import human_size
from qmpnbd.report.text import guest_words

_SHOWN_LAYERS = 8


def graph_text(document: GraphDocument) -> str:
    """Returns the block graph."""
    nodes = {node.node_name: node for node in document.nodes}
    lines = [
        f"QEMU {shown(document.qemu)}, {guest_words(document.guest)}, monitor {shown(document.monitor)}",
        f"can: {', '.join(document.capabilities)}",
        f"does wrong: {', '.join(document.hazards) or 'nothing known'}",
    ]
    told: set[str] = set()
    for disk in document.disks:
        lines += ["", *_tree(disk, nodes, told)]
    # A file by itself is one layer; that needs no line.
    rows = [
        (shown(node.node_name), node.report.numbering, _depths(node.report))
        for node in document.nodes
        if node.kind != "protocol"
    ]
    if rows:
        lines += ["", "an export of a node would say:"]
        lines += [f"  {line}" for line in table([("node", "numbering", "allocation depth"), *rows])]
    return "\n".join(lines) + "\n"


def _tree(disk: GraphDiskEntry, nodes: dict[str, GraphNodeEntry], told: set[str]) -> Iterator[str]:
    """Yields a disk and the nodes below it; what another place has shown already is only named."""
    yield disk_words(disk)
    root = nodes.get(disk.node_name)
    depths = {layer.node_name: layer.allocation_depth for layer in root.report.layers} if root else {}
    # Each entry: the node, its role, what is written before its line, and before the lines below it.
    waiting = [(disk.node_name, "", "  ", "  ")]
    while waiting:
        name, role, before, below = waiting.pop()
        node = nodes.get(name)
        label = f"{shown(role)}: {shown(name)}" if role else shown(name)
        if node is None or name in told:
            yield f"{before}{label}  (see above)" if node else f"{before}{label}  (not described by QEMU)"
            continue
        told.add(name)
        yield f"{before}{label}  {node_words(node, depths.get(name))}"
        last = len(node.children) - 1
        below_it = [
            (
                child.node_name,
                child.role,
                below + ("└─ " if at == last else "├─ "),
                below + ("   " if at == last else "│  "),
            )
            for at, child in enumerate(node.children)
        ]
        waiting += reversed(below_it)


def disk_words(disk: GraphDiskEntry) -> str:
    """Returns what a disk is, in a line."""
    if not disk.attached:
        drive = f", drive {shown(disk.drive)}" if disk.drive else ""
        return f"node {shown(disk.name)} (no device{drive})"
    about = [disk.device, disk.qom_path if disk.qom_path != disk.name else "", disk.drive and f"drive {disk.drive}"]
    return f"disk {shown(disk.name)}: {', '.join(shown(each) for each in about if each)}"


def node_words(node: GraphNodeEntry, depth: int | None) -> str:
    """Returns what a node is; `depth` is its number in the export of the disk above, None if it has none."""
    parts = [shown(node.driver) if node.kind != "filter" else f"{node.driver} (filter)"]
    if node.kind != "protocol":
        parts += [human_size(node.size), "read-only" if node.read_only else "writable"]
    if node.file:
        parts.append(shown(node.file))
    if depth is not None:
        parts.append(f"depth {depth}")
    parts += [f"export {shown(each)}" for each in node.exports]
    parts += [f"bitmap {shown(each)}" for each in node.bitmaps]
    return ", ".join(parts)


def _depths(report: ExportReport) -> str:
    if report.numbering in ("hidden", "unknown"):
        return shown(report.note)
    layers = [f"{shown(layer.node_name)} {layer.allocation_depth}" for layer in report.layers[:_SHOWN_LAYERS]]
    return ", ".join([*layers, "…"] if len(report.layers) > _SHOWN_LAYERS else layers)
