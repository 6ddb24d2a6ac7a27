"""The guest's disks, and how they are addressed.

A disk is a guest device with the node behind it. People name it by the device's id, then by its QOM path, then by
the node-name; never by file name, because files are shared between disks and change under a running guest. Nodes
that belong to no device (the storage daemon has no devices at all) can be addressed by node-name as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qmpnbd.errors import NoSuchDiskError
from qmpnbd.qmp.graph import BlockGraph, below
from qmpnbd.qmp.models import BlockInfo

_VIRTIO_BACKEND = "/virtio-backend"
_PERIPHERAL = "/machine/peripheral/"


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk of the guest, or a node without a device.

    Attributes:
        name: the shortest address that means this disk.
        qdev: the device's id; empty for a device made without one, and for a node without a device.
        qom_path: the device's QOM path; empty for a node without a device.
        node_name: the node that the device stands on.
    """

    name: str
    qdev: str
    qom_path: str
    node_name: str

    @property
    def attached(self) -> bool:
        """Whether a guest device stands on it."""
        return bool(self.qom_path)


def list_disks(blocks: Iterable[BlockInfo], graph: BlockGraph) -> list[Disk]:
    """Returns the guest's disks in QEMU's order, then the top nodes that belong to no device.

    Drives without a medium are left out: there is nothing to export. A drive that is attached to no device
    (``-drive if=none`` that nobody took) is listed by its node, never as a disk of the guest.
    """
    disks = []
    for block in blocks:
        if not block.qdev or block.inserted is None or not block.inserted.node_name:
            continue
        qdev, qom_path = _device_address(block.qdev)
        disks.append(Disk(qdev or qom_path, qdev, qom_path, block.inserted.node_name))
    taken = {disk.node_name for disk in disks}
    free = [Disk(name, "", "", name) for name in graph.roots if name not in taken]
    return disks + free


def empty_drives(blocks: Iterable[BlockInfo]) -> list[str]:
    """Returns the addresses of the guest's drives that have no medium."""
    found = [_device_address(block.qdev) for block in blocks if block.qdev and block.inserted is None]
    return [qdev or qom_path for qdev, qom_path in found]


def _device_address(qdev: str) -> tuple[str, str]:
    """Splits ``query-block``'s qdev into id and QOM path.

    scsi, ide and nvme give the id; virtio the path of the device's backend, usb-storage that of a disk inside it.
    """
    if not qdev.startswith("/"):
        return qdev, _PERIPHERAL + qdev
    if not qdev.startswith(_PERIPHERAL):
        return "", qdev.removesuffix(_VIRTIO_BACKEND)
    name = qdev.removeprefix(_PERIPHERAL).partition("/")[0]
    return name, _PERIPHERAL + name


def users_of(node_name: str, disks: Iterable[Disk], graph: BlockGraph) -> list[Disk]:
    """Returns the guest's disks that stand on a node, directly or through others."""
    return [disk for disk in disks if disk.attached and node_name in below(graph, disk.node_name)]


def find_disk(wanted: str, disks: Sequence[Disk], graph: BlockGraph, *, where: str, empty: Sequence[str] = ()) -> Disk:
    """Returns the disk that `wanted` means: by qdev id, then QOM path, then node-name.

    A node-name also finds a node inside a chain: its export then counts from that node.

    Raises:
        NoSuchDiskError: none or several; the message lists those that exist.
    """
    for found in (
        [disk for disk in disks if disk.attached and wanted == disk.qdev],
        [disk for disk in disks if disk.attached and wanted == disk.qom_path],
        [disk for disk in disks if wanted == disk.node_name],
    ):
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(disk.qom_path or disk.node_name for disk in found)
            raise NoSuchDiskError(f"{wanted!r} means several disks: {names}", where=where, remedy="Use a QOM path.")
    if wanted in graph.nodes:
        return Disk(wanted, "", "", wanted)
    if wanted in empty:
        raise NoSuchDiskError(f"the drive {wanted!r} has no medium", where=where, remedy="There is nothing to export.")
    attached = ", ".join(disk.name for disk in disks if disk.attached)
    free = ", ".join(disk.name for disk in disks if not disk.attached)
    known = f"Disks: {attached or 'none'}" + (f"; nodes without a device: {free}." if free else ".")
    raise NoSuchDiskError(f"there is no disk {wanted!r}", where=where, remedy=known)


def chosen_disks(
    wanted: Sequence[str], disks: Sequence[Disk], graph: BlockGraph, *, where: str, empty: Sequence[str] = ()
) -> list[Disk]:
    """Returns the disks that are meant, each once; all disks of the guest if none is named.

    Raises:
        NoSuchDiskError: one of them does not exist or means several, or the guest has no disk.
    """
    if wanted:
        found = [find_disk(name, disks, graph, where=where, empty=empty) for name in wanted]
        return list(dict.fromkeys(found))
    attached = [disk for disk in disks if disk.attached]
    if not attached:
        free = ", ".join(disk.name for disk in disks)
        raise NoSuchDiskError(
            "no guest device has a disk",
            where=where,
            remedy=f"Name a node: {free}." if free else "There is no node either.",
        )
    return attached
