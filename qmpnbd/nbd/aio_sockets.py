"""Sockets for the asyncio door: what `qmpnbd.nbd.sockets` is, to be awaited."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import AsyncIterator
from typing import TypeVar

from qmpnbd.deadline import Deadline
from qmpnbd.errors import DeadlineError, NbdConnectError, QmpnbdError
from qmpnbd.nbd.sockets import (
    CONNECT_PATIENCE,
    RETRY_INTERVAL,
    Address,
    Inbox,
    connect_failed,
    disconnected,
    new_socket,
    unix_address,
)
from qmpnbd.nbd.uri import NbdUri
from qmpnbd.nbd.wire import Program, Receive, Received, Send

_T = TypeVar("_T")


@contextlib.asynccontextmanager
async def bounded(deadline: Deadline, what: str, where: str) -> AsyncIterator[None]:
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


class Stream:
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
        async with bounded(deadline, "the server to take a request", self._where):
            try:
                await asyncio.get_running_loop().sock_sendall(self._sock, data)
            except OSError as error:
                raise disconnected("a request", None, self._where, error) from error

    async def _receive(self, count: int, what: str, deadline: Deadline) -> bytearray:
        self._inbox.ask(count)
        if not self._inbox.complete:  # most headers are here already, and need no clock
            async with bounded(deadline, what, self._where):
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
