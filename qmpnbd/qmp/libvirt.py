"""The monitor of a domain that libvirt runs: libvirt holds it, and passes commands on.

This is libvirt's ``virDomainQemuMonitorCommand``, which it offers for debugging. It costs:

- the domain is marked as tainted (``custom-monitor``) until it is next started;
- no events: what they would tell is found out by asking again and again (`qmpnbd.qmp.polling`);
- libvirt does not know what is made behind its back. It has one NBD server in QEMU, as everybody, and wants it for its
  own backup jobs; a node of ours under a disk is a graph that libvirt has no picture of. So while something of ours is
  in the domain, no snapshot, block job, migration or backup should be started through libvirt.

The Python module ``libvirt`` belongs to the distribution (python3-libvirt), and is loaded only when it is used.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Self
from urllib.parse import urlsplit
from uuid import UUID

from qemu.qmp import EventListener, Message

from qmpnbd.deadline import Deadline
from qmpnbd.errors import (
    CommandFailedError,
    MonitorConnectError,
    MonitorError,
    MonitorLostError,
    NotAMonitorError,
    ReplyTooLongError,
    UsageError,
)
from qmpnbd.qmp.address import LibvirtAddress
from qmpnbd.qmp.models import ErrorReply, Reply, parse_reply
from qmpnbd.qmp.polling import POLLED, State
from qmpnbd.qmp.transport import MAX_REPLY, Transport, in_daemon_thread, lost

CLOSE_SECONDS = 2.0
"""How long a goodbye to libvirt may take."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 0.5
"""Seconds between two looks, growing by half each time: most of what is waited for takes milliseconds."""

_NOT_PASSED_ON = (
    *("VIR_ERR_OPERATION_INVALID", "VIR_ERR_OPERATION_DENIED", "VIR_ERR_OPERATION_TIMEOUT", "VIR_ERR_NO_DOMAIN"),
    *("VIR_ERR_ACCESS_DENIED", "VIR_ERR_AUTH_FAILED", "VIR_ERR_NO_SUPPORT"),
)
"""Errors of libvirt's that come before it has given the command to QEMU."""


class LibvirtTransport(Transport):
    """A domain's monitor, lent by libvirt; made by `connect`.

    Calls into libvirt block and know no deadline, so each has a thread of its own that nobody waits for at the end.
    """

    is_polled = True
    peer = None  # libvirt does not tell QEMU's process, and what it keeps in files is not the kernel's word

    def __init__(self, connection: Any, domain: Any, where: str, *, is_local: bool, identity: object) -> None:
        self._connection = connection
        self._domain = domain
        self._listeners: dict[EventListener, dict[str, State]] = {}
        self._looking = asyncio.Lock()
        self._ended = False
        self.where = where
        self.is_local = is_local
        self.identity = identity
        self.passes_descriptors = hasattr(_module("libvirt_qemu", where), "qemuMonitorCommandWithFiles") and is_local

    @classmethod
    async def connect(cls, address: LibvirtAddress, deadline: Deadline) -> Self:
        """Connects to libvirt and finds the domain.

        Raises:
            MonitorConnectError: no Python module for libvirt, no libvirt, no such domain, or it does not run.
            DeadlineError: `deadline` passed.
        """
        where = str(address)
        seconds = deadline.remaining("libvirt", where)
        try:
            async with asyncio.timeout(seconds):
                return await in_daemon_thread(partial(cls._open, address, where), "qmpnbd-libvirt")
        except TimeoutError:
            raise deadline.expired("libvirt", where) from None

    @classmethod
    def _open(cls, address: LibvirtAddress, where: str) -> Self:
        libvirt = _module("libvirt", where)
        # By default libvirt writes every error to stderr, and raises it as well.
        libvirt.registerErrorHandler(lambda _context, _error: None, None)
        try:
            connection = libvirt.open(address.uri or None)
            domain = _domain(libvirt, connection, address.domain)
            if not domain.isActive():
                raise MonitorConnectError("the domain does not run", where=where, remedy="Start it with virsh start.")
            is_local = not urlsplit(connection.getURI()).hostname
            identity = domain.UUIDString(), domain.ID()  # the second is another each time it is started
        except libvirt.libvirtError as error:
            raise MonitorConnectError(
                f"libvirt: {error}", where=where, remedy="See `virsh -c URI list`; --libvirt takes the same URI."
            ) from error
        return cls(connection, domain, where, is_local=is_local, identity=identity)

    async def execute(self, command: str, arguments: Mapping[str, object] | None, fd: int | None) -> object:
        """See `Transport.execute`."""
        if any(set(states) != listener.names for listener, states in self._listeners.items()):
            await self._look()  # what there was before the command
        reply = await self._pass_on(command, arguments, fd)
        if self._listeners:
            # The reply is the news; that the connection has ended since will be told to who waits for events.
            with contextlib.suppress(MonitorError):
                await self._look()
        return reply

    async def _pass_on(
        self, command: str, arguments: Mapping[str, object] | None = None, fd: int | None = None
    ) -> object:
        request: dict[str, object] = {"execute": command}
        if arguments is not None:
            request["arguments"] = arguments
        text = await in_daemon_thread(partial(self._call, command, json.dumps(request), fd), "qmpnbd-libvirt")
        if len(text) > MAX_REPLY:
            raise ReplyTooLongError(
                f"the reply to {command} is longer than {MAX_REPLY >> 20} MiB", where=self.where, remedy="Ask for less."
            )
        try:
            decoded = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise NotAMonitorError(
                f"libvirt's reply to {command} is not JSON", where=self.where, remedy="Is this a QEMU domain?"
            ) from error
        if isinstance(decoded, dict) and "error" in decoded:
            refused = parse_reply(ErrorReply, decoded, command=command, where=self.where).error
            raise CommandFailedError(command, refused.error_class, refused.desc, where=self.where)
        return parse_reply(Reply, decoded, command=command, where=self.where).value

    def _call(self, command: str, request: str, fd: int | None) -> str:
        """Hands a command to libvirt and returns QEMU's reply as text; in a thread."""
        if fd is not None and not self.passes_descriptors:
            raise UsageError(
                "file descriptors cannot be passed through this libvirt",
                where=self.where,
                remedy="libvirt 8.2 and later can, on the same host.",
            )
        libvirt, monitor = _module("libvirt", self.where), _module("libvirt_qemu", self.where)
        try:
            if fd is None:
                return str(monitor.qemuMonitorCommand(self._domain, request, 0))
            return str(monitor.qemuMonitorCommandWithFiles(self._domain, request, [fd], 0)[0])
        except libvirt.libvirtError as error:
            self._ended = self._has_ended()
            if error.get_error_code() in {getattr(libvirt, name) for name in _NOT_PASSED_ON}:
                raise MonitorLostError(
                    f"libvirt did not pass {command} on: {error}", where=self.where, remedy="See virsh domstate."
                ) from error
            raise lost(command, self.where, f"libvirt failed ({error})") from error

    def _has_ended(self) -> bool:
        libvirt = _module("libvirt", self.where)
        try:
            return not self._domain.isActive()
        except libvirt.libvirtError as error:
            return bool(error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN)

    @contextlib.contextmanager
    def listen(self, listener: EventListener) -> Iterator[None]:
        """See `Transport.listen`; events that no query tells are refused."""
        if unknown := listener.names - POLLED.keys():
            raise UsageError(
                f"libvirt passes no events on, and {', '.join(sorted(unknown))} cannot be found out by asking",
                where=self.where,
                remedy="Give QEMU a monitor of its own for qmpnbd (<qemu:commandline> in the domain's XML).",
            )
        self._listeners[listener] = {}
        try:
            yield
        finally:
            del self._listeners[listener]

    async def next_event(self, listener: EventListener) -> Mapping[str, object]:
        """See `Transport.next_event`: asks until something has changed."""
        pause = _FIRST_PAUSE
        while listener.empty():
            await self._look()
            if listener.empty():
                await asyncio.sleep(pause)
                pause = min(pause * 1.5, _LONGEST_PAUSE)
        return await listener.get()

    async def _look(self) -> None:
        """Asks for all that somebody listens to, and tells each listener what has changed since it was last asked."""
        async with self._looking:
            for name in {name for listener in self._listeners for name in listener.names}:
                polled = POLLED[name]
                reply = await self._pass_on(polled.command, polled.arguments)
                state = polled.state(reply, self.where)
                for listener, states in self._listeners.items():
                    if name not in listener.names:
                        continue
                    for data in polled.changes(states.get(name, state), state):
                        await listener.put(Message({"event": name, "data": data}))
                    states[name] = state

    def is_gone(self) -> bool:
        """See `Transport.is_gone`; known once a command has failed for it."""
        return self._ended

    async def close(self) -> None:
        """See `Transport.close`; the domain goes on."""
        with contextlib.suppress(Exception):
            async with asyncio.timeout(CLOSE_SECONDS):
                await in_daemon_thread(self._connection.close, "qmpnbd-libvirt")


def _module(name: str, where: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MonitorConnectError(
            f"the Python module {name} is not here",
            where=where,
            remedy="Install python3-libvirt and run qmpnbd with the system's Python, or install libvirt-python beside "
            "qmpnbd; or give QEMU a monitor of its own and use --qmp.",
        ) from error


def _domain(libvirt: Any, connection: Any, name: str) -> Any:
    """Finds a domain by its name, then by its UUID."""
    find: Callable[[str], Any] = connection.lookupByName
    try:
        return find(name)
    except libvirt.libvirtError:
        with contextlib.suppress(ValueError):
            return connection.lookupByUUIDString(str(UUID(name)))
        raise
