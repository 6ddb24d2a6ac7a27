"""Clients that join while jobs of others end: QEMU must not stand still, and its guest with it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TypeAlias

import pytest

from qmpnbd.deadline import Deadline
from qmpnbd.errors import ExportRefusedError
from qmpnbd.export.joining import JoinFromThread, join
from qmpnbd.export.lasting import LastingClients
from qmpnbd.nbd.client import Client
from qmpnbd.nbd.uri import NbdUri
from qmpnbd.qmp.exports import ExportOptions, add_export, exported_node, remove_export
from qmpnbd.qmp.monitor import Monitor
from qmpnbd.qmp.naming import export_id, new_run
from tests.qemu_versions import QemuBinaries, each_qemu
from tests.servers import Server, storage_daemon
from tests.soak_disk import MIB, Snapshots, Writer, guest_uri, make_images, served

DEPTH = "qemu:allocation-depth"
Way: TypeAlias = Callable[[Monitor, NbdUri, Deadline], Awaitable[None]]
TIMES = 24  # of clients that only join, one in ten made QEMU stand still


@contextlib.asynccontextmanager
async def restless(binaries: QemuBinaries, folder: Path) -> AsyncIterator[Monitor]:
    """A disk that is written to as fast as it goes, while snapshots and commits come and go."""
    make_images(folder, 64 * MIB, 8 * MIB)
    with served(binaries, folder) as server:
        writer = Writer(guest_uri(folder), 56 * MIB, 50e6, 3)
        writer.start()
        async with (
            await Monitor.connect(str(folder / "snapshots"), Deadline(60)) as theirs,
            await Monitor.connect(str(server.qmp), Deadline(60)) as monitor,
        ):
            snapshots = asyncio.create_task(Snapshots(theirs, folder, 5, pauses=(0.0, 0.0)).run())
            try:
                yield monitor
                assert not snapshots.done(), snapshots
            finally:
                snapshots.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await snapshots
                writer.stop.set()
                await asyncio.to_thread(writer.join, 30)
        assert writer.error is None


async def exported(monitor: Monitor, name: str, deadline: Deadline) -> None:
    """Exports the node that the guest's export stands on, which may be another one by then."""
    while True:
        try:
            await add_export(monitor, await exported_node(monitor, "guest", deadline), name, deadline, ExportOptions())
        except ExportRefusedError:
            deadline.check("a node that stays", name)
        else:
            return


async def joined_from_thread(monitor: Monitor, uri: NbdUri, deadline: Deadline) -> None:
    connect = partial(Client.connect, uri, contexts=[DEPTH], deadline=deadline)
    client = await asyncio.to_thread(JoinFromThread(monitor, deadline), connect)
    await remove_export(monitor, uri.export, deadline)
    client.close()


async def joined(monitor: Monitor, uri: NbdUri, deadline: Deadline) -> None:
    clients = LastingClients(monitor)
    await clients.connect(uri, [DEPTH], deadline)
    await remove_export(monitor, uri.export, deadline)
    await clients.close()


@each_qemu
@pytest.mark.parametrize("way", [joined, joined_from_thread])
def test_qemu_goes_on_whenever_a_client_joins(binaries: QemuBinaries, folder: Path, way: Way) -> None:
    async def work() -> None:
        async with restless(binaries, folder) as monitor:
            run = new_run()
            for number in range(TIMES):
                name, soon = export_id(run, number), Deadline(30)
                await exported(monitor, name, soon)
                await way(monitor, NbdUri.unix(str(folder / "nbd"), name), soon)
            left = await monitor.execute("query-block-exports", deadline=Deadline(30))
            assert isinstance(left, list)
            assert [export["id"] for export in left] == ["guest"]

    asyncio.run(work())


def test_who_joins_a_qemu_that_falls_silent_leaves_and_comes_again() -> None:
    seen: list[str] = []

    async def work(server: Server) -> None:
        async def connect() -> str:
            if not seen:
                os.kill(server.pid, signal.SIGSTOP)
            seen.append("came")
            return "client"

        async def leave(client: str) -> None:
            seen.append("left")
            os.kill(server.pid, signal.SIGCONT)

        async with await Monitor.connect(str(server.qmp), Deadline(20)) as monitor:
            assert await join(connect, leave, monitor, Deadline(20)) == "client"

    with storage_daemon() as server:
        asyncio.run(work(server))
    assert seen == ["came", "left", "came"]
