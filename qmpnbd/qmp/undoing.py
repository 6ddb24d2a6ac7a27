"""Taking down, one thing at a time; what is gone already is no error."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import assert_never

from qmpnbd.deadline import Deadline
from qmpnbd.errors import CommandFailedError, InterferenceError, LeftBehindError, MonitorLostError
from qmpnbd.qmp.bitmaps import remove_bitmap, transact
from qmpnbd.qmp.credentials import read_objects
from qmpnbd.qmp.exports import remove_export
from qmpnbd.qmp.graph import below
from qmpnbd.qmp.inventory import guest_status, read_inventory, read_nodes
from qmpnbd.qmp.jobs import cancel_job, complete_job, find_job
from qmpnbd.qmp.leftovers import place_in_graph
from qmpnbd.qmp.models import GraphReply, parse_reply
from qmpnbd.qmp.monitor import Monitor, finish
from qmpnbd.qmp.rundir import RunDirectory
from qmpnbd.qmp.scratch import is_committed, note_committed, remove_image
from qmpnbd.qmp.server import stop_server
from qmpnbd.qmp.teardown import TEARDOWN_SECONDS
from qmpnbd.qmp.undecided import undecided_of
from qmpnbd.qmp.undo import (
    AbortCheckpoint,
    CancelJob,
    Command,
    CommitOverlay,
    DeleteNode,
    DeleteObject,
    RemoveBitmap,
    RemoveExport,
    RemoveFile,
    RestoreDrive,
    Resume,
    RetryInputOutput,
    StopServer,
    Undo,
    command,
)

_GONE = ("Failed to find node", "Cannot find node", "not found")  # the second one is QEMU 5.2's
_PAUSED = "paused"
_IO_ERROR = "io-error"


async def send(monitor: Monitor, what: Command, deadline: Deadline) -> object:
    """Executes a command to its end, even if the caller is cancelled meanwhile, and returns the reply.

    Raises:
        CommandFailedError: QEMU refused it.
        MonitorLostError: the connection ended.
        DeadlineError: no reply in time.
    """
    arguments = what.get("arguments")
    given = arguments if isinstance(arguments, dict) else None
    return await finish(monitor.execute(str(what["execute"]), given, deadline=deadline))


async def take_down(monitor: Monitor, undo: Undo, directory: RunDirectory | None, deadline: Deadline) -> None:
    """Takes one thing down; to its end, even if the caller is cancelled meanwhile.

    Args:
        monitor: the QEMU.
        undo: what.
        directory: of the run that made it; None if it is not here.
        deadline: for QEMU's replies. Committing an overlay takes as long as it takes, while it makes progress.

    Raises:
        MonitorError: QEMU refused or is gone, or somebody has built on what was to be taken down.
        DeadlineError: no reply in time.
    """
    await finish(_take_down(monitor, undo, directory, deadline))


async def _take_down(monitor: Monitor, undo: Undo, directory: RunDirectory | None, deadline: Deadline) -> None:
    match undo:
        case RemoveExport():
            await remove_export(monitor, undo.export, deadline)
        case StopServer():
            await _stop_server(monitor, undo, directory, deadline)
        case CancelJob():
            await cancel_job(monitor, undo.job, deadline)
        case CommitOverlay():
            await _commit(monitor, undo, directory, deadline)
        case RestoreDrive():
            await _restore_drive(monitor, undo, deadline)
        case DeleteNode() | DeleteObject():
            await _unless_gone(monitor, undo.commands[0], deadline)
        case RemoveBitmap():
            await remove_bitmap(monitor, undo.node_name, undo.name, deadline)
        case AbortCheckpoint():
            await _abort_checkpoint(monitor, undo, deadline)
        case Resume():
            await _resume(monitor, undo, deadline)
        case RetryInputOutput():
            await _retry(monitor, undo, deadline)
        case RemoveFile():
            await _remove_file(monitor, undo, directory, deadline)
        case _:
            assert_never(undo)


async def _unless_gone(monitor: Monitor, what: Command, deadline: Deadline) -> None:
    """Deletes something; if there is nothing, it is gone already."""
    try:
        await send(monitor, what, deadline)
    except CommandFailedError as error:
        if not any(words in error.description for words in _GONE):
            raise


async def _stop_server(monitor: Monitor, undo: StopServer, directory: RunDirectory | None, deadline: Deadline) -> None:
    if directory is not None and not await stop_server(monitor, directory, deadline):
        raise LeftBehindError("others have exports in it", where=undo.socket_path)


async def _commit(monitor: Monitor, undo: CommitOverlay, directory: RunDirectory | None, deadline: Deadline) -> None:
    if directory is None or not await asyncio.to_thread(is_committed, directory, undo.path):
        if not await _committed(monitor, undo, deadline):
            return
        if directory is not None:
            await asyncio.to_thread(note_committed, directory, undo.path)
    delete = command("blockdev-del", node_name=undo.overlay)
    dismiss = command("job-dismiss", id=undo.job)
    try:
        await _unless_gone(monitor, delete, Deadline(TEARDOWN_SECONDS))
    except CommandFailedError:
        # A concluded job that committed below somebody's overlay holds the node still. From here on, the note is proof.
        await _unless_gone(monitor, dismiss, Deadline(TEARDOWN_SECONDS))
        await _unless_gone(monitor, delete, Deadline(TEARDOWN_SECONDS))
    await asyncio.to_thread(Path(undo.path).unlink, missing_ok=True)
    await _unless_gone(monitor, dismiss, Deadline(TEARDOWN_SECONDS))


async def _committed(monitor: Monitor, undo: CommitOverlay, deadline: Deadline) -> bool:
    """Commits an overlay; returns False if there is nothing to commit: it is gone, or never was in the chain."""
    if await find_job(monitor, undo.job, deadline) is None:
        name = "x-debug-query-block-graph"
        reply = await monitor.execute(name, deadline=deadline)
        place = place_in_graph(parse_reply(GraphReply, reply, command=name, where=monitor.where), undo.overlay)
        if place is None or not place.has_backing:
            return False
        if not place.is_used and place.backing_is_used:
            raise LeftBehindError(
                f"nobody uses it, and somebody uses {undo.base} below: which of the two is newer is not known",
                where=f"node {undo.overlay}",
            )
        commit, *_ = undo.commands
        arguments = commit["arguments"]
        given = {**arguments, "device": place.top} if isinstance(arguments, dict) else {}
        await send(monitor, {**commit, "arguments": given}, deadline)
    await complete_job(monitor, undo.job)
    return True


async def _restore_drive(monitor: Monitor, undo: RestoreDrive, deadline: Deadline) -> None:
    inventory = await read_inventory(monitor, deadline)
    for disk in inventory.disks:
        if disk.qom_path != undo.qom_path:
            continue
        if disk.node_name == undo.filter:
            await send(monitor, undo.commands[0], deadline)
        elif undo.filter in below(inventory.graph, disk.node_name):
            raise InterferenceError(
                f"node {disk.node_name} was put above our filter {undo.filter}",
                where=f"disk {disk.name}",
                remedy="The guest is not harmed. Commit or take away what lies above, then run `qmpnbd recover`.",
            )


async def _abort_checkpoint(monitor: Monitor, undo: AbortCheckpoint, deadline: Deadline) -> None:
    undecided = undecided_of(undo.run, await read_nodes(monitor, deadline))
    if undecided is not None:
        await transact(monitor, undecided.abort(), deadline)


async def _resume(monitor: Monitor, undo: Resume, deadline: Deadline) -> None:
    if undo.marker not in await read_objects(monitor, deadline):
        return
    if await guest_status(monitor, deadline) == _PAUSED:
        await send(monitor, undo.commands[0], deadline)
    await _unless_gone(monitor, undo.commands[1], deadline)


async def _retry(monitor: Monitor, undo: RetryInputOutput, deadline: Deadline) -> None:
    if await guest_status(monitor, deadline) == _IO_ERROR:
        await send(monitor, undo.commands[0], deadline)


async def _remove_file(monitor: Monitor, undo: RemoveFile, directory: RunDirectory | None, deadline: Deadline) -> None:
    try:
        nodes = await read_nodes(monitor, deadline)
    except MonitorLostError:
        if not await monitor.has_gone():
            raise
        nodes = []
    if any(node.node_name == undo.node_name or node.image.filename == undo.path for node in nodes):
        raise LeftBehindError("a node stands on it", where=undo.path)
    await asyncio.to_thread(remove_image, Path(undo.path), directory)
