"""Filling a dirty bitmap from extents: of an allocation depth, of a list, or where two images differ.

The guest goes on writing meanwhile, so in this order nothing is lost::

    1. the bitmap records: the one to be filled, or else one of ours on the same node
    2. the extents are looked at
    3. they are written to a scratch node (`qmpnbd.qmp.populate`), whose bitmap is compared with what was written
    4. one transaction merges them (and ours, and gives the new bitmap its name)

What the guest wrote before 1 is in the extents, what it wrote later is in the recording bitmap.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count

from qmpnbd.control.difference import differing
from qmpnbd.control.ranges import DepthRange, Range, granules, ranges_of, rounded_out
from qmpnbd.deadline import Deadline
from qmpnbd.errors import BitmapError, LeftBehindError, UsageError
from qmpnbd.export.addresses import shared_server
from qmpnbd.nbd.aio import Client
from qmpnbd.nbd.constants import ALLOCATION_DEPTH as DEPTH
from qmpnbd.nbd.uri import NbdUri
from qmpnbd.qmp.bitmaps import add_bitmap, remove_bitmap, transact
from qmpnbd.qmp.checkpoint_plan import require_granularity
from qmpnbd.qmp.checkpoint_state import layers_of, transient_because
from qmpnbd.qmp.disks import find_disk
from qmpnbd.qmp.exports import ExportOptions, add_export, remove_export
from qmpnbd.qmp.inventory import (
    read_inventory,
    read_nodes,
    require_no_iothread_bug,
    require_safe_moment,
)
from qmpnbd.qmp.models import BlockDirtyInfo
from qmpnbd.qmp.monitor import Monitor
from qmpnbd.qmp.naming import bitmap_name, export_id, run_of
from qmpnbd.qmp.populate import (
    Scratch,
    add_scratch,
    birth_actions,
    find_bitmap,
    merge_actions,
    remove_scratch,
    require_marked,
)
from qmpnbd.qmp.recover import remove_leftovers
from qmpnbd.qmp.rundir import RunDirectory
from qmpnbd.qmp.server import STOP_SECONDS, start_server, stop_server
from qmpnbd.qmp.teardown import TakeDown
from qmpnbd.validate.live import in_thread
from qmpnbd.validate.window import Place, open_window

log = logging.getLogger(__name__)

DEFAULT_SECONDS = 600.0

DEFAULT_GRANULARITY = 65536
"""Of a bitmap that is made here: QEMU's own choice for most images."""

MAX_NAME = 1023
"""Bytes of a bitmap's name that QEMU takes."""

_WRITERS = 64
"""Requests in flight."""

_WRITABLE = ExportOptions(writable=True, allocation_depth=False)


@dataclass(frozen=True, slots=True)
class ListedExtents:
    """Extents that are known already.

    Attributes:
        ranges: sorted and joined.
        where: where they come from.
    """

    ranges: Sequence[Range]
    where: str

    def __str__(self) -> str:
        return self.where


@dataclass(frozen=True, slots=True)
class ImageDifference:
    """The extents where two images differ.

    Attributes:
        first: an image.
        second: another of the same size.
    """

    first: str
    second: str

    def __str__(self) -> str:
        return f"difference of {self.first} and {self.second}"


Source = DepthRange | ListedExtents | ImageDifference


@dataclass(frozen=True, slots=True)
class Filling:
    """Which bitmap to fill, and how.

    Attributes:
        disk: qdev id, QOM path or node-name.
        bitmap: name of the bitmap on the disk's active layer; made if there is none.
        source: where the extents come from; a `DepthRange` means those depths of the disk itself, now.
        granularity: bytes, of a bitmap that is made; None for `DEFAULT_GRANULARITY`.
        transient: make a bitmap that vanishes with QEMU even where one could be stored.
        seconds: time for everything; None for no bound. Taking down has its own time.
        nbd: URI of the NBD server this QEMU runs already, to be shared; None to start one.
        runtime_dir: where the private directory is made; None for the folder for temporary files.
        allow_iothread: work on disks in an iothread although this QEMU is known to abort on them.
    """

    disk: str
    bitmap: str
    source: Source
    granularity: int | None = None
    transient: bool = False
    seconds: float | None = DEFAULT_SECONDS
    nbd: str | None = None
    runtime_dir: str | None = None
    allow_iothread: bool = False


@dataclass(frozen=True, slots=True)
class Filled:
    """What was done.

    Attributes:
        where: the monitor.
        qemu: QEMU's version.
        filling: what was asked for.
        node_name: the node that the bitmap belongs to.
        created: whether the bitmap was made.
        bitmap: the bitmap afterwards.
        extents: how many ranges were filled in, rounded out to the granularity.
        filled_bytes: their bytes.
    """

    where: str
    qemu: str
    filling: Filling
    node_name: str
    created: bool
    bitmap: BlockDirtyInfo
    extents: int
    filled_bytes: int


def populate(monitor: str, filling: Filling) -> Filled:
    """Fills a dirty bitmap of a running QEMU; the blocking twin of `populate_bitmap`."""
    return asyncio.run(populate_bitmap(monitor, filling))


async def populate_bitmap(monitor: str, filling: Filling) -> Filled:
    """Fills a dirty bitmap of a running QEMU; what it marks already stays marked.

    Args:
        monitor: where QEMU's monitor listens.
        filling: which bitmap, and from what.

    Raises:
        UsageError: a name, granularity or extent that cannot be.
        BitmapError: the bitmap is in use or inconsistent.
        LeftBehindError: it was done, but something of ours could not be taken down.
        QmpnbdError: see `qmpnbd.errors`; nothing was changed then, and whatever was made in QEMU is gone again, or the
            error's notes tell what is left.
    """
    deadline = Deadline(filling.seconds)
    require_granularity(filling.granularity)
    _require_name(filling.bitmap)
    async with await Monitor.connect(monitor, deadline) as connected:
        take_down = TakeDown(connected.has_gone)
        try:
            filled = await _Work(connected, filling, take_down, deadline).run()
        except BaseException as error:
            for note in take_down.left:
                error.add_note(note)
            raise
        if take_down.left:
            raise LeftBehindError(
                f"the bitmap is filled, but: {'; '.join(take_down.left)}",
                where=connected.where,
                remedy="The next run with the same --runtime-dir takes it down.",
            )
        return filled


def _require_name(name: str) -> None:
    if not 1 <= len(name.encode()) <= MAX_NAME or run_of(name) is not None:
        raise UsageError(
            "not a name for a bitmap",
            where=name,
            remedy=f"Use 1 to {MAX_NAME} bytes, and not a name of the form that qmpnbd's temporary bitmaps have.",
        )


@dataclass(frozen=True, slots=True)
class _Target:
    node: str
    size: int
    granularity: int
    found: BlockDirtyInfo | None
    storable: bool


class _Work:
    """One run."""

    def __init__(self, monitor: Monitor, filling: Filling, take_down: TakeDown, deadline: Deadline) -> None:
        self._monitor = monitor
        self._filling = filling
        self._take_down = take_down
        self._deadline = deadline

    async def run(self) -> Filled:
        monitor, filling, deadline = self._monitor, self._filling, self._deadline
        for removed in await remove_leftovers(monitor, filling.runtime_dir, deadline):
            log.warning("took down what a killed run had left: %s", removed)
        await require_safe_moment(monitor, deadline)
        target = await self._target()
        async with AsyncExitStack() as stack:
            place = await stack.enter_async_context(self._place())
            # From here on writes are recorded, so the extents may be looked at.
            watch = await self._watched(stack, place, target) if target.found is None else None
            found = await self._extents(place, target)
            ranges = rounded_out(found, target.granularity, target.size, str(filling.source))
            scratch = await self._written(stack, place, target, ranges)
            await transact(monitor, self._merge(target, scratch, watch), deadline)
        bitmap = await find_bitmap(monitor, target.node, filling.bitmap, deadline)
        if bitmap is None:
            raise BitmapError("somebody has removed the bitmap", where=f"node {target.node}", remedy="Run again.")
        return Filled(
            where=monitor.where,
            qemu=str(monitor.version),
            filling=filling,
            node_name=target.node,
            created=target.found is None,
            bitmap=bitmap,
            extents=len(ranges),
            filled_bytes=sum(end - offset for offset, end in ranges),
        )

    async def _target(self) -> _Target:
        monitor, filling, deadline = self._monitor, self._filling, self._deadline
        inventory = await read_inventory(monitor, deadline)
        disk = find_disk(filling.disk, inventory.disks, inventory.graph, where=monitor.where, empty=inventory.empty)
        if not filling.allow_iothread:
            await require_no_iothread_bug(monitor, disk.node_name, inventory, deadline)
        node = next(iter(layers_of(inventory.graph, disk.node_name)), disk.node_name)
        info = next((each for each in await read_nodes(monitor, deadline) if each.node_name == node), None)
        if info is None:
            raise BitmapError("the node has just gone", where=f"node {node}", remedy="Run again.")
        found = next((each for each in info.dirty_bitmaps if each.name == filling.bitmap), None)
        if found is not None:
            _require_usable(found, filling, node)
        granularity = found.granularity if found is not None else filling.granularity or DEFAULT_GRANULARITY
        storable = not transient_because(info) and not filling.transient
        return _Target(node, info.image.virtual_size, granularity, found, storable)

    @asynccontextmanager
    async def _place(self) -> AsyncIterator[Place]:
        """Yields where to work: a run of our own, and a server for its exports."""
        monitor, filling = self._monitor, self._filling
        async with AsyncExitStack() as stack:
            create = partial(RunDirectory.create, filling.runtime_dir, for_peer=monitor.peer)
            directory = stack.enter_context(create())
            server = shared_server(filling.nbd) if filling.nbd else NbdUri.unix(str(directory.socket_path), "")
            if not filling.nbd:
                stop = partial(self._stop_server, directory)
                stack.push_async_callback(self._take_down.step, "the NBD server", stop, STOP_SECONDS)
                await start_server(monitor, directory, self._deadline)
            # Number 0 of each kind is the scratch node's.
            yield Place(monitor, server, directory.run, count(1), self._take_down, self._deadline)

    async def _stop_server(self, directory: RunDirectory, deadline: Deadline) -> None:
        if not await stop_server(self._monitor, directory, deadline):
            self._take_down.left.append(f"the NBD server at {directory.socket_path}: others have exports in it")

    async def _watched(self, stack: AsyncExitStack, place: Place, target: _Target) -> str:
        name = bitmap_name(place.run, next(place.numbers))
        work = partial(remove_bitmap, self._monitor, target.node, name)
        stack.push_async_callback(self._take_down.step, f"bitmap {name} of node {target.node}", work)
        await add_bitmap(self._monitor, target.node, name, self._deadline, granularity=target.granularity)
        return name

    async def _extents(self, place: Place, target: _Target) -> Sequence[Range]:
        source = self._filling.source
        if isinstance(source, ListedExtents):
            return source.ranges
        if isinstance(source, ImageDifference):
            work = partial(differing, source.first, source.second, target.granularity, self._deadline)
            return await in_thread(work, self._deadline)
        async with AsyncExitStack() as stack:
            window = await open_window(place, stack, target.node, [DEPTH])
            served = await window.client.maps(deadline=self._deadline)
        return list(ranges_of(served[DEPTH], source))

    async def _written(self, stack: AsyncExitStack, place: Place, target: _Target, ranges: Sequence[Range]) -> Scratch:
        """Returns a scratch node, to be removed by `stack`, whose bitmap marks the ranges."""
        monitor, deadline = self._monitor, self._deadline
        scratch, name = Scratch.of_run(place.run), export_id(place.run, 0)
        stack.push_async_callback(
            self._take_down.step, f"node {scratch.node}", partial(remove_scratch, monitor, scratch)
        )
        await add_scratch(monitor, scratch, target.size, target.granularity, deadline)
        async with AsyncExitStack() as window:
            window.push_async_callback(self._take_down.step, f"export {name}", partial(remove_export, monitor, name))
            await add_export(monitor, scratch.node, name, deadline, _WRITABLE)
            async with await Client.connect(replace(place.server, export=name), deadline=deadline) as client:
                await write_zeroes(client, ranges, deadline)
        await require_marked(monitor, scratch, granules(ranges, target.granularity), deadline)
        return scratch

    def _merge(self, target: _Target, scratch: Scratch, watch: str | None) -> list[dict[str, object]]:
        name = self._filling.bitmap
        if watch is None:
            return merge_actions(target.node, name, scratch)
        granularity, storable = target.granularity, target.storable
        return birth_actions(target.node, name, scratch, watch, granularity=granularity, persistent=storable)


def _require_usable(bitmap: BlockDirtyInfo, filling: Filling, node: str) -> None:
    problem = remedy = ""
    if bitmap.inconsistent:
        problem, remedy = "is inconsistent: QEMU did not end well", "It can only be removed; then it is made anew."
    elif bitmap.busy:
        problem, remedy = "is in use by an export or a job", "End that first."
    elif filling.granularity not in (None, bitmap.granularity):
        problem, remedy = f"has the granularity {bitmap.granularity}", "Leave --granularity out, or name a new bitmap."
    if problem:
        raise BitmapError(f"the bitmap {filling.bitmap} {problem}", where=f"node {node}", remedy=remedy)


async def write_zeroes(client: Client, ranges: Iterable[Range], deadline: Deadline) -> None:
    """Writes zeroes to ranges, many requests in flight.

    Raises:
        NbdError: one failed; others may have been done.
        DeadlineError: the time is over.
    """
    todo = iter(ranges)

    async def work() -> None:
        for offset, end in todo:
            await client.write_zeroes(offset, end - offset, deadline=deadline)

    writers = [asyncio.ensure_future(work()) for _ in range(_WRITERS)]
    try:
        await asyncio.gather(*writers)
    finally:
        for writer in writers:
            writer.cancel()
        await asyncio.gather(*writers, return_exceptions=True)
