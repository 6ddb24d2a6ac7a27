"""The blocking twin of `qmpnbd.export.session`: the same session, worked by an event loop in a thread of its own.

The loop runs all the time, so that the monitor is read and its end is noticed while the caller does something else.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from qmpnbd.deadline import Deadline
from qmpnbd.export.session import Export, Image, Options, Session, SourceMaker, live_disks
from qmpnbd.export.session import exporting as _exporting
from qmpnbd.qmp.address import MonitorAddress
from qmpnbd.qmp.checkpoint_at import BegunCheckpoint
from qmpnbd.qmp.depth_at import InstantDepth
from qmpnbd.qmp.pointintime import Statement

T = TypeVar("T")


class LoopThread:
    """An event loop in a thread; a context manager that ends both."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="qmpnbd-loop")

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs `work` to its end; an interruption (Ctrl-C) cancels it, and is raised when it has ended."""
        ended = threading.Event()
        tasks: list[asyncio.Task[T]] = []

        def begin() -> None:
            tasks.append(self._loop.create_task(work))
            tasks[0].add_done_callback(lambda _: ended.set())

        self._loop.call_soon_threadsafe(begin)
        try:
            ended.wait()
        except BaseException:
            self._loop.call_soon_threadsafe(lambda: tasks[0].cancel())  # noqa: PLW0108 - it is not there yet
            ended.wait()
            raise
        return tasks[0].result()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.run(self._loop.shutdown_asyncgens())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class BlockingSession:
    """Exports that are up; made by `exporting`.

    Attributes:
        session: what is worked here; its attributes can be read.
    """

    def __init__(self, session: Session, thread: LoopThread) -> None:
        self.session = session
        self._thread = thread

    @property
    def exports(self) -> Sequence[Export]:
        """The exports."""
        return self.session.exports

    def node_of(self, export: Export, deadline: Deadline) -> str:
        """Does what `Session.node_of` does."""
        return self._thread.run(self.session.node_of(export, deadline))

    def remove(self, export: Export, deadline: Deadline, mode: Literal["hard", "safe"] = "hard") -> None:
        """Does what `Session.remove` does."""
        self._thread.run(self.session.remove(export, deadline, mode))

    @property
    def statement(self) -> Statement | None:
        """How the point in time was taken; None if there is none."""
        return self.session.statement

    @property
    def checkpoint(self) -> BegunCheckpoint | None:
        """The checkpoint that began at the instant; None if none did."""
        return self.session.checkpoint

    def allocation_depth(self, export: Export, deadline: Deadline) -> InstantDepth:
        """Does what `Session.allocation_depth` does."""
        return self._thread.run(self.session.allocation_depth(export, deadline))

    def release(self) -> None:
        """Does what `Session.release` does."""
        self._thread.run(self.session.release())

    def commit(self, deadline: Deadline) -> None:
        """Does what `Session.commit` does."""
        self._thread.run(self.session.commit(deadline))

    def abort(self, deadline: Deadline) -> None:
        """Does what `Session.abort` does."""
        self._thread.run(self.session.abort(deadline))

    def leave(self, deadline: Deadline) -> None:
        """Does what `Session.leave` does."""
        self._thread.run(self.session.leave(deadline))

    def watch(self, deadline: Deadline) -> None:
        """Does what `Session.watch` does."""
        self._thread.run(self.session.watch(deadline))


@contextmanager
def exporting(
    what: MonitorAddress | str | Image,
    disks: Sequence[str] = (),
    options: Options | None = None,
    sources: SourceMaker = live_disks,
) -> Iterator[BlockingSession]:
    """Exports disks of a running QEMU, or an image file, until the context ends.

    Arguments and errors are those of `qmpnbd.export.session.exporting`.

    Yields:
        The session.
    """
    with LoopThread() as thread:
        context = _exporting(what, disks, options, sources)
        session = thread.run(context.__aenter__())
        try:
            yield BlockingSession(session, thread)
        except BaseException as error:
            if not thread.run(context.__aexit__(type(error), error, error.__traceback__)):
                raise
        else:
            thread.run(context.__aexit__(None, None, None))
