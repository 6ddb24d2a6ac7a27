"""One disk of a running QEMU, and the rounds in which it is judged.

A round::

    graph    which node does the export stand on now, which files lie below        (an export follows the graph)
    watch    a dirty bitmap on every writable layer (`qmpnbd.validate.watch`)      (see below)
    served   the maps, over NBD
    flush    every writable layer, through a window of its own                     (QEMU flushes no backing files)
    files    the maps, computed                                                    (in a thread)
    served   again, if the two differ
    content  piece by piece: served, from the files, and served again if the two differ
    watch    what was written meanwhile
    graph    the same as before? else the round says nothing

The watch costs a little, and no discrepancy counts in the first round, so that goes without unless bytes are compared:
which of them have a hash is told by it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from itertools import islice
from pathlib import PurePosixPath
from typing import TypeVar

from qmpnbd.deadline import Deadline
from qmpnbd.errors import (
    CommandFailedError,
    DeadlineError,
    DiskNotLocalError,
    GraphUnsupportedError,
    ImageError,
    ImageUnsupportedError,
    InterferenceError,
    QmpnbdError,
)
from qmpnbd.extents import ExtentMap
from qmpnbd.images.chain import LayerSpec
from qmpnbd.images.files import open_layers
from qmpnbd.nbd.aio import Client
from qmpnbd.nbd.constants import ALLOCATION_DEPTH as DEPTH
from qmpnbd.nbd.constants import BASE_ALLOCATION
from qmpnbd.nbd.limits import Limits
from qmpnbd.qmp.exports import exported_node
from qmpnbd.qmp.graph import Link, below, chain_of
from qmpnbd.qmp.inventory import read_graph, require_safe_moment
from qmpnbd.qmp.monitor import Monitor
from qmpnbd.validate.choice import Choice
from qmpnbd.validate.findings import Findings, Served
from qmpnbd.validate.live_content import LiveContent
from qmpnbd.validate.reading import Explained, Reading, explain_all, read_chain
from qmpnbd.validate.releases import base_refusal, generation_of
from qmpnbd.validate.sample import both
from qmpnbd.validate.watch import Watch
from qmpnbd.validate.window import Place, Window, open_window

T = TypeVar("T")

_ROUND_ERRORS = (ImageError, GraphUnsupportedError, DiskNotLocalError, InterferenceError, CommandFailedError)
"""What can be an accident of a round, because something moved while it was looked at; twice running it is not."""


class Flusher:
    """Brings the tables of all layers that are written to their files.

    A flush through an export reaches the exported node and the files under it, but not its backing files; so each
    writable layer below gets a window of its own.

    Args:
        place: where.
        stack: closes the windows.
    """

    def __init__(self, place: Place, stack: AsyncExitStack) -> None:
        self._place = place
        self._stack = stack
        self._windows: dict[str, Window] = {}

    async def flush(self, links: Sequence[Link], top: Client) -> None:
        """Flushes a chain, bottom up.

        Args:
            links: its layers.
            top: of an export of the first of them.

        Raises:
            QmpnbdError: a layer cannot be flushed.
        """
        for link in reversed(links[1:]):
            if not link.writable:
                continue
            if link.node_name not in self._windows:
                self._windows[link.node_name] = await open_window(self._place, self._stack, link.node_name, [DEPTH])
            await self._windows[link.node_name].client.flush(self._place.deadline)
        await top.flush(self._place.deadline)


class LiveDisk:
    """A disk that is being judged; made by `judge`."""

    def __init__(self, place: Place, stack: AsyncExitStack, window: Window, choice: Choice) -> None:
        self._place = place
        self._stack = stack
        self._window = window
        self._flusher = Flusher(place, stack)
        refused = base_refusal(place.monitor.version)
        self._generation = generation_of(place.monitor.version) if choice.base and not refused else None
        self._hashing = choice.content != "none"
        self._content = LiveContent(choice)
        self._findings = Findings(window.client.export.size, choice, refused, self._content)

    @classmethod
    async def judge(
        cls, place: Place, node_name: str, rounds: int, listed: int, choice: Choice
    ) -> tuple[Findings, list[Explained]]:
        """Exports a node, judges it, and takes everything down.

        Args:
            place: where.
            node_name: the node that the disk stands on.
            rounds: at most so many.
            listed: how many discrepancies to explain.
            choice: what to compare beside the allocation depth.

        Raises:
            QmpnbdError: the disk cannot be judged.
        """
        async with AsyncExitStack() as stack:
            contexts = [DEPTH, BASE_ALLOCATION] if choice.base else [DEPTH]
            window = await open_window(place, stack, node_name, contexts)
            disk = cls(place, stack, window, choice)
            try:
                for number in range(rounds):
                    await disk._attempt(final=number > 0)
                    if disk._findings.settled:
                        break
            except DeadlineError:
                if not disk._findings.discrepancy_totals()[0]:
                    raise  # what has been found is worth more than what could not be finished
            return disk._findings, await explained(disk._findings, listed, place.deadline)

    async def _attempt(self, *, final: bool) -> None:
        try:
            async with AsyncExitStack() as stack:
                await self._round(stack, final=final)
        except _ROUND_ERRORS as error:
            self._findings.add_failure(error)

    async def _round(self, stack: AsyncExitStack, *, final: bool) -> None:
        watched = final or self._hashing
        place, deadline = self._place, self._place.deadline
        await require_safe_moment(place.monitor, deadline)
        node_name = await self._exported_node()
        graph = await read_graph(place.monitor, deadline)
        links = chain_of(graph, node_name)
        writable = [link.node_name for link in links if link.writable]
        watch = Watch(place, stack)
        for node in writable if watched else ():
            await watch.begin(node)
        before = await self._served()
        await self._flusher.flush(links, self._window.client)
        specs = specs_of(links, place.monitor)
        reading = await self._computed(specs)
        after = None if before.agrees(reading) else await self._served()
        if reading.depth.size == before.depth.size and not self._findings.content.settled:
            await self._read_content(specs, both(reading.depth, before.depth))
        touched = await watch.touched(self._findings.size) if watched else None
        now = below(await read_graph(place.monitor, deadline), await self._exported_node())
        if now != below(graph, node_name):
            self._findings.add_void()
            return
        self._content.hashes.settle(touched)
        touched = touched if final else None  # what differs for the first time is looked at once more
        self._findings.add(reading, before, after, touched, verified=same_files(reading, place.monitor))

    async def _exported_node(self) -> str:
        """Returns the node that our export stands on now: it follows the graph, so its node-name changes."""
        return await exported_node(self._place.monitor, self._window.export, self._place.deadline)

    async def _served(self) -> Served:
        limits = Limits(in_flight=1)  # a live disk has several layers nearly always
        maps = await self._window.client.maps(deadline=self._place.deadline, limits=limits)
        return Served(maps[DEPTH], maps.get(BASE_ALLOCATION))

    async def _read_content(self, specs: Sequence[LayerSpec], depth: ExtentMap) -> None:
        client, deadline, content = self._window.client, self._place.deadline, self._content
        with await in_thread(partial(open_layers, specs, deadline=deadline), deadline) as chain:

            async def served(offset: int, length: int) -> bytearray:
                return await client.read(offset, length, deadline=deadline)

            async def computed(offset: int, length: int) -> bytearray:
                self._place.on_bytes(length, content.bytes)
                return await in_thread(partial(chain.read, offset, length), deadline)

            try:
                await content.read(depth, client.export.minimum_block, served, computed)
            except ImageUnsupportedError as error:
                content.give_up(error.what)

    async def _computed(self, specs: Sequence[LayerSpec]) -> Reading:
        return await in_thread(partial(read_chain, specs, self._place.deadline, self._generation), self._place.deadline)


def same_files(reading: Reading, monitor: Monitor) -> bool:
    """Returns whether QEMU is seen to have the files open that were read; False where the kernel does not tell.

    Raises:
        DiskNotLocalError: it has others.
    """
    open_files = monitor.peer.open_files() if monitor.peer is not None else None
    if open_files is None:
        return False
    for layer, identity in zip(reading.layers, reading.identities, strict=True):
        if identity not in open_files:
            raise DiskNotLocalError(
                "the file of this name is not the one that QEMU has open: it was replaced under QEMU, or QEMU sees "
                "other files under the same names",
                where=layer.path,
                remedy="`qmpnbd map` still shows what is served.",
            )
    return True


async def explained(findings: Findings, listed: int, deadline: Deadline) -> list[Explained]:
    """Returns the first discrepancies of the allocation depth, with the table entries that decide.

    Where the guest has changed these meanwhile, they are no reason any more, and left out.
    """
    found = list(islice(findings.discrepancies(), listed))
    reading = findings.reading
    if not found or reading is None:
        return []
    try:
        reasons = await in_thread(partial(explain_all, reading.specs, found, deadline), deadline)
    except QmpnbdError:
        return [Explained(each, None) for each in found]  # the finding stands without its reason
    return [each if _holds(each) else Explained(each.discrepancy, None) for each in reasons]


def _holds(each: Explained) -> bool:
    return each.explanation is None or each.explanation.allocation_depth == each.discrepancy.computed


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


def specs_of(links: Sequence[Link], monitor: Monitor) -> tuple[LayerSpec, ...]:
    """Returns which files to read for a chain inside QEMU, and how.

    Raises:
        DiskNotLocalError: a file cannot be found from here.
    """
    if not monitor.is_local:
        raise DiskNotLocalError(
            "QEMU is on another host, so its files cannot be read here",
            where=monitor.where,
            remedy="Run qmpnbd on that host; `qmpnbd map` works from here.",
        )
    working_directory = monitor.peer.working_directory() if monitor.peer is not None else None
    return tuple(_spec(link, working_directory) for link in links)


def _spec(link: Link, working_directory: str | None) -> LayerSpec:
    return LayerSpec(
        path=_path(link.filename, link.node_name, working_directory),
        format=link.format,
        allocation_depth=link.allocation_depth,
        node_name=link.node_name,
        offset=link.offset,
        size=link.size,
        data_file=_path(link.data_file, link.node_name, working_directory) if link.data_file else "",
    )


def _path(name: str, node_name: str, working_directory: str | None) -> str:
    problem = None
    if name.startswith("/dev/fdset/"):
        problem = "the image was handed to QEMU as an open file, so its name is not known"
    elif "\ufffd" in name:
        problem = "the image's name is not valid UTF-8, and QEMU cannot tell such a name"
    elif not name.startswith("/") and working_directory is None:
        problem = "the image has a relative name, and QEMU's working directory is not known"
    if problem is not None:
        raise DiskNotLocalError(
            problem,
            where=f"node {node_name} ({name})",
            remedy="Start QEMU with absolute names in UTF-8; `qmpnbd map` still shows what is served.",
        )
    return str(PurePosixPath(working_directory or "/", name))
