"""One disk of a running QEMU at a point in time: the guest goes on, and what is judged stands still.

::

    before the instant   served and files of the disk itself, while a bitmap records    (not for recipe snapshot)
    the instant
    served               depth and base:allocation over NBD
    flush                every layer that is written
    files                the same, computed
    served, files        what the scratch image holds by now
    content              see `qmpnbd.validate.instant_content`
    bitmaps              persistent ones against the image, where that stands still     (recipe snapshot)
                         all that recorded against what changed since an earlier instant

What each recipe allows to be compared is told in docs/validation.md.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from qmpnbd.deadline import Deadline
from qmpnbd.errors import ImageCorruptError, ImageTruncatedError, ImageUnsupportedError
from qmpnbd.export.lasting import LastingClients
from qmpnbd.extents import ExtentMap
from qmpnbd.images.chain import LayerSpec
from qmpnbd.images.files import open_layers
from qmpnbd.nbd.aio import Client
from qmpnbd.nbd.constants import ALLOCATION_DEPTH as DEPTH
from qmpnbd.nbd.constants import BASE_ALLOCATION
from qmpnbd.nbd.limits import Limits
from qmpnbd.nbd.transfer import READ_PIECE
from qmpnbd.qmp.exports import exported_node
from qmpnbd.qmp.graph import Link, chain_of
from qmpnbd.qmp.inventory import read_graph
from qmpnbd.qmp.plan import Offer
from qmpnbd.validate.changes import Blocks, misses
from qmpnbd.validate.choice import Choice
from qmpnbd.validate.compare import MapFinding, compared
from qmpnbd.validate.composed import Side
from qmpnbd.validate.content_judgement import Range
from qmpnbd.validate.findings import Findings, Served
from qmpnbd.validate.instant_content import InstantContent
from qmpnbd.validate.live import Flusher, in_thread, same_files, specs_of
from qmpnbd.validate.reading import Reading, read_chain
from qmpnbd.validate.releases import base_refusal, generation_of
from qmpnbd.validate.sample import both
from qmpnbd.validate.watch import DIRTY
from qmpnbd.validate.window import Place

T = TypeVar("T")

BITMAPS = "bitmaps"
"""What is compared, where no bitmap can be named."""

_ATTEMPTS = 5
"""How often files are read that cannot be understood, because the guest is writing them just now."""

_LIMITS = Limits(in_flight=1)  # a disk with a scratch image has several layers


@dataclass(frozen=True, slots=True)
class Copied:
    """A bitmap that recorded, copied at the instant; the copy stands still.

    Attributes:
        name: the bitmap's.
        copy: the copy's.
    """

    name: str
    copy: str


@dataclass(frozen=True, slots=True)
class Former:
    """What is known of a disk at an earlier instant.

    Attributes:
        blocks: its content.
        bitmaps: copies of what has recorded since; made at the later instant.
        words: when that was, for people.
    """

    blocks: Blocks
    bitmaps: tuple[Copied, ...]
    words: str


class InstantDisk:
    """Judges a disk at a point in time.

    Args:
        place: where.
        stack: closes the clients: only after the exports are gone, or QEMU 7.2 may abort.
        choice: what to compare.
    """

    def __init__(self, place: Place, stack: AsyncExitStack, choice: Choice) -> None:
        self._place = place
        self._stack = stack
        self._choice = choice
        self._refused = base_refusal(place.monitor.version)
        self._with_base = choice.base and not self._refused
        self._generation = generation_of(place.monitor.version) if self._with_base else None
        self._before: tuple[Served, Reading] | None = None

    async def before(self, offer: Offer) -> None:
        """Reads both sides of the disk itself before the instant, while what is written is recorded.

        Raises:
            QmpnbdError: one side cannot be read.
        """
        if not offer.before_export:
            return
        client = await self.client(offer.before_export, self._contexts())
        async with AsyncExitStack() as windows:  # those stand on the disk's node, and must be gone at the instant
            flusher = Flusher(self._place, windows)
            links = await self._links(offer.disk.node_name)
            served = await self._served(client)
            await flusher.flush(links, client)
            self._before = served, await self._computed(specs_of(links, self._place.monitor))

    async def judge(self, offer: Offer, persistent: Sequence[str], former: Former | None) -> Findings:
        """Judges the disk.

        Args:
            offer: what there is to read.
            persistent: bitmaps to be compared with those in the image.
            former: to compare bitmaps with what has changed since; None for nothing.

        Raises:
            QmpnbdError: one side cannot be read: the point in time may have been given up.
        """
        touch = [DIRTY + offer.touch] if offer.touch else []
        client = await self.client(offer.depth_export, [*self._contexts(), *touch])
        bits = [DIRTY + name for name in persistent]
        copies = [DIRTY + each.copy for each in former.bitmaps] if former is not None else []
        reader = await self.client(offer.export, [*bits, *copies])
        content = InstantContent(self._choice)
        findings = Findings(client.export.size, self._choice, self._refused, content)
        async with AsyncExitStack() as windows:
            flusher = Flusher(self._place, windows)
            links = await self._links(await self._node(offer.depth_export))
            flush = partial(flusher.flush, links, client)
            specs = specs_of(links, self._place.monitor)
            await self._maps(findings, offer, client, specs, flush)
            if findings.sizes_differ:
                return findings
            if not content.settled and findings.served is not None and findings.reading is not None:
                files = _Files(specs, self._place.deadline, findings.size, exact=offer.depth_is_exact)
                await self._content(content, both(findings.reading.depth, findings.served), reader, files, flush)
            for name in persistent:
                findings.bitmaps.append(await self._persistent(reader, specs, name))
            if former is not None:
                findings.bitmaps += await self._changed(reader, former)
        return findings

    async def client(self, export: str, contexts: Sequence[str]) -> Client:
        """Connects to an export; the connection is closed at the very end.

        Raises:
            NbdError: it cannot be used.
            DeadlineError: the time is over.
        """
        uri = replace(self._place.server, export=export)
        clients = LastingClients(self._place.monitor)
        self._stack.push_async_callback(clients.close)
        return await clients.connect(uri, contexts, self._place.deadline)

    def _contexts(self) -> list[str]:
        return [DEPTH, BASE_ALLOCATION] if self._with_base else [DEPTH]

    async def _links(self, node_name: str) -> tuple[Link, ...]:
        return chain_of(await read_graph(self._place.monitor, self._place.deadline), node_name)

    async def _node(self, export: str) -> str:
        return await exported_node(self._place.monitor, export, self._place.deadline)

    async def _served(self, client: Client) -> Served:
        maps = await client.maps(contexts=self._contexts(), deadline=self._place.deadline, limits=_LIMITS)
        return Served(maps[DEPTH], maps.get(BASE_ALLOCATION))

    async def _computed(self, specs: Sequence[LayerSpec]) -> Reading:
        deadline = self._place.deadline
        return await in_thread(partial(_settled, partial(read_chain, specs, deadline, self._generation)), deadline)

    async def _maps(
        self,
        findings: Findings,
        offer: Offer,
        client: Client,
        specs: Sequence[LayerSpec],
        flush: Callable[[], Awaitable[None]],
    ) -> None:
        served = await self._served(client)
        await flush()
        reading = await self._computed(specs)
        verified = same_files(reading, self._place.monitor)
        nothing = ExtentMap.uniform(findings.size, 0)
        if self._before is None or reading.depth.size != findings.size:
            for _ in range(1 if reading.depth.size == findings.size else 2):  # what stands still is as if seen twice
                findings.add(reading, served, served, nothing, verified=verified)
            return
        told_before, own_before = self._before
        more = await client.maps(contexts=[DEPTH, DIRTY + offer.touch], deadline=self._place.deadline, limits=_LIMITS)
        await flush()  # now the scratch's tables tell of everything that was different when the files were read
        held = await in_thread(partial(_settled, partial(_held, specs, self._place.deadline)), self._place.deadline)
        touched = more[DIRTY + offer.touch]
        told, presumed = Side(told_before, served, more[DEPTH]).at_instant(touched)
        sides = Side(Served(own_before.depth, own_before.base), Served(reading.depth, reading.base), held)
        own, also_presumed = sides.at_instant(touched)
        unknown = presumed.combine(also_presumed, lambda one, other: one | other)
        composed = replace(own_before, depth=own.depth, base=own.base)
        findings.add(composed, told, told, unknown, verified=verified)
        findings.leave_open(unknown)

    async def _content(
        self,
        content: InstantContent,
        depth: ExtentMap,
        client: Client,
        files: _Files,
        flush: Callable[[], Awaitable[None]],
    ) -> None:
        deadline = self._place.deadline

        async def served(offset: int, length: int) -> bytearray:
            self._place.on_bytes(length, content.bytes)
            return await client.read(offset, length, deadline=deadline)

        async def read(ranges: Sequence[Range]) -> list[bytearray]:
            return await in_thread(partial(_settled, partial(files.read, ranges)), deadline)

        async def again(ranges: Sequence[Range]) -> list[tuple[bytearray, ExtentMap]]:
            await flush()
            return await in_thread(partial(_settled, partial(files.read_again, ranges)), deadline)

        try:
            await content.read(depth, client.export.minimum_block, served, read, again)
        except ImageUnsupportedError as error:
            content.give_up(error.what)

    async def _persistent(self, client: Client, specs: Sequence[LayerSpec], name: str) -> MapFinding:
        """Compares a bitmap as it is served with what the image holds."""
        context, deadline = DIRTY + name, self._place.deadline
        served = (await client.maps(contexts=[context], deadline=deadline))[context]

        def read() -> MapFinding:
            with open_layers(specs, deadline=deadline) as chain:
                stored = {info.name: info for info in chain.bitmaps(0)}
                if name not in stored or stored[name].inconsistent:
                    return MapFinding(context, served, None, "QEMU has not stored it")
                return MapFinding(context, served, compared(served, chain.bitmap(0, name)), "against the image")

        return await in_thread(read, deadline)

    async def _changed(self, client: Client, former: Former) -> list[MapFinding]:
        """Compares bitmaps with what has changed since an earlier instant."""
        if client.export.size != former.blocks.size:
            why = f"the disk had {former.blocks.size} bytes at the earlier point in time, and has {client.export.size}"
            return [MapFinding(BITMAPS, None, None, why)]
        now = await read_blocks(client, former.blocks.block, self._place)
        changed = former.blocks.changed(now)
        found = []
        for each in former.bitmaps:
            context = DIRTY + each.copy
            dirty = (await client.maps(contexts=[context], deadline=self._place.deadline))[context]
            found.append(misses(each.name, changed, dirty, now.block, former.words))
        return found


@dataclass(frozen=True, slots=True)
class _Files:
    """The files of a disk and of the scratch image above it; blocking, run in a thread.

    Attributes:
        specs: which.
        deadline: for all of it.
        size: bytes of the disk.
        exact: there is no scratch image, the chain itself stands still.
    """

    specs: Sequence[LayerSpec]
    deadline: Deadline
    size: int
    exact: bool

    def read(self, ranges: Sequence[Range]) -> list[bytearray]:
        """Reads ranges."""
        with open_layers(self.specs, deadline=self.deadline) as chain:
            return [chain.read(offset, length) for offset, length in ranges]

    def read_again(self, ranges: Sequence[Range]) -> list[tuple[bytearray, ExtentMap]]:
        """Reads ranges, and what the scratch image holds of each."""
        with open_layers(self.specs, deadline=self.deadline) as chain:
            held = ExtentMap.uniform(self.size, 0) if self.exact else chain.allocated(0)
            return [(chain.read(at, length), held.clip(at, at + length)) for at, length in ranges]


def _held(specs: Sequence[LayerSpec], deadline: Deadline) -> ExtentMap:
    """Returns the allocation depth of the scratch image alone: 1 where it holds something."""
    with open_layers(specs, deadline=deadline) as chain:
        return chain.allocated(0)


def _settled(work: Callable[[], T]) -> T:
    """Reads files that are being written: a table that grew while it was read may look like a fault."""
    for _ in range(_ATTEMPTS - 1):
        with suppress(ImageCorruptError, ImageTruncatedError):
            return work()
    return work()


async def read_blocks(client: Client, block: int, place: Place) -> Blocks:
    """Reads a whole disk that stands still, and keeps its hashes.

    Raises:
        NbdError: it cannot be read.
        DeadlineError: the time is over.
    """
    size = client.export.size
    blocks = Blocks(size, block)
    async for offset, piece in client.chunks([(0, size)], size=max(block, READ_PIECE), deadline=place.deadline):
        blocks.add(offset, piece)
    return blocks
