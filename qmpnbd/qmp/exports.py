"""An NBD server and block exports inside QEMU, taken up and down without a trace.

QEMU has one NBD server, asks nobody who stops it, and unlinks whatever lies where its socket shall be. So::

    up      nbd-server-start (fresh path in our private directory) -> block-export-add (our name)
    down    block-export-del hard, wait for BLOCK_EXPORT_DELETED   -> nbd-server-stop, if it is ours and unused

A server that was running before is someone else's: it is shared if the caller says where it listens, never stopped.
Everything here that changes something runs to its end even when cancelled (`finish`): what QEMU did must be known.
"""

from __future__ import annotations

from qmpnbd.deadline import Deadline
from qmpnbd.errors import CommandFailedError, ServerBusyError
from qmpnbd.qmp.inventory import read_exports
from qmpnbd.qmp.monitor import Monitor, finish
from qmpnbd.qmp.naming import export_id, run_of
from qmpnbd.qmp.rundir import RunDirectory, dead_runs

TEARDOWN_SECONDS = 10.0
"""How long QEMU may take for each step of taking things down; not part of the caller's time."""

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
            remedy="QEMU must be able to write to the run's directory: run as QEMU's user, or choose --runtime-dir.",
        ) from error


async def _busy(monitor: Monitor, deadline: Deadline) -> ServerBusyError:
    exports = await read_exports(monitor, deadline)
    others = [export.id for export in exports if export.type == _NBD]
    used = f" (exports: {', '.join(others)})" if others else ""
    remedy = "Say where it listens with --nbd URI; it is then shared, and left running."
    if any(run_of(name) for name in others):
        remedy = "Another qmpnbd is at work, or was killed on another host: wait, or remove its exports by hand."
    return ServerBusyError(f"this QEMU already runs an NBD server{used}", where=monitor.where, remedy=remedy)


async def stop_server(monitor: Monitor, directory: RunDirectory) -> bool:
    """Stops the server that `start_server` started for this run, if it did and nobody else has exports in it.

    Returns:
        Whether nothing of the run is left.

    Raises:
        MonitorError: QEMU refused or is gone.
        DeadlineError: no reply in time.
    """
    if not directory.socket_path.exists():  # QEMU makes it when it starts and removes it when it stops
        return True
    deadline = Deadline(TEARDOWN_SECONDS)
    exports = await read_exports(monitor, deadline)
    if any(export.type == _NBD for export in exports):
        return False  # stopping would cut off the clients of exports that are not ours
    try:
        await finish(monitor.execute("nbd-server-stop", deadline=deadline))
    except CommandFailedError as error:
        if "not running" not in error.description:
            raise
    return True


async def add_export(monitor: Monitor, node_name: str, directory: RunDirectory, number: int, deadline: Deadline) -> str:
    """Exports a node read-only with its allocation depth.

    The id is made of the run and `number`, so that `remove_export` can be prepared before.

    Returns:
        The export's id, which is the name NBD clients ask for, too.

    Raises:
        CommandFailedError: QEMU refused.
        MonitorLostError: the connection ended.
        DeadlineError: no reply in time.
    """
    name = export_id(directory.run, number)
    arguments = {"type": _NBD, "id": name, "name": name, "node-name": node_name, "allocation-depth": True}
    await finish(monitor.execute("block-export-add", arguments, deadline=deadline))
    return name


async def remove_export(monitor: Monitor, name: str) -> None:
    """Removes an export, cutting off its clients, and waits until it is gone; one that does not exist is gone.

    Raises:
        MonitorError: QEMU refused or is gone.
        DeadlineError: it is still there.
    """
    await finish(_remove_export(monitor, name))


async def _remove_export(monitor: Monitor, name: str) -> None:
    deadline = Deadline(TEARDOWN_SECONDS)
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


async def remove_leftovers(monitor: Monitor, base: str | None, deadline: Deadline) -> list[str]:
    """Takes down what killed runs of this user left in this QEMU.

    A run is dead when nobody holds the lock of its directory; what belongs to it is known from names. Runs that
    live, and runs whose directory is not here, are left alone.

    Args:
        monitor: the QEMU.
        base: where runs make their directories; None for the folder for temporary files.
        deadline: for the looking; what is taken down has its own time.

    Returns:
        What was taken down, for people.

    Raises:
        MonitorError: QEMU refused or is gone.
        DeadlineError: no reply in time.
    """
    removed = []
    for dead in dead_runs(base):
        exports = await read_exports(monitor, deadline)
        ours = [export.id for export in exports if run_of(export.id) == dead.run]
        for name in ours:
            await remove_export(monitor, name)
            removed.append(f"export {name}")
        listener = dead.listener_pid()
        if listener is not None and (ours or listener == monitor.peer_pid) and await stop_server(monitor, dead):
            removed.append(f"NBD server at {dead.socket_path}")
    return removed
