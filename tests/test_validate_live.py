"""A disk that moves while it is judged: jobs, snapshots, files replaced, rounds that fail, and the order of the end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from qmpnbd.deadline import Deadline
from qmpnbd.errors import (
    DiskNotLocalError,
    ImageCorruptError,
    InterferenceError,
    NbdError,
    NbdProtocolError,
    QmpnbdError,
    UsageError,
)
from qmpnbd.images.chain import LayerSpec
from qmpnbd.images.mapentries import Generation
from qmpnbd.nbd.aio import Client
from qmpnbd.qmp.monitor import Monitor
from qmpnbd.report.model import DiskReport, ValidationReport
from qmpnbd.validate import live
from qmpnbd.validate.choice import Choice
from qmpnbd.validate.reading import Reading, read_chain
from qmpnbd.validate.run import Options, SoFar, validate, validate_disks
from tests.fleets import spoilt
from tests.qemu_versions import QemuBinaries, each_qemu
from tests.servers import Server, blockdev, qemu, qemu_img, storage_daemon
from tests.writers import writing, written_and_not_flushed

pytestmark = pytest.mark.real


@pytest.fixture
def daemon(copies: Path) -> Iterator[Server]:
    with storage_daemon("--blockdev", blockdev(copies / "top.qcow2", "top", discard="unmap")) as server:
        yield server


def one(report: ValidationReport) -> DiskReport:
    (disk,) = report.disks
    return disk


@contextlib.contextmanager
def reading(monkeypatch: pytest.MonkeyPatch, during: Callable[[int], None]) -> Iterator[None]:
    """Does something each time the files are about to be read; `during` is told how often that was before."""
    count = 0

    def read(specs: Sequence[LayerSpec], deadline: Deadline, generation: Generation | None) -> Reading:
        nonlocal count
        count += 1
        during(count - 1)
        return read_chain(specs, deadline, generation)

    with monkeypatch.context() as patch:
        patch.setattr(live, "read_chain", read)
        yield


def overlay(server: Server, folder: Path, name: str) -> None:
    path = folder / f"{name}.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "16M")
    node = {"driver": "qcow2", "node-name": name, "backing": None, "file": {"driver": "file", "filename": str(path)}}
    server.side.execute("blockdev-add", node)
    below = server.side("query-block-exports")[0]["node-name"]
    server.side("blockdev-snapshot", node=below, overlay=name)


@each_qemu
def test_maps_and_bytes_agree_on_a_disk_that_is_written_all_the_time(binaries: QemuBinaries, copies: Path) -> None:
    """On every release, and of each thing compared at least 99 % are judged."""
    uri = f"nbd+unix:///?socket={copies}/guest"
    whole = Options(nbd=uri, choice=Choice(content="whole"))
    with binaries.daemon("--blockdev", blockdev(copies / "top.qcow2", "top", discard="unmap")) as server:
        with writing(server, copies / "guest", 4 << 20):
            for choice in (Options(nbd=uri), whole, Options(nbd=uri)):
                disk = one(validate(str(server.qmp), ["top"], choice))
                assert disk.discrepancy_count == 0, disk.discrepancies
                compared = {entry.what: entry for entry in disk.compared}
                assert set(compared) == {"qemu:allocation-depth", "base:allocation", "content"}
                for name in ("qemu:allocation-depth", "base:allocation"):
                    assert compared[name].set_aside_bytes <= disk.size // 100
                assert compared["content"].set_aside_bytes <= 4 << 20  # all the rest nobody writes
        assert one(validate(str(server.qmp), ["top"], Options(choice=Choice(content="whole")))).verdict == "agreed"


@each_qemu
@pytest.mark.parametrize("kind", ["cleared", "zero flag"])
def test_a_spoilt_entry_shows_in_all_that_is_compared(binaries: QemuBinaries, copies: Path, kind: str) -> None:
    """One that is gone in depth, base:allocation and content; a zero flag does not change the depth."""
    top = copies / "top.qcow2"
    with binaries.daemon("--blockdev", blockdev(top, "top", read_only=True)) as server:
        whole = Options(choice=Choice(content="whole"))
        assert one(validate(str(server.qmp), ["top"], whole)).verdict == "agreed"
        spoilt(top, 12 << 20, kind)
        disk = one(validate(str(server.qmp), ["top"], whole))
    found = {each.what: each.discrepancy_bytes for each in disk.compared}
    depth = 65536 if kind == "cleared" else 0
    assert found == {"qemu:allocation-depth": depth, "base:allocation": 65536, "content": 65536}


def test_what_is_switched_off_is_not_compared(daemon: Server) -> None:
    disk = one(validate(str(daemon.qmp), ["top"], Options(choice=Choice(base=False, content="none"))))
    assert [entry.what for entry in disk.compared] == ["qemu:allocation-depth"]
    assert disk.choice == "depth,bitmaps,content=none"
    disk = one(validate(str(daemon.qmp), ["top"], Options(choice=Choice(depth=False, content="none"))))
    assert [entry.what for entry in disk.compared] == ["base:allocation"]
    assert disk.verdict == "agreed"


def test_a_depth_that_is_not_compared_is_no_discrepancy(copies: Path) -> None:
    """An entry that is gone shows in the depth and elsewhere; here only the content was asked for."""
    top = copies / "top.qcow2"
    with storage_daemon("--blockdev", blockdev(top, "top", read_only=True)) as server:
        content = Options(choice=Choice(depth=False, base=False, content="whole"))
        assert one(validate(str(server.qmp), ["top"], Options())).verdict == "agreed"
        spoilt(top, 12 << 20)
        disk = one(validate(str(server.qmp), ["top"], content))
    assert {each.compared for each in disk.discrepancies} == {"content"}
    assert disk.discrepancy_bytes == 65536


def test_how_far_it_is_can_be_asked_at_any_time(daemon: Server) -> None:
    so_far = SoFar(str(daemon.qmp))
    whole = Options(choice=Choice(content="whole"))
    report = asyncio.run(validate_disks(str(daemon.qmp), ["top"], whole, so_far=so_far))
    assert so_far.report(()) == report
    assert (so_far.progress.total, so_far.progress.done, so_far.progress.bytes) == (1, 1, 16 << 20)


def test_a_snapshot_in_mid_round_voids_the_round_and_the_new_chain_is_judged(
    daemon: Server, copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with reading(monkeypatch, lambda count: overlay(daemon, copies, "over") if count == 0 else None):
        disk = one(validate(str(daemon.qmp), ["top"]))
    assert (disk.verdict, disk.rounds, len(disk.layers)) == ("agreed", 1, 4)
    assert [layer.node_name for layer in disk.layers[:2]] == ["over", "top"]
    assert {total.allocation_depth for total in disk.totals} == {2, 3, 4}


def test_a_graph_that_never_stands_still_is_said_to(
    daemon: Server, copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with reading(monkeypatch, lambda count: overlay(daemon, copies, f"over{count}")):
        disk = one(validate(str(daemon.qmp), ["top"], Options(rounds=3)))
    assert (disk.verdict, disk.rounds, disk.unfinished, disk.set_aside_bytes) == ("incomplete", 0, "graph", 16 << 20)


def test_nodes_of_others_may_come_and_go(daemon: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def unrelated(count: int) -> None:
        daemon.side("blockdev-add", driver="null-co", node_name=f"other{count}", size=512)

    with reading(monkeypatch, unrelated):
        assert one(validate(str(daemon.qmp), ["top"])).verdict == "agreed"


def test_a_round_that_fails_is_tried_again_and_twice_running_is_no_accident(
    daemon: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(count: int, until: int) -> None:
        if count < until:
            raise ImageCorruptError("torn", where="x", structure="L2 entry", offset=0)

    with reading(monkeypatch, lambda count: broken(count, 1)):
        assert one(validate(str(daemon.qmp), ["top"])).verdict == "agreed"
    with reading(monkeypatch, lambda count: broken(count, 2)), pytest.raises(ImageCorruptError):
        validate(str(daemon.qmp), ["top"])


def test_an_export_that_somebody_removes(daemon: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def remove(_: int) -> None:
        daemon.side("block-export-del", id=daemon.exports()[0], mode="hard")

    with reading(monkeypatch, remove), pytest.raises((InterferenceError, NbdError)):
        validate(str(daemon.qmp), ["top"])
    assert (daemon.exports(), daemon.nbd_server_runs()) == ([], False)


def test_others_in_our_server_are_spared_and_told_of(daemon: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon.side("blockdev-add", driver="null-co", node_name="other", size=512)

    def join(count: int) -> None:
        if count == 0:
            daemon.side("block-export-add", type="nbd", id="theirs", node_name="other")

    with reading(monkeypatch, join):
        report = validate(str(daemon.qmp), ["top"])
    assert report.verdict == "agreed"
    assert len(report.left_behind) == 1
    assert "others have exports in it" in report.left_behind[0]
    assert daemon.exports() == ["theirs"]


def test_a_backing_file_that_a_job_writes_to_is_flushed_as_well(copies: Path) -> None:
    """QEMU flushes no backing files through an export above them; tables that lag behind would look like a fault."""
    mid = {"driver": "qcow2", "node-name": "mid", "file": {"driver": "file", "filename": str(copies / "mid.qcow2")}}
    top = blockdev(copies / "top.qcow2", "top", backing="mid")
    uri = f"nbd+unix:///?socket={copies}/guest"
    with storage_daemon("--blockdev", json.dumps(mid), "--blockdev", top) as server:
        server.side("nbd-server-start", addr={"type": "unix", "data": {"path": str(copies / "guest")}})
        server.side("block-export-add", type="nbd", id="job", node_name="mid", name="job", writable=True)
        with written_and_not_flushed(f"nbd+unix:///job?socket={copies}/guest", "write 5M 64k"):
            disk = one(validate(str(server.qmp), ["top"], Options(nbd=uri)))
        assert (disk.verdict, disk.rounds) == ("agreed", 1)
        assert server.exports() == ["job"]


def test_clusters_that_come_and_go_are_no_discrepancy(folder: Path) -> None:
    """Version 2 without a backing file forgets discarded clusters, so a depth can swing between 0 and 1."""
    qemu_img("create", "-q", "-f", "qcow2", "-o", "compat=0.10", folder / "top.qcow2", "1M")
    uri = f"nbd+unix:///?socket={folder}/guest"
    with (
        storage_daemon("--blockdev", blockdev(folder / "top.qcow2", "top", discard="unmap")) as server,
        writing(server, folder / "guest", 128 << 10, ("write -q", "discard -q")),
    ):
        for _ in range(10):
            disk = one(validate(str(server.qmp), ["top"], Options(nbd=uri)))
            assert disk.verdict in ("agreed", "incomplete"), disk


def test_a_file_that_was_replaced_under_qemu(daemon: Server, copies: Path) -> None:
    assert one(validate(str(daemon.qmp), ["top"])).files_verified
    shutil.copy(copies / "mid.qcow2", copies / "new")
    (copies / "new").rename(copies / "mid.qcow2")
    with pytest.raises(DiskNotLocalError, match="not the one that QEMU has open") as caught:
        validate(str(daemon.qmp), ["top"])
    assert caught.value.where == str(copies / "mid.qcow2")


def test_symlinks_and_hard_links_are_the_files_they_lead_to(copies: Path) -> None:
    (copies / "deep").mkdir()
    for name in ("base.raw", "mid.qcow2", "top.qcow2"):
        (copies / "deep" / name).symlink_to(copies / name)
    with storage_daemon("--blockdev", blockdev(copies / "deep" / "top.qcow2", "top")) as server:
        assert one(validate(str(server.qmp), ["top"])).files_verified


@pytest.fixture
def closings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is closed, in order: exports by name, and the sockets of their clients."""
    order: list[str] = []
    close, execute = Client.close, Monitor.execute

    async def closing(client: Client) -> None:
        order.append("client")
        await close(client)

    async def executing(monitor: Monitor, command: str, *arguments: object, deadline: Deadline) -> object:
        if command == "block-export-del":
            order.append("export")
        return await execute(monitor, command, *arguments, deadline=deadline)  # type: ignore[arg-type]

    monkeypatch.setattr(Client, "close", closing)
    monkeypatch.setattr(Monitor, "execute", executing)
    return order


def test_exports_go_before_their_clients(daemon: Server, closings: list[str]) -> None:
    validate(str(daemon.qmp), ["top"])
    assert closings == ["export", "client"]


def test_exports_go_before_their_clients_after_an_error(
    daemon: Server, closings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise UsageError("no", where="here")

    with reading(monkeypatch, fail), pytest.raises(UsageError):
        validate(str(daemon.qmp), ["top"])
    assert closings == ["export", "client"]


def test_exports_go_before_their_clients_after_a_breach_of_the_protocol(
    daemon: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client closes at once then; QEMU must not see it before the export is gone."""
    execute = Monitor.execute
    socket_path: list[str] = []
    connected: list[int] = []

    def count() -> None:
        connected.append(0)
        for each in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(each.name))) as mine:
                connected[-1] += mine.getpeername() == socket_path[0]

    async def executing(monitor: Monitor, command: str, *arguments: object, deadline: Deadline) -> object:
        if command == "block-export-del":
            count()
        return await execute(monitor, command, *arguments, deadline=deadline)  # type: ignore[arg-type]

    async def broken(client: Client, **_: object) -> None:
        socket_path.append(str(client.where).partition("socket=")[2])
        error = NbdProtocolError("by the test", where=client.where)
        client._runner._fail(error)
        raise error

    monkeypatch.setattr(Client, "maps", broken)
    monkeypatch.setattr(Monitor, "execute", executing)
    with pytest.raises(NbdProtocolError, match="by the test"):
        validate(str(daemon.qmp), ["top"])
    assert connected == [1]


def test_one_disk_named_three_ways_is_one_disk(copies: Path) -> None:
    node = ["-blockdev", blockdev(copies / "top.qcow2", "n"), "-device", "virtio-blk-pci,id=vd0,drive=n"]
    with qemu(*node) as server:
        report = validate(str(server.qmp), ["vd0", "/machine/peripheral/vd0", "n"])
    assert [disk.name for disk in report.disks] == ["vd0"]


def test_one_disks_discrepancy_survives_anothers_refusal(copies: Path) -> None:
    nodes = ["-object", "iothread,id=io", "-blockdev", blockdev(copies / "top.qcow2", "a")]
    nodes += ["-blockdev", blockdev(copies / "base.raw", "b", "raw", read_only=True), "-device"]
    nodes += ["virtio-blk-pci,id=d0,drive=a", "-device", "virtio-blk-pci,id=d1,drive=b,iothread=io"]
    nodes += ["-blockdev", json.dumps({"driver": "null-co", "node-name": "c", "size": 512})]
    with qemu(*nodes, "-device", "virtio-blk-pci,id=d2,drive=c") as server:
        validate(str(server.qmp), ["d0"])
        with (copies / "mid.qcow2").open("r+b") as file:
            file.seek((4 << 16) + 16 * 8)
            file.write(bytes(8))
        report = validate(str(server.qmp))
        unsafe = server.side("query-version")["qemu"]["major"] in (7, 8)
    verdicts = {disk.name: disk.verdict for disk in report.disks}
    assert verdicts == {"d0": "discrepancy", "d1": "error" if unsafe else "agreed", "d2": "error"}
    assert report.verdict == "discrepancy"


def test_an_inner_node_of_a_disk_in_an_iothread(copies: Path) -> None:
    mid = {"driver": "qcow2", "node-name": "mid", "file": {"driver": "file", "filename": str(copies / "mid.qcow2")}}
    nodes = ["-object", "iothread,id=io", "-blockdev", json.dumps({**mid, "read-only": True})]
    nodes += ["-blockdev", blockdev(copies / "top.qcow2", "top", backing="mid")]
    with qemu(*nodes, "-device", "virtio-blk-pci,id=d0,drive=top,iothread=io") as server:
        if server.side("query-version")["qemu"]["major"] in (7, 8):
            with pytest.raises(QmpnbdError, match="iothread"):
                validate(str(server.qmp), ["mid"])


def test_many_runs_at_once_do_not_disturb_each_other(copies: Path) -> None:
    """All of them look for leftovers in the same folder in which all of them make their own."""
    (copies / "run").mkdir()
    top = blockdev(copies / "top.qcow2", "top", read_only=True)
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(storage_daemon("--blockdev", top)) for _ in range(4)]

        async def all_at_once() -> list[ValidationReport]:
            choice = Options(runtime_dir=str(copies / "run"))
            rounds = []
            for _ in range(5):
                work = (validate_disks(str(server.qmp), ["top"], choice) for server in servers)
                rounds += await asyncio.gather(*work)
            return rounds

        assert {report.verdict for report in asyncio.run(all_at_once())} == {"agreed"}
    assert list((copies / "run").iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run QEMU as another user")
def test_root_validates_a_qemu_of_another_user(copies: Path) -> None:
    """As with libvirt: QEMU must be able to make its socket in a directory that is otherwise closed to it."""
    copies.chmod(0o755)
    for name in ("base.raw", "mid.qcow2", "top.qcow2"):
        shutil.chown(copies / name, "nobody")
    node = ["-runas", "nobody", "-blockdev", blockdev(copies / "top.qcow2", "n")]
    with qemu(*node, "-device", "virtio-blk-pci,id=vd0,drive=n") as server:
        assert one(validate(str(server.qmp), ["vd0"])).verdict == "agreed"
        assert (server.exports(), server.nbd_server_runs()) == ([], False)


def test_rounds_must_leave_room_for_a_watched_one(daemon: Server) -> None:
    with pytest.raises(UsageError, match="At least 2"):
        validate(str(daemon.qmp), ["top"], Options(rounds=1))


def test_the_uri_of_a_shared_server_has_no_export(daemon: Server) -> None:
    with pytest.raises(UsageError, match="names an export"):
        validate(str(daemon.qmp), ["top"], Options(nbd="nbd+unix:///disk?socket=/x"))


def test_what_a_temporary_overlay_is(copies: Path) -> None:
    drive = f"if=virtio,file={copies / 'top.qcow2'},format=qcow2,snapshot=on"
    with qemu("-drive", drive) as server, pytest.raises(QmpnbdError, match="snapshot=on"):
        validate(str(server.qmp))
