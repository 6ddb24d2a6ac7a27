"""The blocking door: an NBD client for plain scripts and threads.

::

    with Client.connect("nbd+unix:///disk?socket=/run/nbd.sock", contexts=["qemu:allocation-depth"]) as client:
        depth = client.maps()["qemu:allocation-depth"]
        boot = client.read(0, 512)
        for offset, data in client.chunks((extent.offset, extent.length) for extent in depth if extent.value):
            target.seek(offset)
            target.write(data)

The door makes no decision about the protocol: it has the programs of `qmpnbd.nbd.handshake`, `survey`, `transfer` and
`commands` run, watches the clock and tells apart the ways in which a socket can fail. `qmpnbd.nbd.aio` is the same for
asyncio.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from qmpnbd.deadline import Deadline
from qmpnbd.errors import NbdConnectError, NbdDisconnectedError
from qmpnbd.nbd import commands, transfer
from qmpnbd.nbd.connection import Connection, State
from qmpnbd.nbd.export import Export, Replies
from qmpnbd.nbd.handshake import handshake
from qmpnbd.nbd.limits import DEFAULT_LIMITS, Limits
from qmpnbd.nbd.policy import UriPolicy, admitted
from qmpnbd.nbd.quirks import Quirk
from qmpnbd.nbd.reconnect import Losses, Reconnect, Statistics, require_same
from qmpnbd.nbd.requests import Job
from qmpnbd.nbd.runner import Runner
from qmpnbd.nbd.sockets import Stream, drive, open_stream
from qmpnbd.nbd.tls import Tls
from qmpnbd.nbd.uri import NbdUri

if TYPE_CHECKING:
    from qmpnbd.extents import ExtentMap
    from qmpnbd.nbd.survey import Survey

CLOSE_PATIENCE: Final = 1.0
"""Seconds to wait for room in the socket to take leave in. Nobody answers it, so it is not worth more."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class _Address:
    """How to connect, and to connect again."""

    uri: NbdUri
    tls: Tls | None
    contexts: Sequence[str]
    best: Replies
    request_seconds: float | None
    limits: Limits

    def open(self, deadline: Deadline) -> Runner:
        where = str(self.uri)
        stream = open_stream(self.uri, deadline, where)
        try:
            program = handshake(self.uri.export, self.contexts, where, self.tls, self.best, limits=self.limits)
            export = drive(program, stream, deadline)
        except BaseException:
            stream.close()
            raise
        return Runner(stream, Connection(export, where, self.limits), self.request_seconds)


class Client:
    """An open connection to one export. Make it with `connect`; it is a context manager.

    A client serves one call at a time; between two pieces of `chunks` others can be made.

    Offsets and lengths are in bytes. Those of data must be multiples of `export.minimum_block`, those of maps need not.
    Calls split what is too long for one request. All of them raise, beside what they name:

    - UsageError: the client is closed, or a range is not in the export or not made of its blocks;
    - DeadlineError: the time is over, that of the call or `request_seconds`; the client can be used further;
    - NbdRequestError: the server could not do it; the client can be used further;
    - NbdProtocolError: the server broke the protocol; the connection is closed, as every later call says;
    - NbdDisconnectedError: the server ended the connection.

    Attributes:
        where: server and export, printable.
    """

    def __init__(
        self,
        address: _Address | None,
        runner: Runner,
        reconnect: Reconnect | None,
        lenient: frozenset[Quirk],
        limits: Limits,
    ) -> None:
        self._address = address
        self._runner = runner
        self._reconnect = reconnect
        self._lenient = lenient
        self._limits = limits
        self._past = Statistics()
        self._losses = Losses()
        self.where = runner.connection.where

    @classmethod
    def connect(
        cls,
        uri: str | NbdUri,
        *,
        contexts: Sequence[str] = (),
        deadline: Deadline | None = None,
        tls: Tls | None = None,
        policy: UriPolicy | None = None,
        best: Replies = "extended",
        request_seconds: float | None = None,
        reconnect: Reconnect | None = None,
        lenient: frozenset[Quirk] = frozenset(),
        limits: Limits = DEFAULT_LIMITS,
    ) -> Self:
        """Connects and agrees on an export ("Handshake phase" of doc/proto.md).

        Args:
            uri: where the export is.
            contexts: the metadata contexts to read maps of; all of them must be offered.
            deadline: how long it may take. The greeting alone never takes more than 10 s.
            tls: how to encrypt, completed by what the URI says; None to leave it to the URI.
            policy: what the URI may ask for.
            best: the form of replies not to be exceeded, to try out the lesser ones.
            request_seconds: how long the server may take to answer a request, whatever time a call has; None for as
                long as the call has.
            reconnect: how to go on with what reads after the connection was lost; None to tell the loss.
            lenient: which known faults of servers to bear; none by default.
            limits: how much the server may make us do and hold.

        Raises:
            UsageError: the URI or a name cannot be right.
            DeadlineError: the time is over.
            NbdConnectError: nobody answers there, or does not greet.
            NbdProtocolError: what answers does not speak NBD, or broke the protocol.
            NbdRefusedError: the server refused: no such export, TLS required.
            NbdTlsError: TLS is wanted and did not come about.
            NbdContextError: a context is not offered.
            NbdUnsupportedError: the server or the URI needs what is not supported.
            NbdDisconnectedError: the server ended the connection.
        """
        parsed, encrypted = admitted(uri, tls, policy)
        address = _Address(parsed, encrypted, contexts, best, request_seconds, limits)
        return cls(address, address.open(deadline or Deadline(None)), reconnect, lenient, limits)

    @classmethod
    def agreed(
        cls,
        stream: Stream,
        export: Export,
        where: str,
        limits: Limits,
        *,
        request_seconds: float | None,
        lenient: frozenset[Quirk],
    ) -> Self:
        """Makes a client of a stream on which an export was agreed already. It cannot reconnect."""
        return cls(None, Runner(stream, Connection(export, where, limits), request_seconds), None, lenient, limits)

    @property
    def export(self) -> Export:
        """What was agreed on."""
        return self._runner.connection.export

    @property
    def statistics(self) -> Statistics:
        """What was done so far."""
        past, stream, connection = self._past, self._runner.stream, self._runner.connection
        return Statistics(
            past.requests + connection.requests,
            past.messages + connection.messages,
            past.sent + stream.sent,
            past.received + stream.received,
            past.connections + 1,
        )

    def read(
        self, offset: int, length: int, *, unfragmented: bool = False, deadline: Deadline | None = None
    ) -> bytearray:
        """Reads bytes ("NBD_CMD_READ").

        Args:
            offset: first byte.
            length: bytes.
            unfragmented: have each piece of up to 256 KiB answered at once (NBD_CMD_FLAG_DF). Servers may refuse more
                than 64 KiB of it.
            deadline: how long it may take.

        Raises:
            NbdUnsupportedError: `unfragmented`, and the export does not know it.
        """
        buffer = transfer.new_buffer(self.export, self.where, offset, length)
        self.read_into(offset, buffer, unfragmented=unfragmented, deadline=deadline)
        return buffer

    def read_into(
        self, offset: int, buffer: Any, *, unfragmented: bool = False, deadline: Deadline | None = None
    ) -> None:
        """Reads as many bytes as a buffer has, straight into it ("NBD_CMD_READ").

        After an error its content is undefined, and nothing is written into it any more.

        Args:
            offset: first byte.
            buffer: anything writable and contiguous.
            unfragmented: see `read`.
            deadline: how long it may take.

        Raises:
            NbdUnsupportedError: `unfragmented`, and the export does not know it.
        """
        view = transfer.writable_view(buffer, self.where)
        reading = transfer.Reading(self.export, self.where, offset, view, unfragmented=unfragmented)
        self._read(reading.run, deadline)

    def chunks(
        self,
        ranges: Iterable[tuple[int, int]],
        *,
        size: int = transfer.READ_PIECE,
        in_flight: int = transfer.READS_IN_FLIGHT,
        place: Callable[[int, int], memoryview] | None = None,
        deadline: Deadline | None = None,
    ) -> Iterator[tuple[int, memoryview]]:
        """Reads ranges piece by piece, several requests in flight: the fast way to read much ("NBD_CMD_READ").

        The pieces come in the order in which the server answers. Whoever leaves early may close the iterator
        or let go of it, and the answers still to come are dropped.

        Args:
            ranges: offset and length of each range.
            size: bytes of a piece at most.
            in_flight: requests in flight, each with a buffer of `size` bytes.
            place: tells where the data of a piece is to be put, by its offset and length, when it arrives; for pieces
                that are to outlive the next one. None to have buffers reused here.
            deadline: how long it may take, with what the caller does in between.

        Yields:
            Offset and data of a piece. The data is good until the next piece is asked for, unless there is a `place`
            for it.
        """
        plan = transfer.Chunks(self.export, self.where, ranges, size=size, in_flight=in_flight, place=place)
        while True:
            runner = self._runner
            try:
                yield from runner.give(plan.run(runner.connection), deadline)
            except NbdDisconnectedError as error:
                self._again(runner, error, deadline)
            else:
                return

    def write(self, offset: int, data: Any, *, fua: bool = False, deadline: Deadline | None = None) -> None:
        """Writes bytes ("NBD_CMD_WRITE"). After an error some of them may have been written.

        Args:
            offset: first byte.
            data: anything contiguous. It may be changed again when the call has ended, whichever way.
            fua: have it made durable before the server answers.
            deadline: how long it may take.

        Raises:
            NbdUnsupportedError: the export is read-only, or does not know `fua`.
        """
        view = transfer.readable_view(data, self.where)
        self._run(lambda connection: transfer.write(connection, offset, view, fua=fua), deadline)

    def write_zeroes(
        self,
        offset: int,
        length: int,
        *,
        no_hole: bool = False,
        fast: bool = False,
        fua: bool = False,
        deadline: Deadline | None = None,
    ) -> None:
        """Has a range read as zeroes ("NBD_CMD_WRITE_ZEROES"). After an error some of it may.

        Args:
            offset: first byte.
            length: bytes.
            no_hole: have space allocated for it.
            fast: have it fail with ENOTSUP (95) where it is no faster than writing.
            fua: have it made durable before the server answers.
            deadline: how long it may take.

        Raises:
            NbdUnsupportedError: the export is read-only, or does not know what is asked for.
        """
        self._run(
            lambda connection: commands.write_zeroes(connection, offset, length, no_hole=no_hole, fast=fast, fua=fua),
            deadline,
        )

    def trim(self, offset: int, length: int, *, fua: bool = False, deadline: Deadline | None = None) -> None:
        """Tells the server that a range is not needed any more; what it reads as is undefined ("NBD_CMD_TRIM").

        Args:
            offset: first byte.
            length: bytes.
            fua: have it made durable before the server answers.
            deadline: how long it may take.

        Raises:
            NbdUnsupportedError: the export is read-only, or does not know what is asked for.
        """
        self._run(lambda connection: commands.trim(connection, offset, length, fua=fua), deadline)

    def cache(self, offset: int, length: int, *, deadline: Deadline | None = None) -> None:
        """Tells the server that a range will be read soon ("NBD_CMD_CACHE").

        Raises:
            NbdUnsupportedError: the export does not know it.
        """
        self._run(lambda connection: commands.cache(connection, offset, length), deadline)

    def flush(self, deadline: Deadline | None = None) -> None:
        """Has everything written so far made durable ("NBD_CMD_FLUSH").

        Raises:
            NbdUnsupportedError: the export offers no flush.
        """
        self._run(commands.flush, deadline)

    def maps(
        self,
        offset: int = 0,
        length: int | None = None,
        *,
        contexts: Collection[str] | None = None,
        deadline: Deadline | None = None,
        limits: Limits | None = None,
    ) -> dict[str, ExtentMap]:
        """Reads the maps of a range ("NBD_CMD_BLOCK_STATUS"); by default of the whole export, in all its contexts.

        Args:
            offset: first byte.
            length: bytes; None for all the rest.
            contexts: some of those named when connecting; None for all of them.
            deadline: how long it may take.
            limits: how much the server may make us do and hold, in place of what was said when connecting.

        Returns:
            For each context a map of exactly `length` bytes, whose byte 0 is the one at `offset`.

        Raises:
            NbdUnsupportedError: more extents than `limits` allows.
        """
        survey = self._survey(offset, length, contexts, limits or self._limits)
        return self._read(survey.run, deadline)

    def block_status(
        self,
        offset: int,
        length: int,
        *,
        one: bool = False,
        contexts: Collection[str] | None = None,
        deadline: Deadline | None = None,
    ) -> dict[str, ExtentMap]:
        """Makes a single request for the status of a range and returns what the server chose to tell of it.

        Args:
            offset: first byte, a multiple of the smallest block.
            length: bytes, likewise; as many as fit into one request.
            one: have only the first extent of each context told (NBD_CMD_FLAG_REQ_ONE).
            contexts: some of those named when connecting; None for all of them.
            deadline: how long it may take.

        Returns:
            For each context a map that begins at `offset`. It may be shorter than `length`, and the maps may differ in
            length.
        """
        survey = self._survey(offset, length, contexts, self._limits)
        return self._run(lambda connection: survey.once(connection, one=one), deadline)

    def close(self) -> None:
        """Takes leave and closes; never fails, and may be called again ("Terminating the transmission phase").

        A call under way in another thread ends with NbdDisconnectedError.
        """
        self._runner.close(CLOSE_PATIENCE)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _survey(self, offset: int, length: int | None, contexts: Collection[str] | None, limits: Limits) -> Survey:
        from qmpnbd.nbd.survey import Survey  # noqa: PLC0415 - numpy loads longer than many a read takes

        return Survey(self.export, self.where, offset, length, contexts=contexts, limits=limits, lenient=self._lenient)

    def _run(self, begin: Callable[[Connection], Job[_T]], deadline: Deadline | None) -> _T:
        """Runs what must not be done twice."""
        runner = self._runner
        return runner.run(begin(runner.connection), deadline)

    def _read(self, begin: Callable[[Connection], Job[_T]], deadline: Deadline | None) -> _T:
        """Runs what reads and can be taken up again on another connection."""
        while True:
            runner = self._runner
            try:
                return runner.run(begin(runner.connection), deadline)
            except NbdDisconnectedError as error:
                self._again(runner, error, deadline)

    def _again(self, lost: Runner, error: NbdDisconnectedError, deadline: Deadline | None) -> None:
        """Connects again, or raises the loss; what another call has achieved meanwhile counts."""
        if self._reconnect is None or self._address is None or lost.connection.state is State.CLOSED:
            raise error
        if self._runner is not lost:
            return
        self._losses.book(self._reconnect, lost.connection.answered, error)
        clock, failure = deadline or Deadline(None), error
        for _ in range(self._reconnect.attempts):
            left = clock.remaining("the next try to connect again", self.where)
            time.sleep(self._reconnect.delay if left is None else min(left, self._reconnect.delay))
            try:
                runner = self._address.open(clock)
            except (NbdConnectError, NbdDisconnectedError) as again:
                failure = NbdDisconnectedError(f"{error.what}; then: {again.what}", where=self.where)
                continue
            self._take(runner)
            return
        raise failure from error

    def _take(self, runner: Runner) -> None:
        """Goes on with another connection."""
        try:
            require_same(self.export, runner.connection.export, self.where)
        except NbdDisconnectedError:
            runner.close(CLOSE_PATIENCE)
            raise
        self._past, self._runner = replace(self.statistics), runner
