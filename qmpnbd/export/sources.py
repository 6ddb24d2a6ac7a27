"""Which nodes are exported for the disks of a session: their own, or what a caller makes of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

from qmpnbd.deadline import Deadline
from qmpnbd.qmp.disks import Disk
from qmpnbd.qmp.exports import NodeBitmap
from qmpnbd.qmp.graph import node_to_read
from qmpnbd.qmp.inventory import Inventory
from qmpnbd.qmp.monitor import Monitor
from qmpnbd.qmp.teardown import TakeDown


@dataclass(frozen=True, slots=True)
class Source:
    """A node to export for a disk.

    Attributes:
        disk: the disk.
        node_name: the node.
        bitmaps: dirty bitmaps to offer besides those of `Options.export`.
    """

    disk: Disk
    node_name: str
    bitmaps: tuple[str | NodeBitmap, ...] = ()


@dataclass(frozen=True, slots=True)
class Sources:
    """What is exported together.

    Attributes:
        nodes: the sources.
        consistent: whether all of them show one instant that stays readable.
    """

    nodes: tuple[Source, ...]
    consistent: bool


@dataclass(frozen=True, slots=True)
class Scene:
    """What a function that makes sources may use.

    Attributes:
        monitor: the QEMU.
        guest: the guest's status.
        run: the run id, for names.
        inventory: its disks.
        disks: the chosen ones.
        take_down: takes down what it makes.
        deadline: for making it.
    """

    monitor: Monitor
    guest: str
    run: str
    inventory: Inventory
    disks: tuple[Disk, ...]
    take_down: TakeDown
    deadline: Deadline


SourceMaker = Callable[[Scene], AbstractAsyncContextManager[Sources]]


@asynccontextmanager
async def live_disks(scene: Scene) -> AsyncIterator[Sources]:
    """Yields the nodes that the disks stand on: they show one instant only while nothing writes to them."""
    graph = scene.inventory.graph
    still = all(disk.node_name in graph.nodes and graph.nodes[disk.node_name].read_only for disk in scene.disks)
    sources = tuple(Source(disk, node_to_read(graph, disk.node_name)) for disk in scene.disks)
    yield Sources(sources, consistent=still)
