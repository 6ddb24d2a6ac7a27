"""How to take a point in time: three recipes, written as plans; pure.

Each gives one instant over several disks on stock QEMU. ``D`` is a disk's format node::

    backup             guest -> [job filter] -> D        the job copies what the guest is about to overwrite into
      (5.2 on)                       |          ^        the scratch image first; all jobs start in one transaction
                                     `-> scratch |       export: scratch
                                            `----'
    copy-before-write  guest -> [our filter] -> D        the same with a filter of our own, put under each device while
      (8.0 on)                       |          ^        the guest is paused for some milliseconds; if the scratch
                                     `-> scratch |       fails, the point in time is lost, not the guest's write
                                            `----'       export: snapshot-access above the filter; depth: scratch
    snapshot           guest -> overlay -> D             the guest writes into an overlay, `D` stands still, and is
      (5.2 on)                                           committed into at the end
                                                         export: D itself, depth included

``snapshot-access`` serves wrong data before QEMU 8.0 (hbitmap_status), which no schema shows: hence a version.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from qmpnbd.errors import UsageError
from qmpnbd.qmp.capabilities import SNAPSHOT_ACCESS
from qmpnbd.qmp.naming import Role, export_id, name_of
from qmpnbd.qmp.plan import ImageFile, Offer, Plan, PlannedDisk, Recipe, Step
from qmpnbd.qmp.undo import (
    CancelJob,
    CommitOverlay,
    DeleteNode,
    RemoveBitmap,
    RemoveExport,
    RestoreDrive,
    Resume,
    RetryInputOutput,
    StopServer,
    Undo,
    command,
)

CBW_TIMEOUT_SECONDS = 30
"""How long a guest's write may wait for the scratch before the point in time is given up instead."""

BREAK_SNAPSHOT_SINCE = (7, 1)
"""Before, no filter lets the guest's write pass when the scratch fails (capability ``break-snapshot``)."""

OFFLOADS_BEFORE = (6, 0)
"""Before, a backup copies by copy offloading, in pieces as small as the disk's clusters. QEMU aborts, and the guest is
gone, when such a piece has to wait for a reader of the scratch (an assertion in ``bdrv_co_write_req_prepare``, within
seconds on 5.2 when 256 KiB are read at a time). Data that is to be compressed is not copied like that."""

_SCRATCH_CLUSTER = 65536
_MARKER_TYPE = "throttle-group"  # an object that costs nothing and does nothing, in every release


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a plan depends on beside its disks.

    Attributes:
        run: the run id; every name is made of it.
        scratch_dir: where scratch images, or the overlays of a snapshot, lie.
        socket_path: where the NBD server is to listen; empty if one is shared.
        threshold: bytes of a scratch file from which on QEMU shall give notice; 0 for no notice.
        depth: whether the exact allocation depth of the instant is wanted.
        guest_runs: whether the guest runs, so that the copy-before-write recipe must pause it.
        guest_is_well: whether it has not been stopped by an I/O error already.
        offloads: whether this QEMU copies to the scratch by copy offloading (`OFFLOADS_BEFORE`).
    """

    run: str
    scratch_dir: str
    socket_path: str = ""
    threshold: int = 0
    depth: bool = True
    guest_runs: bool = False
    guest_is_well: bool = True
    offloads: bool = False


def choose_recipe(
    release: tuple[int, int],
    disks: Sequence[PlannedDisk],
    *,
    protect_guest: bool,
    exact_chain: bool,
    allow: Collection[str] = (),
) -> tuple[Recipe, str]:
    """Chooses how to take a point in time.

    Args:
        release: QEMU's major and minor version.
        disks: what takes part.
        protect_guest: a scratch that fails must not fail the guest's writes; costs a pause of some milliseconds.
        exact_chain: the very chain of the instant must be visible, not an overlay above it.
        allow: names of hazards to take the risk of.

    Returns:
        The recipe, and the reason in words.
    """
    if exact_chain:
        return Recipe.SNAPSHOT, "the chain itself must be visible as it was: the guest writes into overlays meanwhile"
    if not protect_guest:
        return Recipe.BACKUP, "one transaction takes all disks without a pause; the scratch space is watched"
    trusted = SNAPSHOT_ACCESS.fixed
    protects = "if the scratch space fails, the point in time is lost, not a write of the guest"
    risked = BREAK_SNAPSHOT_SINCE <= release < trusted and SNAPSHOT_ACCESS.name in allow
    if risked:
        protects += f"; QEMU {release[0]}.{release[1]} {SNAPSHOT_ACCESS.what}, which was allowed"
    if release < trusted and not risked:
        return Recipe.BACKUP, (
            f"QEMU {release[0]}.{release[1]} cannot protect the guest: snapshot-access serves wrong data before "
            f"{trusted[0]}.{trusted[1]}; the scratch space is watched instead"
        )
    free = [disk.name for disk in disks if not disk.qom_path]
    if free:
        return Recipe.BACKUP, f"no device stands on {', '.join(free)}, so no filter can be put under one"
    filtered = [f"{disk.filter} of {disk.name}" for disk in disks if disk.filter]
    if filtered:
        return Recipe.BACKUP, (
            f"our filter would take the place of another one ({', '.join(filtered)}), whose limits the guest would be "
            "without; the scratch space is watched instead"
        )
    return Recipe.COPY_BEFORE_WRITE, protects


def make_plan(recipe: Recipe, why: str, disks: Sequence[PlannedDisk], around: Surroundings) -> Plan:
    """Plans a point in time.

    Args:
        recipe: from `choose_recipe`.
        why: from there, too.
        disks: at least one, each once.
        around: everything else.

    Raises:
        UsageError: the same disk twice, or none at all.
    """
    nodes = [disk.node_name for disk in disks]
    if not nodes or len(set(nodes)) != len(nodes):
        raise UsageError("a point in time needs each disk once", where=", ".join(nodes) or "no disk")
    build: dict[Recipe, Callable[[tuple[PlannedDisk, ...], Surroundings], _Recipe]] = {
        Recipe.BACKUP: _Backup,
        Recipe.COPY_BEFORE_WRITE: _CopyBeforeWrite,
        Recipe.SNAPSHOT: _Snapshot,
    }
    return build[recipe](tuple(disks), around).plan(recipe, why)


class _Recipe(ABC):
    """What the recipes share."""

    depth_is_exact = False

    def __init__(self, disks: tuple[PlannedDisk, ...], around: Surroundings) -> None:
        self.disks = disks
        self.around = around
        self.files: list[ImageFile] = []

    def plan(self, recipe: Recipe, why: str) -> Plan:
        """Writes the plan."""
        prepare = [*self._server()]
        for number, disk in enumerate(self.disks):
            prepare += self.ready(number, disk)
        if self.watched:
            for number, disk in enumerate(self.disks):
                prepare += self._watch(number, disk)
        instant = [*self._unwatch(), *self.instant()]
        offer = [step for number, disk in enumerate(self.disks) for step in self.exports(number, disk)]
        return Plan(
            recipe=recipe,
            why=why,
            files=tuple(self.files),
            prepare=tuple(prepare),
            instant=tuple(instant),
            offer=tuple(offer),
            offers=tuple(self._offer(number, disk) for number, disk in enumerate(self.disks)),
            pauses=any(step.command["execute"] == "stop" for step in instant),
        )

    @abstractmethod
    def ready(self, number: int, disk: PlannedDisk) -> Iterator[Step]:
        """What a disk needs before the instant."""

    @abstractmethod
    def instant(self) -> Iterator[Step]:
        """The instant."""

    @abstractmethod
    def exports(self, number: int, disk: PlannedDisk) -> Iterator[Step]:
        """What is exported of a disk."""

    @property
    def watched(self) -> bool:
        """Whether what is written before the instant must be known."""
        return self.around.depth and not self.depth_is_exact

    def name(self, role: Role, number: int) -> str:
        """Returns the name of something of this run."""
        return name_of(self.around.run, role, number)

    def export_name(self, number: int) -> str:
        """Returns the id of the export of a disk's content."""
        return export_id(self.around.run, number)

    def depth_export_name(self, number: int) -> str:
        """Returns the id of the export of a disk's depth, where it is another one."""
        return export_id(self.around.run, len(self.disks) + number)

    def image(self, number: int, disk: PlannedDisk, role: Role, below: Role) -> Step:
        """Opens an image of our own: a scratch image above the disk, or an overlay that shall be put above it."""
        node, file = self.name(role, number), self.name(below, number)
        path = f"{self.around.scratch_dir}/{node}.qcow2"
        is_overlay = role is Role.OVERLAY
        # What is committed is whole clusters of the overlay: larger ones would allocate what the guest never wrote.
        cluster_size = disk.unit if is_overlay else _SCRATCH_CLUSTER
        self.files.append(ImageFile(path, file, disk.size, cluster_size, disk.file if is_overlay else None))
        protocol = {"driver": "file", "node-name": file, "filename": path}
        backing = None if is_overlay else disk.node_name
        added = command("blockdev-add", driver="qcow2", node_name=node, backing=backing, file=protocol)
        return Step(added, (DeleteNode(node),))

    def scratch(self, number: int, disk: PlannedDisk) -> Iterator[Step]:
        """A scratch image, with a notice before it grows too large."""
        yield self.image(number, disk, Role.SCRATCH, Role.SCRATCH_FILE)
        if self.around.threshold:
            node = self.name(Role.SCRATCH_FILE, number)
            yield Step(command("block-set-write-threshold", node_name=node, write_threshold=self.around.threshold))

    def export(self, name: str, node_name: str, bitmaps: Sequence[object] = (), *, depth: bool) -> Step:
        """Exports a node.

        Args:
            name: the export's.
            node_name: the node.
            bitmaps: to be offered.
            depth: whether to offer the allocation depth. Through a scratch image it is not the disk's, so that only who
                composes the two gets it, from an export of its own.
        """
        more = {"bitmaps": list(bitmaps)} if bitmaps else {}
        added = command(
            "block-export-add", type="nbd", id=name, name=name, node_name=node_name, allocation_depth=depth, **more
        )
        return Step(added, (RemoveExport(name),))

    def transaction(self, more: Sequence[Mapping[str, object]] = (), undo: Sequence[Undo] = ()) -> Iterator[Step]:
        """One transaction with what happens to bitmaps at the instant, and more; none if there is nothing to do."""
        actions: list[Mapping[str, object]] = []
        for number, disk in enumerate(self.disks):
            actions += disk.actions
            actions += [
                {"type": "block-dirty-bitmap-disable", "data": {"node": disk.node_name, "name": name}}
                for name in self.touch(number)
            ]
        actions += more
        if actions:
            yield Step(command("transaction", actions=actions), tuple(undo))

    def _depth_export(self, number: int) -> Iterator[Step]:
        """Exports the scratch image for whoever composes the depth of the instant."""
        if self.watched:
            node = self.name(Role.SCRATCH, number)
            yield self.export(self.depth_export_name(number), node, self.touch(number), depth=True)

    def touch(self, number: int) -> list[str]:
        """Returns the name of the bitmap that records until the instant, if one does."""
        return [self.name(Role.TOUCH, number)] if self.watched else []

    def _server(self) -> Iterator[Step]:
        if self.around.socket_path:
            address = {"type": "unix", "data": {"path": self.around.socket_path}}
            yield Step(command("nbd-server-start", addr=address), (StopServer(self.around.socket_path),))

    def _watch(self, number: int, disk: PlannedDisk) -> Iterator[Step]:
        """Records what is written until the instant, then lets the depth be read."""
        (touch,) = self.touch(number)
        added = command(
            "block-dirty-bitmap-add", node=disk.node_name, name=touch, granularity=disk.unit, persistent=False
        )
        yield Step(added, (RemoveBitmap(disk.node_name, touch),))
        yield self.export(self._before_export_name(number), disk.node_name, depth=True)

    def _unwatch(self) -> Iterator[Step]:
        """Ends the exports that the depth was read from: they would follow the graph, and hold the nodes."""
        for number in range(len(self.disks)) if self.watched else ():
            yield Step(command("block-export-del", id=self._before_export_name(number), mode="hard"))

    def _before_export_name(self, number: int) -> str:
        return export_id(self.around.run, 2 * len(self.disks) + number)

    def _offer(self, number: int, disk: PlannedDisk) -> Offer:
        return Offer(
            disk=disk,
            export=self.export_name(number),
            depth_export=self.depth_export_name(number) if self.around.depth else "",
            before_export=self._before_export_name(number) if self.watched else "",
            touch="".join(self.touch(number)),
            depth_is_exact=self.depth_is_exact,
            scratch="" if self.depth_is_exact else self.name(Role.SCRATCH_FILE, number),
        )


class _Backup(_Recipe):
    """One transaction that starts a backup job of nothing (``sync=none``) on every disk."""

    def ready(self, number: int, disk: PlannedDisk) -> Iterator[Step]:
        yield from self.scratch(number, disk)

    def instant(self) -> Iterator[Step]:
        undo: list[Undo] = [CancelJob(self.name(Role.JOB, number)) for number in range(len(self.disks))]
        if self.around.guest_is_well:
            undo.append(RetryInputOutput())
        yield from self.transaction([self._job(number, disk) for number, disk in enumerate(self.disks)], undo)

    def _job(self, number: int, disk: PlannedDisk) -> Mapping[str, object]:
        data: dict[str, object] = {
            "job-id": self.name(Role.JOB, number),
            "device": disk.node_name,
            "target": self.name(Role.SCRATCH, number),
            "sync": "none",
            "filter-node-name": self.name(Role.FILTER, number),
        }
        if self.around.offloads:
            data["compress"] = True
        return {"type": "blockdev-backup", "data": data}

    def exports(self, number: int, disk: PlannedDisk) -> Iterator[Step]:
        yield self.export(self.export_name(number), self.name(Role.SCRATCH, number), disk.bitmaps, depth=False)
        yield from self._depth_export(number)


class _CopyBeforeWrite(_Recipe):
    """A filter of our own under every device, put there while the guest is paused."""

    def ready(self, number: int, disk: PlannedDisk) -> Iterator[Step]:
        yield from self.scratch(number, disk)
        node = self.name(Role.COPY, number)
        added = command(
            "blockdev-add",
            driver="copy-before-write",
            node_name=node,
            file=disk.node_name,
            target=self.name(Role.SCRATCH, number),
            on_cbw_error="break-snapshot",
            cbw_timeout=CBW_TIMEOUT_SECONDS,
        )
        yield Step(added, (DeleteNode(node),))

    def instant(self) -> Iterator[Step]:
        marker = self.name(Role.PAUSE, 0)
        if self.around.guest_runs:
            # The marker first: a guest that stands still without it was paused by somebody else.
            yield Step(command("object-add", qom_type=_MARKER_TYPE, id=marker), (Resume(marker),))
            yield Step(command("stop"))
        for number, disk in enumerate(self.disks):
            node = self.name(Role.COPY, number)
            undo = RestoreDrive(disk.qom_path, node, disk.node_name)
            yield Step(command("qom-set", path=disk.qom_path, property="drive", value=node), (undo,))
        yield from self.transaction()
        if self.around.guest_runs:
            yield Step(command("cont"))
            yield Step(command("object-del", id=marker))

    def exports(self, number: int, disk: PlannedDisk) -> Iterator[Step]:
        access = self.name(Role.ACCESS, number)
        # Only now: before the filter stands under the device, QEMU refuses it (permission conflict).
        added = command("blockdev-add", driver="snapshot-access", node_name=access, file=self.name(Role.COPY, number))
        yield Step(added, (DeleteNode(access),))
        # snapshot-access is no filter, so QEMU does not look below it for bitmaps: their node is named.
        bitmaps = [{"node": disk.node_name, "name": name} for name in disk.bitmaps]
        yield self.export(self.export_name(number), access, bitmaps, depth=False)
        yield from self._depth_export(number)


class _Snapshot(_Recipe):
    """An external snapshot of every disk in one transaction, committed at the end."""

    depth_is_exact = True  # the chain stands still

    def ready(self, number: int, disk: PlannedDisk) -> Iterator[Step]:
        yield self.image(number, disk, Role.OVERLAY, Role.OVERLAY_FILE)

    def instant(self) -> Iterator[Step]:
        actions: list[Mapping[str, object]] = []
        undo: list[Undo] = []
        for number, disk in enumerate(self.disks):
            overlay = self.name(Role.OVERLAY, number)
            actions.append({"type": "blockdev-snapshot", "data": {"node": disk.node_name, "overlay": overlay}})
            job, path = self.name(Role.JOB, number), f"{self.around.scratch_dir}/{overlay}.qcow2"
            undo.append(CommitOverlay(overlay, disk.node_name, job, path))
        yield from self.transaction(actions, undo)

    def depth_export_name(self, number: int) -> str:
        return self.export_name(number)

    def exports(self, number: int, disk: PlannedDisk) -> Iterator[Step]:
        yield self.export(self.export_name(number), disk.node_name, disk.bitmaps, depth=True)
