"""The asyncio door to option haggling: the same as `qmpnbd.nbd.stepwise`, to be awaited.

::

    async with await Negotiation.connect("nbd+unix:///?socket=/run/nbd.sock") as negotiation:
        for name, description in await negotiation.list_exports():
            print(name, description, (await negotiation.info(name)).size)
        async with await negotiation.go("disk") as client:
            ...

Cancelling a call closes the socket and leaves no task behind.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from types import TracebackType
from typing import Self, TypeVar

from qmpnbd.deadline import Deadline
from qmpnbd.errors import QmpnbdError, UsageError
from qmpnbd.nbd.aio import Client
from qmpnbd.nbd.aio_sockets import Stream, drive, open_stream
from qmpnbd.nbd.export import ExportInfo, Replies
from qmpnbd.nbd.limits import DEFAULT_LIMITS, Limits
from qmpnbd.nbd.negotiation import Haggling
from qmpnbd.nbd.policy import UriPolicy, admitted
from qmpnbd.nbd.quirks import Quirk
from qmpnbd.nbd.stepwise import LEAVE_PATIENCE, where_of
from qmpnbd.nbd.tls import Tls
from qmpnbd.nbd.uri import NbdUri
from qmpnbd.nbd.wire import Program

_T = TypeVar("_T")


class Negotiation:
    """A connection on which nothing has been chosen yet. Make it with `connect`; it is an asynchronous context manager.

    One call at a time. A refusal (NbdRefusedError, NbdContextError, NbdUnsupportedError, UsageError) leaves it where
    it was; after every other error it is closed. QEMU hangs up on whoever has not chosen within 10 s.

    Attributes:
        uri: where the server is; its export name is a proposal, no more.
        where: the same, printable.
    """

    def __init__(self, stream: Stream, haggling: Haggling, uri: NbdUri) -> None:
        self._stream = stream
        self._haggling = haggling
        self._busy = False
        self._given_away = False
        self.uri = uri
        self.where = haggling.where

    @classmethod
    async def connect(
        cls,
        uri: str | NbdUri,
        *,
        tls: Tls | None = None,
        policy: UriPolicy | None = None,
        deadline: Deadline | None = None,
        best: Replies = "extended",
        limits: Limits = DEFAULT_LIMITS,
    ) -> Self:
        """Connects, changes to TLS if it is wanted, and agrees on the form of replies.

        Args:
            uri: where the server is.
            tls: how to encrypt, beyond what the URI says; TLS is used even if the URI does not ask for it.
            policy: what the URI may ask for; by default everything but files of this machine.
            deadline: how long it may take. The greeting alone never takes more than 10 s.
            best: the form of replies not to be exceeded.
            limits: how much the server may make us do and hold, here and when an export was chosen.

        Raises:
            UsageError: the URI or the parameters of TLS cannot be right, or the URI asks for what is not allowed.
            DeadlineError: the time is over.
            NbdConnectError: nobody answers there, or does not greet.
            NbdProtocolError: what answers does not speak NBD, or broke the protocol.
            NbdRefusedError: the server insists on TLS.
            NbdTlsError: TLS is wanted and did not come about.
            NbdUnsupportedError: a kind of TLS that is not supported.
            NbdDisconnectedError: the server ended the connection.
        """
        parsed, secure = admitted(uri, tls, policy)
        where, deadline = str(parsed), deadline or Deadline(None)
        negotiation = cls(await open_stream(parsed, deadline, where), Haggling(where, limits), parsed)
        try:
            await negotiation._run(negotiation._haggling.begin(secure, best), deadline)
        except BaseException:
            await negotiation.abort()
            raise
        return negotiation

    @property
    def style(self) -> str:
        """Of the negotiation: fixed newstyle, newstyle or oldstyle; the latter two can only `go`."""
        return self._haggling.style

    @property
    def tls(self) -> bool:
        """Whether the connection is encrypted."""
        return self._haggling.tls

    @property
    def replies(self) -> Replies:
        """The form of replies agreed on."""
        return self._haggling.replies

    async def list_exports(self, deadline: Deadline | None = None) -> list[tuple[str, str]]:
        """Returns name and description of every export the server is willing to list.

        Raises:
            NbdRefusedError: it is not willing to list any.
        """
        return await self._run(self._haggling.list_exports(), deadline)

    async def list_contexts(
        self, export: str, queries: Sequence[str] = (), deadline: Deadline | None = None
    ) -> list[str]:
        """Returns the metadata contexts an export offers.

        Args:
            export: its name.
            queries: which ones: whole names, or namespaces with their colon (``qemu:dirty-bitmap:``); all if empty.
            deadline: how long it may take.

        Raises:
            NbdRefusedError: there is no such export.
            NbdUnsupportedError: the server has no metadata contexts.
        """
        return await self._run(self._haggling.list_contexts(export, queries), deadline)

    async def info(self, export: str, deadline: Deadline | None = None) -> ExportInfo:
        """Returns what the server tells of an export.

        Raises:
            NbdRefusedError: there is no such export, or it needs TLS.
            NbdUnsupportedError: the server cannot tell before an export is chosen, or the export is too large.
        """
        return await self._run(self._haggling.info(export), deadline)

    async def set_contexts(self, export: str, queries: Sequence[str], deadline: Deadline | None = None) -> list[str]:
        """Selects the metadata contexts for the export that `go` will be given, in place of an earlier selection.

        Args:
            export: its name.
            queries: whole names, or namespaces with their colon; QEMU selects nothing for a namespace.
            deadline: how long it may take.

        Returns:
            The names of all that were granted.

        Raises:
            NbdContextError: one of them is not offered.
            NbdRefusedError: there is no such export.
            NbdUnsupportedError: the server has no metadata contexts.
        """
        return list(await self._run(self._haggling.set_contexts(export, queries), deadline))

    async def go(
        self,
        export: str,
        deadline: Deadline | None = None,
        *,
        request_seconds: float | None = None,
        lenient: frozenset[Quirk] = frozenset(),
    ) -> Client:
        """Chooses an export; the negotiation is over then, and the connection belongs to the client.

        Args:
            export: its name.
            deadline: how long it may take.
            request_seconds: how long the server may take to answer a request of the client, whatever time a call has;
                None for as long as the call has.
            lenient: which known faults of servers the client is to bear; none by default.

        Raises:
            NbdRefusedError: there is no such export, or it needs TLS.
            NbdUnsupportedError: the export cannot be worked with.
            UsageError: metadata contexts were selected for another export.
        """
        chosen = await self._run(self._haggling.go(export), deadline)
        self._given_away = True
        where, limits = where_of(self.uri, export), self._haggling.limits
        return Client.agreed(self._stream, chosen, where, limits, request_seconds=request_seconds, lenient=lenient)

    def duplicate(self) -> int:
        """Returns a descriptor of the connection, for the caller to close: until then the server sees no end of it.

        A connection is closed when the server breaks the protocol or the time is over, here and by the client that `go`
        returns, which is too soon for a server that must let go of something first. Nothing may be sent or received
        with it.
        """
        return self._stream.duplicate()

    async def abort(self) -> None:
        """Takes leave and closes, unless an export was chosen; never fails, and may be called again."""
        if self._busy:
            self._stream.shut_down()  # the call under way fails, and closes
        elif self._haggling.in_step:
            with contextlib.suppress(QmpnbdError):
                await self._run(self._haggling.abort(), Deadline(LEAVE_PATIENCE))
            self._stream.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.abort()

    async def _run(self, program: Program[_T], deadline: Deadline | None) -> _T:
        """Drives a step; where it leaves the conversation out of step, the connection is over."""
        if self._given_away:
            raise UsageError("the negotiation is over: an export was chosen", where=self.where)
        if self._busy:
            raise UsageError("another call is under way", where=self.where)
        self._busy = True
        try:
            return await drive(program, self._stream, deadline or Deadline(None))
        except BaseException:
            if not self._haggling.in_step:
                self._stream.close()
            raise
        finally:
            self._busy = False
