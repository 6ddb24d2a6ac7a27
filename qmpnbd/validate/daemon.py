"""A storage daemon of ours, which serves image files one after the other.

It is started once and given one image at a time, because starting it takes longer than judging a small image::

    qemu-storage-daemon ─ QMP ─ blockdev-add, block-export-add  ->  NBD  ->  block-export-del, blockdev-del

It opens files for reading only.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from itertools import count

from qmpnbd.deadline import Deadline
from qmpnbd.errors import (
    CommandFailedError,
    DeadlineError,
    ImageUnreadableError,
    MonitorLostError,
    QmpnbdError,
)
from qmpnbd.nbd.uri import NbdUri
from qmpnbd.qmp.exports import ExportOptions, add_export, remove_export
from qmpnbd.qmp.monitor import Monitor, finish
from qmpnbd.qmp.naming import export_id
from qmpnbd.qmp.rundir import RunDirectory
from qmpnbd.qmp.server import start_server
from qmpnbd.qmp.storage_daemon import running_daemon
from qmpnbd.validate.releases import generation_of
from qmpnbd.validate.still_run import DaemonFacts

_START_SECONDS = 20.0


class Daemon:
    """A running storage daemon; made by `start`.

    Attributes:
        monitor: its monitor.
    """

    def __init__(self, monitor: Monitor, directory: RunDirectory, stack: AsyncExitStack) -> None:
        self.monitor = monitor
        self._directory = directory
        self._numbers = count()
        self._stack = stack

    @classmethod
    async def start(cls, program: str, runtime_dir: str | None) -> Daemon:
        """Starts a daemon, with its NBD server on a socket in a private directory.

        Args:
            program: the program.
            runtime_dir: where the private directory is made; None for the folder for temporary files.

        Raises:
            UsageError: there is no such program, or no directory can be made.
            MonitorConnectError: it does not start.
            MonitorError: it does not do what it is told.
        """
        async with AsyncExitStack() as stack:
            directory = stack.enter_context(RunDirectory.create(runtime_dir, for_child=True))
            deadline = Deadline(_START_SECONDS)
            monitor = await stack.enter_async_context(running_daemon(directory, [], deadline, program))
            await start_server(monitor, directory, deadline)
            return cls(monitor, directory, stack.pop_all())

    @property
    def facts(self) -> DaemonFacts:
        """What matters of it for a comparison."""
        return DaemonFacts(str(self.monitor.version), generation_of(self.monitor.version))

    async def stop(self) -> None:
        """Ends the daemon."""
        await self._stack.aclose()

    @contextlib.asynccontextmanager
    async def serving(
        self, path: str, image_format: str, bitmaps: Sequence[str], deadline: Deadline
    ) -> AsyncIterator[NbdUri]:
        """Serves an image, and what lies below it, for reading.

        Args:
            path: the active layer.
            image_format: its format.
            bitmaps: its persistent bitmaps that shall be served, too.
            deadline: for QEMU's replies.

        Yields:
            Where it is served.

        Raises:
            ImageUnreadableError: QEMU cannot open it: another process has it open for writing, for instance.
            MonitorError: the daemon is gone.
            DeadlineError: the time is over; the daemon is of no use any more.
        """
        export = node = export_id(self._directory.run, next(self._numbers))
        arguments = {
            "driver": image_format,
            "node-name": node,
            "read-only": True,
            "file": {"driver": "file", "filename": path, "read-only": True},
        }
        try:
            await finish(self.monitor.execute("blockdev-add", arguments, deadline=deadline))
        except CommandFailedError as error:
            is_locked = '" lock' in error.description
            remedy = "If a running QEMU has it open, validate it there with --qmp." if is_locked else ""
            what = f"QEMU cannot open it: {error.description}"
            raise ImageUnreadableError(what, where=path, remedy=remedy) from error
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self.monitor.execute, "blockdev-del", {"node-name": node}, deadline=deadline)
            await add_export(self.monitor, node, export, deadline, ExportOptions(bitmaps=bitmaps))
            stack.push_async_callback(remove_export, self.monitor, export, deadline)
            try:
                yield NbdUri.unix(str(self._directory.socket_path), export)
            except FATAL:
                stack.pop_all()  # it is not used any further, and what failed is to be told, not what would fail now
                raise


FATAL: tuple[type[QmpnbdError], ...] = (DeadlineError, MonitorLostError)
"""After these a daemon is not used any further: what it still does is unknown."""
