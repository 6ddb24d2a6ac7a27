"""What of ours is in a QEMU, told from names and the block graph alone; pure.

The order of taking down is that of one run's making, reversed, and holds for every recipe, cut off anywhere::

    exports             they hold nodes and bitmaps
    snapshot-access     holds the filter below
    drives back         guest -> D again; then our filter is free
    jobs                cancel backups; lead commits to their end
    the guest           let it run on, if we paused it, or if it was stopped because our scratch failed
    overlays            commit: they hold the guest's newest data
    nodes               filters before the scratch images they write to
    checkpoint          merged back if nobody has decided about it; an overlay must be committed before that
    bitmaps             nothing uses them any more
    objects
    files               of the nodes that are gone
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from qmpnbd.qmp.disks import Disk
from qmpnbd.qmp.graph import BlockGraph
from qmpnbd.qmp.models import BlockDeviceInfo, BlockExportInfo, GraphNode, GraphReply, JobInfo
from qmpnbd.qmp.naming import Role, name_of, number_of, role_of, run_of
from qmpnbd.qmp.undecided import undecided_of
from qmpnbd.qmp.undo import (
    AbortCheckpoint,
    CancelJob,
    CommitOverlay,
    DeleteNode,
    DeleteObject,
    RemoveBitmap,
    RemoveExport,
    RemoveFile,
    RestoreDrive,
    Resume,
    RetryInputOutput,
    Undo,
)

_COMMIT = "commit"
_OF_SERVER = {Role.SERVER, Role.CREDENTIALS, Role.CLIENTS}
"""Objects that go with the NBD server; one of them tells whose it is."""


_UNDECIDED = ": nobody has decided about this run's checkpoint"


@dataclass(frozen=True, slots=True)
class Contents:
    """What a QEMU has at one moment, anyone's.

    Attributes:
        exports: block exports.
        nodes: block nodes, with their bitmaps.
        graph: how they stand on one another.
        disks: the guest's disks.
        jobs: jobs.
        objects: ids of users' objects.
        guest: the guest's status.
    """

    exports: Sequence[BlockExportInfo]
    nodes: Sequence[BlockDeviceInfo]
    graph: BlockGraph
    disks: Sequence[Disk]
    jobs: Sequence[JobInfo]
    objects: Sequence[str]
    guest: str


@dataclass(frozen=True, slots=True)
class Thing:
    """Something that a run of ours made.

    Attributes:
        kind: ``export``, ``job``, ``node``, ``bitmap`` or ``object``.
        name: its name.
        detail: more, for people: the node of an export, the state of a job.
    """

    kind: str
    name: str
    detail: str


def things_by_run(contents: Contents) -> dict[str, list[Thing]]:
    """Returns what of ours is in a QEMU, by run."""
    found: dict[str, list[Thing]] = {}
    for thing in _things(contents):
        run = run_of(thing.name)
        if run is not None:
            found.setdefault(run, []).append(thing)
    return found


def _things(contents: Contents) -> Iterator[Thing]:
    for export in contents.exports:
        yield Thing("export", export.id, f"of node {export.node_name}")
    for job in contents.jobs:
        yield Thing("job", job.id, f"{job.type}, {job.status}")
    for node in contents.nodes:
        yield Thing("node", node.node_name or "", node.drv)
        for bitmap in node.dirty_bitmaps:
            marks = bitmap.name is not None and role_of(bitmap.name) is Role.UNDECIDED
            yield Thing("bitmap", bitmap.name or "", f"of node {node.node_name}" + (_UNDECIDED if marks else ""))
    for name in contents.objects:
        yield Thing("object", name, "the guest was paused by us" if role_of(name) is Role.PAUSE else "")


def undo_of(run: str, contents: Contents) -> list[Undo]:
    """Returns what takes down all that a run left in a QEMU, in order; empty if there is nothing.

    The NBD server is not among it: QEMU does not tell whose it is.
    """
    own = [node for node in contents.nodes if node.node_name and run_of(node.node_name) == run]
    names = [node.node_name for node in own if node.node_name]
    jobs = [job for job in contents.jobs if run_of(job.id) == run]
    objects = [name for name in contents.objects if run_of(name) == run]
    undo: list[Undo] = [RemoveExport(export.id) for export in contents.exports if run_of(export.id) == run]
    undo += [DeleteNode(name) for name in _of_role(names, Role.ACCESS)]
    undo += _drives(names, contents)
    undo += [CancelJob(job.id) for job in jobs if job.type != _COMMIT]
    undo += [Resume(name) for name in objects if role_of(name) is Role.PAUSE]
    if undo and contents.guest == "io-error":
        undo.append(RetryInputOutput())
    undo += _overlays(run, own, contents)
    commits = [each for each in undo if isinstance(each, CommitOverlay)]  # they remove node and file, too
    single = set(names) - {each.overlay for each in commits}
    for role in (Role.COPY, Role.SCRATCH, Role.OVERLAY):
        undo += [DeleteNode(name) for name in _of_role(single, role)]
    undo += _checkpoint(run, contents.nodes)
    undo += _bitmaps(run, contents.nodes)
    undo += [DeleteObject(name) for name in objects if role_of(name) not in _OF_SERVER | {Role.PAUSE}]
    undo += [file for file in _files(own) if file.path not in {each.path for each in commits}]
    return undo


def _of_role(names: Iterable[str | None], role: Role) -> list[str]:
    return sorted(name for name in names if name is not None and role_of(name) is role)


def _drives(names: Sequence[str], contents: Contents) -> Iterator[Undo]:
    for name in _of_role(names, Role.COPY):
        below = contents.graph.nodes[name].children.get("file") if name in contents.graph.nodes else None
        for disk in contents.disks:
            if below is not None and disk.attached and disk.node_name == name:
                yield RestoreDrive(disk.qom_path, name, below)


def _overlays(run: str, own: Sequence[BlockDeviceInfo], contents: Contents) -> Iterator[Undo]:
    files = {node.node_name: node.image.filename for node in own}
    committed = []
    for name in _of_role(files, Role.OVERLAY):
        number = number_of(name)
        below = contents.graph.nodes[name].children.get("backing") if name in contents.graph.nodes else None
        # A commit's filter may lie in between; what lies below that is the base.
        while below is not None and role_of(below) is Role.FILTER and below in contents.graph.nodes:
            below = contents.graph.nodes[below].children.get("backing")
        job, path = name_of(run, Role.JOB, number), files.get(name_of(run, Role.OVERLAY_FILE, number), "")
        if below is not None and is_own_image(path):
            committed.append(job)
            yield CommitOverlay(name, below, job, path)
    for job_info in contents.jobs:
        if run_of(job_info.id) == run and job_info.type == _COMMIT and job_info.id not in committed:
            yield CancelJob(job_info.id)  # the overlay is gone: it only waits to be dismissed


def _checkpoint(run: str, nodes: Iterable[BlockDeviceInfo]) -> Iterator[Undo]:
    undecided = undecided_of(run, nodes)
    if undecided is not None:
        yield AbortCheckpoint(run, str(undecided), tuple(undecided.idle().abort()))


def _bitmaps(run: str, nodes: Iterable[BlockDeviceInfo]) -> Iterator[Undo]:
    for node in nodes:
        for bitmap in node.dirty_bitmaps:
            if not (node.node_name and bitmap.name) or role_of(bitmap.name) is Role.UNDECIDED:
                continue
            if run_of(bitmap.name) == run:
                yield RemoveBitmap(node.node_name, bitmap.name)


def _files(own: Iterable[BlockDeviceInfo]) -> Iterator[RemoveFile]:
    for node in own:
        name, path = node.node_name or "", node.image.filename
        if role_of(name) in (Role.SCRATCH_FILE, Role.OVERLAY_FILE) and is_own_image(path):
            yield RemoveFile(path, name)


def is_own_image(path: str) -> bool:
    """Returns whether a path names an image that a run of ours made, from its name alone."""
    name = PurePath(path)
    return name.is_absolute() and name.suffix == ".qcow2" and role_of(name.stem) in (Role.SCRATCH, Role.OVERLAY)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a node stands in the block graph.

    Attributes:
        top: the topmost node above it; the node itself where nothing lies above.
        is_used: whether anything but a job uses it, or a node above it.
        has_backing: whether it has a backing node.
        backing_is_used: whether anything but a job uses that one, beside this node.
    """

    top: str
    is_used: bool
    has_backing: bool
    backing_is_used: bool


def place_in_graph(reply: GraphReply, node_name: str) -> Place | None:
    """Returns where a node stands, None if it does not exist.

    Args:
        reply: of ``x-debug-query-block-graph``.
        node_name: the node.
    """
    vertices = {vertex.id: vertex for vertex in reply.nodes}
    nodes = {vertex.name: vertex.id for vertex in reply.nodes if vertex.type == "block-driver"}

    def above(node: int) -> list[GraphNode]:
        parents = [vertices[edge.parent] for edge in reply.edges if edge.child == node and edge.parent in vertices]
        return [parent for parent in parents if parent.type != "block-job"]

    own = top = nodes.get(node_name)
    if own is None or top is None:
        return None
    for _ in reply.nodes:
        parent = next((parent for parent in above(top) if parent.type == "block-driver"), None)
        if parent is None:
            break
        top = parent.id
    backing = next((edge.child for edge in reply.edges if edge.parent == own and edge.name == "backing"), None)
    others = [parent for parent in above(backing) if parent.id != own] if backing is not None else []
    return Place(vertices[top].name, bool(above(own)), backing is not None, bool(others))
