"""Where the nodes of a block graph are drawn: a grid; pure.

The way that data takes goes down: from the disk through filters and backing files. What a node stands on beside that
(its file, a job's target) goes to the right::

    disk
     |
    top  -- top.qcow2
     |
    base -- base.raw
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

from qmpnbd.report.model import GraphDiskEntry, GraphNodeEntry

_FULL_ROW = 5
"""Columns side by side; more would not be legible on a screen."""


@dataclass(slots=True)
class Grid:
    """Places, as column and row; row 0 is for the disks.

    Attributes:
        nodes: node-name -> its place.
        disks: the places of the disks, in their order.
    """

    nodes: dict[str, tuple[int, int]] = field(default_factory=dict)
    disks: list[tuple[int, int]] = field(default_factory=list)

    @property
    def columns(self) -> int:
        """How many columns there are."""
        return 1 + max((column for column, _ in [*self.nodes.values(), *self.disks]), default=0)

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return 1 + max((row for _, row in [*self.nodes.values(), *self.disks]), default=0)


def lay_out(disks: Sequence[GraphDiskEntry], nodes: Mapping[str, GraphNodeEntry]) -> Grid:
    """Places every node once: below the first disk, or beside the first node, that leads to it.

    Disks stand side by side, and further ones below those when a row is full.
    """
    grid = Grid()
    column = row = height = 0
    for disk in disks:
        block = _block(disk.node_name, nodes, grid.nodes.keys())
        width = 1 + max((place[0] for place in block.values()), default=0)
        if column and column + width > _FULL_ROW:
            column, row, height = 0, row + height, 0
        grid.disks.append((column, row))
        grid.nodes |= {name: (column + place[0], row + place[1]) for name, place in block.items()}
        column += width
        height = max(height, 1 + max((place[1] for place in block.values()), default=0))
    return grid


def _block(name: str, nodes: Mapping[str, GraphNodeEntry], placed: Set[str]) -> dict[str, tuple[int, int]]:
    """Places what is below one disk: the way down, and then what has children of its own beside that way."""
    block: dict[str, tuple[int, int]] = {}
    aside, column = deque([(name, 1)]), 0
    while aside:
        name, row = aside.popleft()
        while name in nodes and name not in block and name not in placed:
            block[name] = column, row
            down, beside = _split(nodes[name])
            height = 0
            for child in beside:
                if child not in nodes or child in block or child in placed:
                    continue
                if nodes[child].children:
                    aside.append((child, row))
                else:
                    block[child] = column + 1, row + height
                    height += 1
            name, row = down, row + max(height, 1)
        column = 1 + max((place[0] for place in block.values()), default=0)
    return block


def _split(node: GraphNodeEntry) -> tuple[str, list[str]]:
    """Returns the child that data is looked for next in, and the others."""
    roles = {child.role: child.node_name for child in node.children}
    main = "backing" if "backing" in roles or node.kind != "filter" else "file"
    others = [child.node_name for child in node.children if child.role != main]
    return roles.get(main, ""), others
