"""The guest agent: have the guest bring its filesystems to rest for an instant, and say truly whether it did.

The agent speaks QMP without a greeting, through a channel that knows no connections: what an earlier client left in it,
half a command or a late reply, is still there. So the first thing said is a byte that ends any half command, and a
request whose reply is marked with the same byte; all before that mark is somebody else's ("guest-sync-delimited").
Nobody tells whether an agent is there at all. Nothing within the deadline means: none runs, another client holds the
channel, or the guest stands still.

A freeze outlives us: use `qmpnbd.qmp.quiesce`, which thaws on every way out.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import socket
from typing import Literal, Self

from qemu.qmp import ExecInterruptedError, ExecuteError, QMPClient, QMPError, StateError

from qmpnbd.deadline import Deadline
from qmpnbd.errors import (
    AgentRefusedError,
    AgentSilentError,
    DeadlineError,
    MonitorConnectError,
    UsageError,
)
from qmpnbd.qmp.address import MonitorAddress, TcpAddress, UnixAddress, parse_address
from qmpnbd.qmp.monitor import finish

SYNC_SECONDS = 5.0
"""For the first answer; an agent that is there gives it at once."""

FROZEN_ALREADY = "frozen state"
"""In the agent's refusal of nearly everything while the guest is frozen."""

MAX_STALE = 1 << 20
"""Bytes that earlier clients may have left in the channel."""

_MARK = b"\xff"


class Agent:
    """A connected guest agent; made by `connect`, closed by `close` or at the end of an ``async with``.

    Attributes:
        where: its address, for messages.
    """

    def __init__(self, client: QMPClient, sock: socket.socket, where: str) -> None:
        self._client = client
        self._socket = sock
        self.where = where

    @classmethod
    async def connect(cls, address: MonitorAddress | str, deadline: Deadline) -> Self:
        """Connects, and makes sure that an agent answers and that what it says is meant for us.

        Args:
            address: the socket of the channel ``org.qemu.guest_agent.0``, as for `qmpnbd.qmp.monitor`.
            deadline: for all of it; an answer must come within `SYNC_SECONDS`.

        Raises:
            UsageError: not an address.
            MonitorConnectError: no such socket, nobody listens, no permission.
            AgentSilentError: nobody answers.
            AgentRefusedError: what answers is no guest agent.
            DeadlineError: `deadline` passed before.
        """
        target = _listening(address)
        where = f"guest agent {target}"
        bound = deadline.within(SYNC_SECONDS)
        seconds = bound.remaining("the guest agent", where)
        sock = socket.socket(_family(target))
        try:
            async with asyncio.timeout(seconds):
                await _open(sock, target, where)
                await _synchronize(sock, where)
                client = QMPClient("qmpnbd-agent")
                client.await_greeting = client.negotiate = False
                await client.connect(sock)
        except (TimeoutError, OSError):
            sock.close()
            raise _silent(where, bound.seconds) from None
        except BaseException:
            sock.close()
            raise
        return cls(client, sock, where)

    async def status(self, deadline: Deadline) -> Literal["frozen", "thawed"]:
        """Returns whether the guest's filesystems are frozen, whoever froze them.

        Raises:
            AgentError: no answer, or a refusal.
        """
        reply = await self._execute("guest-fsfreeze-status", deadline)
        if reply == "frozen":
            return "frozen"
        if reply == "thawed":
            return "thawed"
        raise self._odd("guest-fsfreeze-status", reply)

    async def freeze(self, deadline: Deadline) -> int:
        """Freezes the guest's filesystems; returns how many.

        After a failure they may be frozen nevertheless, also later: thaw in any case.

        Raises:
            AgentError: no answer, or a refusal.
        """
        return self._count("guest-fsfreeze-freeze", await self._execute("guest-fsfreeze-freeze", deadline))

    async def thaw(self, deadline: Deadline) -> int:
        """Thaws the guest's filesystems; returns how many were frozen until then.

        Raises:
            AgentError: no answer, or a refusal.
        """
        return self._count("guest-fsfreeze-thaw", await self._execute("guest-fsfreeze-thaw", deadline))

    async def _execute(self, command: str, deadline: Deadline) -> object:
        try:
            async with asyncio.timeout(deadline.remaining(f"the guest agent's reply to {command}", self.where)):
                return await self._client.execute(command)
        except (TimeoutError, DeadlineError):
            raise _silent(self.where, deadline.seconds, command) from None
        except ExecuteError as error:
            raise AgentRefusedError(
                f"the guest agent refused {command}: {error}", where=self.where, remedy=_remedy(error)
            ) from error
        except (ExecInterruptedError, StateError, QMPError, EOFError, OSError, ValueError) as error:
            raise AgentSilentError(
                f"the connection to the guest agent ended during {command}",
                where=self.where,
                remedy="See whether QEMU and the guest still run, and whether the guest is frozen.",
            ) from error

    def _count(self, command: str, reply: object) -> int:
        if type(reply) is not int or reply < 0:
            raise self._odd(command, reply)
        return reply

    def _odd(self, command: str, reply: object) -> AgentRefusedError:
        return AgentRefusedError(
            f"unexpected reply to {command}: {str(reply)[:80]!r}",
            where=self.where,
            remedy="Give the socket of the channel org.qemu.guest_agent.0.",
        )

    async def close(self) -> None:
        """Ends the connection; never raises. One that stays open would keep every other client out."""
        await finish(self._close())

    async def _close(self) -> None:
        # Shut down first: disconnect() waits until everything is written, which a guest that stands still never reads.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        # After a loss, disconnect() raises the cause, of any type; execute() has told it already.
        with contextlib.suppress(Exception):
            await self._client.disconnect()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def _listening(address: MonitorAddress | str) -> UnixAddress | TcpAddress:
    target = parse_address(address) if isinstance(address, str) else address
    if isinstance(target, UnixAddress | TcpAddress):
        return target
    raise UsageError(
        "a guest agent cannot be reached this way",
        where=str(target),
        remedy="Give the UNIX socket or the TCP port of the channel org.qemu.guest_agent.0.",
    )


def _family(target: UnixAddress | TcpAddress) -> socket.AddressFamily:
    if isinstance(target, UnixAddress):
        return socket.AF_UNIX
    return socket.AF_INET6 if ":" in target.host else socket.AF_INET


async def _open(sock: socket.socket, target: UnixAddress | TcpAddress, where: str) -> None:
    sock.setblocking(False)
    endpoint = target.path if isinstance(target, UnixAddress) else (target.host, target.port)
    try:
        await asyncio.get_running_loop().sock_connect(sock, endpoint)
    except OSError as error:
        raise MonitorConnectError(
            f"cannot connect: {error.strerror or error}",
            where=where,
            remedy="Give the socket of the channel org.qemu.guest_agent.0, and see whether QEMU runs.",
        ) from error


async def _synchronize(sock: socket.socket, where: str) -> None:
    """Reads away what is not meant for us ("guest-sync-delimited")."""
    loop = asyncio.get_running_loop()
    number = secrets.randbits(31)
    command = {"execute": "guest-sync-delimited", "arguments": {"id": number}}
    await loop.sock_sendall(sock, _MARK + json.dumps(command).encode() + b"\n")
    received = b""
    stale = 0
    while True:
        data = await loop.sock_recv(sock, 4096)
        stale += len(data)
        if not data or stale > MAX_STALE:
            what = "it closed the connection" if not data else f"more than {MAX_STALE} bytes, and no answer among them"
            raise AgentRefusedError(
                f"not a guest agent: {what}",
                where=where,
                remedy="Give the socket of the channel org.qemu.guest_agent.0, not that of a monitor.",
            )
        received += data
        # The last mark counts: late replies to earlier clients may be marked as well.
        _, mark, after = received.rpartition(_MARK)
        if mark and after.endswith(b"\n") and _is_reply(after, number):
            return
        received = mark + after if mark else b""


def _is_reply(line: bytes, number: int) -> bool:
    try:
        return bool(json.loads(line) == {"return": number})
    except (ValueError, RecursionError):
        return False


def _silent(where: str, seconds: float | None, command: str = "guest-sync-delimited") -> AgentSilentError:
    within = "" if seconds is None else f" within {seconds:g} s"
    return AgentSilentError(
        f"no reply to {command}{within}",
        where=where,
        remedy="No guest agent runs in the guest (install and start qemu-guest-agent), another client holds its socket "
        "(libvirt, for one), or the guest is paused.",
    )


def _remedy(error: ExecuteError) -> str:
    text = str(error)
    if FROZEN_ALREADY in text:
        return "Somebody froze the guest before: thaw it with guest-fsfreeze-thaw if that was a backup that died."
    if "disabled" in text or "not allowed" in text:
        return "Allow it in the guest agent's configuration (block-rpcs, allow-rpcs)."
    if error.error_class == "CommandNotFound":
        return "This guest agent cannot freeze filesystems."
    return "See the guest agent's log in the guest."
