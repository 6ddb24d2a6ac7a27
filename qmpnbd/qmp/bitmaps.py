"""Commands on dirty bitmaps, one by one and in transactions, and what to do when QEMU refuses them."""

from __future__ import annotations

from collections.abc import Sequence

from qmpnbd.deadline import Deadline
from qmpnbd.errors import CommandFailedError
from qmpnbd.qmp.monitor import Monitor, finish

REMEDIES = (
    (("in use",), "End the export or the job that uses the bitmap first."),
    (
        ("is inconsistent",),
        "QEMU did not end well, and its content is lost: it can only be removed. Make a full backup.",
    ),
    (("is readonly",), "Its image is read-only at the moment, under a snapshot for one: end that first."),
    (("already exists",), "Somebody else has just made it, another run for one: see what there is, and try again."),
    (("Can't store",), "Only qcow2 of version 3 stores bitmaps; others are made transient."),
    (("can't be merged",), "The disk was given another size meanwhile: nothing was changed. Run again."),
    (("Dirty bitmap '",), "Somebody else has just removed it: see what there is, and try again."),
    (("Cannot find device", "Node '"), "The node is gone or has another name: see `qmpnbd disks`."),
)
"""Words of QEMU's refusals -> what to do; the first row that fits; the same in QEMU 5.2, 7.2 and 10.0."""


def transaction(actions: Sequence[dict[str, object]]) -> dict[str, object]:
    """Returns the QMP command that carries out all of `actions` or none, at one instant."""
    return {"execute": "transaction", "arguments": {"actions": list(actions)}}


async def transact(monitor: Monitor, actions: Sequence[dict[str, object]], deadline: Deadline) -> None:
    """Carries out all of `actions` or none, at one instant.

    Raises:
        CommandFailedError: QEMU refused one; nothing was changed.
        MonitorLostError: the connection ended.
        DeadlineError: no reply in time.
    """
    try:
        await finish(monitor.execute("transaction", {"actions": list(actions)}, deadline=deadline))
    except CommandFailedError as error:
        add_remedy(error)
        raise


def add_remedy(error: CommandFailedError) -> None:
    """Says what to do about a refusal of commands on bitmaps, if a row knows what QEMU said."""
    error.remedy = next(
        (remedy for words, remedy in REMEDIES if any(each in error.description for each in words)), error.remedy
    )


async def add_bitmap(
    monitor: Monitor, node_name: str, name: str, deadline: Deadline, *, granularity: int | None = None
) -> None:
    """Makes a transient bitmap that records from now on what is written, zeroed or discarded through a node.

    Args:
        monitor: the QEMU.
        node_name: the node.
        name: of the bitmap.
        deadline: for QEMU's reply.
        granularity: bytes told by one bit; None for QEMU's choice.

    Raises:
        CommandFailedError: QEMU refused.
        MonitorLostError: the connection ended.
        DeadlineError: no reply in time.
    """
    arguments: dict[str, object] = {"node": node_name, "name": name, "persistent": False}
    if granularity is not None:
        arguments["granularity"] = granularity
    try:
        await finish(monitor.execute("block-dirty-bitmap-add", arguments, deadline=deadline))
    except CommandFailedError as error:
        add_remedy(error)
        raise


async def disable_bitmaps(monitor: Monitor, bitmaps: Sequence[tuple[str, str]], deadline: Deadline) -> None:
    """Ends the recording of several bitmaps at one moment, so that they can be exported.

    A write under way sets its bit only when it has ended; a transaction waits for all of these first.

    Args:
        monitor: the QEMU.
        bitmaps: node-name and name of each; with none, nothing is done.
        deadline: for QEMU's reply.

    Raises:
        CommandFailedError: QEMU refused.
        MonitorLostError: the connection ended.
        DeadlineError: no reply in time.
    """
    kind = "block-dirty-bitmap-disable"
    actions: list[dict[str, object]] = [{"type": kind, "data": {"node": node, "name": name}} for node, name in bitmaps]
    if actions:
        await transact(monitor, actions, deadline)


async def remove_bitmap(monitor: Monitor, node_name: str, name: str, deadline: Deadline) -> None:
    """Removes a bitmap; one that does not exist, or whose node is gone, is gone.

    Raises:
        CommandFailedError: QEMU refused: it is in use.
        MonitorLostError: the connection ended.
        DeadlineError: no reply in time.
    """
    try:
        arguments = {"node": node_name, "name": name}
        await finish(monitor.execute("block-dirty-bitmap-remove", arguments, deadline=deadline))
    except CommandFailedError as error:
        if not any(words in error.description for words in ("not found", "Cannot find")):
            raise
