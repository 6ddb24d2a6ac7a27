"""Block exports inside QEMU, taken up and down without a trace.

::

    up      block-export-add (our id)
    down    block-export-del hard | safe -> wait for BLOCK_EXPORT_DELETED

An export follows the block graph: after a snapshot it stands on the overlay, after a commit on the base, and while a
job runs on the job's filter. So its id is what identifies it, and `exported_node` tells where it stands now.

Everything here that changes something runs to its end even when cancelled (`finish`): what QEMU did must be known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qmpnbd.deadline import Deadline
from qmpnbd.errors import CommandFailedError, ExportRefusedError, InterferenceError
from qmpnbd.qmp.capabilities import Capability
from qmpnbd.qmp.inventory import read_abilities, read_exports
from qmpnbd.qmp.monitor import Monitor, finish
from qmpnbd.qmp.refusals import explained


@dataclass(frozen=True, slots=True)
class NodeBitmap:
    """A bitmap that is not found from the exported node on, because a ``raw`` node lies between (QEMU 7.1).

    Attributes:
        node: the node that has it.
        name: its name.
    """

    node: str
    name: str


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What an export offers beyond the content.

    Attributes:
        bitmaps: disabled dirty bitmaps, offered as metadata contexts; by name those of the node and of what it stands
            on.
        description: for clients that list exports; empty for none.
        iothread: the iothread that shall serve it; empty for where the node runs now.
        fixed_iothread: refuse if it cannot be that one. Without, QEMU 7.2 stays silently where the node runs.
        writable: let clients write.
        allocation_depth: offer ``qemu:allocation-depth``.
    """

    bitmaps: Sequence[str | NodeBitmap] = ()
    description: str = ""
    iothread: str = ""
    fixed_iothread: bool = True
    writable: bool = False
    allocation_depth: bool = True

    def arguments(self) -> dict[str, object]:
        """Returns them as arguments of ``block-export-add``."""
        found: dict[str, object] = {"allocation-depth": self.allocation_depth, "writable": self.writable}
        if self.bitmaps:
            found["bitmaps"] = [
                each if isinstance(each, str) else {"node": each.node, "name": each.name} for each in self.bitmaps
            ]
        if self.description:
            found["description"] = self.description
        if self.iothread:
            found |= {"iothread": self.iothread, "fixed-iothread": self.fixed_iothread}
        return found


_READ_ONLY = ExportOptions()


async def add_export(
    monitor: Monitor, node_name: str, name: str, deadline: Deadline, options: ExportOptions = _READ_ONLY
) -> None:
    """Exports a node, read-only with its allocation depth unless told otherwise.

    Args:
        monitor: the QEMU.
        node_name: the node.
        name: id of the export, and the name that NBD clients ask for (`qmpnbd.qmp.naming.export_id`).
        deadline: for QEMU's reply.
        options: what else it offers.

    Raises:
        CapabilityError: a `NodeBitmap`, and this QEMU knows bitmaps by their names alone.
        ExportRefusedError: QEMU refused, for a reason that is known.
        CommandFailedError: QEMU refused.
        MonitorLostError: the connection ended.
        DeadlineError: no reply in time.
    """
    if any(isinstance(each, NodeBitmap) for each in options.bitmaps):
        (await read_abilities(monitor, deadline)).require(Capability.BITMAP_OF_NODE, where=f"node {node_name}")
    arguments = {"type": "nbd", "id": name, "name": name, "node-name": node_name, **options.arguments()}
    try:
        await finish(monitor.execute("block-export-add", arguments, deadline=deadline))
    except CommandFailedError as error:
        raise explained(error) from error


async def exported_node(monitor: Monitor, name: str, deadline: Deadline) -> str:
    """Returns the node that an export stands on now.

    Args:
        monitor: the QEMU.
        name: the export's id.
        deadline: for QEMU's reply.

    Raises:
        InterferenceError: somebody removed the export.
        MonitorError: QEMU refused to tell, or is gone.
        DeadlineError: no reply in time.
    """
    for info in await read_exports(monitor, deadline):
        if info.id == name:
            return info.node_name
    raise InterferenceError("somebody removed our export", where=f"export {name}", remedy="Run again.")


async def remove_export(
    monitor: Monitor, name: str, deadline: Deadline, mode: Literal["hard", "safe"] = "hard"
) -> None:
    """Removes an export and waits until it is gone; one that does not exist is gone.

    Args:
        monitor: the QEMU.
        name: the export's id.
        deadline: for all of it.
        mode: "hard" cuts off its clients, "safe" refuses while there is one.

    Raises:
        ExportRefusedError: a client is connected, and the mode is "safe".
        MonitorError: QEMU refused or is gone.
        DeadlineError: it is still there.
    """
    await finish(_remove_export(monitor, name, mode, deadline))


async def _remove_export(monitor: Monitor, name: str, mode: str, deadline: Deadline) -> None:
    with monitor.events("BLOCK_EXPORT_DELETED") as deleted:
        try:
            await monitor.execute("block-export-del", {"id": name, "mode": mode}, deadline=deadline)
        except CommandFailedError as error:
            refusal = explained(error)
            if isinstance(refusal, ExportRefusedError) and refusal.reason == "export-missing":
                return
            raise refusal from error
        while True:
            event = await monitor.next_event(deleted, f"the export {name} to be gone", deadline)
            if event.get("id") == name:
                return
