"""The asyncio door: the same client as `qmpnbd.nbd.client`, to be awaited.

::

    uri = NbdUri.unix("/run/nbd.sock", "disk")
    async with await Client.connect(uri, contexts=["qemu:allocation-depth"]) as client:
        depth = (await client.maps())["qemu:allocation-depth"]

Cancelling a call closes the socket and leaves no task behind: there is none, every wait is the caller's own. Of a
Deadline the time counts; to stop early, cancel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from types import TracebackType
from typing import Self, TypeVar

from qmpnbd.deadline import Deadline
from qmpnbd.errors import QmpnbdError, UsageError
from qmpnbd.extents import ExtentMap
from qmpnbd.nbd.aio_sockets import Stream, drive, open_stream
from qmpnbd.nbd.client import CLOSE_PATIENCE
from qmpnbd.nbd.connection import Connection
from qmpnbd.nbd.handshake import Export, handshake
from qmpnbd.nbd.survey import Limits, survey
from qmpnbd.nbd.uri import NbdUri
from qmpnbd.nbd.wire import Program

_T = TypeVar("_T")


class Client:
    """An open connection to one export. Make it with `connect`; it is an asynchronous context manager.

    A client serves one call at a time. After an error other than NbdRequestError, NbdUnsupportedError or UsageError
    the connection is closed; every later call says so.

    Attributes:
        where: server and export, printable.
    """

    def __init__(self, stream: Stream, connection: Connection) -> None:
        self._stream = stream
        self._connection = connection
        self.where = connection.where

    @classmethod
    async def connect(
        cls, uri: str | NbdUri, *, contexts: Sequence[str] = (), deadline: Deadline | None = None
    ) -> Self:
        """Connects and agrees on an export ("Handshake phase" of doc/proto.md).

        Args:
            uri: where the export is.
            contexts: the metadata contexts to read maps of; all of them must be offered.
            deadline: how long it may take. The greeting alone never takes more than 10 s.

        Raises:
            UsageError: the URI or a name cannot be right.
            DeadlineError: the time is over.
            NbdConnectError: nobody answers there, or does not greet.
            NbdProtocolError: what answers does not speak NBD, or broke the protocol.
            NbdRefusedError: the server refused: no such export, TLS required.
            NbdContextError: a context is not offered.
            NbdUnsupportedError: the server or the URI needs what is not supported.
            NbdDisconnectedError: the server ended the connection.
        """
        parsed = NbdUri.parse(uri) if isinstance(uri, str) else uri
        where, deadline = str(parsed), deadline or Deadline(None)
        stream = await open_stream(parsed, deadline, where)
        try:
            export = await drive(handshake(parsed.export, contexts, where), stream, deadline)
        except BaseException:
            stream.close()
            raise
        return cls(stream, Connection(export, where))

    @property
    def export(self) -> Export:
        """What was agreed on."""
        return self._connection.export

    async def maps(self, deadline: Deadline | None = None, *, limits: Limits | None = None) -> dict[str, ExtentMap]:
        """Reads the map of every context agreed on ("Request types", NBD_CMD_BLOCK_STATUS).

        Args:
            deadline: how long it may take.
            limits: how much the server may make us collect.

        Returns:
            For each context a map of exactly the export's size.

        Raises:
            UsageError: no context was agreed on, or the client is closed.
            DeadlineError: the time is over.
            NbdRequestError: the server cannot tell the status of some range; the client can be used further.
            NbdProtocolError: a reply that cannot be true.
            NbdUnsupportedError: more extents than `limits` allows.
            NbdDisconnectedError: the server ended the connection.
        """
        return await self._run(survey(self._connection, limits), deadline)

    async def flush(self, deadline: Deadline | None = None) -> None:
        """Has everything written so far made durable ("Request types", NBD_CMD_FLUSH).

        Raises:
            UsageError: the client is closed.
            DeadlineError: the time is over.
            NbdUnsupportedError: the export offers no flush.
            NbdRequestError: it failed at the server; the client can be used further.
            NbdProtocolError: a reply that makes no sense.
            NbdDisconnectedError: the server ended the connection.
        """
        await self._run(self._connection.flush(), deadline)

    async def close(self) -> None:
        """Takes leave and closes; never fails, and may be called again ("Terminating the transmission phase")."""
        if self._connection.busy:
            self._connection.closed()
            self._stream.shut_down()  # the call under way fails, and closes
            return
        try:
            with contextlib.suppress(QmpnbdError):
                await drive(self._connection.disconnect(), self._stream, Deadline(CLOSE_PATIENCE))
        finally:
            self._connection.closed()
            self._stream.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _run(self, program: Program[_T], deadline: Deadline | None) -> _T:
        """Drives a program; where it leaves the conversation out of step, the connection is over."""
        try:
            return await drive(program, self._stream, deadline or Deadline(None))
        except UsageError:
            raise  # nothing was sent; what is out of step is another task's call
        except BaseException:
            if not self._connection.in_step:
                self._connection.lose()
                self._stream.close()
            raise
