"""What an NBD export of any node would say of allocation depth; pure.

Most nodes count their layers 1, 2, 3. Filters shift that. Some nodes pass on only their own child's status, and what
lies in backing files below has depth 0 although it is there: a client that skips depth 0 loses it. And of some nobody
here knows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qmpnbd.errors import GraphUnsupportedError
from qmpnbd.qmp.graph import FILTER_DRIVERS, LOCAL_FILE_DRIVERS, REMOTE_DRIVERS, BlockGraph, Node, below, numbered

Numbering = Literal["plain", "shifted", "hidden", "unknown"]
"""1, 2, 3, …; with gaps, for filters; backing files read as depth 0; not known for certain."""

Kind = Literal["filter", "format", "protocol", "other"]

FORMAT_DRIVERS = frozenset(
    {"qcow2", "raw", "luks", "qcow", "qed", "vdi", "vhdx", "vmdk", "vpc", "parallels", "bochs", "cloop", "dmg"}
)
"""Drivers that know which bytes they hold, or hold all."""

PROTOCOL_DRIVERS = LOCAL_FILE_DRIVERS | REMOTE_DRIVERS


@dataclass(frozen=True, slots=True)
class Report:
    """What an export of a node would say.

    Attributes:
        numbering: how it counts.
        depths: the layers it counts, top first: node-name and allocation depth; empty where that is unknown.
        note: why it does not count 1, 2, 3; empty if it does.
    """

    numbering: Numbering
    depths: tuple[tuple[str, int], ...]
    note: str = ""


def kind_of(node: Node) -> Kind:
    """Returns what sort of node it is."""
    if node.driver in FILTER_DRIVERS:
        return "filter"
    if node.driver in FORMAT_DRIVERS:
        return "format"
    return "protocol" if node.driver in PROTOCOL_DRIVERS else "other"


def report_of(graph: BlockGraph, node_name: str) -> Report:
    """Returns what an export of a node would say."""
    try:
        layers = list(numbered(graph, node_name))
    except GraphUnsupportedError as error:
        return Report("unknown", (), error.what)
    depths = tuple((node.name, number) for node, number in layers)
    for node, _ in layers:
        if reason := _hides(graph, node):
            return Report("hidden", depths, reason)
        if kind_of(node) == "other":
            return Report("unknown", (), f"what {node.driver} (node {node.name}) counts is not known")
    if [number for _, number in depths] == list(range(1, len(depths) + 1)):
        return Report("plain", depths)
    return Report("shifted", depths, "a filter adds one to everything below the layer that it answers for")


def _hides(graph: BlockGraph, node: Node) -> str:
    """Returns why a node passes on the status of a chain without the chain; empty if it does not."""
    child = node.children.get("file")
    if child is None or node.driver not in ("raw", "snapshot-access"):
        return ""
    if any("backing" in each.children and kind_of(each) == "format" for each in below(graph, child).values()):
        return f"{node.driver} (node {node.name}) tells data of the backing files below it as depth 0"
    return ""
