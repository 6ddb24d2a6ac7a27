"""`qmpnbd export` and its library: other tools read through its URIs, and whatever ends it, nothing stays behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from qmpnbd.deadline import Deadline
from qmpnbd.errors import (
    ExportRefusedError,
    ImageMissingError,
    ImageUnreadableError,
    InterferenceError,
    NoSuchDiskError,
    UnsafeOperationError,
    UsageError,
)
from qmpnbd.export import blocking, hazards
from qmpnbd.export.session import Image, Options, Scene, Source, Sources, exporting
from qmpnbd.nbd.client import Client
from qmpnbd.qmp.address import TcpAddress
from qmpnbd.qmp.capabilities import ALLOCATION_AFTER_DEPTH
from qmpnbd.qmp.credentials import ServerTls
from qmpnbd.qmp.exports import ExportOptions
from qmpnbd.qmp.monitor import Monitor
from qmpnbd.qmp.recover import remove_leftovers
from qmpnbd.report.exports import variable
from tests.qemu_versions import QemuBinaries, each_qemu, installed
from tests.servers import Server, blockdev, qemu_img, qemu_io, storage_daemon, wait_until
from tests.test_cli import COMMAND, document, qmpnbd
from tests.tls_files import Authority

SOON = Deadline(None)  # pytest bounds each test

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]  # many runs in one test, on a machine that may be busy


@pytest.fixture
def disk(folder: Path) -> Path:
    """An image in two layers, of which something can be read."""
    qemu_img("create", "-q", "-f", "qcow2", folder / "base.qcow2", "4M")
    qemu_io(folder / "base.qcow2", "write -P 1 1M 1M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", folder / "base.qcow2", "-F", "qcow2", folder / "disk.qcow2")
    qemu_io(folder / "disk.qcow2", "write -P 2 64k 128k")
    return folder / "disk.qcow2"


@contextlib.contextmanager
def guest(binaries: QemuBinaries, disk: Path, *more: str, device: str = "") -> Iterator[Server]:
    device = f"virtio-blk-pci,id=vd0,drive=n{device}"
    with binaries.qemu("-blockdev", blockdev(disk, "n"), *more, "-device", device) as server:
        yield server
        assert (server.exports(), server.nbd_server_runs(), objects(server)) == ([], False, [])


def objects(server: Server) -> list[str]:
    return [each["name"] for each in server.side("qom-list", path="/objects") if each["name"].startswith("qmpnbd")]


@contextlib.contextmanager
def running(*arguments: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    """Runs `qmpnbd export`, and ends it."""
    command = [*COMMAND, "export", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        try:
            yield child
        finally:
            child.kill()


def told(child: subprocess.Popen[bytes]) -> dict[str, object]:
    """Reads the document that the child prints when everything is up."""
    assert child.stdout is not None
    text = b""
    while not text.endswith(b"\n}\n"):
        ready, _, _ = select.select([child.stdout], [], [], 30)
        piece = os.read(child.stdout.fileno(), 65536) if ready else b""
        assert piece, (text, child.stderr and child.stderr.read())
        text += piece
    return document(text.decode())


def uris(found: dict[str, object]) -> list[str]:
    assert isinstance(found["exports"], list)
    return [each["uri"] for each in found["exports"]]


@each_qemu
def test_other_tools_read_a_guests_disk_through_the_uri(binaries: QemuBinaries, disk: Path, folder: Path) -> None:
    copied, converted = folder / "copied", folder / "converted"
    with guest(binaries, disk) as server, running("--qmp", server.qmp, "--runtime-dir", folder, "--json") as child:
        found = told(child)
        (uri,) = uris(found)
        assert (found["consistent"], found["guest"]) == (False, "prelaunch")
        size = subprocess.run(["nbdinfo", "--size", uri], check=True, capture_output=True, timeout=60)
        assert size.stdout == b"4194304\n"
        subprocess.run(["nbdcopy", uri, copied], check=True, timeout=60)
        qemu_img("convert", "-f", "raw", "-O", "raw", uri, converted)
        child.send_signal(signal.SIGTERM)
        _, complaint = child.communicate(timeout=60)
        assert (child.returncode, complaint) == (143, b"qmpnbd: SIGTERM\n")
    qemu_img("compare", "-f", "raw", "-F", "qcow2", copied, disk)
    qemu_img("compare", "-f", "raw", "-F", "qcow2", converted, disk)
    assert not list(folder.glob("qmpnbd-*"))


@each_qemu
def test_other_tools_read_over_tls(binaries: QemuBinaries, disk: Path, folder: Path, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    tls: list[str | Path] = ["--tls", authority.server(), "--listen", "localhost:0"]
    with guest(binaries, disk) as server, running("--qmp", server.qmp, *tls, "--json") as child:
        (uri,) = uris(told(child))
        assert uri.startswith("nbds://localhost:")
        subprocess.run(
            ["nbdcopy", f"{uri}?tls-certificates={authority.client()}", folder / "copied"], check=True, timeout=60
        )
        child.send_signal(signal.SIGINT)
        child.communicate(timeout=60)
        assert child.returncode == 130
    qemu_img("compare", "-f", "raw", "-F", "qcow2", folder / "copied", disk)


def test_an_image_that_no_qemu_has_open(disk: Path, folder: Path) -> None:
    script = 'nbdcopy "$QMPNBD_URI" "$0"; test "$QMPNBD_URI" = "$QMPNBD_URI_IMAGE"; echo "$QMPNBD_EXPORTS"; exit 7'
    command: list[str | Path] = ["--exec", "sh", "-ec", script, folder / "copied"]
    done = qmpnbd("export", disk, "--format", "qcow2", "--runtime-dir", folder, *command, code=7)
    found = document(done.stdout)
    assert (found["image"], found["consistent"], done.stderr) == (str(disk), True, "")
    qemu_img("compare", "-f", "raw", "-F", "qcow2", folder / "copied", disk)
    assert not list(folder.glob("qmpnbd-*"))


@each_qemu
def test_the_storage_daemon_of_every_release(
    binaries: QemuBinaries, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(Path(binaries.storage_daemon).parent), prepend=os.pathsep)
    for options in (Options(), Options(listen=TcpAddress("127.0.0.1", 0), insecure=True)):
        with blocking.exporting(Image(str(disk), "qcow2"), options=options) as session:
            assert session.session.monitor.version.qemu.major == binaries.version[0]
            with Client.connect(session.exports[0].uri, deadline=SOON) as client:
                assert client.read(64 << 10, 4) == b"\2\2\2\2"
        assert session.session.take_down.left == []


def test_images_that_cannot_be_exported(disk: Path, folder: Path) -> None:
    (folder / "garbage").write_bytes(b"garbage" * 1000)
    with pytest.raises(ImageMissingError), blocking.exporting(Image(str(folder / "nothing"), "raw")):
        pass
    with pytest.raises(ImageUnreadableError, match="Image is not in qcow2 format"):  # noqa: SIM117
        with blocking.exporting(Image(str(folder / "garbage"), "qcow2")):
            pass
    with storage_daemon("--blockdev", blockdev(disk, "n")), pytest.raises(ImageUnreadableError, match="--qmp"):  # noqa: SIM117
        with blocking.exporting(Image(str(disk), "qcow2")):
            pass


def daemons(folder: Path) -> list[int]:
    """The storage daemons that were started for images below a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes()
            if words.split(b"\0")[0].endswith(b"qemu-storage-daemon") and os.fsencode(folder) in words:
                found.append(int(process.name))
    return found


def test_the_storage_daemon_ends_when_we_are_killed(disk: Path, folder: Path) -> None:
    with running(disk, "--format", "qcow2", "--runtime-dir", folder, "--json") as child:
        told(child)
        assert len(daemons(disk.parent)) == 1
        child.kill()
        wait_until(lambda: not daemons(disk.parent), "the daemon to end")
    with storage_daemon() as server:

        async def clean() -> None:
            async with await Monitor.connect(str(server.qmp), SOON) as monitor:
                await remove_leftovers(monitor, str(folder), SOON)

        asyncio.run(clean())
    assert not list(folder.glob("qmpnbd-*"))


@each_qemu
def test_a_killed_export_is_recovered(binaries: QemuBinaries, disk: Path, folder: Path) -> None:
    with guest(binaries, disk) as server:
        with running("--qmp", server.qmp, "--runtime-dir", folder, "--json") as child:
            told(child)
            child.kill()
            child.wait(30)
        assert len(server.exports()) == 1

        async def clean() -> None:
            async with await Monitor.connect(str(server.qmp), SOON) as monitor:
                assert len(await remove_leftovers(monitor, str(folder), SOON)) == 2

        asyncio.run(clean())
    assert not list(folder.glob("qmpnbd-*"))


def test_several_disks_and_bitmaps(disk: Path, folder: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", folder / "second.qcow2", "1M")
    second = blockdev(folder / "second.qcow2", "m")
    with storage_daemon("--blockdev", blockdev(disk, "n"), "--blockdev", second) as server:
        for node in "nm":
            for name in ("b0", "b1"):
                server.side("block-dirty-bitmap-add", node=node, name=name, disabled=True)
        script = 'echo "$QMPNBD_URI_N"; echo "$QMPNBD_URI_M"; echo "$QMPNBD_URI"; nbdinfo --json "$QMPNBD_URI_M"'
        chosen = ["--disk", "n", "--disk", "m", "--bitmap", "b0", "--bitmap", "b1", "--description", "for the test"]
        done = qmpnbd("export", "--qmp", server.qmp, *chosen, "--exec", "sh", "-c", script)
        first, second, none, told_by_nbdinfo = done.stdout.split("\n", 3)
        (export,) = json.loads(told_by_nbdinfo)["exports"]
        assert first != second
        assert none == ""
        bitmaps = ["qemu:dirty-bitmap:b0", "qemu:dirty-bitmap:b1"]
        assert sorted(export["contexts"]) == ["base:allocation", "qemu:allocation-depth", *bitmaps]
        assert (export["description"], export["is_read_only"]) == ("for the test", True)
        assert (server.exports(), server.nbd_server_runs()) == ([], False)


@pytest.mark.parametrize(("disk_name", "expected"), [("vd0", "QMPNBD_URI_VD0"), ("/a/b[0]", "QMPNBD_URI__A_B_0_")])
def test_the_variable_of_a_disk(disk_name: str, expected: str) -> None:
    assert variable(disk_name) == expected


def test_the_time_is_over(disk: Path) -> None:
    image: list[str | Path] = [disk, "--format", "qcow2", "--timeout", "0.3"]
    assert "consistent: yes" in qmpnbd("export", *image).stdout
    done = qmpnbd("export", *image, "--exec", "sleep", "60", code=50)
    assert (done.stdout, "timed out" in done.stderr) == ("", True)


@pytest.mark.parametrize(
    ("command", "code"),
    [(["false"], 1), (["sh", "-c", "kill -9 $$"], 137), (["/no/such/command"], 2), (["true"], 0)],
)
def test_the_commands_end_is_ours(disk: Path, command: list[str], code: int) -> None:
    done = qmpnbd("export", disk, "--format", "qcow2", "--exec", *command, code=code)
    assert done.stdout == "", "stdout belongs to the command"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["image"],
        ["image", "--qmp", "x"],
        ["image", "--format", "raw", "--disk", "d"],
        ["image", "--format", "raw", "--writable"],
        ["--qmp", "x", "--format", "raw"],
        ["--qmp", "x", "--exec"],
        ["--qmp", "x", "--tls", "a", "--tls-psk", "b"],
        ["--qmp", "x", "--tls-authz", "a"],
        ["--qmp", "x", "--tls-psk", "a", "--tls-authz", "a"],
        ["--qmp", "x", "--nbd", "nbd://localhost", "--listen", "localhost:1"],
        ["--qmp", "x", "--listen", "nonsense"],
    ],
)
def test_what_makes_no_sense_is_refused(arguments: list[str]) -> None:
    done = qmpnbd("export", *arguments, code=2)
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_command_and_takes_everything_down(disk: Path, folder: Path, number: signal.Signals) -> None:
    with storage_daemon("--blockdev", blockdev(disk, "n", read_only=True)) as server:
        script = f'trap "echo asked > {folder}/asked; exit 0" TERM; touch {folder}/up; while :; do sleep 0.05; done'
        with running("--qmp", server.qmp, "--disk", "n", "--exec", "sh", "-c", script) as child:
            wait_until((folder / "up").exists, "the command")
            child.send_signal(number)
            child.communicate(timeout=60)
            assert child.returncode == 128 + number
        assert (folder / "asked").exists()
        assert (server.exports(), server.nbd_server_runs()) == ([], False)


def test_a_reader_that_goes_away_ends_it(disk: Path) -> None:
    with storage_daemon("--blockdev", blockdev(disk, "n", read_only=True)) as server:
        with running("--qmp", server.qmp, "--disk", "n", "--json") as child:
            told(child)
            assert child.stdout is not None
            child.stdout.close()
            assert child.wait(60) == 141
        assert (server.exports(), server.nbd_server_runs()) == ([], False)


@pytest.mark.parametrize("command", [[], ["--exec", "sleep", "60"]])
def test_a_qemu_that_dies_ends_it(disk: Path, folder: Path, command: list[str]) -> None:
    with storage_daemon("--blockdev", blockdev(disk, "n", read_only=True)) as server:
        with running("--qmp", server.qmp, "--disk", "n", "--runtime-dir", folder, *command) as child:
            wait_until(lambda: bool(server.exports()), "the export")
            os.kill(server.pid, signal.SIGKILL)
            _, complaint = child.communicate(timeout=60)
            assert child.returncode == 13
        assert b"left behind" not in complaint
    assert not list(folder.glob("qmpnbd-*"))


def test_an_export_that_somebody_removes_ends_it(disk: Path) -> None:
    with storage_daemon("--blockdev", blockdev(disk, "n", read_only=True)) as server:
        with running("--qmp", server.qmp, "--disk", "n", "--json") as child:
            told(child)
            server.side("block-export-del", id=server.exports()[0], mode="hard")
            child.communicate(timeout=60)
            assert child.returncode == 17
        assert not server.nbd_server_runs()


def test_an_export_that_moved_is_told(disk: Path, folder: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", folder / "over", "4M")
    with storage_daemon("--blockdev", blockdev(disk, "n")) as server:
        with running("--qmp", server.qmp, "--disk", "n", "--json", "--timeout", "2") as child:
            told(child)
            file = {"driver": "file", "filename": str(folder / "over")}
            server.side.execute("blockdev-add", {"driver": "qcow2", "node-name": "o", "backing": None, "file": file})
            server.side("blockdev-snapshot", node="n", overlay="o")
            _, complaint = child.communicate(timeout=60)
            assert child.returncode == 0
        assert b"followed the block graph from node n to o" in complaint


def test_a_shared_server_is_left_running(disk: Path, folder: Path) -> None:
    with storage_daemon("--blockdev", blockdev(disk, "n", read_only=True)) as server:
        server.side("nbd-server-start", addr={"type": "unix", "data": {"path": str(folder / "theirs")}})
        uri = f"nbd+unix:///?socket={folder}/theirs"
        shared = blocking.exporting(str(server.qmp), ["n"], Options(nbd=uri))
        with shared as session, Client.connect(session.exports[0].uri, deadline=SOON) as client:
            assert client.export.size == 4 << 20
        assert (server.exports(), server.nbd_server_runs()) == ([], True)


def test_a_guest_in_an_iothread_is_refused_where_qemu_is_known_to_abort(disk: Path) -> None:
    with guest(installed(), disk, "-object", "iothread,id=io", device=",iothread=io") as server:
        if installed().version[0] in (7, 8):
            with pytest.raises(UnsafeOperationError, match="--allow-iothread"), blocking.exporting(str(server.qmp)):
                pass
        for options in (Options(allow_iothread=True), Options(allow=["iothread"])):
            with blocking.exporting(str(server.qmp), ["vd0"], options) as session:
                assert len(session.exports) == 1
        allowed: list[str | Path] = ["export", "--qmp", server.qmp, "--allow", "iothread", "--exec", "true"]
        qmpnbd(*allowed)
        assert "snapshot-access" in qmpnbd("export", "--qmp", server.qmp, "--allow", "nothing", code=2).stderr


def test_both_contexts_of_a_raw_file_are_refused_where_they_spoil_each_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hazards, "ALLOCATION_AFTER_DEPTH", replace(ALLOCATION_AFTER_DEPTH, first=(5, 0), fixed=(99, 0)))
    disk = folder / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    with storage_daemon("--blockdev", blockdev(disk, "n", "raw", read_only=True)) as server:
        with (
            pytest.raises(UnsafeOperationError, match="--allow allocation-after-depth"),
            blocking.exporting(str(server.qmp), ["n"]),
        ):
            pytest.fail("it is refused")
        for options in (
            Options(allow=["allocation-after-depth"]),
            Options(export=ExportOptions(allocation_depth=False)),
        ):
            with blocking.exporting(str(server.qmp), ["n"], options) as session:
                assert len(session.exports) == 1


@each_qemu
def test_an_iothread_serves_a_free_node(binaries: QemuBinaries, disk: Path) -> None:
    more = ["-object", "iothread,id=io", "-blockdev", json.dumps({"driver": "null-co", "node-name": "free"})]
    with guest(binaries, disk, *more) as server:
        chosen = Options(export=ExportOptions(iothread="io"))
        if (7, 0) <= binaries.version < (9, 0):  # which aborts when a client leaves, whatever thread the device has
            refused = pytest.raises(UnsafeOperationError, match="--allow iothread")
            with refused, blocking.exporting(str(server.qmp), ["free"], chosen):
                pytest.fail("it is refused")
        chosen = replace(chosen, allow=["iothread"])
        with blocking.exporting(str(server.qmp), ["free"], chosen) as session:
            assert session.node_of(session.exports[0], SOON) == "free"
        # The disk's thread is its device's business, so it is insisted on and refused.
        taken = pytest.raises(ExportRefusedError, match="iothread")
        with taken, blocking.exporting(str(server.qmp), ["vd0"], chosen):
            pass


@each_qemu
@pytest.mark.parametrize("command", ["export", "validate"])
def test_reading_changes_no_disk_that_copies_on_read(
    binaries: QemuBinaries, disk: Path, folder: Path, command: str
) -> None:
    """Through such a filter, whatever is read of lower layers would be written to the active one."""
    copying = json.dumps({"driver": "copy-on-read", "node-name": "copying", "file": "n"})
    more = ["-blockdev", blockdev(disk, "n"), "-blockdev", copying, "-device", "virtio-blk-pci,id=vd0,drive=copying"]
    with binaries.qemu(*more):
        pass  # the device itself reads its first sector
    before = qemu_img("map", "--output=json", disk)
    with binaries.qemu(*more) as server:
        if command == "export":
            options: list[str | Path] = ["--exec", "sh", "-c", f'nbdcopy "$QMPNBD_URI" {folder / "copied"}']
        else:
            options = ["vd0", "--content", "whole"]
        qmpnbd(command, "--qmp", server.qmp, *options)
    assert qemu_img("map", "--output=json", disk) == before


def test_the_blocking_twin_removes_and_watches(disk: Path) -> None:
    with storage_daemon("--blockdev", blockdev(disk, "n", read_only=True)) as server:
        with blocking.exporting(str(server.qmp), ["n"]) as session:
            (export,) = session.exports
            assert session.node_of(export, SOON) == "n"
            with Client.connect(export.uri, deadline=SOON):
                with pytest.raises(ExportRefusedError) as refused:
                    session.remove(export, SOON, "safe")
                assert refused.value.reason == "in-use"
                session.remove(export, SOON)
            assert (server.exports(), list(session.exports)) == ([], [])
            with pytest.raises(InterferenceError):
                session.node_of(export, SOON)
        with pytest.raises(ValueError, match="mine"), blocking.exporting(str(server.qmp), ["n"]):
            raise ValueError("mine")
        with pytest.raises(NoSuchDiskError), blocking.exporting(str(server.qmp), ["nothing"]):
            pass
        assert (server.exports(), server.nbd_server_runs()) == ([], False)


def test_a_function_that_makes_sources_decides_what_is_exported(disk: Path) -> None:
    gone = []

    @asynccontextmanager
    async def below(scene: Scene) -> AsyncIterator[Sources]:
        (chosen,) = scene.disks
        yield Sources((Source(chosen, scene.inventory.graph.nodes["n"].children["backing"]),), consistent=True)
        gone.append(scene.run)

    with storage_daemon("--blockdev", blockdev(disk, "n", read_only=True)) as server:
        with blocking.exporting(str(server.qmp), ["n"], sources=below) as session:
            assert session.session.consistent
            with Client.connect(session.exports[0].uri, deadline=SOON) as client:
                assert client.read(64 << 10, 1) == b"\0"
        assert len(gone) == 1


def test_cancelled_at_any_step_everything_is_taken_down(disk: Path) -> None:
    with storage_daemon("--blockdev", blockdev(disk, "n", read_only=True)) as server:

        async def job() -> None:
            async with exporting(str(server.qmp), ["n"]):
                await asyncio.Event().wait()

        async def all_jobs() -> None:
            # Where each cancellation falls is chance; what must hold afterwards is not.
            for step in range(20):
                task = asyncio.ensure_future(job())
                await asyncio.sleep(step * 0.0015)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert (server.exports(), server.nbd_server_runs()) == ([], False)

        asyncio.run(all_jobs())
        assert objects(server) == []


def test_credentials_that_do_not_go_together() -> None:
    with pytest.raises(UsageError):
        ServerTls("folder", "psk", ("CN=a",))


KILLED = """
import asyncio, os, sys
from qmpnbd.export.session import Options, exporting
from qmpnbd.qmp.address import TcpAddress
from qmpnbd.qmp.credentials import ServerTls
from qmpnbd.qmp.monitor import Monitor

address, base, certificates, last = sys.argv[1:]
seen, execute = 0, Monitor.execute

async def counted(self, *arguments, **options):
    global seen
    try:
        return await execute(self, *arguments, **options)
    finally:
        seen += 1
        if seen == int(last):
            os.kill(os.getpid(), 9)

async def main():
    tls = {"listen": TcpAddress("127.0.0.1", 0), "tls": ServerTls(certificates, authorized=("*",))}
    async with exporting(address, ["vd0"], Options(runtime_dir=base, **(tls if certificates else {}))):
        pass

Monitor.execute = counted
asyncio.run(main())
"""


@each_qemu
@pytest.mark.parametrize("kind", ["unix", "tls"])
def test_killed_after_any_command_it_is_recovered(
    binaries: QemuBinaries, disk: Path, folder: Path, tmp_path: Path, kind: str
) -> None:
    certificates = Authority(tmp_path).server() if kind == "tls" else ""

    async def recovered(server: Server) -> list[str]:
        async with await Monitor.connect(str(server.qmp), SOON) as monitor:
            removed = await remove_leftovers(monitor, str(folder), SOON)
            assert await remove_leftovers(monitor, str(folder), SOON) == []
            return removed

    with guest(binaries, disk) as server:
        nodes, most, last, code = server.nodes(), 0, 0, -9
        while code == -9:
            last += 1
            arguments = [str(server.qmp), str(folder), str(certificates), str(last)]
            code = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False, timeout=60).returncode
            most = max(most, len(asyncio.run(recovered(server))))
            assert (server.exports(), server.nodes(), server.nbd_server_runs()) == ([], nodes, False), last
            assert objects(server) == [], last
            assert not list(folder.glob("qmpnbd-*")), last
        assert (code, most) == (0, 2)
        assert last > 15
