"""A monitor for dry runs: it asks QEMU, and notes what it would have been told to change."""

from __future__ import annotations

from collections.abc import Mapping

from qmpnbd.deadline import Deadline
from qmpnbd.qmp.address import MonitorAddress
from qmpnbd.qmp.commands import what_tells
from qmpnbd.qmp.monitor import Monitor
from qmpnbd.qmp.server import PROBE_ADDRESS
from qmpnbd.qmp.transport import Transport
from qmpnbd.qmp.undo import Command


class Rehearsal(Monitor):
    """A monitor whose QEMU stays as it is; what is done through it seems to succeed.

    Attributes:
        noted: the commands that were not sent, in order.
    """

    def __init__(self, transport: Transport, address: MonitorAddress) -> None:
        super().__init__(transport, address)
        self.noted: list[Command] = []

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        deadline: Deadline,
        fd: int | None = None,
    ) -> object:
        """Executes a command that asks, and notes one that changes something.

        Raises:
            MonitorError: as `Monitor.execute`, for what is sent.
            DeadlineError: no reply in time.
        """
        probes = (arguments or {}).get("addr") == PROBE_ADDRESS
        if (not what_tells(command) and fd is None) or probes:
            return await super().execute(command, arguments, deadline=deadline)
        self.noted.append({"execute": command, **({"arguments": dict(arguments)} if arguments else {})})
        return {}
