"""Reading the allocation depth that a disk had at a point in time.

::

    reader = DepthReader(server, deadline)
    async with point_in_time(monitor, disks, directory, deadline, before=reader.before) as point:
        for offer in point.offers:
            found = await reader.at_instant(offer)

How it is composed, and what of it is presumed, is told in `qmpnbd.qmp.depth_at`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qmpnbd.deadline import Deadline
from qmpnbd.extents import ExtentMap
from qmpnbd.nbd.aio import Client
from qmpnbd.nbd.uri import NbdUri
from qmpnbd.qmp.depth_at import InstantDepth, compose, exact
from qmpnbd.qmp.plan import Offer

DEPTH = "qemu:allocation-depth"
DIRTY = "qemu:dirty-bitmap:"

_SECTOR = 512


class DepthReader:
    """Reads what is needed before the instant, keeps it, and composes the depth afterwards.

    Args:
        server: where the exports are; the export's name is filled in.
        deadline: for all of it.
    """

    def __init__(self, server: NbdUri, deadline: Deadline) -> None:
        self._server = server
        self._deadline = deadline
        self._before: dict[str, ExtentMap] = {}

    async def before(self, offers: Sequence[Offer]) -> None:
        """Reads the depth of every disk before the instant; to be handed to `point_in_time`.

        Raises:
            NbdError: an export cannot be read.
            DeadlineError: the time is over.
        """
        for offer in offers:
            if offer.before_export:
                async with await self._client(offer.before_export, [DEPTH]) as client:
                    self._before[offer.export] = (await client.maps(deadline=self._deadline))[DEPTH]

    async def at_instant(self, offer: Offer) -> InstantDepth:
        """Returns the depth of a disk at the instant.

        Raises:
            NbdError: an export cannot be read: the point in time may have been given up.
            DeadlineError: the time is over.
        """
        touch = DIRTY + offer.touch
        contexts = [DEPTH] if offer.depth_is_exact else [DEPTH, touch]
        async with await self._client(offer.depth_export, contexts) as client:
            first = await client.maps(deadline=self._deadline)
            if offer.depth_is_exact:
                return exact(first[DEPTH])
            again = await client.maps(contexts=[DEPTH], deadline=self._deadline)
        if offer.depth_export != offer.export:
            await self._require_unbroken(offer)
        return compose(self._before[offer.export], first[touch], first[DEPTH], again[DEPTH])

    async def _require_unbroken(self, offer: Offer) -> None:
        """Reads a sector of the content: a filter that gave up fails it, but its scratch shows depths still."""
        async with await self._client(offer.export, []) as client:
            await client.read(0, min(_SECTOR, offer.disk.size), deadline=self._deadline)

    async def _client(self, export: str, contexts: Sequence[str]) -> Client:
        uri = replace(self._server, export=export)
        return await Client.connect(uri, contexts=contexts, deadline=self._deadline)
