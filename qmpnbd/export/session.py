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
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

from qmpnbd.deadline import Deadline
from qmpnbd.export.addresses import server_uri, shared_server
from qmpnbd.nbd.uri import NbdUri
from qmpnbd.qmp.address import MonitorAddress, TcpAddress
from qmpnbd.qmp.agent_journal import AgentJournal
from qmpnbd.qmp.credentials import ServerTls
from qmpnbd.qmp.disks import Disk, chosen_disks
from qmpnbd.qmp.exports import ExportOptions, NodeBitmap, add_export, exported_node, remove_export
from qmpnbd.qmp.inventory import (
    Inventory,
    guest_status,
    read_inventory,
    require_no_iothread_bug,
    require_safe_moment,
)
from qmpnbd.qmp.monitor import Monitor
from qmpnbd.qmp.naming import export_id
from qmpnbd.qmp.planning import Wishes
from qmpnbd.qmp.pointintime import Statement, point_in_time
from qmpnbd.qmp.quiesce import at_rest, thaw_leftovers
from qmpnbd.qmp.recover import remove_leftovers
from qmpnbd.qmp.rundir import RunDirectory
from qmpnbd.qmp.server import STOP_SECONDS, start_server, stop_server
from qmpnbd.qmp.storage_daemon import NODE, storage_daemon
from qmpnbd.qmp.teardown import TakeDown

log = logging.getLogger(__name__)

SETUP_SECONDS = 30.0
"""Time until the exports are up: what only asks a few questions, and starts a storage daemon at most."""


@dataclass(frozen=True, slots=True)
class Image:
    """An image file that no QEMU has open.

    Attributes:
        path: the file or block device.
        format: QEMU's name of its format.
    """

    path: str
    format: str


@dataclass(frozen=True, slots=True)
class Options:
    """How to export.

    Attributes:
        listen: a TCP port to listen on; None for a UNIX socket in a private directory.
        tls: TLS of the server.
        insecure: a TCP port without TLS.
        nbd: URI of the NBD server this QEMU runs already, to be shared; None to start one.
        runtime_dir: where the private directory is made; None for the folder for temporary files.
        allow_iothread: export disks in an iothread although this QEMU is known to abort on them.
        export: what each export offers.
        seconds: time until everything is up; None for no bound. Taking down has its own time.
        instant: export the disks as they are at one instant, taken like this; None for the disks as they go on.
        agent: the guest agent's socket, to have the guest's filesystems at rest at that instant; None to go without.
        journal: folder in which it is written down that the guest may be frozen; with `agent`.
    """

    listen: TcpAddress | None = None
    tls: ServerTls | None = None
    insecure: bool = False
    nbd: str | None = None
    runtime_dir: str | None = None
    allow_iothread: bool = False
    export: ExportOptions = field(default_factory=ExportOptions)
    seconds: float | None = SETUP_SECONDS
    instant: Wishes | None = None
    agent: MonitorAddress | str | None = None
    journal: str = ""


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
    nodes = scene.inventory.graph.nodes
    still = all(disk.node_name in nodes and nodes[disk.node_name].read_only for disk in scene.disks)
    yield Sources(tuple(Source(disk, disk.node_name) for disk in scene.disks), consistent=still)


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
        statement: how the point in time was taken; None if there is none.
    """

    monitor: Monitor
    guest: str
    consistent: bool
    take_down: TakeDown
    exports: list[Export] = field(default_factory=list)
    statement: Statement | None = None

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
    deadline = Deadline(choice.seconds)
    take_down: TakeDown | None = None
    try:
        async with AsyncExitStack() as stack:
            if isinstance(what, Image):
                directory = stack.enter_context(RunDirectory.create(choice.runtime_dir))
                daemon = storage_daemon(directory, what.path, what.format, deadline)
                monitor, wanted = await stack.enter_async_context(daemon), [NODE]
                guest = await guest_status(monitor, deadline)
            else:
                monitor, wanted = await stack.enter_async_context(await Monitor.connect(what, deadline)), list(disks)
                for removed in await remove_leftovers(monitor, choice.runtime_dir, deadline):
                    log.warning("took down what a killed run had left: %s", removed)
                guest = await require_safe_moment(monitor, deadline)
                directory = stack.enter_context(RunDirectory.create(choice.runtime_dir, for_peer=monitor.peer))
            take_down = TakeDown(monitor.is_gone)
            inventory = await read_inventory(monitor, deadline)
            chosen = chosen_disks(wanted, inventory.disks, inventory.graph, where=monitor.where, empty=inventory.empty)
            if not choice.allow_iothread:
                for disk in chosen:
                    await require_no_iothread_bug(monitor, disk.node_name, inventory, deadline)
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
    )
    names = [disk.name for disk in disks]
    quiesce = None
    if choice.agent is not None:
        journal = AgentJournal(Path(choice.journal))
        for thawed in await thaw_leftovers(journal, log.warning):
            log.warning("thawed a guest that a killed run had left frozen: %s", thawed)
        quiesce = at_rest(choice.agent, journal, scene.deadline, required=False)
    holding = point_in_time(monitor, names, directory, scene.deadline, wishes=wishes, quiesce=quiesce)
    point = await stack.enter_async_context(holding)
    session = Session(monitor, scene.guest, consistent=True, take_down=scene.take_down, statement=point.statement)
    for disk, offer in zip(disks, point.offers, strict=True):
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
