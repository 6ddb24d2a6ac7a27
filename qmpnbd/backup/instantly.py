"""Instant restore: a disk that can be used at once, and is filled while it is used.

::

    repository   0001/vda.qcow2 <- 0002/vda.qcow2 <- 0003/vda.qcow2       read-only
                                                          ^ backing file, until it is filled
    target       vda.qcow2   overlay, writable ───────────┘
                     ^
    storage daemon of ours ── NBD, writable ──> a QEMU that boots from it
                     └── block-stream: copies what the overlay does not have yet

What the guest writes goes into the target alone. When the stream is through, the target stands on nothing any more;
until then the repository is held, because to prune it could take away what the target stands on. The names in the
headers of the repository's images are not followed: the daemon is told every layer.

Meanwhile every piece of the backup is hashed. That a guest has started from rotten data is told late, but for sure.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from qmpnbd.backup.content import ABSENT, DATA
from qmpnbd.backup.destination import discarding
from qmpnbd.backup.layers import RestoreSource
from qmpnbd.backup.point import Point, Wanted, open_point
from qmpnbd.backup.proof import ranges_of
from qmpnbd.backup.qcow2_target import Backing, Qcow2Target
from qmpnbd.backup.repository import Repository
from qmpnbd.deadline import Deadline
from qmpnbd.errors import CommandFailedError, RepositoryDamagedError, TargetError
from qmpnbd.extents import ExtentMap
from qmpnbd.nbd.uri import NbdUri
from qmpnbd.printable import printable
from qmpnbd.qmp.exports import ExportOptions, add_export, exported_node
from qmpnbd.qmp.jobs import complete_job
from qmpnbd.qmp.monitor import Monitor, finish
from qmpnbd.qmp.naming import Role, export_id, name_of
from qmpnbd.qmp.rundir import RunDirectory
from qmpnbd.qmp.server import start_server
from qmpnbd.qmp.storage_daemon import PROGRAM, running_daemon
from qmpnbd.validate.live import in_thread

_START_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class InstantOptions:
    """How to begin.

    Attributes:
        serve: serve the target and fill it; else only make it, for a QEMU that fills it itself (``block-stream``).
        force: whether a file of the target's name may be replaced.
        program: the storage daemon.
        runtime_dir: where the private directory is made; None for the folder for temporary files.
    """

    serve: bool = True
    force: bool = False
    program: str = PROGRAM
    runtime_dir: str | None = None


@dataclass(frozen=True, slots=True)
class _Daemon:
    """A storage daemon that serves the target, and the names of what is in it."""

    monitor: Monitor
    node: str
    job: str
    export: str
    uri: str


class Begun:
    """An instant restore that has begun; made by `instant_restore`.

    Attributes:
        point: what is restored.
        stands_on_repository: whether the target still needs the repository.
    """

    def __init__(
        self, point: Point, source: RestoreSource, daemon: _Daemon | None, held: ExitStack, deadline: Deadline
    ) -> None:
        self.point = point
        self.stands_on_repository = True
        self._source = source
        self._daemon = daemon
        self._held = held
        self._deadline = deadline

    @property
    def uri(self) -> str:
        """Where it is served, writable; empty if it is not."""
        return self._daemon.uri if self._daemon is not None else ""

    async def filled(self, speed: int | None = None) -> RepositoryDamagedError | None:
        """Copies what the target does not have yet, and hashes the whole backup meanwhile.

        Args:
            speed: bytes a second, at most; None for no limit.

        Returns:
            What is wrong with the backup that the guest has started from; None if it is proved. It is returned and not
            raised, because the guest's disk must not vanish for it.

        Raises:
            CommandFailedError: QEMU could not fill it: the target is full, or the repository cannot be read.
            MonitorError: the daemon is gone.
            DeadlineError: it makes no progress.
        """
        proof = asyncio.ensure_future(in_thread(self._prove, self._deadline))
        try:
            if self._daemon is not None:
                await _stream(self._daemon, speed, self._deadline)
                self.stands_on_repository = False
            return await proof
        finally:
            proof.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await proof
            self._held.close()

    def _prove(self) -> RepositoryDamagedError | None:
        content = self._source.content(self._deadline)
        try:
            for _ in self._source.chunks(ranges_of(content, DATA), self._deadline):
                pass
        except RepositoryDamagedError as error:
            return error
        return None

    async def until_lost(self) -> None:
        """Serves until something ends it from outside; never returns.

        Raises:
            InterferenceError: somebody removed the export.
            MonitorLostError: the daemon is gone.
            DeadlineError: the time is over.
        """
        daemon = self._daemon
        if daemon is None:
            return
        with daemon.monitor.events("BLOCK_EXPORT_DELETED") as deleted:
            while True:
                await exported_node(daemon.monitor, daemon.export, self._deadline)
                await daemon.monitor.next_event(deleted, "the end of the export", self._deadline)


@contextlib.asynccontextmanager
async def instant_restore(
    wanted: Wanted, target: str, options: InstantOptions, deadline: Deadline
) -> AsyncIterator[Begun]:
    """Has a disk be there at once.

    The tables of the images are held against what was backed up before; their data is hashed by `Begun.filled`. Until
    then nobody can prune the repository.

    Args:
        wanted: which disk, at which point in time.
        target: the qcow2 file to make.
        options: how.
        deadline: for all of it.

    Yields:
        What has begun.

    Raises:
        NoSuchBackupError: there is no such backup.
        RepositoryBusyError: backups are just being removed.
        RepositoryDamagedError: what it depends on is missing, foreign or cut.
        TargetInUseError: the target exists, or somebody uses it.
        TargetError: the target cannot be made, or QEMU cannot open it.
        UsageError: what is wanted is not clear, or there is no storage daemon.
        MonitorError: the daemon does not do what it is told.
        DeadlineError: the time is over.
    """
    async with AsyncExitStack() as stack:
        held = stack.enter_context(ExitStack())
        held.enter_context(Repository.open(Path(wanted.repository)).reading())
        point, source = await in_thread(partial(open_point, wanted, deadline), deadline)
        stack.enter_context(source)
        await in_thread(partial(source.content, deadline), deadline)
        _make_overlay(point, target, force=options.force)
        daemon = None
        if options.serve:
            try:
                daemon = await _serving(stack, point, target, options, deadline)
            except BaseException:
                _remove(target)
                raise
        begun = Begun(point, source, daemon, held, deadline)
        try:
            yield begun
        except BaseException as error:
            if begun.stands_on_repository:
                error.add_note(f"{printable(target)}: it still stands on the repository: do not prune that")
            raise


def _make_overlay(point: Point, target: str, *, force: bool) -> None:
    """Makes an image that holds nothing yet and stands on a backup."""
    size = point.disk.size
    below = Backing(os.fspath(point.image.absolute()), "qcow2", size)
    made = Qcow2Target.create(target, ExtentMap.uniform(size, ABSENT), backing=below, force=force)
    with discarding(made):
        made.finish()


def _remove(target: str) -> None:
    """Removes a target that nobody has used yet."""
    Path(target).unlink(missing_ok=True)


async def _serving(
    stack: AsyncExitStack, point: Point, target: str, options: InstantOptions, deadline: Deadline
) -> _Daemon:
    """Has a storage daemon serve the target, until the stack ends."""
    inner = deadline.within(_START_SECONDS)
    directory = stack.enter_context(RunDirectory.create(options.runtime_dir, for_child=True))
    monitor = await stack.enter_async_context(running_daemon(directory, [], inner, options.program))
    await start_server(monitor, directory, inner)
    node, export = name_of(directory.run, Role.OVERLAY, 0), export_id(directory.run, 0)
    try:
        await monitor.execute("blockdev-add", {"node-name": node, **_node(point, target)}, deadline=inner)
    except CommandFailedError as error:
        what = f"QEMU cannot open it: {error.description}"
        raise TargetError(what, where=printable(target), remedy="Restore it without --instant.") from error
    await add_export(monitor, node, export, inner, ExportOptions(writable=True))
    uri = str(NbdUri.unix(str(directory.socket_path), export))
    return _Daemon(monitor, node, name_of(directory.run, Role.JOB, 0), export, uri)


async def _stream(daemon: _Daemon, speed: int | None, deadline: Deadline) -> None:
    arguments = {"job-id": daemon.job, "device": daemon.node, "auto-dismiss": False, "speed": speed or 0}
    await finish(daemon.monitor.execute("block-stream", arguments, deadline=deadline))
    await complete_job(daemon.monitor, daemon.job)


def _node(point: Point, target: str) -> dict[str, object]:
    """Returns the target and every layer below it, as QEMU is to open them."""
    name = point.disk.name
    entry = point.layers[-1].disk(name).template
    below = None if entry is None else _layer(point.template, entry.format, None)
    for backup in reversed(point.layers):
        below = _layer(os.fspath(backup.image(name)), "qcow2", below)
    file = {"driver": "file", "filename": str(Path(target).absolute())}
    return {"driver": "qcow2", "discard": "unmap", "file": file, "backing": below}


def _layer(path: str, driver: str, below: dict[str, object] | None) -> dict[str, object]:
    file = {"driver": "file", "filename": str(Path(path).absolute()), "read-only": True}
    node: dict[str, object] = {"driver": driver, "read-only": True, "file": file}
    # null says that nothing is below, whatever the header says.
    return node if driver == "raw" else {**node, "backing": below}
