"""The main job: validate the allocation depth of the disks of a running QEMU.

::

    QMP: the graph  ->  export of the node  ->  NBD: served map   ┐
                    ->  paths of the layers ->  files: computed map┴> compare -> report

Everything is taken down in reverse order on every way out: the export first, while our NBD client is still
connected (QEMU 7.2 aborts when a client of an iothread's disk leaves first), then the client, then the server.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, TypeVar

from qmpnbd.deadline import Deadline
from qmpnbd.errors import (
    DiskNotLocalError,
    ImageCorruptError,
    ImageTruncatedError,
    LeftBehindError,
    MonitorError,
    NoSuchDiskError,
    QmpnbdError,
)
from qmpnbd.extents import ExtentMap
from qmpnbd.images.chain import LayerSpec
from qmpnbd.nbd.aio import Client
from qmpnbd.nbd.uri import NbdUri
from qmpnbd.qmp.disks import Disk, find_disk
from qmpnbd.qmp.exports import add_export, remove_export, remove_leftovers, start_server, stop_server
from qmpnbd.qmp.graph import BlockGraph, Link, chain_of
from qmpnbd.qmp.inventory import (
    Inventory,
    guest_status,
    read_exports,
    read_graph,
    read_inventory,
    require_exportable,
    require_no_iothread_bug,
)
from qmpnbd.qmp.monitor import Monitor
from qmpnbd.qmp.naming import export_id
from qmpnbd.qmp.rundir import RunDirectory
from qmpnbd.report.model import DiskReport, ValidationReport
from qmpnbd.validate.findings import Findings
from qmpnbd.validate.outcome import disk_report, failed_disk_report, worst
from qmpnbd.validate.reading import Explained, Reading, check_readable, explain_all, read_chain

T = TypeVar("T")
log = logging.getLogger(__name__)

CONTEXT = "qemu:allocation-depth"

DEFAULT_SECONDS = 600.0
"""Time for a whole validation: ten times what a disk of a hundred million extents takes."""

MIN_ROUNDS = 2
"""A discrepancy is one only if it is seen in two rounds running."""


@dataclass(frozen=True, slots=True)
class Options:
    """How to validate.

    Attributes:
        seconds: time for everything; None for no bound. Taking down has its own time.
        rounds: how often at most served and computed are read while the guest writes; at least 2.
        nbd: URI of the NBD server this QEMU runs already, to be shared; None to start one.
        runtime_dir: where the private directory is made; None for the folder for temporary files.
        allow_iothread: work on disks in an iothread although this QEMU is known to abort on them.
        listed: how many discrepancies are listed and explained; all are counted.
    """

    seconds: float | None = DEFAULT_SECONDS
    rounds: int = 5
    nbd: str | None = None
    runtime_dir: str | None = None
    allow_iothread: bool = False
    listed: int = 100


def validate(monitor: str, disks: Sequence[str] = (), options: Options | None = None) -> ValidationReport:
    """Validates disks of a running QEMU; the blocking twin of `validate_disks`."""
    return asyncio.run(validate_disks(monitor, disks, options))


async def validate_disks(monitor: str, disks: Sequence[str] = (), options: Options | None = None) -> ValidationReport:
    """Validates disks of a running QEMU: is the allocation depth it serves what the image files hold?

    Args:
        monitor: where its QMP monitor listens: ``PATH`` or ``HOST:PORT``.
        disks: qdev ids, QOM paths or node-names; none for all disks of the guest.
        options: how to do it.

    Returns:
        The report. If several disks are validated, one that cannot be is reported as ``error`` and the others go on.

    Raises:
        QmpnbdError: nothing could be validated (see `qmpnbd.errors`); whatever was made in QEMU is gone again, or
            the error's notes tell what is left.
    """
    choice = options or Options()
    deadline = Deadline(choice.seconds)
    started = datetime.now(UTC)
    async with await Monitor.connect(monitor, deadline) as connected:
        run = _Run(connected, choice, deadline)
        reports = await run.all(disks)
        return ValidationReport(
            monitor=connected.where,
            qemu=str(connected.version),
            guest=run.guest,
            started=started.isoformat(timespec="seconds"),
            verdict=worst(reports),
            disks=tuple(reports),
        )


@dataclass(slots=True)
class _Run:
    """One run over one monitor."""

    monitor: Monitor
    options: Options
    deadline: Deadline
    guest: str = ""
    left: list[str] = field(default_factory=list)

    async def all(self, wanted: Sequence[str]) -> list[DiskReport]:
        try:
            reports = await self._all(wanted)
        except BaseException as error:
            for note in self.left:
                error.add_note(note)
            raise
        if self.left:
            raise LeftBehindError(
                "; ".join(self.left), where=self.monitor.where, remedy="The next run takes it down if it can."
            )
        return reports

    async def _all(self, wanted: Sequence[str]) -> list[DiskReport]:
        for removed in await remove_leftovers(self.monitor, self.options.runtime_dir, self.deadline):
            log.warning("took down what a killed run had left: %s", removed)
        self.guest = await guest_status(self.monitor, self.deadline)
        require_exportable(self.guest, self.monitor.where)
        inventory = await read_inventory(self.monitor, self.deadline)
        disks = _chosen(wanted, inventory, self.monitor.where)
        shared = NbdUri.parse(self.options.nbd) if self.options.nbd else None
        async with AsyncExitStack() as stack:
            directory = stack.enter_context(RunDirectory.create(self.options.runtime_dir))
            server = shared or NbdUri.unix(str(directory.socket_path), "")
            if shared is None:
                stack.push_async_callback(self._stop_server, directory)
                await start_server(self.monitor, directory, self.deadline)
            return [
                await self._reported(disk, number, directory, server, alone=len(disks) == 1)
                for number, disk in enumerate(disks)
            ]

    async def _reported(
        self, disk: Disk, number: int, directory: RunDirectory, server: NbdUri, *, alone: bool
    ) -> DiskReport:
        try:
            return await self._disk(disk, number, directory, server)
        except MonitorError:
            raise  # no other disk will fare better
        except QmpnbdError as error:
            if alone:
                raise
            return failed_disk_report(disk, error)

    async def _disk(self, disk: Disk, number: int, directory: RunDirectory, server: NbdUri) -> DiskReport:
        began = time.monotonic()
        if not self.options.allow_iothread:
            await require_no_iothread_bug(self.monitor, disk, self.deadline)
        # What cannot be read is told before anything is made in QEMU.
        graph = await read_graph(self.monitor, self.deadline)
        specs = self._specs(graph, disk.node_name)
        await in_thread(partial(check_readable, specs, self.deadline), self.deadline)
        async with AsyncExitStack() as stack:
            clients: list[Client] = []
            name = export_id(directory.run, number)
            stack.push_async_callback(_close_all, clients)
            stack.push_async_callback(self._remove_export, name)
            await add_export(self.monitor, disk.node_name, directory, number, self.deadline)
            uri = replace(server, export=name)
            clients.append(await Client.connect(uri, contexts=[CONTEXT], deadline=self.deadline))
            return await self._judged(disk, name, clients[0], began)

    async def _judged(self, disk: Disk, export: str, client: Client, began: float) -> DiskReport:
        findings = Findings(client.export.size)
        for _ in range(max(self.options.rounds, MIN_ROUNDS)):
            graph = await read_graph(self.monitor, self.deadline)
            specs = self._specs(graph, await self._exported_node(export))
            before = await self._served(client)
            await client.flush(self.deadline)
            try:
                reading = await self._computed(specs)
            except (ImageCorruptError, ImageTruncatedError) as error:
                findings.add_failure(error)  # of a live image, perhaps a structure that moved while it was read
                continue
            same = before == reading.depth
            after = None if same else await self._served(client)
            if await read_graph(self.monitor, self.deadline) != graph:
                continue  # a snapshot, a job, a resize: this round says nothing
            findings.add(reading, before, after)
            if findings.settled:
                break
        explained = await self._explained(findings)
        return disk_report(disk, findings, explained, self.options.listed, time.monotonic() - began)

    def _specs(self, graph: BlockGraph, node_name: str) -> tuple[LayerSpec, ...]:
        return tuple(_spec(link, self.monitor.working_directory()) for link in chain_of(graph, node_name))

    async def _exported_node(self, export: str) -> str:
        """Returns the node that an export stands on now: it follows the graph, so its node-name changes."""
        for info in await read_exports(self.monitor, self.deadline):
            if info.id == export:
                return info.node_name
        raise MonitorError("somebody removed our export", where=f"export {export}", remedy="Run again.")

    async def _served(self, client: Client) -> ExtentMap:
        return (await client.maps(deadline=self.deadline))[CONTEXT]

    async def _computed(self, specs: Sequence[LayerSpec]) -> Reading:
        return await in_thread(partial(read_chain, specs, self.deadline), self.deadline)

    async def _explained(self, findings: Findings) -> list[Explained]:
        listed = list(islice(findings.discrepancies(), self.options.listed))
        if not listed or findings.reading is None:
            return []
        return await in_thread(partial(explain_all, findings.reading.specs, listed, self.deadline), self.deadline)

    async def _remove_export(self, name: str) -> None:
        await self._take_down(remove_export(self.monitor, name), f"export {name}")

    async def _stop_server(self, directory: RunDirectory) -> None:
        async def stop() -> None:
            if not await stop_server(self.monitor, directory):
                self.left.append(f"the NBD server at {directory.socket_path} runs on: it has exports of others")

        await self._take_down(stop(), f"NBD server at {directory.socket_path}")

    async def _take_down(self, work: Coroutine[Any, Any, None], what: str) -> None:
        try:
            await work
        except QmpnbdError as error:
            self.left.append(f"left behind in QEMU: {what} ({error.what})")


async def in_thread(work: Callable[[], T], deadline: Deadline) -> T:
    """Runs blocking work in a thread; when cancelled, tells it to stop by its deadline, and waits for that."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        deadline.stop()
        await asyncio.wait({task})
        task.exception()
        raise


async def _close_all(clients: Sequence[Client]) -> None:
    for client in clients:
        await client.close()


def _chosen(wanted: Sequence[str], inventory: Inventory, where: str) -> list[Disk]:
    if wanted:
        return [find_disk(name, inventory.disks, inventory.graph, where=where) for name in dict.fromkeys(wanted)]
    attached = [disk for disk in inventory.disks if disk.attached]
    if not attached:
        free = ", ".join(disk.name for disk in inventory.disks)
        raise NoSuchDiskError(
            "no guest device has a disk",
            where=where,
            remedy=f"Name a node: {free}." if free else "There is no node either.",
        )
    return attached


def _spec(link: Link, working_directory: str | None) -> LayerSpec:
    path = link.filename
    if path.startswith("/dev/fdset/"):
        raise DiskNotLocalError(
            "the image was handed to QEMU as an open file, so its name is not known",
            where=f"node {link.node_name} ({path})",
            remedy="`qmpnbd map` still shows what is served.",
        )
    if not path.startswith("/"):
        if working_directory is None:
            raise DiskNotLocalError(
                "the image has a relative name, and QEMU's working directory is not known",
                where=f"node {link.node_name} ({path})",
                remedy="Start QEMU with absolute names, or run on its host with a UNIX socket as monitor.",
            )
        path = str(PurePosixPath(working_directory, path))
    return LayerSpec(
        path=path,
        format=link.format,
        allocation_depth=link.allocation_depth,
        node_name=link.node_name,
        offset=link.offset,
        size=link.size,
    )
