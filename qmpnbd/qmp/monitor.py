"""The door to a QEMU monitor: commands and events, with a bound on every wait.

How QMP travels is the business of a `qmpnbd.qmp.transport.Transport`; here is what callers see of any of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Coroutine, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

from qemu.qmp import EventListener

from qmpnbd.deadline import Deadline
from qmpnbd.errors import (
    CommandFailedError,
    DeadlineError,
    InterferenceError,
    MonitorConnectError,
    MonitorLostError,
    UsageError,
)
from qmpnbd.qmp.address import FdAddress, LibvirtAddress, MonitorAddress, parse_address
from qmpnbd.qmp.commands import what_tells
from qmpnbd.qmp.direct import DirectTransport
from qmpnbd.qmp.libvirt import LibvirtTransport
from qmpnbd.qmp.models import EVENTS, VersionInfo, parse_event, parse_reply
from qmpnbd.qmp.process import Peer
from qmpnbd.qmp.transport import Transport

T = TypeVar("T")

ENDING_SECONDS = 10.0
"""How long a QEMU that has closed its monitor may take to end, before it is taken for one that goes on."""

_LOOK_SECONDS = 0.02

_PLANE_ENDS = "".join(f"{chr(plane << 16 | 0xFFFE)}{chr(plane << 16 | 0xFFFF)}" for plane in range(17))
_NO_CHARACTER = re.compile(f"[\ud800-\udfff\ufdd0-\ufdef{_PLANE_ENDS}]")
"""Code points that QEMU's JSON parser refuses (``mod_utf8_encode``): surrogates and noncharacters."""


async def finish(work: Coroutine[Any, Any, T]) -> T:
    """Runs `work` to its end even if the caller is cancelled meanwhile; the cancellation is raised afterwards.

    For what must not be left half done: starting something in QEMU whose outcome decides what to take down, and
    taking it down.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        task.exception()  # looked at, so that asyncio does not complain; the cancellation is the news
        raise cancelled
    return task.result()


@dataclass(frozen=True, slots=True)
class Events:
    """Events that are being collected; made by `Monitor.events`, read by `Monitor.next_event`."""

    transport: Transport
    listener: EventListener


class Monitor:
    """A connected monitor; made by `connect`, closed by `close` or at the end of an ``async with``."""

    def __init__(self, transport: Transport, address: MonitorAddress) -> None:
        self._transport = transport
        self._address = address
        self._version: VersionInfo | None = None
        self._ending: Deadline | None = None

    @classmethod
    async def connect(cls, address: MonitorAddress | str, deadline: Deadline) -> Self:
        """Connects and negotiates.

        Args:
            address: where the monitor is, parsed or as people write it (`qmpnbd.qmp.address.parse_address`).
            deadline: for all of it; the greeting alone must come within `qmpnbd.qmp.direct.GREETING_SECONDS`.

        Raises:
            UsageError: not an address.
            MonitorConnectError: nothing to connect to.
            NotAMonitorError: what answers does not speak QMP.
            MonitorSilentError: no greeting.
            DeadlineError: `deadline` passed.
        """
        target = parse_address(address) if isinstance(address, str) else address
        monitor = cls(await _open(target, deadline), target)
        try:
            await monitor._ask_version(deadline)
        except BaseException:
            await monitor.close()
            raise
        return monitor

    async def _ask_version(self, deadline: Deadline) -> None:
        reply = await self.execute("query-version", deadline=deadline)
        self._version = parse_reply(VersionInfo, reply, command="query-version", where=self.where)

    async def reconnect(self, deadline: Deadline) -> None:
        """Makes a new connection in place of one that ended; nothing that was under way is repeated.

        A command that raised `OutcomeUnknownError` may have been carried out: what that error names is to be asked
        first. Events of the old connection are lost, and those who wait for them are told.

        Raises:
            MonitorConnectError: nothing to connect to, or a descriptor that was used up.
            InterferenceError: another QEMU answers there now; what was made in the first is gone with it. Over TCP only
                another release can be told.
            MonitorError: as for `connect`.
            DeadlineError: `deadline` passed.
        """
        if isinstance(self._address, FdAddress):
            raise MonitorConnectError(
                "a descriptor that was inherited cannot be connected again",
                where=self.where,
                remedy="Start qmpnbd anew with a new one.",
            )
        before, version = self._transport, self._version
        await self.close()
        transport = await _open(self._address, deadline)
        self._transport = transport
        self._ending = None
        await self._ask_version(deadline)
        if before.is_gone() or before.identity != transport.identity or version != self._version:
            raise InterferenceError(
                "the QEMU that was here has ended, and another one answers",
                where=self.where,
                remedy="Begin anew: nothing of what was made in the first is in this one.",
            )

    @property
    def where(self) -> str:
        """The address, for messages."""
        return self._transport.where

    @property
    def peer(self) -> Peer | None:
        """QEMU's process if it is on this host and the kernel tells it, else None; whoever started it may set it."""
        return self._transport.peer

    @peer.setter
    def peer(self, peer: Peer) -> None:
        self._transport.peer = peer

    @property
    def is_local(self) -> bool:
        """Whether QEMU is on this host for certain."""
        return self._transport.is_local

    @property
    def is_polled(self) -> bool:
        """Whether events are found out by asking, so that what comes and goes between two looks is not seen."""
        return self._transport.is_polled

    @property
    def version(self) -> VersionInfo:
        """QEMU's version, asked once when connecting."""
        if self._version is None:
            raise MonitorLostError("the connection was not made to its end", where=self.where)
        return self._version

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        deadline: Deadline,
        fd: int | None = None,
    ) -> object:
        """Sends a command and returns its reply, decoded.

        Args:
            command: its name.
            arguments: its arguments.
            deadline: for the reply.
            fd: a file descriptor to pass to QEMU, for ``getfd`` and ``add-fd``; it stays open here.

        Raises:
            UsageError: the arguments cannot be said in QMP, or the descriptor cannot be passed.
            CommandFailedError: QEMU refused it.
            OutcomeUnknownError: the connection ended, and whether the command was carried out is unknown.
            MonitorLostError: the connection ended before or during a command that changes nothing.
            DeadlineError: no reply in time; the command may still be carried out.
        """
        what = f"QEMU's reply to {command}"
        seconds = deadline.remaining(what, self.where)
        sent = None if arguments is None else _sayable(command, arguments, self.where)
        try:
            async with asyncio.timeout(seconds):
                return await self._transport.execute(command, sent, fd)
        except TimeoutError:
            late = deadline.expired(what, self.where)
            if asks := what_tells(command):
                late.remedy += f" It may be carried out yet: before doing it again, ask {', '.join(asks)}."
            raise late from None

    @property
    def passes_descriptors(self) -> bool:
        """Whether open files can be handed over this connection."""
        return self._transport.passes_descriptors

    async def pass_descriptor(self, descriptor: int, name: str, deadline: Deadline) -> None:
        """Hands QEMU an open file, which its later commands call `name`; ours stays open.

        Not for two tasks at once: QEMU gives ``getfd`` the file that came last.

        Raises:
            UsageError: none can be handed over this connection.
            CommandFailedError: QEMU refused; of class ``CommandNotFound`` if it takes none (the storage daemon).
            MonitorLostError: the connection ended.
            DeadlineError: no reply in time.
        """
        # Also asks whether QEMU takes files at all: one that was sent for nothing would stay open in it.
        try:
            await self.execute("closefd", {"fdname": name}, deadline=deadline)
        except CommandFailedError as error:
            if error.error_class == "CommandNotFound":
                raise
        await self.execute("getfd", {"fdname": name}, deadline=deadline, fd=descriptor)

    @contextlib.contextmanager
    def events(self, *names: str) -> Iterator[Events]:
        """Collects the events of some names from here on; enter it before the command that causes them.

        Raises:
            UsageError: such an event cannot be had over this transport.
        """
        listener = EventListener(names)
        with self._transport.listen(listener):
            yield Events(self._transport, listener)

    async def next_event(self, events: Events, what: str, deadline: Deadline) -> Mapping[str, object]:
        """Returns the data of the next event.

        Args:
            events: from `events`.
            what: what is waited for, for messages.
            deadline: how long.

        Raises:
            MonitorLostError: the connection that they came over has ended.
            NotAMonitorError: an event of another shape than the QMP reference gives it.
            DeadlineError: none came in time.
        """
        try:
            async with asyncio.timeout(deadline.remaining(what, self.where)):
                event = await events.transport.next_event(events.listener)
        except TimeoutError:
            raise deadline.expired(what, self.where) from None
        except MonitorLostError as error:
            raise MonitorLostError(
                f"{error.what}, while waiting for {what}", where=self.where, remedy=error.remedy
            ) from error
        data = event.get("data", {})
        if kind := EVENTS.get(str(event["event"])):
            parse_event(kind, data, event=str(event["event"]), where=self.where)
        return data if isinstance(data, dict) else {}

    def is_gone(self) -> bool:
        """Returns whether QEMU's process has ended for certain, and with it everything inside."""
        return self._transport.is_gone()

    async def has_gone(self) -> bool:
        """Returns whether QEMU has ended; after its connection has ended, it is given some time for that, once.

        One that was killed loses its sockets some moments before its process is gone, and one that quits in an orderly
        way closes its monitors before its images.
        """
        return await finish(self._gone_at_last())

    async def _gone_at_last(self) -> bool:
        if self._ending is None:
            self._ending = Deadline(ENDING_SECONDS if self.peer is not None else 0)
        while not self.is_gone():
            try:
                self._ending.check("QEMU to end", self.where)
            except DeadlineError:
                return False
            await asyncio.sleep(_LOOK_SECONDS)
        return True

    async def close(self) -> None:
        """Ends the connection; never raises, and takes at most a few seconds even if QEMU does not read."""
        await finish(self._transport.close())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


async def _open(address: MonitorAddress, deadline: Deadline) -> Transport:
    if isinstance(address, LibvirtAddress):
        return await LibvirtTransport.connect(address, deadline)
    return await DirectTransport.connect(address, deadline)


def _sayable(command: str, arguments: Mapping[str, object], where: str) -> dict[str, object]:
    """Refuses what QEMU's JSON parser does not read: the error that it answers has no id, and ends the session.

    Raises:
        UsageError: a number that is none, or text that is no Unicode, as file names can be.
    """
    try:
        text = json.dumps(dict(arguments), allow_nan=False, ensure_ascii=False)
    except (ValueError, TypeError) as error:
        raise UsageError(f"the arguments of {command} are not JSON: {error}", where=where) from error
    if found := _NO_CHARACTER.search(text):
        raise UsageError(
            f"an argument of {command} holds {found[0]!a}, which is no Unicode character",
            where=where,
            remedy="QMP knows only names in valid UTF-8: rename the file.",
        )
    return dict(arguments)
