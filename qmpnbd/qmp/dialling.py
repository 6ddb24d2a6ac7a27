"""Connecting to where a monitor listens, without ever waiting longer than one is told to."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from qmpnbd.deadline import Deadline
from qmpnbd.errors import MonitorConnectError, UsageError
from qmpnbd.qmp.address import FdAddress, TcpAddress, UnixAddress
from qmpnbd.qmp.transport import in_daemon_thread

_RETRY_SECONDS = 0.05


async def connected(address: UnixAddress | TcpAddress | FdAddress, deadline: Deadline, where: str) -> socket.socket:
    """Returns a socket that is connected and does not block.

    Raises:
        UsageError: the descriptor is no connected socket.
        MonitorConnectError: nobody listens, or cannot be reached in time.
        TimeoutError: somebody listens on the UNIX socket, and accepts nobody.
        DeadlineError: the time was over before it began.
    """
    try:
        async with asyncio.timeout(deadline.remaining("the connection to the monitor", where)):
            if isinstance(address, FdAddress):
                return _inherited(address.fd, where)
            if isinstance(address, UnixAddress):
                return await _opened(socket.AF_UNIX, partial(_connect_unix, path=address.path))
            return await _opened_tcp(address)
    except TimeoutError:
        if isinstance(address, UnixAddress):
            raise
        raise MonitorConnectError(
            f"no connection within {deadline.seconds:g} s", where=where, remedy="See whether the host can be reached."
        ) from None
    except OSError as error:
        raise connect_error(error, where) from error


def _inherited(fd: int, where: str) -> socket.socket:
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise UsageError(
            f"not a socket that was inherited: {error.strerror}",
            where=where,
            remedy="Whoever starts qmpnbd must leave that descriptor open for it.",
        ) from error
    try:
        sock.getpeername()
    except OSError as error:
        sock.close()
        raise UsageError(
            f"the socket is not connected: {error.strerror}", where=where, remedy="Connect it to QEMU's monitor first."
        ) from error
    sock.setblocking(False)
    return sock


async def _opened_tcp(target: TcpAddress) -> socket.socket:
    failure = OSError("the host has no address")
    # A resolver knows no deadline.
    answers = await in_daemon_thread(partial(_resolve, target), "qmpnbd-resolve")
    for family, _, _, _, endpoint in answers:
        try:
            return await _opened(family, partial(_connect_tcp, endpoint=endpoint))
        except OSError as error:
            failure = error
    raise failure


def _resolve(target: TcpAddress) -> list[Any]:
    try:
        return list(socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM))
    except UnicodeError as error:
        raise OSError(str(error)) from error


async def _opened(family: socket.AddressFamily, connect: Callable[[socket.socket], Awaitable[None]]) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        await connect(sock)
    except BaseException:
        sock.close()
        raise
    return sock


async def _connect_tcp(sock: socket.socket, endpoint: Any) -> None:
    await asyncio.get_running_loop().sock_connect(sock, endpoint)


async def _connect_unix(sock: socket.socket, path: str) -> None:
    while True:
        try:
            sock.connect(path)
        except BlockingIOError:
            # The queue of a listener that accepts nobody is full, and nothing tells when it is not: try again.
            await asyncio.sleep(_RETRY_SECONDS)
        else:
            return


def connect_error(error: OSError, where: str) -> MonitorConnectError:
    """Makes the error for a socket that could not be connected."""
    if isinstance(error, FileNotFoundError):
        return MonitorConnectError(
            "no such socket", where=where, remedy="Start QEMU with -qmp unix:PATH,server=on,wait=off, or correct PATH."
        )
    if isinstance(error, ConnectionRefusedError):
        return MonitorConnectError("nobody listens there", where=where, remedy="See whether QEMU still runs.")
    if isinstance(error, PermissionError):
        return MonitorConnectError("permission denied", where=where, remedy="Run as the user of QEMU, or as root.")
    return MonitorConnectError(
        f"cannot connect: {error.strerror or error}", where=where, remedy="Give the socket of QEMU's -qmp option."
    )
