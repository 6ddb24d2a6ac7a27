"""The NBD server and exports inside QEMU, on every release: sockets of ours, TLS, every refusal, the moving graph."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import pytest

from qmpnbd.deadline import Deadline
from qmpnbd.errors import (
    CapabilityError,
    CommandFailedError,
    ExportRefusedError,
    InterferenceError,
    NbdRefusedError,
    NbdTlsError,
    ServerBusyError,
    UnsafeOperationError,
    UsageError,
)
from qmpnbd.nbd.client import Client
from qmpnbd.nbd.tls import Tls
from qmpnbd.nbd.uri import NbdUri
from qmpnbd.qmp.address import TcpAddress, UnixAddress
from qmpnbd.qmp.bitmaps import add_bitmap, disable_bitmaps
from qmpnbd.qmp.credentials import ServerTls, read_objects
from qmpnbd.qmp.exports import ExportOptions, NodeBitmap, add_export, exported_node, remove_export
from qmpnbd.qmp.monitor import Monitor
from qmpnbd.qmp.naming import export_id, server_object
from qmpnbd.qmp.recover import remove_leftovers
from qmpnbd.qmp.refusals import REFUSALS, explained
from qmpnbd.qmp.rundir import RunDirectory
from qmpnbd.qmp.server import Listen, start_server, stop_server
from tests.qemu_versions import QemuBinaries, each_qemu
from tests.servers import Server, blockdev, qemu_img, storage_daemon, wait_until
from tests.tls_files import Authority

SOON = Deadline(None)  # pytest bounds each test
LOCAL = TcpAddress("127.0.0.1", 0)
NULL = json.dumps({"driver": "null-co", "node-name": "n", "size": 1 << 20})

pytestmark = pytest.mark.real


def run(server: Server, work: Callable[[Monitor], Awaitable[object]]) -> None:
    async def session() -> None:
        async with await Monitor.connect(str(server.qmp), SOON) as monitor:
            await work(monitor)

    asyncio.run(session())


def objects(server: Server) -> list[str]:
    return [each["name"] for each in server.side("qom-list", path="/objects") if each["name"].startswith("qmpnbd")]


@asynccontextmanager
async def serving(
    monitor: Monitor, folder: Path, listen: TcpAddress | None = None, tls: ServerTls | None = None
) -> AsyncIterator[tuple[RunDirectory, Listen]]:
    """A server of ours with an export of node n."""
    with RunDirectory.create(str(folder)) as directory:
        listens = None
        try:
            listens = await start_server(monitor, directory, SOON, listen=listen, tls=tls, insecure=tls is None)
            await add_export(monitor, "n", export_id(directory.run, 0), SOON)
            yield directory, listens
        finally:
            await remove_export(monitor, export_id(directory.run, 0), SOON)
            assert await stop_server(monitor, directory, SOON, listens)


async def size_of(uri: NbdUri, tls: Tls | None = None) -> int:
    def connected() -> int:
        with Client.connect(uri, contexts=[], deadline=Deadline(20), tls=tls) as client:
            return client.export.size

    return await asyncio.to_thread(connected)


@each_qemu
def test_the_socket_is_ours_and_for_us_alone(binaries: QemuBinaries, folder: Path) -> None:
    with binaries.qemu("-blockdev", NULL) as server:

        async def work(monitor: Monitor) -> None:
            async with serving(monitor, folder) as (directory, listens):
                assert listens == UnixAddress(str(directory.socket_path))
                assert directory.socket_path.stat().st_mode & 0o777 == 0o600
                assert objects(server) == [server_object(directory.run)]
                uri = NbdUri.unix(listens.path, export_id(directory.run, 0))
                assert await size_of(uri) == 1 << 20
            assert not directory.socket_path.exists()

        run(server, work)
        assert (server.exports(), server.nbd_server_runs(), objects(server)) == ([], False, [])
    assert list(folder.iterdir()) == []


@each_qemu
def test_the_storage_daemon_takes_no_descriptors_and_makes_the_socket_itself(
    binaries: QemuBinaries, folder: Path
) -> None:
    with binaries.daemon("--blockdev", NULL) as server:

        async def work(monitor: Monitor) -> None:
            async with serving(monitor, folder) as (directory, _):
                assert await size_of(NbdUri.unix(str(directory.socket_path), export_id(directory.run, 0))) == 1 << 20

        run(server, work)
        assert (server.exports(), server.nbd_server_runs()) == ([], False)


@each_qemu
def test_a_free_port_is_known(binaries: QemuBinaries, folder: Path) -> None:
    with binaries.qemu("-blockdev", NULL) as server:

        async def work(monitor: Monitor) -> None:
            async with serving(monitor, folder, LOCAL) as (directory, listens):
                assert isinstance(listens, TcpAddress)
                assert listens.port > 0
                assert await size_of(NbdUri.tcp(listens.host, listens.port, export_id(directory.run, 0))) == 1 << 20

        run(server, work)
        assert (server.exports(), server.nbd_server_runs(), objects(server)) == ([], False, [])


def test_a_port_without_tls_must_be_wanted(folder: Path) -> None:
    with storage_daemon("--blockdev", NULL) as server:

        async def work(monitor: Monitor) -> None:
            with RunDirectory.create(str(folder)) as directory, pytest.raises(UsageError, match="--insecure"):
                await start_server(monitor, directory, SOON, listen=LOCAL)

        run(server, work)
        assert not server.nbd_server_runs()


@each_qemu
@pytest.mark.parametrize("authorized", [(), ("O=trustme*",), ("CN=somebody else",)])
def test_tls_with_certificates(
    binaries: QemuBinaries, folder: Path, tmp_path: Path, authorized: tuple[str, ...]
) -> None:
    authority = Authority(tmp_path)
    certificates, client = str(authority.server()), authority.client()
    with binaries.qemu("-blockdev", NULL) as server:

        async def work(monitor: Monitor) -> None:
            tls = ServerTls(certificates, authorized=authorized)
            async with serving(monitor, folder, LOCAL, tls) as (directory, listens):
                assert isinstance(listens, TcpAddress)
                uri = NbdUri.tcp("localhost", listens.port, export_id(directory.run, 0))
                assert len(objects(server)) == (3 if authorized else 2)
                if authorized == ("CN=somebody else",):
                    with pytest.raises((NbdTlsError, NbdRefusedError)):
                        await size_of(uri, Tls(certificates=str(client)))
                else:
                    assert await size_of(uri, Tls(certificates=str(client))) == 1 << 20
                with pytest.raises(NbdRefusedError, match="TLS"):
                    await size_of(uri)
                with pytest.raises(NbdTlsError):  # the server's name is proven, ours is not
                    await size_of(uri, Tls(ca_file=str(authority.ca_file)))

        run(server, work)
        assert (server.exports(), server.nbd_server_runs(), objects(server)) == ([], False, [])


@each_qemu
def test_tls_with_a_shared_secret(binaries: QemuBinaries, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "keys.psk").write_text("backup:00112233445566778899aabbccddeeff\n")
    with binaries.qemu("-blockdev", NULL) as server:

        async def work(monitor: Monitor) -> None:
            async with serving(monitor, folder, LOCAL, ServerTls(str(tmp_path), "psk")) as (directory, listens):
                assert isinstance(listens, TcpAddress)
                uri = f"nbds://backup@127.0.0.1:{listens.port}/{export_id(directory.run, 0)}"
                uri += f"?tls-psk-file={tmp_path}/keys.psk"
                process = await asyncio.create_subprocess_exec("nbdinfo", "--size", uri, stdout=subprocess.PIPE)
                assert (await process.communicate())[0] == b"1048576\n"

        run(server, work)
        assert objects(server) == []


@each_qemu
def test_tls_on_a_unix_socket_is_had_or_refused_with_a_remedy(
    binaries: QemuBinaries, folder: Path, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    tls, client = ServerTls(str(authority.server())), authority.client()
    with binaries.qemu("-blockdev", NULL) as server:

        async def work(monitor: Monitor) -> None:
            if binaries.version < (7, 0):
                with pytest.raises(ExportRefusedError, match="--listen"):
                    async with serving(monitor, folder, None, tls):
                        pass
                return
            async with serving(monitor, folder, None, tls) as (directory, _):
                uri = NbdUri.unix(str(directory.socket_path), export_id(directory.run, 0))
                assert await size_of(uri, Tls(certificates=str(client), hostname="localhost")) == 1 << 20

        run(server, work)
        assert (server.nbd_server_runs(), objects(server)) == (False, [])


KILLED = """
import asyncio, os, sys
from qmpnbd.deadline import Deadline
from qmpnbd.qmp.address import TcpAddress
from qmpnbd.qmp.monitor import Monitor
from qmpnbd.qmp.rundir import RunDirectory
from qmpnbd.qmp.server import start_server

async def main(address, base, kind):
    monitor = await Monitor.connect(address, Deadline(20))
    listen = TcpAddress("127.0.0.1", 0) if kind == "tcp" else None
    await start_server(monitor, RunDirectory.create(base), Deadline(20), listen=listen, insecure=True)
    os.kill(os.getpid(), 9)

asyncio.run(main(*sys.argv[1:]))
"""


@each_qemu
@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_a_killed_runs_server_is_known_by_its_marker(binaries: QemuBinaries, folder: Path, kind: str) -> None:
    with binaries.qemu("-blockdev", NULL) as server, binaries.qemu("-blockdev", NULL) as other:
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(server.qmp), str(folder), kind], check=False, timeout=60
        )
        assert done.returncode == -9
        other.side("nbd-server-start", addr={"type": "unix", "data": {"path": str(folder / "theirs")}})

        async def elsewhere(monitor: Monitor) -> None:
            assert await remove_leftovers(monitor, str(folder), SOON) == []

        async def work(monitor: Monitor) -> None:
            assert len(await remove_leftovers(monitor, str(folder), SOON)) == 1

        if kind == "unix":  # the directory of a socket that is served outlives the visit of somebody else
            run(other, elsewhere)
        run(server, work)
        assert (server.nbd_server_runs(), objects(server), other.nbd_server_runs()) == (False, [], True)


def test_a_start_that_fails_marks_nobody_elses_server(folder: Path) -> None:
    with storage_daemon("--blockdev", NULL) as server:
        server.side("nbd-server-start", addr={"type": "unix", "data": {"path": str(folder / "theirs")}})

        async def work(monitor: Monitor) -> None:
            with RunDirectory.create(str(folder)) as directory:
                with pytest.raises(ServerBusyError):
                    await start_server(monitor, directory, SOON)
                assert await stop_server(monitor, directory, SOON)
                assert not any(name.startswith("qmpnbd") for name in await read_objects(monitor, SOON))

        run(server, work)
        assert server.nbd_server_runs()


@each_qemu
def test_a_client_that_only_lurks_does_not_make_qemu_hang(binaries: QemuBinaries, folder: Path) -> None:
    """QEMU 7.2.22 would stand still for ever if its server were stopped while a client is in option haggling."""
    with binaries.qemu("-blockdev", NULL) as server:

        async def work(monitor: Monitor) -> None:
            with RunDirectory.create(str(folder)) as directory:
                listens = await start_server(monitor, directory, SOON, listen=LOCAL, insecure=True)
                assert isinstance(listens, TcpAddress)
                with socket.create_connection((listens.host, listens.port)) as lurker:
                    assert lurker.recv(8) == b"NBDMAGIC"
                    if binaries.version[0] in (7, 8, 9):
                        with pytest.raises(UnsafeOperationError, match="would hang"):
                            await stop_server(monitor, directory, Deadline(0.3), listens)
                assert await stop_server(monitor, directory, SOON, listens)

        run(server, work)
        assert not server.nbd_server_runs()


# What provokes each refusal; those that only the server can give are below.
ADDED: list[tuple[str, str, ExportOptions, str]] = [
    ("id-taken", "n", ExportOptions(), "e0"),
    ("id-invalid", "n", ExportOptions(), "1 2"),
    ("text-too-long", "n", ExportOptions(description="x" * 5000), "e1"),
    ("node-missing", "no-such-node", ExportOptions(), "e1"),
    ("bitmap-missing", "a", ExportOptions(bitmaps=["nothing"]), "e1"),
    ("bitmap-enabled", "a", ExportOptions(bitmaps=["enabled"]), "e1"),
    ("bitmap-busy", "a", ExportOptions(bitmaps=["busy"]), "e1"),
    ("bitmap-inconsistent", "broken", ExportOptions(bitmaps=["lost"]), "e1"),
    ("read-only", "ro", ExportOptions(writable=True), "e1"),
    ("permission", "a", ExportOptions(writable=True), "e1"),
    ("permission", "a-file", ExportOptions(), "e1"),
    ("iothread-missing", "n", ExportOptions(iothread="nothing"), "e1"),
    ("iothread-taken", "a", ExportOptions(iothread="io"), "e1"),
    ("name-taken", "n", ExportOptions(), "theirs"),
]


def inconsistent_bitmap(binaries: QemuBinaries, image: Path) -> None:
    """Makes an image whose bitmap was in use when its QEMU was killed."""
    qemu_img("create", "-q", "-f", "qcow2", image, "1M")
    with binaries.daemon("--blockdev", blockdev(image, "a")) as server:
        server.side("block-dirty-bitmap-add", node="a", name="lost", persistent=True)
        server.side("blockdev-del", node_name="a")  # which stores it; 5.2 does not on SIGTERM
    with binaries.daemon("--blockdev", blockdev(image, "a")) as server:
        os.kill(server.pid, 9)


@each_qemu
def test_every_refusal_of_an_export_has_a_reason_and_a_remedy(binaries: QemuBinaries, folder: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", folder / "a", "1M")
    inconsistent_bitmap(binaries, folder / "broken")
    read_only = json.dumps({"driver": "null-co", "node-name": "ro", "size": 1 << 20, "read-only": True})
    disk = {"driver": "file", "filename": str(folder / "a"), "node-name": "a-file"}
    nodes = [NULL, read_only, json.dumps({"driver": "qcow2", "node-name": "a", "file": disk})]
    arguments = [part for node in [*nodes, blockdev(folder / "broken", "broken")] for part in ("-blockdev", node)]
    devices = ["-object", "iothread,id=io", "-device", "virtio-blk-pci,id=vd0,drive=a"]
    with binaries.qemu(*arguments, *devices) as server:

        async def work(monitor: Monitor) -> None:
            found = {}
            with RunDirectory.create(str(folder)) as directory:
                with pytest.raises(ExportRefusedError) as none:
                    await add_export(monitor, "n", "e0", SOON)
                found[none.value.reason] = none.value
                await start_server(monitor, directory, SOON)
                for name in ("enabled", "busy"):
                    await add_bitmap(monitor, "a", name, SOON)
                await disable_bitmaps(monitor, [("a", "busy")], SOON)
                await add_export(monitor, "n", "e0", SOON)
                await add_export(monitor, "a", "user", SOON, ExportOptions(bitmaps=["busy"]))
                server.side("block-export-add", type="nbd", id="another-id", name="theirs", node_name="n")
                for reason, node, options, name in ADDED:
                    with pytest.raises(ExportRefusedError) as refused:
                        await add_export(monitor, node, name, SOON, options)
                    assert refused.value.reason == reason, str(refused.value)
                    found[reason] = refused.value
                await disable_bitmaps(monitor, [("a", "enabled")], SOON)
                if binaries.version < (7, 1):
                    with pytest.raises(CapabilityError, match="bitmap-of-node"):
                        await add_export(monitor, "n", "e1", SOON, ExportOptions(bitmaps=[NodeBitmap("a", "enabled")]))
                uri = NbdUri.unix(str(directory.socket_path), "e0")
                with await asyncio.to_thread(lambda: Client.connect(uri, contexts=[], deadline=Deadline(20))):
                    with pytest.raises(ExportRefusedError) as refused:
                        await remove_export(monitor, "e0", SOON, "safe")
                    found[refused.value.reason] = refused.value
                for name in ("e0", "user", "another-id"):
                    await remove_export(monitor, name, SOON)
                assert await stop_server(monitor, directory, SOON)
            assert {each for each, *_ in ADDED} | {"in-use", "server-not-running"} == set(found)
            assert all(error.remedy and error.exit_code == 24 for error in found.values())

        run(server, work)
        assert (server.exports(), server.nbd_server_runs()) == ([], False)


@each_qemu
def test_every_refusal_of_the_server_has_a_reason_and_a_remedy(
    binaries: QemuBinaries, folder: Path, tmp_path: Path
) -> None:
    busy = socket.create_server(("127.0.0.1", 0))
    kinds: list[tuple[str, TcpAddress | None, ServerTls | None]] = [
        ("port-in-use", TcpAddress("127.0.0.1", busy.getsockname()[1]), None),
        ("address-unusable", TcpAddress("192.0.2.1", 0), None),
        ("address-unusable", TcpAddress("no-such-host.invalid", 1), None),
        ("tls-files", LOCAL, ServerTls(str(tmp_path))),
        ("tls-files", LOCAL, ServerTls(str(tmp_path), "psk")),
    ]
    with busy, binaries.qemu("-blockdev", NULL) as server:

        async def work(monitor: Monitor) -> None:
            for reason, listen, tls in kinds:
                with RunDirectory.create(str(folder)) as directory:
                    with pytest.raises(ExportRefusedError) as refused:
                        await start_server(monitor, directory, SOON, listen=listen, tls=tls, insecure=tls is None)
                    assert refused.value.reason == reason, str(refused.value)
                    assert refused.value.remedy
                    assert await stop_server(monitor, directory, SOON)
            for reason, path in (("path-unusable", folder / "nowhere"), ("path-too-long", folder / ("x" * 108))):
                lost = RunDirectory("00000000", path, -1)
                with pytest.raises(ExportRefusedError) as refused:
                    await start_server(monitor, lost, SOON)
                assert refused.value.reason == reason, str(refused.value)

        run(server, work)
        assert (server.nbd_server_runs(), objects(server)) == (False, [])


@each_qemu
def test_refusals_of_what_others_have_changed_have_a_reason_too(binaries: QemuBinaries, tmp_path: Path) -> None:
    """Nothing that is sent here provokes them by itself: somebody takes away or makes anew what we rely on."""
    address = {"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}}
    commands: dict[str, tuple[str, dict[str, object]]] = {
        "tls-missing": ("nbd-server-start", {"addr": address, "tls-creds": "nothing"}),
        "tls-endpoint": ("nbd-server-start", {"addr": address, "tls-creds": "theirs"}),
        "export-missing": ("block-export-del", {"id": "nothing"}),
    }
    folder = str(Authority(tmp_path).client())
    with binaries.qemu("-object", f"tls-creds-x509,id=theirs,dir={folder},endpoint=client") as server:

        async def work(monitor: Monitor) -> None:
            for reason, (command, arguments) in commands.items():
                with pytest.raises(CommandFailedError) as refused:
                    await monitor.execute(command, arguments, deadline=SOON)
                told = explained(refused.value)
                assert isinstance(told, ExportRefusedError), str(told)
                assert (told.reason, bool(told.remedy)) == (reason, True)

        run(server, work)
        assert not server.nbd_server_runs()


def test_what_no_row_knows_stays_what_qemu_said() -> None:
    error = CommandFailedError("block-export-add", "GenericError", "The moon is full", where="vm.qmp")
    assert explained(error) is error
    assert len({row.reason for row in REFUSALS}) == len(REFUSALS)
    assert all(row.remedy.endswith((".", ")")) for row in REFUSALS)


def test_the_documentation_lists_every_refusal() -> None:
    text = (Path(__file__).parent.parent / "docs" / "controller.md").read_text()
    assert [row.reason for row in REFUSALS if f"| `{row.reason}` |" not in text] == []


@each_qemu
@pytest.mark.parametrize("move", ["snapshot", "commit", "stream"])
def test_an_export_is_followed_by_its_id_when_the_graph_moves(
    binaries: QemuBinaries, folder: Path, move: Literal["snapshot", "commit", "stream"]
) -> None:
    qemu_img("create", "-q", "-f", "qcow2", folder / "base", "1M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", folder / "base", "-F", "qcow2", folder / "top")
    qemu_img("create", "-q", "-f", "qcow2", folder / "over", "1M")
    base = json.dumps(
        {"driver": "qcow2", "node-name": "base", "file": {"driver": "file", "filename": f"{folder}/base"}}
    )
    top = blockdev(folder / "top", "n", backing="base")
    device = ["-device", "virtio-blk-pci,id=vd0,drive=n"]
    with binaries.qemu("-blockdev", base, "-blockdev", top, *device) as server:

        async def work(monitor: Monitor) -> None:
            async with serving(monitor, folder) as (directory, _):
                name = export_id(directory.run, 0)
                assert await exported_node(monitor, name, SOON) == "n"
                if move == "snapshot":
                    file = {"driver": "file", "filename": f"{folder}/over"}
                    over = {"driver": "qcow2", "node-name": "over", "backing": None, "file": file}
                    server.side.execute("blockdev-add", over)
                    server.side("blockdev-snapshot", node="n", overlay="over")
                elif move == "commit":
                    server.side("block-commit", device="n", top_node="n", base_node="base", job_id="j")
                    wait_until(lambda: server.side("query-block-jobs")[0]["ready"], "the commit to be ready")
                    server.side("job-complete", id="j")
                else:
                    server.side("block-stream", device="n", job_id="j")
                wait_until(lambda: server.side("query-block-jobs") == [], "the job to end")
                after = {"snapshot": "over", "commit": "base", "stream": "n"}[move]
                assert await exported_node(monitor, name, SOON) == after
                server.side("block-export-del", id=name, mode="hard")
                wait_until(lambda: server.exports() == [], "the export to be gone")
                with pytest.raises(InterferenceError):
                    await exported_node(monitor, name, SOON)

        run(server, work)
        assert server.exports() == []
