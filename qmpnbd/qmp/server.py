"""QEMU's NBD server, taken up and down without a trace.

QEMU has one NBD server, tells nobody whether it runs or where, and asks nobody who stops it. So::

    up      marker object, TLS objects -> our socket (getfd) -> nbd-server-start
    down    no export of anyone, no client of ours -> nbd-server-stop -> objects, the marker last

The marker, an object inside QEMU that carries the run's id (`qmpnbd.qmp.naming.server_object`), tells later that the
server of this QEMU is this run's, whatever it listens on. A server that was running before is someone else's: it is
shared if the caller says where it listens, never stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

from qmpnbd.deadline import Deadline
from qmpnbd.errors import (
    CommandFailedError,
    DeadlineError,
    ExportRefusedError,
    ServerBusyError,
    UnsafeOperationError,
    UsageError,
)
from qmpnbd.qmp.address import TcpAddress, UnixAddress
from qmpnbd.qmp.capabilities import SERVER_STOP
from qmpnbd.qmp.credentials import ServerTls, add_credentials, add_object, read_objects, remove_object
from qmpnbd.qmp.inventory import read_exports
from qmpnbd.qmp.listeners import free_port, has_clients, listening, listens_in, remove_socket
from qmpnbd.qmp.monitor import Monitor, finish
from qmpnbd.qmp.naming import authorization_object, credentials_object, run_directory_name, run_of, server_object
from qmpnbd.qmp.refusals import explained
from qmpnbd.qmp.rundir import RunDirectory

STOP_SECONDS = 15.0
"""Time for `stop_server`: a client that never ends its handshake is sent away by QEMU after 10 s."""

_TRIES = 5
_LOOK_SECONDS = 0.02
PROBE_ADDRESS = {"type": "fd", "data": {"str": "qmpnbd-probe"}}
"""A descriptor that QEMU does not have: no server ever starts on it."""

_PASSED = "qmpnbd-nbd"

Listen = UnixAddress | TcpAddress


async def start_server(
    monitor: Monitor,
    directory: RunDirectory,
    deadline: Deadline,
    *,
    listen: TcpAddress | None = None,
    tls: ServerTls | None = None,
    insecure: bool = False,
) -> Listen:
    """Starts QEMU's NBD server for a run.

    Args:
        monitor: the QEMU.
        directory: the run's private directory, where the socket lies.
        deadline: for all of it.
        listen: a TCP port instead of the socket; port 0 for a free one.
        tls: TLS, which clients then must use.
        insecure: a TCP port without TLS: whoever reaches it can read the disks.

    Returns:
        Where it listens.

    Raises:
        UsageError: a TCP port without TLS that was not explicitly asked for, or a port that cannot be known.
        ServerBusyError: someone else's server is running.
        ExportRefusedError: QEMU refused, for a reason that is known.
        CommandFailedError: QEMU refused.
        MonitorLostError: the connection ended.
        DeadlineError: no reply in time.
    """
    if listen is not None and tls is None and not insecure:
        raise UsageError(
            "a TCP port without TLS: whoever reaches it can read the disks",
            where=str(listen),
            remedy="Give --tls DIR, or --insecure.",
        )
    if listen is not None and listen.port == 0 and not monitor.is_local:
        raise UsageError(
            "QEMU is on another host and cannot tell which port it chose", where=str(listen), remedy="Give a port."
        )
    return await finish(_start(monitor, directory, listen, tls, deadline))


async def _start(
    monitor: Monitor, directory: RunDirectory, listen: TcpAddress | None, tls: ServerTls | None, deadline: Deadline
) -> Listen:
    if await nbd_server_runs(monitor, deadline):
        raise await busy_server(monitor, deadline)
    wanted = listen or UnixAddress(str(directory.socket_path))
    try:
        await _mark(monitor, directory.run, deadline)
        more = {} if tls is None else await add_credentials(monitor, directory.run, tls, deadline)
        return await _listening_at(monitor, wanted, more, deadline)
    except CommandFailedError as error:
        # Nothing runs that the marker could stand for; somebody else's server might.
        await _remove_objects(monitor, directory.run, deadline)
        if "already running" in error.description:
            raise await busy_server(monitor, deadline) from error
        raise


async def nbd_server_runs(monitor: Monitor, deadline: Deadline) -> bool:
    """Returns whether QEMU's NBD server runs. QEMU cannot be asked, so one is started on nothing, which fails anyhow.

    Raises:
        MonitorError: QEMU is gone.
        DeadlineError: no reply in time.
    """
    try:
        await monitor.execute("nbd-server-start", {"addr": PROBE_ADDRESS}, deadline=deadline)
    except CommandFailedError as error:
        return "already running" in error.description
    return True


async def busy_server(monitor: Monitor, deadline: Deadline) -> ServerBusyError:
    """Makes the error for an NBD server that runs already; it names the exports in it.

    Raises:
        MonitorError: QEMU is gone.
        DeadlineError: no reply in time.
    """
    others = [export.id for export in await read_exports(monitor, deadline) if export.type == "nbd"]
    used = f" (exports: {', '.join(others)})" if others else ""
    remedy = "Say where it listens with --nbd URI; it is then shared, and left running."
    if any(run_of(name) for name in others):
        remedy = (
            "Another qmpnbd is at work: wait. If it was killed, name its --runtime-dir to have this taken down, "
            "or run block-export-del with mode hard and then nbd-server-stop in the monitor."
        )
    return ServerBusyError(f"this QEMU already runs an NBD server{used}", where=monitor.where, remedy=remedy)


async def _mark(monitor: Monitor, run: str, deadline: Deadline) -> None:
    try:
        # A group that throttles nothing: the one kind of object that every QEMU has and that does nothing.
        await add_object(monitor, "throttle-group", server_object(run), {}, deadline)
    except CommandFailedError as error:
        if error.error_class != "CommandNotFound":  # the storage daemon of 5.2, known by who listens on our socket
            raise


async def _listening_at(monitor: Monitor, wanted: Listen, more: dict[str, str], deadline: Deadline) -> Listen:
    """Has the server listen on a socket of ours; where that does not go, QEMU makes one itself."""
    if monitor.passes_descriptors:
        try:
            return await _on_our_socket(monitor, wanted, more, deadline)
        except OSError:
            pass  # QEMU may have rights and addresses that we do not have; if not, it says what is wrong
        except CommandFailedError as error:
            # The storage daemon takes no descriptors, 5.2 no TLS on them, and a relay of the monitor loses them.
            too_old = isinstance(error, ExportRefusedError) and error.reason == "tls-needs-tcp"
            relayed = "No file descriptor supplied" in error.description
            if error.error_class != "CommandNotFound" and not too_old and not relayed:
                raise
    for _ in range(_TRIES - 1):
        try:
            return await _on_its_socket(monitor, wanted, more, deadline)
        except ExportRefusedError as error:
            if error.reason != "port-in-use" or not isinstance(wanted, TcpAddress) or wanted.port:
                raise  # else another program took the free port before QEMU did
    return await _on_its_socket(monitor, wanted, more, deadline)


async def _on_our_socket(monitor: Monitor, wanted: Listen, more: dict[str, str], deadline: Deadline) -> Listen:
    with listening(wanted) as sock:
        try:
            await monitor.pass_descriptor(sock.fileno(), _PASSED, deadline)
            await _command(monitor, {"type": "fd", "data": {"str": _PASSED}}, more, deadline)
        except CommandFailedError:
            if isinstance(wanted, UnixAddress):
                remove_socket(wanted)
            raise
        return wanted if isinstance(wanted, UnixAddress) else replace(wanted, port=sock.getsockname()[1])


async def _on_its_socket(monitor: Monitor, wanted: Listen, more: dict[str, str], deadline: Deadline) -> Listen:
    if isinstance(wanted, UnixAddress):
        await _command(monitor, {"type": "unix", "data": {"path": wanted.path}}, more, deadline)
        return wanted
    chosen = wanted
    if not wanted.port:
        with contextlib.suppress(OSError):  # QEMU says what is wrong with the address
            chosen = replace(wanted, port=free_port(wanted.host))
    await _command(monitor, {"type": "inet", "data": {"host": chosen.host, "port": str(chosen.port)}}, more, deadline)
    return chosen


async def _command(monitor: Monitor, address: dict[str, object], more: dict[str, str], deadline: Deadline) -> None:
    try:
        await monitor.execute("nbd-server-start", {"addr": address, **more}, deadline=deadline)
    except CommandFailedError as error:
        raise explained(error) from error


async def stop_server(
    monitor: Monitor, directory: RunDirectory, deadline: Deadline, listens: Listen | None = None, *, ours: bool = False
) -> bool:
    """Stops the server that `start_server` started for this run, if it did and nobody else has exports in it.

    Args:
        monitor: the QEMU.
        directory: the run's.
        deadline: for all of it; `STOP_SECONDS` are enough.
        listens: where it listens; None for the socket in the directory.
        ours: it is known that the server is this run's; else `is_ours` decides.

    Returns:
        Whether nothing of the run's server is left.

    Raises:
        UnsafeOperationError: a client is connected that this QEMU would wait for with everything else stopped.
        MonitorError: QEMU refused or is gone.
        DeadlineError: no reply in time.
    """
    address = listens or UnixAddress(str(directory.socket_path))

    async def stop() -> bool:
        known = ours or await is_ours(monitor, directory, deadline)
        return await _stop(monitor, directory.run, address, deadline, ours=known)

    return await finish(stop())


async def lost_server(monitor: Monitor, run: str, deadline: Deadline) -> str | None:
    """Returns where the NBD server of a run listens whose directory is gone, None if this QEMU's is not that run's.

    It is if the run's marker is in this QEMU, or if QEMU listens on the socket that was in that directory. Where it
    listens may be unknown: empty.

    Raises:
        MonitorLostError: the connection ended.
        DeadlineError: no reply in time.
    """
    path = listens_in(monitor.peer, run_directory_name(run)) if monitor.peer is not None else None
    if path is not None:
        return path.path
    return "" if server_object(run) in await read_objects(monitor, deadline) else None


async def stop_lost_server(monitor: Monitor, run: str, socket_path: str, deadline: Deadline) -> bool:
    """Stops what `lost_server` has found, unless others have exports in it.

    Raises:
        UnsafeOperationError: a client is connected, or may be, that this QEMU would wait for with all else stopped.
        MonitorError: QEMU refused or is gone.
        DeadlineError: no reply in time.
    """
    listens = UnixAddress(socket_path) if socket_path else None
    runs = await nbd_server_runs(monitor, deadline)
    return await finish(_stop(monitor, run, listens, deadline, ours=runs))


async def _stop(monitor: Monitor, run: str, listens: Listen | None, deadline: Deadline, *, ours: bool) -> bool:
    if ours:
        if any(export.type == "nbd" for export in await read_exports(monitor, deadline)):
            return False  # stopping would cut off the clients of exports that are not ours
        await _until_no_client(monitor, listens, deadline)
        try:
            await monitor.execute("nbd-server-stop", deadline=deadline)
        except CommandFailedError as error:
            if "not running" not in error.description:
                raise
    await _remove_objects(monitor, run, deadline)
    # Of a socket that was handed over, QEMU may be unable to remove the name.
    if isinstance(listens, UnixAddress):
        remove_socket(listens)
    return True


async def is_ours(monitor: Monitor, directory: RunDirectory, deadline: Deadline) -> bool:
    """Returns whether the NBD server of this QEMU is the one that `start_server` started for a run, alive or dead.

    Raises:
        MonitorLostError: the connection ended.
        DeadlineError: no reply in time.
    """
    if server_object(directory.run) in await read_objects(monitor, deadline):
        return True
    listener = directory.listener()
    return listener is not None and monitor.peer is not None and listener.pid == monitor.peer.pid


async def _until_no_client(monitor: Monitor, listens: Listen | None, deadline: Deadline) -> None:
    """Waits until nobody is connected, where QEMU would hang otherwise.

    Measured: when its server is stopped, 7.2.22 waits for clients in option haggling while its main loop stands still,
    and with it the guest, for ever; 5.2 and 10.0 do not. Clients of exports have been cut off before; those in option
    haggling QEMU sends away after 10 s.
    """
    if not SERVER_STOP.applies(monitor.version):
        return
    if listens is None:
        raise UnsafeOperationError(
            "where the NBD server listens is not known, and this QEMU would hang if a client is connected",
            where=monitor.where,
            remedy="Make sure that no client is, then run nbd-server-stop in the monitor.",
        )
    while has_clients(listens):
        try:
            left = deadline.remaining("the last NBD client to leave", monitor.where)
        except DeadlineError as error:
            raise UnsafeOperationError(
                "a client is connected to the NBD server without using an export, and this QEMU would hang",
                where=monitor.where,
                remedy="End that client, then run nbd-server-stop in the monitor.",
            ) from error
        await asyncio.sleep(min(_LOOK_SECONDS, left or _LOOK_SECONDS))


async def _remove_objects(monitor: Monitor, run: str, deadline: Deadline) -> None:
    present = await read_objects(monitor, deadline)
    for name in (authorization_object(run), credentials_object(run), server_object(run)):
        if name in present:
            await remove_object(monitor, name, deadline)
