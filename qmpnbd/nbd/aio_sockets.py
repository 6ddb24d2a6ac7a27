"""Sockets for the asyncio door: what `qmpnbd.nbd.sockets` is, to be awaited."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import socket
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, TypeVar

from qmpnbd.deadline import Deadline
from qmpnbd.errors import DeadlineError, NbdConnectError, NbdTlsError, QmpnbdError
from qmpnbd.nbd import constants
from qmpnbd.nbd.channel import Channel
from qmpnbd.nbd.sockets import (
    CONNECT_PATIENCE,
    RETRY_INTERVAL,
    Address,
    connect_failed,
    new_socket,
    unix_address,
)
from qmpnbd.nbd.uri import NbdUri
from qmpnbd.nbd.wire import Program, Receive, Received, Send, StartTls

if TYPE_CHECKING:
    from qmpnbd.nbd.tls_socket import TlsSocket

_T = TypeVar("_T")


@contextlib.asynccontextmanager
async def bounded(deadline: Deadline, what: object, where: str) -> AsyncIterator[None]:
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


class Stream(Channel):
    """A channel that can be awaited, never longer than allowed."""

    async def perform(self, operation: Send | Receive | StartTls, deadline: Deadline) -> Received:
        """Does what a program of the handshake asks for.

        Raises:
            DeadlineError: the caller's time is over.
            TimeoutError: the operation's own patience is over.
            NbdDisconnectedError: the connection ended.
            NbdTlsError: TLS did not come about.
        """
        if isinstance(operation, StartTls):
            await self._shake(self.start_tls(operation.tls), deadline)
            return b""
        if isinstance(operation, Send):
            self.push(operation.data, operation.payload)
            async with bounded(deadline, "the server to take a request", self.where):
                while not self.flush():
                    await self.writable()
            return b""
        clock = deadline if operation.patience is None else deadline.within(operation.patience)
        try:
            async with bounded(clock, operation.what, self.where):
                while not self.receive(operation):
                    await self.readable()
        except DeadlineError as error:
            deadline.check(operation.what, self.where)
            raise TimeoutError(error.what) from error
        return self.take()

    async def _shake(self, secure: TlsSocket, deadline: Deadline) -> None:
        what = "the TLS handshake"
        try:
            async with bounded(deadline.within(constants.TLS_PATIENCE), what, self.where):
                while (events := secure.shake()) is not None:
                    await (self.readable() if events == select.POLLIN else self.writable())
        except DeadlineError as error:
            deadline.check(what, self.where)
            raise NbdTlsError("the server is silent in the middle of the TLS handshake", where=self.where) from error

    async def readable(self) -> None:
        """Waits until something may be received."""
        loop = asyncio.get_running_loop()
        ready = loop.create_future()
        loop.add_reader(self._sock, _settle, ready)
        try:
            await ready
        finally:
            loop.remove_reader(self._sock)

    async def writable(self) -> None:
        """Waits until something may be sent."""
        loop = asyncio.get_running_loop()
        ready = loop.create_future()
        loop.add_writer(self._sock, _settle, ready)
        try:
            await ready
        finally:
            loop.remove_writer(self._sock)

    def fileno(self) -> int:
        """Returns the socket's number, -1 when it is closed."""
        return self._sock.fileno()


def _settle(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


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


async def _open(address: Address, where: str) -> Stream:
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
    return Stream(sock, where)


async def open_stream(uri: NbdUri, deadline: Deadline, where: str) -> Stream:
    """Connects to the first address that accepts."""
    what = "the connection to be accepted"
    try:
        async with bounded(deadline.within(CONNECT_PATIENCE), what, where):
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


async def drive(program: Program[_T], stream: Stream, deadline: Deadline) -> _T:
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
