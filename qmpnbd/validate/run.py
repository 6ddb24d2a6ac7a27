"""The main job: validate the allocation depth of the disks of a running QEMU.

::

    QMP: the graph  ->  export of the node  ->  NBD: served map   ┐
                    ->  paths of the layers ->  files: computed map┴> compare -> report

`qmpnbd.validate.live` judges one disk; here is what the disks of a run share. Everything is taken down in reverse
order on every way out, and what cannot be taken down is told.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from itertools import count

from qmpnbd.deadline import Deadline
from qmpnbd.errors import ImageMissingError, MonitorLostError, QmpnbdError, UsageError
from qmpnbd.export.addresses import shared_server
from qmpnbd.nbd.uri import NbdUri
from qmpnbd.qmp.address import MonitorAddress
from qmpnbd.qmp.disks import Disk, chosen_disks
from qmpnbd.qmp.graph import chain_of, node_to_read
from qmpnbd.qmp.inventory import Inventory, read_inventory, require_no_iothread_bug, require_safe_moment
from qmpnbd.qmp.monitor import Monitor
from qmpnbd.qmp.planning import Wishes
from qmpnbd.qmp.recover import remove_leftovers
from qmpnbd.qmp.rundir import RunDirectory
from qmpnbd.qmp.server import STOP_SECONDS, start_server, stop_server
from qmpnbd.qmp.teardown import TakeDown
from qmpnbd.report.model import DiskReport, ErrorEntry, ValidationReport
from qmpnbd.validate.choice import Choice
from qmpnbd.validate.instant_run import InstantTerms, judged_at_instant
from qmpnbd.validate.live import LiveDisk, in_thread, specs_of
from qmpnbd.validate.outcome import disk_report, failed_disk_report, not_judged_disk_report, worst
from qmpnbd.validate.progress import Progress
from qmpnbd.validate.reading import check_readable
from qmpnbd.validate.window import Place

log = logging.getLogger(__name__)

DEFAULT_SECONDS = 600.0
"""Time for a whole validation: ten times what a disk of a hundred million extents takes."""

DEFAULT_ROUNDS = 5

MIN_ROUNDS = 2
"""The first round finds no discrepancy."""


@dataclass(frozen=True, slots=True)
class Options:
    """How to validate.

    Attributes:
        seconds: time for everything; None for no bound. Taking down has its own time.
        rounds: how often at most served and computed are read while the guest writes; at least `MIN_ROUNDS`.
        nbd: URI of the NBD server this QEMU runs already, to be shared; None to start one.
        runtime_dir: where the private directory is made; None for the folder for temporary files.
        allow_iothread: work on disks in an iothread although this QEMU is known to abort on them.
        listed: how many discrepancies are listed and explained; all are counted.
        choice: what is compared. The bitmaps of a running QEMU are not, unless at a point in time: it keeps them in
            memory, and no file has them.
        instant: judge all disks at one point in time, taken like this; None to judge them as they go on.
        change_seconds: with `instant`, compare bitmaps that record with what changed since an earlier point in time, so
            many seconds before; None not to.
        fail_fast: begin no other disk after the first discrepancy or error; at a point in time all of them are begun.
    """

    seconds: float | None = DEFAULT_SECONDS
    rounds: int = DEFAULT_ROUNDS
    nbd: str | None = None
    runtime_dir: str | None = None
    allow_iothread: bool = False
    listed: int = 100
    choice: Choice = field(default_factory=Choice)
    instant: Wishes | None = None
    change_seconds: float | None = None
    fail_fast: bool = False


class SoFar:
    """What is known of a run while it goes on: for the report on one that is ended early.

    Args:
        monitor: the QMP address, until QEMU was heard.

    Attributes:
        progress: how far it is.
    """

    def __init__(self, monitor: str) -> None:
        self.progress = Progress(1)
        self._head = {"monitor": monitor, "qemu": "", "guest": ""}
        self._started = datetime.now(UTC)
        self._waiting: list[DiskReport] = []
        self._done: list[DiskReport] = []

    def begin(self, monitor: str, qemu: str, guest: str, waiting: Sequence[DiskReport]) -> None:
        """Notes which disks there are to validate, as reports that say that they were not judged."""
        self._head = {"monitor": monitor, "qemu": qemu, "guest": guest}
        self._waiting = list(waiting)
        self.progress.total = len(self._waiting)

    def content(self, count: int, total: int) -> None:
        """Notes that `count` more bytes of the `total` of the disk under way have been compared."""
        self.progress.content(len(self._done), count, total)

    def add(self, report: DiskReport) -> None:
        """Notes that a disk is done; they are done in their order."""
        self.progress.disk(len(self._done), discrepancy=report.verdict == "discrepancy")
        self._done.append(report)

    @property
    def failed(self) -> bool:
        """Whether a disk has a discrepancy, or could not be validated."""
        return worst(self._done) in ("discrepancy", "error")

    @property
    def waiting(self) -> list[DiskReport]:
        """Reports of the disks that have not been judged, which say so."""
        return self._waiting[len(self._done) :]

    def fail_fast(self) -> None:
        """Notes that the rest is not judged because of a fault."""
        self._waiting = [each.model_copy(update={"not_judged_because": "fail-fast"}) for each in self._waiting]

    def report(
        self, left_behind: Sequence[str], stopped: ErrorEntry | None = None, *, failed: bool = False
    ) -> ValidationReport:
        """Returns what is known; of the rest it says that it was not judged.

        Args:
            left_behind: what could not be taken down, in words.
            stopped: what ended the run early; None if nothing did.
            failed: whether that was an error, not somebody's wish.
        """
        disks = (*self._done, *self.waiting)
        verdict = worst(disks)
        if failed and verdict != "discrepancy":
            verdict = "error"
        elif stopped is not None and verdict == "agreed":
            verdict = "incomplete"
        return ValidationReport(
            **self._head,
            started=self._started.isoformat(timespec="seconds"),
            verdict=verdict,
            disks=disks,
            left_behind=tuple(left_behind),
            stopped=stopped,
        )


def validate(
    monitor: MonitorAddress | str, disks: Sequence[str] = (), options: Options | None = None
) -> ValidationReport:
    """Validates disks of a running QEMU; the blocking twin of `validate_disks`."""
    return asyncio.run(validate_disks(monitor, disks, options))


async def validate_disks(
    monitor: MonitorAddress | str,
    disks: Sequence[str] = (),
    options: Options | None = None,
    *,
    on_disk: Callable[[DiskReport], None] | None = None,
    so_far: SoFar | None = None,
) -> ValidationReport:
    """Validates disks of a running QEMU: is the allocation depth it serves what the image files hold?

    Args:
        monitor: where its QMP monitor is: an address, or one as people write it (``PATH``, ``HOST:PORT``, ``fd:N``).
        disks: qdev ids, QOM paths or node-names; none for all disks of the guest.
        options: how to do it.
        on_disk: is handed the report of each disk as soon as there is one.
        so_far: is told what is known: for progress, and for a report should the run be cancelled.

    Returns:
        The report. If several disks are validated, one that cannot be is reported as ``error`` and the others go on.

    Raises:
        QmpnbdError: nothing could be validated (see `qmpnbd.errors`); whatever was made in QEMU is gone again, or
            the error's notes tell what is left.
    """
    choice = options or Options()
    if choice.rounds < MIN_ROUNDS:
        raise UsageError(f"{choice.rounds} rounds", where="rounds", remedy=f"At least {MIN_ROUNDS} are needed.")
    deadline = Deadline(choice.seconds)
    known = so_far or SoFar(str(monitor))
    async with await Monitor.connect(monitor, deadline) as connected:
        run = _Run(connected, choice, deadline, TakeDown(connected.has_gone), on_disk, known)
        await run.all(disks)
        return known.report(run.take_down.left)


@dataclass(slots=True)
class _Run:
    """One run over one monitor."""

    monitor: Monitor
    options: Options
    deadline: Deadline
    take_down: TakeDown
    on_disk: Callable[[DiskReport], None] | None
    so_far: SoFar

    async def all(self, wanted: Sequence[str]) -> None:
        try:
            for removed in await remove_leftovers(self.monitor, self.options.runtime_dir, self.deadline):
                log.warning("took down what a killed run had left: %s", removed)
            guest = await require_safe_moment(self.monitor, self.deadline)
            inventory = await read_inventory(self.monitor, self.deadline)
            disks = chosen_disks(
                wanted, inventory.disks, inventory.graph, where=self.monitor.where, empty=inventory.empty
            )
            waiting = [not_judged_disk_report(disk).model_copy(update=self._origin()) for disk in disks]
            self.so_far.begin(self.monitor.where, str(self.monitor.version), guest, waiting)
            await self._judged(disks, inventory)
        except BaseException as error:
            for note in self.take_down.left:
                error.add_note(note)
            raise

    async def _judged(self, disks: Sequence[Disk], inventory: Inventory) -> None:
        shared = None if self.options.nbd is None else shared_server(self.options.nbd)
        async with AsyncExitStack() as stack:
            create = partial(RunDirectory.create, self.options.runtime_dir, for_peer=self.monitor.peer)
            directory = stack.enter_context(create())
            if shared is None:
                stack.push_async_callback(self._stop_server, directory)
                await start_server(self.monitor, directory, self.deadline)
            server = shared or NbdUri.unix(str(directory.socket_path), "")
            told = self.so_far.content
            place = Place(self.monitor, server, directory.run, count(), self.take_down, self.deadline, told)
            if self.options.instant is not None:
                await self._at_instant(self.options.instant, place, directory, disks)
                return
            lost: MonitorLostError | None = None
            for disk in disks:
                try:
                    if lost is not None:
                        raise lost
                    self._done(await self._disk(disk, inventory, place))
                except QmpnbdError as error:
                    if len(disks) == 1:
                        raise
                    lost = error if isinstance(error, MonitorLostError) else None
                    self._done(failed_disk_report(disk, error))
                if self.options.fail_fast and self.so_far.failed:
                    self.so_far.fail_fast()
                    return

    def _done(self, report: DiskReport) -> None:
        told = report.model_copy(update=self._origin())
        self.so_far.add(told)
        if self.on_disk is not None:
            self.on_disk(told)

    async def _at_instant(self, wishes: Wishes, place: Place, directory: RunDirectory, disks: Sequence[Disk]) -> None:
        wishes = replace(wishes, allow_iothread=self.options.allow_iothread)
        terms = InstantTerms(wishes, self.options.choice, self.options.listed, self.options.change_seconds)
        place = replace(place, numbers=count(3 * len(disks)))
        for report in await judged_at_instant(place, directory, disks, terms):
            self._done(report)

    async def _disk(self, disk: Disk, inventory: Inventory, place: Place) -> DiskReport:
        began = time.monotonic()
        if not self.options.allow_iothread:
            await require_no_iothread_bug(self.monitor, disk.node_name, inventory, self.deadline)
        # What cannot be read is told before anything is exported.
        node_name = node_to_read(inventory.graph, disk.node_name)
        specs = specs_of(chain_of(inventory.graph, node_name), self.monitor)
        try:
            await in_thread(partial(check_readable, specs, self.deadline), self.deadline)
        except ImageMissingError as error:
            raise ImageMissingError(
                error.what,
                where=error.where,
                remedy="It was removed or renamed under QEMU, or is the nameless overlay of a drive with snapshot=on.",
            ) from error
        rounds, listed, choice = self.options.rounds, self.options.listed, self.options.choice
        findings, explained = await LiveDisk.judge(place, node_name, rounds, listed, choice)
        return disk_report(disk, findings, explained, self.options.listed, time.monotonic() - began)

    def _origin(self) -> dict[str, str]:
        return {
            "source": self.monitor.where,
            "qemu": str(self.monitor.version),
            "choice": str(self.options.choice),
        }

    async def _stop_server(self, directory: RunDirectory) -> None:
        async def stop(deadline: Deadline) -> None:
            if not await stop_server(self.monitor, directory, deadline):
                self.take_down.left.append(
                    f"the NBD server at {directory.socket_path} runs on: others have exports in it"
                )

        await self.take_down.step(f"NBD server at {directory.socket_path}", stop, STOP_SECONDS)
