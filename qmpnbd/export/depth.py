"""Reading the allocation depth that a disk had at a point in time.

::

    async with DepthReader(monitor, server, deadline) as reader:
        async with point_in_time(monitor, disks, directory, deadline, before=reader.before) as point:
            for offer in point.offers:
                found = await reader.at_instant(offer)

How it is composed, and what of it is presumed, is told in `qmpnbd.qmp.depth_at`. `qmpnbd.export.session` does all of
this: `Session.allocation_depth`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self

from qmpnbd.deadline import Deadline
from qmpnbd.export.lasting import LastingClients
from qmpnbd.extents import ExtentMap
from qmpnbd.nbd.aio import Client
from qmpnbd.nbd.constants import ALLOCATION_DEPTH as DEPTH
from qmpnbd.nbd.tls import Tls
from qmpnbd.nbd.uri import NbdUri
from qmpnbd.qmp.depth_at import InstantDepth, compose, exact
from qmpnbd.qmp.monitor import Monitor
from qmpnbd.qmp.plan import Offer

DIRTY = "qemu:dirty-bitmap:"

_SECTOR = 512


class DepthReader:
    """Reads what is needed before the instant, keeps it, and composes the depth afterwards.

    An asynchronous context manager, to be entered before the point in time: its connections must outlast the exports.

    Args:
        monitor: of the QEMU.
        server: where the exports are; the export's name is filled in.
        deadline: for what is read before the instant.
        tls: how to be let in, where the server wants TLS.
    """

    def __init__(self, monitor: Monitor, server: NbdUri, deadline: Deadline, tls: Tls | None = None) -> None:
        self._server = server
        self._deadline = deadline
        self._tls = tls
        self._clients = LastingClients(monitor)
        self._before: dict[str, ExtentMap] = {}

    async def before(self, offers: Sequence[Offer]) -> None:
        """Reads the depth of every disk before the instant; to be handed to `point_in_time`.

        Raises:
            NbdError: an export cannot be read.
            DeadlineError: the time is over.
        """
        for offer in offers:
            if offer.before_export:
                client = await self._client(offer.before_export, [DEPTH], self._deadline)
                self._before[offer.export] = (await client.maps(deadline=self._deadline))[DEPTH]

    async def at_instant(self, offer: Offer, deadline: Deadline | None = None) -> InstantDepth:
        """Returns the depth of a disk at the instant; holds if the point in time ends without an error.

        Args:
            offer: what there is to read of the disk.
            deadline: for reading it; None for what is left of the reader's.

        Raises:
            NbdError: an export cannot be read: the point in time may have been given up.
            DeadlineError: the time is over.
        """
        until = deadline or self._deadline
        touch = DIRTY + offer.touch
        contexts = [DEPTH] if offer.depth_is_exact else [DEPTH, touch]
        client = await self._client(offer.depth_export, contexts, until)
        first = await client.maps(deadline=until)
        if offer.depth_is_exact:
            return exact(first[DEPTH])
        again = await client.maps(contexts=[DEPTH], deadline=until)
        await self._require_unbroken(offer, until)
        return compose(self._before[offer.export], first[touch], first[DEPTH], again[DEPTH])

    async def _require_unbroken(self, offer: Offer, deadline: Deadline) -> None:
        """Reads a sector of the content: a filter that gave up fails it, but its scratch shows depths still."""
        client = await self._client(offer.export, [], deadline)
        await client.read(0, min(_SECTOR, offer.disk.size), deadline=deadline)

    async def _client(self, export: str, contexts: Sequence[str], deadline: Deadline) -> Client:
        return await self._clients.connect(replace(self._server, export=export), contexts, deadline, self._tls)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._clients.close()
