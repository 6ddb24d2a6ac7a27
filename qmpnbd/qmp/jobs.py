"""Block jobs of our own: ended, or led to their end, and dismissed.

Commits are made with ``auto-dismiss: false``: such a job stays visible until it is dismissed, so its outcome cannot be
missed. Backups are not: on QEMU 5.2, ``query-named-block-nodes`` crashes the guest (measured) while a cancelled backup
waits to be dismissed, because its filter has lost its child already. Their end is all there is to know of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from qmpnbd.deadline import Deadline
from qmpnbd.errors import CommandFailedError, DeadlineError, InterferenceError
from qmpnbd.qmp.models import JobInfo, parse_reply
from qmpnbd.qmp.monitor import Monitor, finish

STALL_SECONDS = 10.0
"""How long a job may make no progress at all before it is not waited for any longer."""

_LOOK_SECONDS = 1.0
_CHANGE = "JOB_STATUS_CHANGE"
_ENDING = frozenset({"aborting", "concluded", "null"})


async def read_jobs(monitor: Monitor, deadline: Deadline) -> list[JobInfo]:
    """Reads all jobs, anyone's.

    Raises:
        MonitorError: QEMU refused.
        DeadlineError: no reply in time.
    """
    reply = await monitor.execute("query-jobs", deadline=deadline)
    return parse_reply(list[JobInfo], reply, command="query-jobs", where=monitor.where)


async def find_job(monitor: Monitor, job: str, deadline: Deadline) -> JobInfo | None:
    """Returns a job, or None if there is none of this id.

    Raises:
        MonitorError: QEMU refused.
        DeadlineError: no reply in time.
    """
    return next((each for each in await read_jobs(monitor, deadline) if each.id == job), None)


async def cancel_job(monitor: Monitor, job: str, deadline: Deadline) -> None:
    """Cancels a job, waits for its end and dismisses it; one that does not exist has ended.

    Raises:
        MonitorError: QEMU refused.
        DeadlineError: it has not ended in time.
    """
    await finish(_cancel(monitor, job, deadline))


async def _cancel(monitor: Monitor, job: str, deadline: Deadline) -> None:
    with monitor.events(_CHANGE) as changes:
        info = await find_job(monitor, job, deadline)
        if info is not None and info.status not in _ENDING:
            await _unless_gone(monitor, "job-cancel", job, deadline)
        while (info := await find_job(monitor, job, deadline)) is not None and info.status != "concluded":
            with contextlib.suppress(DeadlineError):  # an event can be missed where events are polled for
                await monitor.next_event(changes, f"the job {job} to end", deadline.within(_LOOK_SECONDS))
    if info is not None:
        await _unless_gone(monitor, "job-dismiss", job, deadline)


async def complete_job(monitor: Monitor, job: str) -> None:
    """Leads a job that copies to its end, however long that takes, as long as it makes progress.

    It stays, concluded, as the proof of its success, until it is dismissed.

    Raises:
        CommandFailedError: it failed; it is dismissed.
        MonitorError: QEMU is gone.
        DeadlineError: it made no progress for `STALL_SECONDS`.
    """
    await finish(_complete(monitor, job))


async def _complete(monitor: Monitor, job: str) -> None:
    told = False
    progress = -1
    with monitor.events(_CHANGE) as changes:
        while (info := await find_job(monitor, job, Deadline(STALL_SECONDS))) is not None:
            if info.status == "concluded":
                break
            if info.status == "ready" and not told:
                await _unless_gone(monitor, "job-complete", job, Deadline(STALL_SECONDS))
                told = True
            try:
                await monitor.next_event(changes, f"the job {job} to go on", Deadline(STALL_SECONDS))
            except DeadlineError:
                if info.current_progress == progress:
                    raise
            progress = info.current_progress
    if info is not None and info.error:
        await _unless_gone(monitor, "job-dismiss", job, Deadline(STALL_SECONDS))
        raise CommandFailedError(
            info.type,
            "GenericError",
            info.error,
            where=monitor.where,
            remedy="Nothing is lost. Remove what stands in its way, then run `qmpnbd recover`.",
        )
    if info is None:
        raise InterferenceError(
            f"somebody dismissed the job {job}, so it is not known how it ended",
            where=monitor.where,
            remedy="Nothing is removed. See the block graph, and remove by hand what is not needed.",
        )


async def _unless_gone(monitor: Monitor, command: str, job: str, deadline: Deadline) -> None:
    """Tells a job something, unless it has gone, or gone on, in this moment."""
    arguments: Mapping[str, object] = {"id": job}
    try:
        await monitor.execute(command, arguments, deadline=deadline)
    except CommandFailedError as error:
        if not any(words in error.description for words in ("not found", "cannot accept command verb")):
            raise
