"""QEMU's block graph, and the backing chain an NBD export of one of its nodes shows.

Allocation depth counts nodes, not files. A filter adds one to everything below it, except to what its own child
holds, for which it answers itself::

    node       kind      file        its data has depth
    throttle0  filter    -           -
    top        qcow2     top.qcow2   1      (the filter's number)
    mid        qcow2     mid.qcow2   3
    base       raw       base.raw    4

Everything whose numbering is not known for certain (a raw node over a format node, quorum, drivers never seen) is
refused: a wrong number would look like a fault of the disk.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from qmpnbd.errors import DiskNotLocalError, GraphUnsupportedError, ImageUnsupportedError
from qmpnbd.qmp.models import BlockDeviceInfo, GraphReply

COPY_ON_READ = "copy-on-read"
"""The filter through which reading changes the image: what is read of lower layers is written to the active one."""

FILTER_DRIVERS = frozenset(
    {
        "backup-top",  # QEMU 5.2's name of what became copy-before-write
        "blkdebug",
        "blklogwrites",
        "blkreplay",
        "commit_top",
        "compress",
        "copy-before-write",
        COPY_ON_READ,
        "mirror_top",
        "preallocate",
        "throttle",
    }
)
"""Drivers that answer for their child and count as a layer (QEMU's ``is_filter``)."""

LOCAL_FILE_DRIVERS = frozenset({"file", "host_device"})
"""Protocol drivers whose bytes can be read from a path on this host."""

REMOTE_DRIVERS = frozenset(
    {
        *("nbd", "rbd", "iscsi", "ssh", "nfs", "gluster", "http", "https", "ftp", "ftps", "vxhs", "sheepdog"),
        *("nvme", "io_uring", "nvme-io_uring", "virtio-blk-vhost-user", "virtio-blk-vhost-vdpa"),
        *("virtio-blk-vfio-pci", "host_cdrom", "vvfat", "null-co", "null-aio"),
    }
)
"""Protocol drivers of storage that has no local file to read."""

MAX_CHAIN = 256
"""Nodes followed below a disk. QEMU itself becomes unusable well before; a graph has no cycles, a liar's may."""


@dataclass(frozen=True, slots=True)
class Node:
    """A node of the block graph.

    Attributes:
        name: its node-name.
        driver: the block driver.
        filename: the image's name as QEMU tells it; a plain path for protocol nodes only.
        virtual_size: bytes it offers to its parents; not part of equality, since a file grows while it is written.
        read_only: whether it was opened read-only.
        children: role of the edge -> node-name of the child.
        bitmaps: names of its dirty bitmaps; not part of equality, since they are no part of the graph.
    """

    name: str
    driver: str
    filename: str
    virtual_size: int = field(compare=False)
    read_only: bool
    children: Mapping[str, str] = field(default_factory=dict)
    bitmaps: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class Link:
    """One layer of a backing chain inside QEMU.

    Attributes:
        node_name: the format node (the protocol node where no format lies above it).
        format: ``qcow2`` or ``raw``.
        filename: the image file as QEMU opened it, perhaps relative to QEMU's working directory.
        allocation_depth: NBD's number for data that this layer holds.
        offset: first byte of the file that the disk shows; not 0 for a raw window only.
        size: bytes of a raw window; None where the file decides.
        writable: whether something may write to it inside QEMU, be it the guest or a job.
        data_file: qcow2 only: the external data file as QEMU opened it, "" if the data is in the image.
    """

    node_name: str
    format: Literal["qcow2", "raw"]
    filename: str
    allocation_depth: int
    offset: int = 0
    size: int | None = None
    writable: bool = False
    data_file: str = ""


@dataclass(frozen=True, slots=True)
class BlockGraph:
    """The nodes of one QEMU at one moment; equal if and only if nothing was inserted, removed or moved.

    Attributes:
        nodes: node-name -> node.
        roots: names of the nodes that no other node uses, in QEMU's order.
        backends: block backend's name (a device's QOM path, a drive's id) -> node-name it stands on.
    """

    nodes: Mapping[str, Node]
    roots: tuple[str, ...]
    backends: Mapping[str, str]


def build_graph(infos: Iterable[BlockDeviceInfo], reply: GraphReply) -> BlockGraph:
    """Joins what QEMU says of its nodes with the edges between them."""
    names = {vertex.id: vertex.name for vertex in reply.nodes if vertex.type == "block-driver"}
    backend_names = {vertex.id: vertex.name for vertex in reply.nodes if vertex.type == "block-backend"}
    children: dict[str, dict[str, str]] = {name: {} for name in names.values()}
    backends: dict[str, str] = {}
    used: set[str] = set()
    for edge in reply.edges:
        if edge.child not in names:
            continue
        if edge.parent in names:
            children[names[edge.parent]][edge.name] = names[edge.child]
            used.add(names[edge.child])
        elif edge.parent in backend_names and edge.name == "root":
            backends[backend_names[edge.parent]] = names[edge.child]
    nodes = {
        info.node_name: Node(
            name=info.node_name,
            driver=info.drv,
            filename=info.image.filename,
            virtual_size=info.image.virtual_size,
            read_only=info.ro,
            children=children.get(info.node_name, {}),
            bitmaps=tuple(bitmap.name for bitmap in info.dirty_bitmaps if bitmap.name),
        )
        for info in infos
        if info.node_name
    }
    return BlockGraph(nodes, tuple(name for name in nodes if name not in used), backends)


def below(graph: BlockGraph, node_name: str) -> dict[str, Node]:
    """Returns a node and all nodes that it stands on, by name: what an export of it depends on."""
    found: dict[str, Node] = {}
    waiting = [node_name]
    while waiting:
        name = waiting.pop()
        node = graph.nodes.get(name)
        if node is not None and name not in found:
            found[name] = node
            waiting += node.children.values()
    return found


def node_to_read(graph: BlockGraph, node_name: str) -> str:
    """Returns where to export a disk so that reading it changes nothing: below copy-on-read filters that it stands on.

    Args:
        graph: the block graph.
        node_name: the node that the disk stands on; it is returned if there is no such filter.
    """
    found = name = node_name
    for _ in range(MAX_CHAIN):
        node = graph.nodes.get(name)
        if node is None or node.driver not in FILTER_DRIVERS:
            break
        name = node.children.get("backing") or node.children.get("file") or ""
        if node.driver == COPY_ON_READ:
            found = name
    return found


def chain_of(graph: BlockGraph, node_name: str) -> tuple[Link, ...]:
    """Returns the layers that an export of `node_name` counts, top first.

    Raises:
        DiskNotLocalError: a layer is not a local file.
        GraphUnsupportedError: the numbering of the layers is not known for certain.
        ImageUnsupportedError: a layer's format is not read here.
    """
    return tuple(_link(graph, node, number) for node, number in numbered(graph, node_name))


def numbered(graph: BlockGraph, node_name: str) -> Iterator[tuple[Node, int]]:
    """Yields the layers that an export of `node_name` counts, top first, with NBD's number for data each holds.

    Only the way down is judged here, not whether each layer answers for what lies below it.

    Raises:
        GraphUnsupportedError: the way down is not known: an endless one, or a filter without a child.
    """
    number = 1
    first_filter: int | None = None
    name: str | None = node_name
    while name is not None:
        node = _node(graph, name)
        if number > MAX_CHAIN:
            raise GraphUnsupportedError(f"more than {MAX_CHAIN} nodes in the chain", where=node_name)
        if node.driver in FILTER_DRIVERS:
            first_filter = first_filter or number
            name = node.children.get("backing") or node.children.get("file")
            if name is None:
                raise GraphUnsupportedError(f"the filter {node.driver} has no child", where=f"node {node.name}")
        else:
            yield node, first_filter or number
            first_filter = None
            name = node.children.get("backing")
        number += 1


def _node(graph: BlockGraph, name: str) -> Node:
    try:
        return graph.nodes[name]
    except KeyError:
        raise GraphUnsupportedError("QEMU does not describe this node", where=f"node {name}") from None


def _link(graph: BlockGraph, node: Node, number: int) -> Link:
    if node.driver in LOCAL_FILE_DRIVERS:
        return Link(node.name, "raw", _file_name(node), number, writable=not node.read_only)
    _refuse_storage_without_files(node)
    if node.driver not in ("qcow2", "raw"):
        raise ImageUnsupportedError(
            f"the format {node.driver} is not read here",
            where=f"node {node.name} ({node.filename})",
            remedy="`qmpnbd map` still shows what is served.",
        )
    protocol = _protocol_below(graph, node)
    if node.driver == "qcow2":
        data_file = _file_name(_protocol_below(graph, node, "data-file")) if "data-file" in node.children else ""
        return Link(node.name, "qcow2", _file_name(protocol), number, writable=not node.read_only, data_file=data_file)
    offset, size = _raw_window(node)
    return Link(node.name, "raw", _file_name(protocol), number, offset, size, not node.read_only)


def _protocol_below(graph: BlockGraph, node: Node, role: str = "file") -> Node:
    """Returns the protocol node under a format node; filters between the two do not count as layers."""
    child = node
    for _ in range(MAX_CHAIN):
        name, role = child.children.get(role), "file"
        if name is None:
            raise GraphUnsupportedError("the node stands on no file", where=f"node {child.name}")
        child = _node(graph, name)
        if child.driver in LOCAL_FILE_DRIVERS:
            return child
        _refuse_storage_without_files(child)
        if child.driver not in FILTER_DRIVERS:
            raise GraphUnsupportedError(
                f"{node.driver} over {child.driver}: the layers below are hidden from the export",
                where=f"node {node.name}",
                remedy="Validate the node below instead, by its node-name.",
            )
    raise GraphUnsupportedError("the node stands on no file", where=f"node {node.name}")


def _refuse_storage_without_files(node: Node) -> None:
    if node.driver in REMOTE_DRIVERS:
        raise DiskNotLocalError(
            f"the layer is on {node.driver}, so its files cannot be read here",
            where=f"node {node.name} ({node.filename})",
            remedy="`qmpnbd map` still shows what is served.",
        )


def _file_name(protocol: Node) -> str:
    """Returns a protocol node's file name; QEMU tells it in ``json:`` form when options do not fit into a name."""
    if not protocol.filename.startswith("json:"):
        return protocol.filename
    name = _options(protocol).get("filename")
    if not isinstance(name, str):
        raise GraphUnsupportedError("QEMU does not tell the name of the file", where=f"node {protocol.name}")
    return name


def _raw_window(node: Node) -> tuple[int, int | None]:
    """Returns offset and size of a raw node; QEMU shows them only in the ``json:`` form of its name."""
    if not node.filename.startswith("json:"):
        return 0, None
    options = _options(node)
    try:
        offset, size = options.get("offset", 0), options.get("size")
        return int(str(offset)), None if size is None else int(str(size))
    except ValueError as error:
        raise GraphUnsupportedError("cannot read the options of this raw node", where=f"node {node.name}") from error


def _options(node: Node) -> dict[str, object]:
    try:
        options = json.loads(node.filename.removeprefix("json:"))
    except ValueError as error:
        raise GraphUnsupportedError("cannot read the options of this node", where=f"node {node.name}") from error
    return options if isinstance(options, dict) else {}
