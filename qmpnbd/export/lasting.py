"""NBD connections that outlast the exports they go to.

QEMU 7.2 aborts, guest and all, when a client leaves the export of a disk in an iothread; one that goes after its export
harms nobody. So what is connected here stays so until `LastingClients.close`, whatever becomes of the client: it may
give up because the server broke the protocol, or fail or be cancelled between the choice of the export, from which on
QEMU counts it as the export's, and the end of the handshake.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial

from qmpnbd.deadline import Deadline
from qmpnbd.export.joining import join
from qmpnbd.nbd.aio import Client
from qmpnbd.nbd.aio_stepwise import Negotiation
from qmpnbd.nbd.tls import Tls
from qmpnbd.nbd.uri import NbdUri
from qmpnbd.qmp.monitor import Monitor


class LastingClients:
    """Makes clients, and keeps their connections open.

    Args:
        monitor: of the QEMU whose exports they join (`qmpnbd.export.joining`).
    """

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._clients: dict[Client, int] = {}
        self._kept: list[int] = []

    async def connect(self, uri: NbdUri, contexts: Sequence[str], deadline: Deadline, tls: Tls | None = None) -> Client:
        """Connects to an export.

        Args:
            uri: the export.
            contexts: the metadata contexts to read maps of; all of them must be offered.
            deadline: how long it may take.
            tls: how to encrypt, completed by what the URI says.

        Raises:
            NbdError: the export cannot be used.
            MonitorError: QEMU is gone.
            DeadlineError: the time is over.
        """
        connect = partial(self._connected, uri, contexts, deadline, tls)
        return await join(connect, self._leave, self._monitor, deadline)

    async def _connected(self, uri: NbdUri, contexts: Sequence[str], deadline: Deadline, tls: Tls | None) -> Client:
        async with await Negotiation.connect(uri, tls=tls, deadline=deadline) as negotiation:
            if contexts:
                await negotiation.set_contexts(uri.export, contexts, deadline)
            kept = negotiation.duplicate()
            self._kept.append(kept)
            client = await negotiation.go(uri.export, deadline)
        self._clients[client] = kept
        return client

    async def _leave(self, client: Client) -> None:
        """Leaves although the export is there still: QEMU does not go on otherwise."""
        kept = self._clients.pop(client)
        self._kept.remove(kept)
        os.close(kept)
        await client.close()

    async def close(self) -> None:
        """Closes everything, once the exports are gone; may be called again."""
        while self._clients:
            await self._clients.popitem()[0].close()
        while self._kept:
            os.close(self._kept.pop())
