"""Which checkpoints a QEMU has, from what it says of its nodes, and what they are good for; pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from qmpnbd.qmp.disks import Disk
from qmpnbd.qmp.graph import FILTER_DRIVERS, MAX_CHAIN, BlockGraph
from qmpnbd.qmp.models import BlockDeviceInfo
from qmpnbd.qmp.naming import CheckpointName, Role, checkpoint_of, role_of, run_of

State = Literal["missing", "displaced", "recording", "pending", "stopped", "inconsistent"]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The bitmap of a checkpoint on one disk.

    Attributes:
        number: of the checkpoint.
        backup: id of the backup that was begun with it.
        bitmap: its name.
        node_name: the node it belongs to.
        granularity: bytes told by one bit.
        dirty_bytes: bytes marked; 0 if inconsistent.
        recording: whether it records.
        persistent: whether it survives the end of QEMU.
        busy: whether an export or a job uses it; then nothing can be done to it.
        inconsistent: QEMU did not end well and its content is lost; it can only be removed.
        removable: whether its node can be written, so that it can be removed.
        mark: name of the bitmap that says that the run which began it lives, or was killed before it was decided
            (`qmpnbd.qmp.undecided`); empty once that is done.
    """

    number: int
    backup: str
    bitmap: str
    node_name: str
    granularity: int
    dirty_bytes: int
    recording: bool
    persistent: bool
    busy: bool
    inconsistent: bool
    removable: bool = True
    mark: str = ""


@dataclass(frozen=True, slots=True)
class DiskCheckpoints:
    """The checkpoints of one chain on one disk.

    Attributes:
        disk: the disk as it is addressed.
        node_name: the node whose bitmaps record the guest's writes: the active layer, below filters.
        chain: chain id.
        transient_because: why bitmaps of this node vanish with QEMU; empty if they persist.
        checkpoints: of the active layer, oldest first.
        displaced: those of lower layers: the disk got a new active layer since.
    """

    disk: str
    node_name: str
    chain: str
    transient_because: str
    checkpoints: tuple[Checkpoint, ...] = ()
    displaced: tuple[Checkpoint, ...] = ()

    @property
    def usable(self) -> tuple[Checkpoint, ...]:
        """Those since which everything is recorded, oldest first."""
        newest_first = self.checkpoints[::-1]
        if not newest_first or not newest_first[0].recording:
            return ()
        broken = next((i for i, each in enumerate(newest_first) if each.inconsistent), len(newest_first))
        return newest_first[:broken][::-1]

    @property
    def state(self) -> State:
        """What can be told of it in a word; `REASONS` has the sentences."""
        if self.usable:
            return "pending" if len(self.usable) > 1 else "recording"
        if not self.checkpoints:
            return "displaced" if self.displaced else "missing"
        return "inconsistent" if self.checkpoints[-1].inconsistent else "stopped"

    def since(self, number: int) -> tuple[Checkpoint, ...]:
        """Returns the bitmaps that together hold all that was written since a checkpoint; none if it is not usable."""
        found = tuple(each for each in self.usable if each.number >= number)
        return found if found and found[0].number == number else ()


REASONS: dict[State, tuple[str, str]] = {
    "recording": ("", ""),
    "pending": (
        "older checkpoints are kept: a backup is under way, or nobody has decided about one",
        "Commit the checkpoint if its backup is safe, abort it if not.",
    ),
    "missing": ("the disk has no checkpoint of this chain", "Make a full backup of it, with a new checkpoint."),
    "displaced": (
        "the disk got a new active layer, and the checkpoint recorded the layers below it only",
        "Make a full backup of it, with a new checkpoint.",
    ),
    "stopped": (
        "somebody disabled the newest checkpoint's bitmap: what was written since is recorded nowhere",
        "Make a full backup of it, with a new checkpoint.",
    ),
    "inconsistent": (
        "QEMU did not end well, and what the bitmap recorded is lost",
        "Its bitmap can only be removed: make a full backup, with a new checkpoint, which removes it.",
    ),
}
"""State -> why an increment is (or is not) possible, and what to do next."""


def layers_of(graph: BlockGraph, node_name: str) -> tuple[str, ...]:
    """Returns the nodes of a disk's layers, active layer first; filters are seen through.

    Bitmaps belong on the active layer: on a filter they could not persist, and would go with it.
    """
    layers = []
    name: str | None = node_name
    for _ in range(MAX_CHAIN):
        node = graph.nodes.get(name) if name is not None else None
        if node is None:
            break
        if node.driver in FILTER_DRIVERS:
            name = node.children.get("backing") or node.children.get("file")
        else:
            layers.append(node.name)
            name = node.children.get("backing")
    return tuple(layers)


def transient_because(node: BlockDeviceInfo | None) -> str:
    """Returns why bitmaps of a node vanish with QEMU, or nothing if they persist."""
    if node is None:
        return "QEMU does not describe the node"
    if node.drv != "qcow2":
        return f"{node.drv} cannot store bitmaps, only qcow2 can"
    if node.image.format_specific is not None and node.image.format_specific.data.compat == "0.10":
        return "qcow2 of version 2 cannot store bitmaps (`qemu-img amend -o compat=1.1` while no QEMU uses it)"
    if node.ro:
        return "the image is read-only"
    return ""


def chains_of(nodes: Iterable[BlockDeviceInfo]) -> list[str]:
    """Returns the ids of all chains that have a checkpoint anywhere, in order."""
    return sorted({name.chain for name in _names(nodes)})


def newest_number(chain: str, nodes: Iterable[BlockDeviceInfo]) -> int:
    """Returns the highest number of a chain on any node, whoever's disk that is; 0 if there is none."""
    return max((name.number for name in _names(nodes) if name.chain == chain), default=0)


def _names(nodes: Iterable[BlockDeviceInfo]) -> Iterator[CheckpointName]:
    for node in nodes:
        for bitmap in node.dirty_bitmaps:
            if bitmap.name and (name := checkpoint_of(bitmap.name)) is not None:
                yield name


def marks_of(node: BlockDeviceInfo) -> dict[str, str]:
    """Returns the marks of undecided checkpoints on a node: run -> name."""
    names = [bitmap.name for bitmap in node.dirty_bitmaps if bitmap.name]
    return {run: name for name in names if role_of(name) is Role.UNDECIDED and (run := run_of(name)) is not None}


def disk_checkpoints(
    disk: Disk, chain: str, graph: BlockGraph, nodes: Mapping[str, BlockDeviceInfo]
) -> DiskCheckpoints:
    """Returns the checkpoints of one chain on one disk.

    Args:
        disk: the disk.
        chain: chain id.
        graph: the graph below it.
        nodes: node-name -> what QEMU says of it, its bitmaps among that.
    """
    layers = layers_of(graph, disk.node_name) or (disk.node_name,)
    found = [node_checkpoints(chain, nodes[name]) if name in nodes else () for name in layers]
    return DiskCheckpoints(
        disk=disk.name,
        node_name=layers[0],
        chain=chain,
        transient_because=transient_because(nodes.get(layers[0])),
        checkpoints=found[0],
        displaced=tuple(each for layer in found[1:] for each in layer),
    )


def node_checkpoints(chain: str, node: BlockDeviceInfo) -> tuple[Checkpoint, ...]:
    """Returns the checkpoints of one chain on one node, oldest first."""
    found = []
    marks = marks_of(node)
    for bitmap in node.dirty_bitmaps:
        name = checkpoint_of(bitmap.name) if bitmap.name else None
        if name is None or name.chain != chain or not node.node_name:
            continue
        found.append(
            Checkpoint(
                number=name.number,
                backup=name.backup,
                bitmap=str(name),
                node_name=node.node_name,
                granularity=bitmap.granularity,
                dirty_bytes=bitmap.count,
                recording=bitmap.recording,
                persistent=bitmap.persistent,
                busy=bitmap.busy,
                inconsistent=bitmap.inconsistent,
                removable=not (node.ro and bitmap.persistent),
                mark=marks.get(name.backup, ""),
            )
        )
    return tuple(sorted(found, key=lambda each: each.number))
