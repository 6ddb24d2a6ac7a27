"""The disks of a running QEMU, all of them at one point in time.

::

    [earlier instant: content of every disk, as hashes]      only to compare bitmaps with what changed since
    [some seconds]
    the instant: bitmaps that record are copied in the same transaction
    every disk is judged, while the guest goes on
    everything is taken down; only now what was read can be relied on

The earlier point in time is over before the later one is taken: there is one at a time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial

from qmpnbd.errors import InterferenceError, LeftBehindError, QmpnbdError
from qmpnbd.qmp.bitmaps import remove_bitmap
from qmpnbd.qmp.disks import Disk
from qmpnbd.qmp.inventory import read_nodes
from qmpnbd.qmp.models import BlockDirtyInfo
from qmpnbd.qmp.naming import bitmap_name, run_of
from qmpnbd.qmp.plan import Offer, Recipe
from qmpnbd.qmp.planning import Wishes, plan_point_in_time
from qmpnbd.qmp.pointintime import Before, PointInTime, Statement, point_in_time
from qmpnbd.qmp.rundir import RunDirectory
from qmpnbd.report.instant import instant_entry
from qmpnbd.report.model import DiskReport
from qmpnbd.validate.changes import Blocks, block_size
from qmpnbd.validate.choice import Choice
from qmpnbd.validate.compare import MapFinding
from qmpnbd.validate.findings import Findings
from qmpnbd.validate.instant import BITMAPS, Copied, Former, InstantDisk, read_blocks
from qmpnbd.validate.live import explained
from qmpnbd.validate.outcome import disk_report, failed_disk_report
from qmpnbd.validate.reading import Explained
from qmpnbd.validate.window import Place


@dataclass(frozen=True, slots=True)
class InstantTerms:
    """How disks are judged at a point in time.

    Attributes:
        wishes: how it is taken.
        choice: what is compared.
        listed: how many discrepancies are listed and explained.
        change_seconds: compare bitmaps with what changed since an instant so many seconds before; None not to.
    """

    wishes: Wishes
    choice: Choice
    listed: int
    change_seconds: float | None = None


async def judged_at_instant(
    place: Place, directory: RunDirectory, disks: Sequence[Disk], terms: InstantTerms
) -> list[DiskReport]:
    """Judges disks at one point in time.

    Args:
        place: where. The exports of a point in time are numbered from 0 on, three for each disk at most: its numbers
            begin behind these.
        directory: the run's.
        disks: which.
        terms: how.

    Returns:
        A report of each; one that cannot be judged is reported as ``error``, unless it is the only one.

    Raises:
        QmpnbdError: there is no point in time (`qmpnbd.qmp.pointintime.point_in_time`), or it was lost.
    """
    return await _Run(place, directory, tuple(disks), terms).all()


@dataclass(slots=True)
class _Part:
    """A disk that takes part, and what is known of it so far.

    Attributes:
        disk: the disk.
        node: its format node.
        judge: judges it.
        recorded: bitmaps that recorded at the earlier instant.
        blocks: its content at that instant; None if it was not read.
        persistent: bitmaps to be compared with those in the image.
        copies: of bitmaps that have recorded since the earlier instant.
        actions: what makes these, at the instant.
        findings: what was found of it.
        error: why it could not be judged.
        seconds: time that took.
    """

    disk: Disk
    node: str
    judge: InstantDisk
    recorded: tuple[str, ...] = ()
    blocks: Blocks | None = None
    persistent: tuple[str, ...] = ()
    copies: list[Copied] = field(default_factory=list)
    actions: list[Mapping[str, object]] = field(default_factory=list)
    findings: tuple[Findings, list[Explained]] | None = None
    error: QmpnbdError | None = None
    seconds: float = 0.0


@dataclass(slots=True)
class _Run:
    """One run over all disks."""

    place: Place
    directory: RunDirectory
    disks: tuple[Disk, ...]
    terms: InstantTerms

    async def all(self) -> list[DiskReport]:
        place, names = self.place, [disk.name for disk in self.disks]
        wishes = replace(self.terms.wishes, start_server=False)
        plan = await plan_point_in_time(place.monitor, names, self.directory, place.deadline, wishes)
        async with AsyncExitStack() as stack:
            parts = [
                _Part(disk, offer.disk.node_name, InstantDisk(place, stack, self.terms.choice))
                for disk, offer in zip(self.disks, plan.offers, strict=True)
            ]
            if self.terms.change_seconds is not None:
                await self._earlier(parts, replace(wishes, depth=False))
                await self._sleep(self.terms.change_seconds)
            stored = self.terms.choice.bitmaps and plan.recipe is Recipe.SNAPSHOT
            for part in parts:
                await self._choose_bitmaps(stack, part, stored=stored)
            statement = await self._judged(parts, wishes)
        return [self._report(part, statement) for part in parts]

    async def _earlier(self, parts: Sequence[_Part], wishes: Wishes) -> None:
        """Takes the earlier point in time, and keeps what the disks hold."""
        granularities: dict[str, int] = {}
        for part in parts:
            recording = {name: each for name, each in (await self._bitmaps(part.node)).items() if each.recording}
            part.recorded = tuple(recording)
            granularities[part.disk.name] = min((each.granularity for each in recording.values()), default=0)
        async with self._held(wishes) as point:
            for part, offer in zip(parts, point.offers, strict=True):
                if part.recorded:
                    client = await part.judge.client(offer.export, [])
                    block = block_size(client.export.size, granularities[part.disk.name])
                    part.blocks = await read_blocks(client, block, self.place)

    async def _sleep(self, seconds: float) -> None:
        deadline = self.place.deadline
        left = deadline.remaining("the second point in time", self.place.monitor.where)
        await asyncio.sleep(seconds if left is None else min(seconds, left))
        deadline.check("the second point in time", self.place.monitor.where)

    async def _choose_bitmaps(self, stack: AsyncExitStack, part: _Part, *, stored: bool) -> None:
        """Decides which bitmaps are compared; `stack` removes the copies that are made of them at the instant."""
        bitmaps = await self._bitmaps(part.node)
        if stored:
            part.persistent = tuple(
                name for name, each in bitmaps.items() if each.persistent and not each.inconsistent and not each.busy
            )
        for name in part.recorded:
            if name not in bitmaps or not bitmaps[name].recording or bitmaps[name].busy:
                continue
            copy = bitmap_name(self.place.run, next(self.place.numbers))
            work = partial(remove_bitmap, self.place.monitor, part.node, copy)
            stack.push_async_callback(self.place.take_down.step, f"bitmap {copy} of node {part.node}", work)
            part.copies.append(Copied(name, copy))
            part.actions += _copying(part.node, name, copy, bitmaps[name].granularity)

    async def _judged(self, parts: Sequence[_Part], wishes: Wishes) -> Statement:
        async def before(offers: Sequence[Offer]) -> None:
            for part, offer in zip(parts, offers, strict=True):
                await self._tried(part, partial(part.judge.before, offer))

        wishes = replace(
            wishes,
            bitmaps={part.disk.name: [*part.persistent, *(each.copy for each in part.copies)] for part in parts},
            actions={part.disk.name: part.actions for part in parts},
        )
        async with self._held(wishes, before) as point:
            for part, offer in zip(parts, point.offers, strict=True):
                await self._tried(part, partial(self._judge, part, offer))
        return point.statement

    async def _judge(self, part: _Part, offer: Offer) -> None:
        began = time.monotonic()
        former = None
        if part.blocks is not None:
            former = Former(part.blocks, tuple(part.copies), f"against what changed in {self.terms.change_seconds:g} s")
        findings = await part.judge.judge(offer, part.persistent, former)
        part.findings = findings, await explained(findings, self.terms.listed, self.place.deadline)
        part.seconds = time.monotonic() - began

    async def _tried(self, part: _Part, work: Callable[[], Awaitable[None]]) -> None:
        """Does something for a disk; that it cannot be done does not keep the others from being judged."""
        if part.error is not None:
            return
        try:
            await work()
        except QmpnbdError as error:
            if len(self.disks) == 1:
                raise
            part.error = error

    @asynccontextmanager
    async def _held(self, wishes: Wishes, before: Before | None = None) -> AsyncIterator[PointInTime]:
        place, names = self.place, [disk.name for disk in self.disks]
        try:
            async with point_in_time(
                place.monitor, names, self.directory, place.deadline, wishes=wishes, before=before
            ) as point:
                yield point
        except LeftBehindError as error:
            place.take_down.left.append(error.what)  # what was read is good all the same

    async def _bitmaps(self, node_name: str) -> dict[str, BlockDirtyInfo]:
        """Returns the bitmaps of a node that are no scaffolding of a run of ours."""
        nodes = await read_nodes(self.place.monitor, self.place.deadline)
        found = [each for node in nodes if node.node_name == node_name for each in node.dirty_bitmaps]
        return {each.name: each for each in found if each.name and run_of(each.name) is None}

    def _report(self, part: _Part, statement: Statement) -> DiskReport:
        if part.error is not None or part.findings is None:
            error = part.error or InterferenceError("it was not judged", where=f"disk {part.disk.name}")
            return failed_disk_report(part.disk, error)
        findings, reasons = part.findings
        if self.terms.change_seconds is not None:
            findings.bitmaps += _left_out(part)
        report = disk_report(part.disk, findings, reasons, self.terms.listed, part.seconds)
        return report.model_copy(update={"instant": instant_entry(statement)})


def _copying(node: str, name: str, copy: str, granularity: int) -> list[Mapping[str, object]]:
    """Returns the transaction actions that copy a bitmap into a new one, which does not record."""
    made = {"node": node, "name": copy, "granularity": granularity, "persistent": False, "disabled": True}
    merged = {"node": node, "target": copy, "bitmaps": [name]}
    return [
        {"type": "block-dirty-bitmap-add", "data": made},
        {"type": "block-dirty-bitmap-merge", "data": merged},
    ]


def _left_out(part: _Part) -> list[MapFinding]:
    """Tells which bitmaps could not be compared with what changed."""
    if not part.recorded:
        return [MapFinding(BITMAPS, None, None, "no bitmap records on this disk")]
    lost = sorted(set(part.recorded) - {each.name for each in part.copies})
    return [MapFinding(BITMAPS, None, None, f"{name} did not record all the time") for name in lost]
