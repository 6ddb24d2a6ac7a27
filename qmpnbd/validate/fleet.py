"""Many disks in one run: running QEMUs, exports, images; several at a time, one verdict each.

::

    targets ─ queue ─┬─ worker 1 (storage daemon 1) ─┐
                     ├─ worker 2 (storage daemon 2) ─┼─ reports, in the order of the targets
                     └─ worker 3 (storage daemon 3) ─┘

Each target has a deadline of its own, so that one that hangs keeps a single worker, and that not for ever; a storage
daemon that fell silent is killed, and the next image gets a new one. A worker starts its daemon when the first image
comes. With `fail_fast` the first fault empties the queue and cancels what is under way, which takes down what it made.
When the run is cancelled, what is done is kept: `Fleet.report` can be asked at any time.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial

from qmpnbd.deadline import Deadline
from qmpnbd.errors import QmpnbdError
from qmpnbd.nbd.tls import Tls
from qmpnbd.qmp.storage_daemon import PROGRAM
from qmpnbd.report.model import DiskReport, ErrorEntry, NotJudgedBecause, ValidationReport
from qmpnbd.validate.choice import Choice
from qmpnbd.validate.daemon import FATAL, Daemon
from qmpnbd.validate.former import Former
from qmpnbd.validate.live import in_thread
from qmpnbd.validate.outcome import worst
from qmpnbd.validate.progress import Progress
from qmpnbd.validate.run import Options, SoFar, validate_disks
from qmpnbd.validate.still import Terms
from qmpnbd.validate.still_outcome import failed_report, not_judged_report
from qmpnbd.validate.still_run import compare_image, compare_served, prepared
from qmpnbd.validate.target import ImageTarget, MonitorTarget, ServedTarget, Target


@dataclass(frozen=True, slots=True)
class FleetOptions:
    """How to validate many disks.

    Attributes:
        each: for each running QEMU; its `seconds` are the time for each target of any kind.
        choice: what is compared.
        jobs: targets at a time.
        fail_fast: end with the first discrepancy or error: begin nothing new, and stop what is under way.
        former: a former report, whose verdict on unchanged images is taken over; None to judge all.
        storage_daemon: the program that serves images.
        tls: for the URIs of exports; None to leave it to them.
    """

    each: Options = field(default_factory=Options)
    choice: Choice = field(default_factory=Choice)
    jobs: int = 1
    fail_fast: bool = False
    former: Former | None = None
    storage_daemon: str = PROGRAM
    tls: Tls | None = None


def usable_cpus() -> int:
    """Returns how many processors this process may use: a good number of jobs."""
    return len(os.sched_getaffinity(0))


class Fleet:
    """A run over many targets; `run` it once.

    Args:
        targets: what to validate.
        options: how to do it.
        on_disk: is handed the report of each disk as soon as there is one.

    Attributes:
        progress: how far it is.
    """

    def __init__(
        self, targets: Sequence[Target], options: FleetOptions, on_disk: Callable[[DiskReport], None] | None = None
    ) -> None:
        self.progress = Progress(len(targets))
        self._targets = tuple(targets)
        self._options = options
        self._on_disk = on_disk
        self._queue = deque(range(len(targets)))
        self._under_way: dict[int, asyncio.Task[None]] = {}
        self._failed_fast = False
        self._reports: dict[int, list[DiskReport]] = {}
        self._ended: set[int] = set()
        self._left_behind: list[str] = []
        self._started = datetime.now(UTC)

    async def run(self) -> ValidationReport:
        """Validates all targets.

        Returns:
            The report; a target that cannot be validated is reported as ``error``, and the others go on.

        Raises:
            UsageError: there is no storage daemon to serve images with.
            asyncio.CancelledError: it was cancelled; everything was taken down, and `report` tells what is done.
        """
        workers = min(self._options.jobs, len(self._targets))
        tasks = [asyncio.ensure_future(_Worker(self).work()) for _ in range(workers)]
        try:
            if tasks:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in tasks:
                _stop(task)
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in tasks:
            if not task.cancelled():
                task.result()
        return self.report()

    def report(self, stopped: ErrorEntry | None = None) -> ValidationReport:
        """Returns what is known now; of the rest it says that it was not judged.

        Args:
            stopped: what ended the run before everything was validated; None if nothing did.
        """
        disks: list[DiskReport] = []
        for number, target in enumerate(self._targets):
            disks += self._reports.get(number, [])
            if number not in self._ended:
                disks.append(self._not_judged(target))
        return ValidationReport(
            monitor="",
            qemu="",
            guest="",
            started=self._started.isoformat(timespec="seconds"),
            verdict=worst(disks),
            disks=tuple(disks),
            left_behind=tuple(self._left_behind),
            stopped=stopped,
        )

    def next_target(self) -> tuple[int, Target] | None:
        """Takes the next target from the queue; None if there is none."""
        if not self._queue:
            return None
        number = self._queue.popleft()
        task = asyncio.current_task()
        if task is not None:
            self._under_way[number] = task
        return number, self._targets[number]

    def add(self, number: int, report: DiskReport) -> None:
        """Notes the report of a disk."""
        self._reports.setdefault(number, []).append(report)
        if self._on_disk is not None:
            self._on_disk(report)

    def leave(self, number: int, reports: Sequence[DiskReport]) -> None:
        """Notes disks of a target that were not judged."""
        self._reports.setdefault(number, []).extend(reports)

    def is_stopped(self, number: int) -> bool:
        """Returns whether a target was stopped: another one had a fault, or the run is cancelled."""
        return self._under_way[number].cancelling() > 0

    def stopped(self, number: int, waiting: Sequence[DiskReport], left_behind: Sequence[str]) -> None:
        """Notes that a target was stopped.

        Args:
            number: the target.
            waiting: reports of those of its disks that are known and have not been judged.
            left_behind: what could not be taken down, in words.

        Raises:
            asyncio.CancelledError: the run is cancelled.
        """
        because = {"not_judged_because": self._because}
        known = [each.model_copy(update=because) for each in waiting]
        if not known and number not in self._reports:
            known = [self._not_judged(self._targets[number])]
        self.leave(number, known)
        self.end(number, left_behind)
        if not self._failed_fast:
            raise asyncio.CancelledError

    def end(self, number: int, left_behind: Sequence[str] = ()) -> None:
        """Notes that a target is done."""
        self._ended.add(number)
        self._under_way.pop(number)
        self._left_behind += left_behind
        verdict = worst(self._reports.get(number, []))
        self.progress.disk(number, discrepancy=verdict == "discrepancy")
        if self._options.fail_fast and not self._failed_fast and verdict in ("discrepancy", "error"):
            self._failed_fast = True
            self._queue.clear()
            for task in self._under_way.values():
                _stop(task)

    def _not_judged(self, target: Target) -> DiskReport:
        return not_judged_report(target, self._options.choice, self._because)

    @property
    def _because(self) -> NotJudgedBecause:
        return "fail-fast" if self._failed_fast else ""

    @property
    def options(self) -> FleetOptions:
        """How it is done."""
        return self._options


def _stop(task: asyncio.Task[None]) -> None:
    """Cancels a task once: a second time would cut short what takes down."""
    if not task.cancelling():
        task.cancel()


class _Worker:
    """Takes one target after the other."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._options = fleet.options
        self._daemon: Daemon | None = None

    async def work(self) -> None:
        try:
            while (taken := self._fleet.next_target()) is not None:
                await self._target(*taken)
        finally:
            await self._drop_daemon()

    async def _target(self, number: int, target: Target) -> None:
        left: Sequence[str] = ()
        began = time.monotonic()
        so_far = SoFar(target.source)
        try:
            if isinstance(target, MonitorTarget):
                left = await self._monitor(number, target, so_far)
            else:
                report = await self._still(number, target, Deadline(self._options.each.seconds))
                taken = report.seconds if report.agreed_in else round(time.monotonic() - began, 3)
                self._fleet.add(number, report.model_copy(update={"seconds": taken}))
        except (QmpnbdError, asyncio.CancelledError) as error:
            left = [*left, *getattr(error, "__notes__", ())]
            if self._fleet.is_stopped(number):
                self._fleet.stopped(number, so_far.waiting, left)
                return
            if isinstance(error, asyncio.CancelledError):
                raise
            if isinstance(target, ImageTarget) and isinstance(error, FATAL):
                await self._drop_daemon()
            version = self._daemon.facts.version if self._daemon is not None and isinstance(target, ImageTarget) else ""
            self._fleet.add(number, failed_report(target, error, self._options.choice, version))
        self._fleet.end(number, left)

    async def _monitor(self, number: int, target: MonitorTarget, so_far: SoFar) -> Sequence[str]:
        options = self._options
        each = replace(options.each, nbd=target.nbd, choice=options.choice, fail_fast=options.fail_fast)
        add = partial(self._fleet.add, number)
        report = await validate_disks(target.monitor, target.disks, each, on_disk=add, so_far=so_far)
        self._fleet.leave(number, [disk for disk in report.disks if disk.verdict == "not-judged"])
        return report.left_behind

    async def _still(self, number: int, target: ServedTarget | ImageTarget, deadline: Deadline) -> DiskReport:
        options = self._options
        told = partial(self._fleet.progress.content, number)
        terms = Terms(options.choice, options.each.listed, deadline, told)
        if isinstance(target, ServedTarget):
            return await in_thread(partial(compare_served, target, options.tls, terms), deadline)
        if self._daemon is None:
            self._daemon = await Daemon.start(options.storage_daemon, options.each.runtime_dir)
        facts = self._daemon.facts
        if options.former is not None:
            former = options.former.unchanged(target, options.choice, facts.version)
            if former is not None:
                return former
        image = await in_thread(partial(prepared, target, terms), deadline)
        with image.chain:
            async with self._daemon.serving(target.image, image.format, image.bitmaps, deadline) as uri:
                return await in_thread(partial(compare_image, target, image, uri, facts, terms), deadline)

    async def _drop_daemon(self) -> None:
        if self._daemon is not None:
            daemon, self._daemon = self._daemon, None
            await daemon.stop()
