"""Exports for other tools: everything that is needed to have them, in one asynchronous context manager.

::

    exporting("vm.qmp", ["vd0"])          connect -> leftovers of killed runs -> disks -> sources ┐
    exporting(Image("disk.qcow2"))        storage daemon of our own                               ┤
                                                                                                  v
                                          session: server -> exports -> URIs   ->   all of it down again

A source is a node to export for a disk. `live_disks` yields the disks' own nodes, which go on moving with the guest; a
point in time is another such function.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from qmpnbd.deadline import Deadline
from qmpnbd.errors import UsageError
from qmpnbd.export.addresses import server_uri, shared_server
from qmpnbd.export.depth import DepthReader
from qmpnbd.export.hazards import require_no_hazard
from qmpnbd.export.instant import HeldInstant, held_instant
from qmpnbd.export.options import Image, Options
from qmpnbd.export.sources import Scene, Source, SourceMaker, Sources, live_disks
from qmpnbd.nbd.uri import NbdUri
from qmpnbd.qmp.address import MonitorAddress
from qmpnbd.qmp.checkpoint_at import BegunCheckpoint
from qmpnbd.qmp.depth_at import InstantDepth
from qmpnbd.qmp.disks import Disk, chosen_disks
from qmpnbd.qmp.exports import ExportOptions, add_export, exported_node, remove_export
from qmpnbd.qmp.inventory import (
    guest_status,
    read_inventory,
    require_safe_moment,
)
from qmpnbd.qmp.monitor import Monitor
from qmpnbd.qmp.naming import export_id
from qmpnbd.qmp.planning import Wishes
from qmpnbd.qmp.pointintime import Statement
from qmpnbd.qmp.recover import remove_leftovers
from qmpnbd.qmp.rundir import RunDirectory
from qmpnbd.qmp.server import STOP_SECONDS, start_server, stop_server
from qmpnbd.qmp.storage_daemon import NODE, storage_daemon
from qmpnbd.qmp.teardown import TakeDown

log = logging.getLogger(__name__)

__all__ = [
    "Export",
    "Image",
    "Options",
    "Scene",
    "Session",
    "Source",
    "SourceMaker",
    "Sources",
    "exporting",
    "live_disks",
]


@dataclass(frozen=True, slots=True)
class Export:
    """An export of ours.

    Attributes:
        id: its id inside QEMU, and its name for NBD clients.
        disk: the disk.
        node_name: the node it was made for; `Session.node_of` tells where it stands now.
        uri: where NBD clients find it.
        size: bytes.
        bitmaps: names of the dirty bitmaps it offers.
    """

    id: str
    disk: Disk
    node_name: str
    uri: NbdUri
    size: int
    bitmaps: tuple[str, ...]


@dataclass(slots=True)
class Session:
    """Exports that are up; made by `exporting`.

    Attributes:
        monitor: the QEMU.
        guest: the guest's status.
        consistent: whether all exports show one instant that stays readable.
        exports: the exports.
        take_down: takes everything down.
        held: the point in time that is exported; None if there is none.
    """

    monitor: Monitor
    guest: str
    consistent: bool
    take_down: TakeDown
    exports: list[Export] = field(default_factory=list)
    held: HeldInstant | None = None

    @property
    def statement(self) -> Statement | None:
        """How the point in time was taken; None if there is none."""
        return self.held.point.statement if self.held is not None else None

    @property
    def checkpoint(self) -> BegunCheckpoint | None:
        """The checkpoint that began at the instant; None if none did. Merged back at the end unless decided about."""
        return self.held.checkpoint if self.held is not None else None

    async def allocation_depth(self, export: Export, deadline: Deadline) -> InstantDepth:
        """Returns the allocation depth that a disk's own chain had at the instant, byte by byte.

        Depths count from the disk's active layer, although the export may stand on a scratch image above it. Like all
        that is read of a point in time, it holds once `release` has returned.

        Raises:
            UsageError: no instant with a depth is held, or not this export's.
            NbdError: it cannot be read: the point in time may have been given up.
            DeadlineError: the time is over.
        """
        if self.held is None or self.held.depths is None or export not in self.exports:
            raise UsageError(
                "the allocation depth of an instant is to be told, and none is held that has one",
                where=f"export {export.id}",
                remedy="Set Options.instant, with depth, and composed_depth; ask before release(). Of disks that go on "
                "moving, read qemu:allocation-depth.",
            )
        (offer,) = (each for each in self.held.point.offers if each.export == export.id)
        return await self.held.depths.at_instant(offer, deadline)

    async def release(self) -> None:
        """Ends the point in time: once this returns, what was read of it holds, and a backup may be made durable.

        Raises:
            InterferenceError: a job of ours ended; what was read does not hold.
            ScratchError: the scratch space ran out; what was read does not hold.
            LeftBehindError: something could not be taken down.
        """
        if self.held is not None:
            self.exports.clear()
            await self.held.release()

    async def commit(self, deadline: Deadline) -> None:
        """Decides that the backup at the checkpoint is safe: removes the older ones. Ends the point in time first.

        Raises:
            UsageError: no checkpoint was begun.
            QmpnbdError: as `release`, and as `BegunCheckpoint.commit`.
        """
        await self.release()
        await self._begun().commit(deadline)

    async def abort(self, deadline: Deadline) -> None:
        """Decides that the backup has failed: what was recorded goes back to the checkpoint before.

        Raises:
            UsageError: no checkpoint was begun.
            QmpnbdError: as `release`, and as `BegunCheckpoint.commit`.
        """
        await self.release()
        await self._begun().abort(deadline)

    async def leave(self, deadline: Deadline) -> None:
        """Leaves the decision to ``qmpnbd checkpoint commit`` or ``abort``.

        Raises:
            UsageError: no checkpoint was begun.
            QmpnbdError: as `release`, and as `BegunCheckpoint.commit`.
        """
        await self.release()
        await self._begun().leave(deadline)

    def _begun(self) -> BegunCheckpoint:
        if self.checkpoint is None:
            raise UsageError("no checkpoint was begun", where=self.monitor.where, remedy="Set Options.checkpoint.")
        return self.checkpoint

    async def node_of(self, export: Export, deadline: Deadline) -> str:
        """Returns the node that an export stands on now: it follows the block graph.

        Raises:
            InterferenceError: somebody removed it.
            MonitorError: QEMU refused to tell, or is gone.
            DeadlineError: no reply in time.
        """
        return await exported_node(self.monitor, export.id, deadline)

    async def remove(self, export: Export, deadline: Deadline, mode: Literal["hard", "safe"] = "hard") -> None:
        """Removes one export before the others, and waits until it is gone.

        Raises:
            ExportRefusedError: a client is connected, and the mode is "safe".
            MonitorError: QEMU refused or is gone.
            DeadlineError: it is still there.
        """
        self.exports.remove(export)
        try:
            await remove_export(self.monitor, export.id, deadline, mode)
        except BaseException:
            self.exports.append(export)
            raise

    async def watch(self, deadline: Deadline) -> None:
        """Waits for what ends the exports from outside; never returns.

        Raises:
            MonitorLostError: QEMU is gone, or its monitor.
            InterferenceError: somebody removed an export.
            DeadlineError: the time is over.
        """
        with self.monitor.events("BLOCK_EXPORT_DELETED") as deleted:
            while True:
                for export in self.exports:
                    await self.node_of(export, deadline)
                await self.monitor.next_event(deleted, "the end of the exports", deadline)


@asynccontextmanager
async def exporting(
    what: MonitorAddress | str | Image,
    disks: Sequence[str] = (),
    options: Options | None = None,
    sources: SourceMaker = live_disks,
) -> AsyncIterator[Session]:
    """Exports disks of a running QEMU, or an image file, until the context ends.

    Args:
        what: where QEMU's QMP monitor listens (``PATH`` or ``HOST:PORT``), or an image.
        disks: qdev ids, QOM paths or node-names; none for all disks of the guest.
        options: how to do it.
        sources: which nodes to export for the disks.

    Yields:
        The session. Afterwards `take_down.left` tells what could not be taken down.

    Raises:
        QmpnbdError: it could not be exported (see `qmpnbd.errors`); whatever was made in QEMU is gone again, or the
            error's notes tell what is left.
    """
    choice = options or Options()
    if choice.checkpoint is not None and choice.instant is None:
        raise UsageError("a checkpoint needs a point in time", where="checkpoint", remedy="Set Options.instant, too.")
    if choice.tls is not None and choice.client_tls is None and choice.composes_depth:
        raise UsageError(
            "the allocation depth of the instant is to be read, and nothing says how to be let in",
            where="TLS",
            remedy="Set Options.client_tls, or do without the depth: Wishes(depth=False).",
        )
    deadline = Deadline(choice.seconds)
    take_down: TakeDown | None = None
    try:
        async with AsyncExitStack() as stack:
            if isinstance(what, Image):
                directory = stack.enter_context(RunDirectory.create(choice.runtime_dir, for_child=True))
                daemon = storage_daemon(directory, what.path, what.format, deadline)
                monitor, wanted = await stack.enter_async_context(daemon), [NODE]
                guest = await guest_status(monitor, deadline)
            else:
                monitor, wanted = await stack.enter_async_context(await Monitor.connect(what, deadline)), list(disks)
                for removed in await remove_leftovers(monitor, choice.runtime_dir, deadline):
                    log.warning("took down what a killed run had left: %s", removed)
                guest = await require_safe_moment(monitor, deadline)
                directory = stack.enter_context(RunDirectory.create(choice.runtime_dir, for_peer=monitor.peer))
            take_down = TakeDown(monitor.has_gone)
            inventory = await read_inventory(monitor, deadline)
            chosen = chosen_disks(wanted, inventory.disks, inventory.graph, where=monitor.where, empty=inventory.empty)
            await require_no_hazard(monitor, chosen, inventory, choice, deadline)
            scene = Scene(monitor, guest, directory.run, inventory, tuple(chosen), take_down, deadline)
            if choice.instant is not None:
                server = await _server(stack, scene, directory, choice)
                yield await _at_instant(stack, scene, directory, server, choice)
                return
            made = await stack.enter_async_context(sources(scene))
            server = await _server(stack, scene, directory, choice)
            session = Session(monitor, guest, made.consistent, take_down)
            for number, source in enumerate(made.nodes):
                uri = replace(server, export=export_id(scene.run, number))
                session.exports.append(await _exported(stack, scene, source, uri, choice.export))
            yield session
    except BaseException as error:
        for note in take_down.left if take_down is not None else ():
            error.add_note(note)
        raise


async def _at_instant(
    stack: AsyncExitStack, scene: Scene, directory: RunDirectory, server: NbdUri, choice: Options
) -> Session:
    """Takes a point in time of the disks; its exports are in the server that runs already."""
    monitor, disks = scene.monitor, scene.disks
    wishes = replace(
        choice.instant or Wishes(),
        bitmaps={disk.name: _names(choice.export) for disk in disks},
        start_server=False,
        allow_iothread=choice.allow_iothread,
        allow=frozenset(choice.allow),
    )
    depths = DepthReader(monitor, server, scene.deadline, choice.client_tls) if choice.composes_depth else None
    holding = held_instant(
        monitor,
        [disk.name for disk in disks],
        directory,
        scene.deadline,
        wishes=wishes,
        checkpoint=choice.checkpoint,
        depths=depths,
        agent=choice.agent,
        journal=choice.journal,
    )
    held = await stack.enter_async_context(holding)
    session = Session(monitor, scene.guest, consistent=True, take_down=scene.take_down, held=held)
    for disk, offer in zip(disks, held.point.offers, strict=True):
        node = await exported_node(monitor, offer.export, scene.deadline)
        uri = replace(server, export=offer.export)
        session.exports.append(Export(offer.export, disk, node, uri, offer.disk.size, tuple(offer.disk.bitmaps)))
    return session


def _names(options: ExportOptions) -> tuple[str, ...]:
    return tuple(each if isinstance(each, str) else each.name for each in options.bitmaps)


async def _server(stack: AsyncExitStack, scene: Scene, directory: RunDirectory, choice: Options) -> NbdUri:
    if choice.nbd is not None:
        return shared_server(choice.nbd)
    listens = None

    async def stop(deadline: Deadline) -> None:
        if not await stop_server(scene.monitor, directory, deadline, listens):
            scene.take_down.left.append(f"the NBD server {what} runs on: others have exports in it")

    what = f"at {choice.listen or directory.socket_path}"
    stack.push_async_callback(scene.take_down.step, f"NBD server {what}", stop, STOP_SECONDS)
    listens = await start_server(
        scene.monitor, directory, scene.deadline, listen=choice.listen, tls=choice.tls, insecure=choice.insecure
    )
    return server_uri(listens, choice.tls, socket.gethostname())


async def _exported(stack: AsyncExitStack, scene: Scene, source: Source, uri: NbdUri, options: ExportOptions) -> Export:
    name = uri.export
    more = replace(options, bitmaps=(*options.bitmaps, *source.bitmaps))
    stack.push_async_callback(scene.take_down.step, f"export {name}", partial(remove_export, scene.monitor, name))
    await add_export(scene.monitor, source.node_name, name, scene.deadline, more)
    return Export(
        id=name,
        disk=source.disk,
        node_name=source.node_name,
        uri=uri,
        size=scene.inventory.graph.nodes[source.disk.node_name].virtual_size,
        bitmaps=_names(more),
    )
