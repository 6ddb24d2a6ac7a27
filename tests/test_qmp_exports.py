"""Exports and the NBD server on real QEMUs: up, down, shared, cancelled, and what a killed run left."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from qmpnbd.deadline import Deadline
from qmpnbd.errors import CommandFailedError, ServerBusyError, UnsafeOperationError, UsageError
from qmpnbd.qmp.bitmaps import add_bitmap, disable_bitmaps, remove_bitmap
from qmpnbd.qmp.exports import add_export, remove_export
from qmpnbd.qmp.inventory import (
    guest_status,
    read_exports,
    read_graph,
    read_inventory,
    require_no_iothread_bug,
    require_safe_moment,
)
from qmpnbd.qmp.monitor import Monitor
from qmpnbd.qmp.naming import bitmap_name, export_id, new_run, run_of
from qmpnbd.qmp.recover import remove_leftovers
from qmpnbd.qmp.rundir import RunDirectory, dead_runs
from qmpnbd.qmp.server import start_server, stop_server
from tests.servers import Server, blockdev, qemu, storage_daemon, wait_until

SOON = Deadline(None)  # pytest bounds each test

pytestmark = pytest.mark.real


@pytest.fixture
def server(three_layers: Path) -> Iterator[Server]:
    scratch = json.dumps({"driver": "null-co", "node-name": "rw", "size": 1 << 20})
    top = blockdev(three_layers / "top.qcow2", "top", read_only=True)
    with storage_daemon("--blockdev", top, "--blockdev", scratch) as running:
        yield running


def run(server: Server, work: Callable[[Monitor], Awaitable[object]]) -> None:
    async def session() -> None:
        async with await Monitor.connect(str(server.qmp), SOON) as monitor:
            await work(monitor)

    asyncio.run(session())


@asynccontextmanager
async def served(monitor: Monitor, directory: RunDirectory) -> AsyncIterator[str]:
    try:
        await start_server(monitor, directory, SOON)
        await add_export(monitor, "top", export_id(directory.run, 0), SOON)
        yield export_id(directory.run, 0)
    finally:
        await remove_export(monitor, export_id(directory.run, 0), SOON)
        await stop_server(monitor, directory, SOON)


def test_up_and_down_leaves_nothing(server: Server, folder: Path) -> None:
    before = server.nodes()

    async def work(monitor: Monitor) -> None:
        with RunDirectory.create(str(folder)) as directory:
            assert (directory.path.stat().st_mode & 0o777, directory.path.parent) == (0o700, folder)
            async with served(monitor, directory) as name:
                assert server.exports() == [name]
                assert run_of(name) == directory.run
                assert [each.node_name for each in await read_exports(monitor, SOON)] == ["top"]
                assert directory.socket_path.is_socket()

    run(server, work)
    assert (server.exports(), server.nodes(), server.nbd_server_runs()) == ([], before, False)
    assert list(folder.iterdir()) == []


def test_taking_down_what_is_not_there_is_no_error(server: Server, folder: Path) -> None:
    async def work(monitor: Monitor) -> None:
        with RunDirectory.create(str(folder)) as directory:
            await remove_export(monitor, export_id(directory.run, 0), SOON)
            assert await stop_server(monitor, directory, SOON)

    run(server, work)


def test_a_server_of_someone_else_is_neither_used_nor_stopped(server: Server, folder: Path) -> None:
    server.side("nbd-server-start", addr={"type": "unix", "data": {"path": str(folder / "theirs")}})
    server.side("block-export-add", type="nbd", id="theirs", node_name="top")

    async def work(monitor: Monitor) -> None:
        with RunDirectory.create(str(folder)) as directory:
            with pytest.raises(ServerBusyError, match=r"exports: theirs.*--nbd URI"):
                await start_server(monitor, directory, SOON)
            assert await stop_server(monitor, directory, SOON)

    run(server, work)
    assert (server.exports(), server.nbd_server_runs()) == (["theirs"], True)


def test_our_server_stays_while_others_have_exports_in_it(server: Server, folder: Path) -> None:
    async def work(monitor: Monitor) -> None:
        with RunDirectory.create(str(folder)) as directory:
            await start_server(monitor, directory, SOON)
            server.side("block-export-add", type="nbd", id="theirs", node_name="top")
            assert not await stop_server(monitor, directory, SOON)
        assert directory.socket_path.is_socket()

    run(server, work)
    assert (server.exports(), server.nbd_server_runs()) == (["theirs"], True)


def test_a_socket_that_qemu_cannot_make(server: Server, folder: Path) -> None:
    async def work(monitor: Monitor) -> None:
        with RunDirectory.create(str(folder)) as directory:
            hidden = RunDirectory(directory.run, folder / "nowhere", os.open("/dev/null", os.O_RDONLY))
            with pytest.raises(CommandFailedError, match="--runtime-dir"):
                await start_server(monitor, hidden, SOON)
            hidden.remove()

    run(server, work)


def test_cancelled_while_qemu_works_everything_is_known_and_taken_down(server: Server, folder: Path) -> None:
    async def work(monitor: Monitor) -> None:
        with RunDirectory.create(str(folder)) as directory:
            # Where each cancellation falls is chance; what must hold afterwards is not.
            for step in range(20):

                async def job() -> None:
                    async with served(monitor, directory):
                        await asyncio.Event().wait()

                task = asyncio.ensure_future(job())
                await asyncio.sleep(step * 0.0004)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert (server.exports(), server.nbd_server_runs()) == ([], False)

    run(server, work)


KILLED = """
import asyncio, os, sys
from qmpnbd.deadline import Deadline
from qmpnbd.qmp.bitmaps import add_bitmap, disable_bitmaps, remove_bitmap
from qmpnbd.qmp.exports import add_export
from qmpnbd.qmp.monitor import Monitor
from qmpnbd.qmp.naming import bitmap_name, export_id
from qmpnbd.qmp.rundir import RunDirectory
from qmpnbd.qmp.server import start_server

async def main(address, base, exported):
    monitor = await Monitor.connect(address, Deadline(20))
    directory = RunDirectory.create(base)
    await start_server(monitor, directory, Deadline(20))
    if exported == "exported":
        await add_export(monitor, "top", export_id(directory.run, 0), Deadline(20))
    if exported == "bitmap":
        await add_bitmap(monitor, "rw", bitmap_name(directory.run, 1), Deadline(20))
    os.kill(os.getpid(), 9)

asyncio.run(main(*sys.argv[1:]))
"""


def bitmaps(server: Server) -> list[str]:
    nodes = server.side("query-named-block-nodes", flat=True)
    return [each["name"] for node in nodes for each in node.get("dirty-bitmaps", ())]


@pytest.mark.parametrize(("step", "count"), [("exported", 2), ("bitmap", 2), ("started", 1)])
def test_what_a_killed_run_left_is_found_and_removed(server: Server, folder: Path, step: str, count: int) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(server.qmp), str(folder), step], check=False, timeout=60)
    assert done.returncode == -9
    left = (len(server.exports()), len(bitmaps(server)), server.nbd_server_runs())
    assert left == (int(step == "exported"), int(step == "bitmap"), True)

    async def work(monitor: Monitor) -> None:
        removed = await remove_leftovers(monitor, str(folder), SOON)
        assert len(removed) == count
        assert await remove_leftovers(monitor, str(folder), SOON) == []

    run(server, work)
    assert (server.exports(), bitmaps(server), server.nbd_server_runs()) == ([], [], False)
    assert list(folder.iterdir()) == []


def test_a_bitmap_tells_what_was_written(server: Server) -> None:
    name = bitmap_name(new_run(), 0)

    async def work(monitor: Monitor) -> None:
        await add_bitmap(monitor, "rw", name, SOON)
        assert bitmaps(server) == [name]
        await disable_bitmaps(monitor, [("rw", name)], SOON)
        await remove_bitmap(monitor, "rw", name, SOON)
        await remove_bitmap(monitor, "rw", name, SOON)
        await remove_bitmap(monitor, "no-such-node", name, SOON)
        with pytest.raises(CommandFailedError):
            await disable_bitmaps(monitor, [("rw", name)], SOON)

    run(server, work)
    assert bitmaps(server) == []


def test_a_run_that_lives_and_another_qemu_are_left_alone(server: Server, folder: Path, three_layers: Path) -> None:
    top = blockdev(three_layers / "top.qcow2", "top", read_only=True)
    with storage_daemon("--blockdev", top) as other, RunDirectory.create(str(folder)) as directory:

        async def work(monitor: Monitor) -> None:
            async with served(monitor, directory) as name:
                assert await remove_leftovers(monitor, str(folder), SOON) == []
                assert server.exports() == [name]

        run(server, work)
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(other.qmp), str(folder), "exported"], check=False, timeout=60
        )
        assert done.returncode == -9

        async def elsewhere(monitor: Monitor) -> None:
            assert await remove_leftovers(monitor, str(folder), SOON) == []

        run(server, elsewhere)
        assert len(other.exports()) == 1


def test_only_private_directories_of_our_own_are_looked_at(folder: Path) -> None:
    for name, mode in (("qmpnbd-00000001", 0o755), ("qmpnbd-00000002", 0o700), ("qmpnbd-zzzzzzzz", 0o700)):
        (folder / name).mkdir()
        (folder / name / "lock").write_bytes(b"")
        (folder / name).chmod(mode)
    (folder / "qmpnbd-00000003").symlink_to(folder / "qmpnbd-00000002")
    (folder / "qmpnbd-00000004").mkdir(mode=0o700)
    assert [dead.run for dead in dead_runs(str(folder))] == ["00000002"]
    assert not (folder / "qmpnbd-00000002").exists()


def test_a_run_with_a_qemu_of_its_own_that_was_killed_at_once_is_removed_by_the_next(folder: Path) -> None:
    """No `recover` comes by it: there is no QEMU to recover."""
    begun = "import os, sys; from qmpnbd.qmp.rundir import RunDirectory as R"
    for choice, stays in (("for_child=True", False), ("", True)):
        killed = f"{begun}; R.create(sys.argv[1], {choice}); os.kill(os.getpid(), 9)"
        assert subprocess.run([sys.executable, "-c", killed, str(folder)], check=False, timeout=60).returncode == -9
        (left,) = folder.iterdir()
        with RunDirectory.create(str(folder), for_child=True):
            assert left.exists() == stays


def test_a_folder_that_cannot_hold_the_socket_is_refused(folder: Path) -> None:
    deep = folder / ("d" * 90)
    deep.mkdir()
    with pytest.raises(UsageError, match="--runtime-dir"):
        RunDirectory.create(str(deep))
    with pytest.raises(UsageError, match="--runtime-dir"):
        RunDirectory.create(str(folder / "missing"))


def test_names() -> None:
    name = new_run()
    assert run_of(export_id(name, 3)) == name
    assert [run_of(text) for text in ("qmpnbd", "qmpnbd-", "qmpnbd-123", "disk0", f"x-qmpnbd-{name}")] == [None] * 5


def test_a_guest_that_has_migrated_is_not_touched(three_layers: Path, folder: Path) -> None:
    node = ["-blockdev", blockdev(three_layers / "top.qcow2", "a", read_only=True)]
    with qemu(*node, "-device", "virtio-blk-pci,id=d0,drive=a") as server:

        async def work(monitor: Monitor) -> None:
            assert await require_safe_moment(monitor, SOON) == "prelaunch"
            server.side("migrate", uri=f"exec:cat > {folder / 'state'}")
            wait_until(lambda: server.side("query-migrate").get("status") == "completed", "the migration")
            with pytest.raises(UnsafeOperationError, match="postmigrate"):
                await require_safe_moment(monitor, SOON)

        run(server, work)


def test_a_guest_that_is_migrating_is_not_touched(three_layers: Path, folder: Path) -> None:
    node = ["-blockdev", blockdev(three_layers / "top.qcow2", "a", read_only=True)]
    with qemu(*node, "-device", "virtio-blk-pci,id=d0,drive=a") as server:

        async def work(monitor: Monitor) -> None:
            server.side("migrate", uri=f"exec:sleep 60; cat > {folder / 'state'}")
            with pytest.raises(UnsafeOperationError, match=r"migration (setup|active)"):
                await require_safe_moment(monitor, SOON)

        run(server, work)


def test_the_storage_daemon_never_migrates(server: Server) -> None:
    async def work(monitor: Monitor) -> None:
        assert await require_safe_moment(monitor, SOON) == await guest_status(monitor, SOON) == "storage daemon"

    run(server, work)


def test_disks_in_an_iothread_are_refused_where_qemu_is_known_to_abort(three_layers: Path) -> None:
    nodes = [
        part for n in "abcd" for part in ("-blockdev", blockdev(three_layers / "base.raw", n, "raw", read_only=True))
    ]
    devices = ["-object", "iothread,id=io", "-device", "virtio-scsi-pci,id=s0,iothread=io"]
    devices += ["-device", "virtio-scsi-pci,id=s1", "-device", "virtio-blk-pci,id=a,drive=a,iothread=io"]
    devices += ["-device", "virtio-blk-pci,drive=b,id=b", "-device", "scsi-hd,id=c,bus=s0.0,drive=c"]
    devices += ["-device", "scsi-hd,id=d,bus=s1.0,drive=d"]
    with qemu(*nodes, *devices) as server:

        async def work(monitor: Monitor) -> None:
            assert await guest_status(monitor, SOON) == "prelaunch"
            inventory = await read_inventory(monitor, SOON)
            refused = set()
            for name in inventory.graph.nodes:
                try:
                    await require_no_iothread_bug(monitor, name, inventory, SOON)
                except UnsafeOperationError:
                    refused.add(name)
            files = {inventory.graph.nodes[name].children["file"] for name in "ac"}
            assert refused == ({"a", "c", *files} if monitor.version.qemu.major in (7, 8) else set())

        run(server, work)


def test_the_graph_of_a_running_qemu(server: Server) -> None:
    async def work(monitor: Monitor) -> None:
        graph = await read_graph(monitor, SOON)
        assert sorted(graph.nodes) == server.nodes()
        assert graph.roots == ("top", "rw") or graph.roots == ("rw", "top")
        assert graph == await read_graph(monitor, SOON)

    run(server, work)
