"""An NBD server and block exports inside QEMU, taken up and down without a trace.

QEMU has one NBD server, asks nobody who stops it, and unlinks whatever lies where its socket shall be. So::

    up      nbd-server-start (fresh path in our private directory) -> block-export-add (our name)
    down    block-export-del hard, wait for BLOCK_EXPORT_DELETED   -> nbd-server-stop, if it is ours and unused

A server that was running before is someone else's: it is shared if the caller says where it listens, never stopped.
Everything here that changes something runs to its end even when cancelled (`finish`): what QEMU did must be known.
"""

from __future__ import annotations

from collections.abc import Sequence

from qmpnbd.deadline import Deadline
from qmpnbd.errors import CommandFailedError, ServerBusyError
from qmpnbd.qmp.inventory import read_exports
from qmpnbd.qmp.monitor import Monitor, finish
from qmpnbd.qmp.naming import run_of
from qmpnbd.qmp.rundir import RunDirectory

_NBD = "nbd"


async def start_server(monitor: Monitor, directory: RunDirectory, deadline: Deadline) -> None:
    """Starts QEMU's NBD server on the socket of a run.

    Args:
        monitor: the QEMU.
        directory: the run's private directory; `stop_server` recognises the server by it.
        deadline: for QEMU's reply.

    Raises:
        ServerBusyError: someone else's server is running.
        CommandFailedError: QEMU cannot make the socket, for instance because it runs as another user.
        MonitorLostError: the connection ended.
        DeadlineError: no reply in time.
    """
    address = {"type": "unix", "data": {"path": str(directory.socket_path)}}
    try:
        await finish(monitor.execute("nbd-server-start", {"addr": address}, deadline=deadline))
    except CommandFailedError as error:
        if "already running" in error.description:
            raise await _busy(monitor, deadline) from error
        raise CommandFailedError(
            error.command,
            error.error_class,
            error.description,
            where=monitor.where,
            remedy="QEMU must be able to reach and write the folder of --runtime-dir: run as QEMU's user, or as root.",
        ) from error


async def _busy(monitor: Monitor, deadline: Deadline) -> ServerBusyError:
    exports = await read_exports(monitor, deadline)
    others = [export.id for export in exports if export.type == _NBD]
    used = f" (exports: {', '.join(others)})" if others else ""
    remedy = "Say where it listens with --nbd URI; it is then shared, and left running."
    if any(run_of(name) for name in others):
        remedy = (
            "Another qmpnbd is at work: wait. If it was killed, name its --runtime-dir to have this taken down, "
            "or run block-export-del with mode hard and then nbd-server-stop in the monitor."
        )
    return ServerBusyError(f"this QEMU already runs an NBD server{used}", where=monitor.where, remedy=remedy)


async def stop_server(monitor: Monitor, directory: RunDirectory, deadline: Deadline) -> bool:
    """Stops the server that `start_server` started for this run, if it did and nobody else has exports in it.

    Args:
        monitor: the QEMU.
        directory: the run's.
        deadline: for QEMU's replies.

    Returns:
        Whether nothing of the run is left.

    Raises:
        MonitorError: QEMU refused or is gone.
        DeadlineError: no reply in time.
    """
    if not directory.socket_path.exists():  # QEMU makes it when it starts and removes it when it stops
        return True
    exports = await read_exports(monitor, deadline)
    if any(export.type == _NBD for export in exports):
        return False  # stopping would cut off the clients of exports that are not ours
    try:
        await finish(monitor.execute("nbd-server-stop", deadline=deadline))
    except CommandFailedError as error:
        if "not running" not in error.description:
            raise
    return True


async def add_export(
    monitor: Monitor, node_name: str, name: str, deadline: Deadline, *, bitmaps: Sequence[str] = ()
) -> None:
    """Exports a node read-only with its allocation depth.

    Args:
        monitor: the QEMU.
        node_name: the node.
        name: id of the export, and the name that NBD clients ask for (`qmpnbd.qmp.naming.export_id`).
        deadline: for QEMU's reply.
        bitmaps: disabled dirty bitmaps to offer as metadata contexts.

    Raises:
        CommandFailedError: QEMU refused.
        MonitorLostError: the connection ended.
        DeadlineError: no reply in time.
    """
    arguments = {"type": _NBD, "id": name, "name": name, "node-name": node_name, "allocation-depth": True}
    if bitmaps:
        arguments["bitmaps"] = list(bitmaps)
    try:
        await finish(monitor.execute("block-export-add", arguments, deadline=deadline))
    except CommandFailedError as error:
        if "not running" not in error.description:
            raise
        remedy = "Leave --nbd out: then a server is started."
        raise CommandFailedError(
            error.command, error.error_class, error.description, where=monitor.where, remedy=remedy
        ) from error


async def remove_export(monitor: Monitor, name: str, deadline: Deadline) -> None:
    """Removes an export, cutting off its clients, and waits until it is gone; one that does not exist is gone.

    Raises:
        MonitorError: QEMU refused or is gone.
        DeadlineError: it is still there.
    """
    await finish(_remove_export(monitor, name, deadline))


async def _remove_export(monitor: Monitor, name: str, deadline: Deadline) -> None:
    with monitor.events("BLOCK_EXPORT_DELETED") as deleted:
        try:
            await monitor.execute("block-export-del", {"id": name, "mode": "hard"}, deadline=deadline)
        except CommandFailedError as error:
            if "not found" in error.description:
                return
            raise
        while True:
            event = await monitor.next_event(deleted, f"the export {name} to be gone", deadline)
            if event.get("id") == name:
                return
