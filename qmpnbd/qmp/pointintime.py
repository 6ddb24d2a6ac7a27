"""A point in time: the disks of a guest as they were at one instant, readable over NBD for as long as it is held.

::

    async with await Monitor.connect(address, deadline) as monitor:
        with RunDirectory.create(for_peer=monitor.peer) as directory:
            async with point_in_time(monitor, ["vd0", "vd1"], directory, deadline) as point:
                for offer in point.offers:
                    ...                     # nbd+unix:///EXPORT?socket=SOCKET

Which of the three recipes is used, and why, is in `PointInTime.statement`. Whatever was made is taken down on every way
out, in reverse order, and what could not be is told (`qmpnbd recover` finds it by its name).

While it is held, the scratch space is watched: before it is full, the point in time is given up, because the guest
would be stopped otherwise. Then its exports end, the body of the ``async with`` is cancelled, and `ScratchError` comes
out of it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

from qmpnbd.deadline import Deadline
from qmpnbd.errors import (
    CommandFailedError,
    DiskBusyError,
    InterferenceError,
    LeftBehindError,
    QmpnbdError,
    ScratchError,
)
from qmpnbd.qmp.bitmaps import add_remedy
from qmpnbd.qmp.exports import remove_export
from qmpnbd.qmp.jobs import read_jobs
from qmpnbd.qmp.monitor import Events, Monitor, finish
from qmpnbd.qmp.plan import Offer, Plan, Recipe, Step
from qmpnbd.qmp.planning import Wishes, plan_point_in_time
from qmpnbd.qmp.quiesce import Consistency, Kind, Rest
from qmpnbd.qmp.refusals import explained
from qmpnbd.qmp.rundir import RunDirectory
from qmpnbd.qmp.scratch import image_files, remove_stale
from qmpnbd.qmp.server import busy_server
from qmpnbd.qmp.teardown import TEARDOWN_SECONDS, TakeDown
from qmpnbd.qmp.undo import CancelJob, RemoveFile, Undo
from qmpnbd.qmp.undoing import send, take_down

_ENDED = ("aborting", "concluded", "null")


@dataclass(frozen=True, slots=True)
class Statement:
    """What can be said of the instant.

    Attributes:
        recipe: how it was taken.
        why: the reason for this recipe.
        consistency: what can be said of the content; how long the guest's writes were held up for it is told there.
        window_ms: within how many milliseconds the instant lies: the time its commands took.
        paused_ms: for how many milliseconds the guest was paused; 0 if it was not.
    """

    recipe: Recipe
    why: str
    consistency: Consistency
    window_ms: float
    paused_ms: float


@dataclass(frozen=True, slots=True)
class PointInTime:
    """A point in time that is being held.

    What is read of it can be relied on only once the ``async with`` has been left without an error.

    Attributes:
        offers: what there is to read, in the order of the disks.
        statement: what can be said of it.
    """

    offers: tuple[Offer, ...]
    statement: Statement


Before = Callable[[Sequence[Offer]], Awaitable[None]]
"""Called just before the instant: the time to read the depth of `Offer.before_export`."""


@asynccontextmanager
async def point_in_time(
    monitor: Monitor,
    disks: Sequence[str],
    directory: RunDirectory,
    deadline: Deadline,
    *,
    wishes: Wishes | None = None,
    before: Before | None = None,
    quiesce: AbstractAsyncContextManager[Rest] | None = None,
) -> AsyncIterator[PointInTime]:
    """Holds the disks of a guest as they are at one instant.

    Args:
        monitor: the QEMU.
        disks: qdev ids, QOM paths or node-names.
        directory: the run's; kept at its end if something could not be taken down.
        deadline: for getting there. Taking down has its own time.
        wishes: how.
        before: called just before the instant.
        quiesce: entered right before the instant and left right after it (`qmpnbd.qmp.quiesce.at_rest`).

    Yields:
        The point in time.

    Raises:
        DiskBusyError: something else holds a disk.
        ServerBusyError: someone else's NBD server is running, and none is shared.
        ExportRefusedError: QEMU refused an export or its server, for a reason that is known.
        ScratchError: no room, or (out of the body) the room ran out.
        InterferenceError: (out of the body) a job of ours ended.
        LeftBehindError: something could not be taken down; a note on any other error.
        QmpnbdError: see `qmpnbd.errors`.
    """
    plan = await plan_point_in_time(monitor, disks, directory, deadline, wishes)
    remove_stale(_folder(plan))
    holder = _Holder(monitor, directory, plan, TakeDown(monitor.has_gone))
    try:
        with image_files(plan.files, directory, monitor.peer):
            async with AsyncExitStack() as stack:
                holder.note(stack, [RemoveFile(file.path, file.node_name) for file in plan.files])
                await holder.do(stack, plan.prepare, deadline)
                if before is not None:
                    await before(plan.offers)
                async with holder.watched():
                    statement = await holder.instant(stack, quiesce, deadline)
                    await holder.do(stack, plan.offer, deadline)
                    yield PointInTime(plan.offers, statement)
    except BaseException as error:
        directory.keep = bool(holder.steps.left)
        for note in holder.steps.left:
            error.add_note(note)
        raise
    if holder.steps.left:
        directory.keep = True
        raise LeftBehindError(
            "; ".join(holder.steps.left), where=monitor.where, remedy="Run `qmpnbd recover` once QEMU answers again."
        )


def _folder(plan: Plan) -> str:
    return plan.files[0].path.rpartition("/")[0]


@dataclass(slots=True)
class _Holder:
    """Carries out a plan, and takes it down."""

    monitor: Monitor
    directory: RunDirectory
    plan: Plan
    steps: TakeDown
    failure: QmpnbdError | None = None
    taken: bool = False

    def note(self, stack: AsyncExitStack, undo: Sequence[Undo]) -> None:
        """Has `stack` take something down, in this order."""
        for each in reversed(undo):
            stack.push_async_callback(
                self.steps.step, str(each), partial(take_down, self.monitor, each, self.directory)
            )

    async def do(self, stack: AsyncExitStack, steps: Sequence[Step], deadline: Deadline) -> None:
        """Carries out steps; `stack` takes them down. What is to be undone is noted before it is done."""
        for step in steps:
            self.note(stack, step.undo)
            try:
                await self._one(step, deadline)
            except CommandFailedError as error:
                if "already running" in error.description:
                    raise await busy_server(self.monitor, deadline) from error
                raise _explained(error) from error

    async def _one(self, step: Step, deadline: Deadline) -> None:
        arguments = step.command.get("arguments")
        if step.command["execute"] == "block-export-del" and isinstance(arguments, dict):
            await remove_export(self.monitor, str(arguments["id"]), deadline)  # waits until it is gone
        else:
            await send(self.monitor, step.command, deadline)

    async def instant(
        self, stack: AsyncExitStack, quiesce: AbstractAsyncContextManager[Rest] | None, deadline: Deadline
    ) -> Statement:
        """Takes the instant."""
        steps = self.plan.instant
        ready = sum(step.command["execute"] == "block-export-del" for step in steps)
        await self.do(stack, steps[:ready], deadline)
        kind: Kind = "paused" if self.plan.pauses else "crash-consistent"
        async with quiesce or nullcontext(Rest(Consistency(kind))) as rest:
            began = time.monotonic()
            await self.do(stack, steps[ready:], deadline)
            window = (time.monotonic() - began) * 1000
        # Jobs of a transaction that is refused end, too, and perhaps before the refusal is here.
        self.taken = True
        await self._require_jobs()
        return Statement(
            recipe=self.plan.recipe,
            why=self.plan.why,
            consistency=rest.consistency,
            window_ms=window,
            paused_ms=window if self.plan.pauses else 0.0,
        )

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Gives the point in time up when the scratch space runs out or a job of ours ends, and cancels the body."""
        body = asyncio.current_task()
        with (
            self.monitor.events("BLOCK_WRITE_THRESHOLD") as thresholds,
            self.monitor.events("JOB_STATUS_CHANGE") as changes,
        ):
            watch = asyncio.ensure_future(self._watch(thresholds, changes, body))
            try:
                yield
                await self._require_jobs()
                self._require_no_failure()
            except asyncio.CancelledError:
                if self.failure is None or (body is not None and body.uncancel() > 0):
                    raise
                raise self.failure from None
            except QmpnbdError as error:
                # An export that was cut off is a consequence; why it was is what the caller must hear.
                if self.failure is None or self.failure is error:
                    raise
                raise self.failure from error
            finally:
                watch.cancel()
                await finish(_settled(watch))

    async def _watch(self, thresholds: Events, changes: Events, body: asyncio.Task[object] | None) -> None:
        found = [asyncio.ensure_future(self._scratch_ran_out(thresholds))]
        found.append(asyncio.ensure_future(self._job_ended(changes)))
        try:
            done, _ = await asyncio.wait(found, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in found:
                each.cancel()
        try:
            self.failure = done.pop().result()
        except QmpnbdError as error:
            self.failure = error  # QEMU has ended, or its monitor has
        if body is not None:
            body.cancel()
        # Not left to the body, which may take its time: first nobody reads any more, then the guest is free.
        for step in (*reversed(self.plan.offer), *reversed(self.plan.instant)):
            for undo in step.undo:
                await self.steps.step(str(undo), partial(take_down, self.monitor, undo, self.directory))

    @property
    def _jobs(self) -> set[str]:
        return {undo.job for step in self.plan.instant for undo in step.undo if isinstance(undo, CancelJob)}

    async def _require_jobs(self) -> None:
        """Makes sure that our jobs have run all the time: an event of their end may not have come yet."""
        running = {
            job.id for job in await read_jobs(self.monitor, Deadline(TEARDOWN_SECONDS)) if job.status == "running"
        }
        for job in self._jobs - running:
            raise self._ended(job)

    def _require_no_failure(self) -> None:
        """Has a body that nobody could cancel, or that went on all the same, hear of a failure in the end."""
        if self.failure is not None:
            raise self.failure

    def _ended(self, job: str) -> InterferenceError:
        return InterferenceError(
            f"the job {job} ended, and with it the point in time",
            where=self.monitor.where,
            remedy="Somebody cancelled it, or the scratch failed. Take a new point in time.",
        )

    async def _scratch_ran_out(self, events: Events) -> QmpnbdError:
        names = {offer.scratch: offer.disk.name for offer in self.plan.offers if offer.scratch}
        while True:
            event = await self.monitor.next_event(events, "a notice of the scratch space", Deadline(None))
            disk = names.get(str(event.get("node-name")))
            if disk is not None:
                return ScratchError(
                    "the guest wrote more than the scratch space takes; the point in time was given up before the "
                    "guest was hurt",
                    where=f"disk {disk}",
                    remedy="Give it more space, read faster, or choose a quieter hour.",
                )

    async def _job_ended(self, events: Events) -> QmpnbdError:
        while True:
            event = await self.monitor.next_event(events, "a change of our jobs", Deadline(None))
            if self.taken and event.get("id") in self._jobs and event.get("status") in _ENDED:
                return self._ended(str(event.get("id")))


async def _settled(task: asyncio.Future[None]) -> None:
    await asyncio.wait({task})


def _explained(error: CommandFailedError) -> QmpnbdError:
    """Returns what QEMU's refusal means, where that is known."""
    words = error.description
    if "is busy" in words or "block device is in use" in words or "Need a root block node" in words:
        return DiskBusyError(
            f"QEMU refused {error.command}: {words}",
            where=error.where,
            remedy="Another block job works on the disk: wait for its end (`query-block-jobs`). If it is one of a "
            "killed qmpnbd, run `qmpnbd recover`.",
        )
    if words.startswith("Could not open ") and "Permission denied" in words:
        return ScratchError(
            f"QEMU may not use the scratch image: {words}",
            where=error.where,
            remedy="Run as QEMU's user, or as root over a monitor socket of QEMU's own, which tells who that is "
            "(libvirt does not). If AppArmor or SELinux confines QEMU, name a folder with --scratch that it may use.",
        )
    if error.command in ("block-export-add", "nbd-server-start"):
        return explained(error)
    if "itmap" in words:
        add_remedy(error)
    return error
