"""The asyncio door: the same client as `qmpnbd.nbd.client`, to be awaited.

::

    uri = NbdUri.unix("/run/nbd.sock", "disk")
    async with await Client.connect(uri, contexts=["qemu:allocation-depth"]) as client:
        depth = (await client.maps())["qemu:allocation-depth"]

Cancelling a call closes the socket and leaves no task behind: there is none, every wait is the caller's own. Of a
Deadline the time counts; to stop early, cancel.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Self, TypeVar

from qmpnbd.deadline import Deadline
from qmpnbd.errors import DeadlineError, NbdConnectError, QmpnbdError, UsageError
from qmpnbd.extents import ExtentMap
from qmpnbd.nbd.client import (
    CLOSE_PATIENCE,
    CONNECT_PATIENCE,
    RETRY_INTERVAL,
    Address,
    Inbox,
    connect_failed,
    disconnected,
    new_socket,
    unix_address,
)
from qmpnbd.nbd.connection import Connection
from qmpnbd.nbd.handshake import Export, handshake
from qmpnbd.nbd.survey import Limits, survey
from qmpnbd.nbd.uri import NbdUri
from qmpnbd.nbd.wire import Program, Receive, Received, Send

_T = TypeVar("_T")


@contextlib.asynccontextmanager
async def _bounded(deadline: Deadline, what: str, where: str) -> AsyncIterator[None]:
    """Ends what is awaited inside when the time is over.

    Raises:
        DeadlineError: it is.
    """
    clock = asyncio.timeout(deadline.remaining(what, where))
    try:
        async with clock:
            yield
    except TimeoutError as error:
        if clock.expired():
            raise deadline.expired(what, where) from error
        raise


class _Stream:
    """A socket that sends all, receives exactly, and is never waited for longer than allowed."""

    def __init__(self, sock: socket.socket, where: str) -> None:
        self._sock = sock
        self._where = where
        self._inbox = Inbox()

    async def perform(self, operation: Send | Receive, deadline: Deadline) -> Received:
        """Does what a program asks for.

        Raises:
            DeadlineError: the caller's time is over.
            TimeoutError: the operation's own patience is over.
            NbdDisconnectedError: the connection ended.
        """
        if isinstance(operation, Send):
            await self._send(operation.data, deadline)
            return b""
        clock = deadline if operation.patience is None else deadline.within(operation.patience)
        try:
            return await self._receive(operation.count, operation.what, clock)
        except DeadlineError as error:
            deadline.check(operation.what, self._where)
            raise TimeoutError(error.what) from error

    def close(self) -> None:
        """Closes the socket."""
        self._sock.close()

    def shut_down(self) -> None:
        """Ends the conversation, so that whoever waits for the socket learns of it."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    async def _send(self, data: bytes, deadline: Deadline) -> None:
        async with _bounded(deadline, "the server to take a request", self._where):
            try:
                await asyncio.get_running_loop().sock_sendall(self._sock, data)
            except OSError as error:
                raise disconnected("a request", None, self._where, error) from error

    async def _receive(self, count: int, what: str, deadline: Deadline) -> bytearray:
        self._inbox.ask(count)
        if not self._inbox.complete:  # most headers are here already, and need no clock
            async with _bounded(deadline, what, self._where):
                await self._fill(what)
        return self._inbox.take()

    async def _fill(self, what: str) -> None:
        loop = asyncio.get_running_loop()
        while not self._inbox.complete:
            try:
                got = await loop.sock_recv_into(self._sock, self._inbox.room())
            except OSError as error:
                raise disconnected(what, self._inbox, self._where, error) from error
            if not got:
                raise disconnected(what, self._inbox, self._where)
            self._inbox.arrived(got)


async def _addresses(uri: NbdUri) -> list[Address]:
    """Finds the addresses of a host."""
    if uri.transport == "unix":
        return [unix_address(uri)]
    loop = asyncio.get_running_loop()
    try:
        answers = await loop.getaddrinfo(uri.host, uri.port, type=socket.SOCK_STREAM)
    except UnicodeError as error:  # the name cannot even be asked for
        raise socket.gaierror(socket.EAI_NONAME, str(error)) from error
    return [(family, address) for family, _, _, _, address in answers]


async def _open(address: Address, where: str) -> _Stream:
    """Connects to one address."""
    loop = asyncio.get_running_loop()
    sock = new_socket(address[0])
    try:
        if address[0] == socket.AF_UNIX:
            # loop.sock_connect takes EAGAIN, a full queue, for a connection on its way.
            while True:
                code = sock.connect_ex(address[1])
                if code != errno.EAGAIN:
                    break
                await asyncio.sleep(RETRY_INTERVAL)
        else:
            code = 0
            await loop.sock_connect(sock, address[1])
    except BaseException:
        sock.close()
        raise
    if code:
        sock.close()
        raise OSError(code, os.strerror(code))
    return _Stream(sock, where)


async def _connect(uri: NbdUri, deadline: Deadline, where: str) -> _Stream:
    """Connects to the first address that accepts."""
    what = "the connection to be accepted"
    try:
        async with _bounded(deadline.within(CONNECT_PATIENCE), what, where):
            failure = OSError(errno.EADDRNOTAVAIL, "the host has no address")
            for address in await _addresses(uri):
                try:
                    return await _open(address, where)
                except OSError as error:
                    failure = error
            raise connect_failed(failure, where) from failure
    except DeadlineError as error:
        deadline.check(what, where)
        raise NbdConnectError(f"nobody accepts the connection ({error.what})", where=where) from error
    except OSError as error:
        raise connect_failed(error, where) from error


class Client:
    """An open connection to one export. Make it with `connect`; it is an asynchronous context manager.

    A client serves one call at a time. After an error other than NbdRequestError, NbdUnsupportedError or UsageError
    the connection is closed; every later call says so.

    Attributes:
        where: server and export, printable.
    """

    def __init__(self, stream: _Stream, connection: Connection) -> None:
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
        stream = await _connect(parsed, deadline, where)
        try:
            export = await _drive(handshake(parsed.export, contexts, where), stream, deadline)
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
                await _drive(self._connection.disconnect(), self._stream, Deadline(CLOSE_PATIENCE))
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
            return await _drive(program, self._stream, deadline or Deadline(None))
        except UsageError:
            raise  # nothing was sent; what is out of step is another task's call
        except BaseException:
            if not self._connection.in_step:
                self._connection.lose()
                self._stream.close()
            raise


async def _drive(program: Program[_T], stream: _Stream, deadline: Deadline) -> _T:
    """Does what a program asks for until it returns."""
    try:
        operation = next(program)
        while True:
            try:
                outcome = await stream.perform(operation, deadline)
            except (QmpnbdError, TimeoutError) as error:
                operation = program.throw(error)
            else:
                operation = program.send(outcome)
    except StopIteration as stop:
        result: _T = stop.value
        return result
    finally:
        program.close()
