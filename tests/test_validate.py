"""The main job on real QEMUs: agreement on many chains and graphs, and faults that must be found."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmpnbd.errors import (
    DiskNotLocalError,
    GraphUnsupportedError,
    ImageCorruptError,
    ImageMissingError,
    ImageTruncatedError,
    ImageUnreadableError,
    ImageUnsupportedError,
    NbdConnectError,
    NbdRefusedError,
    NoSuchDiskError,
    QmpnbdError,
    ServerBusyError,
    UnsafeOperationError,
)
from qmpnbd.images.files import open_chain
from qmpnbd.report.model import DiskReport
from qmpnbd.validate.choice import Choice
from qmpnbd.validate.run import Options, validate
from tests.chains import ChainRecipe, build, recipes
from tests.qemu_versions import QemuBinaries, each_qemu
from tests.servers import Server, blockdev, qemu, qemu_img, qemu_io, storage_daemon
from tests.writers import writing, written_and_not_flushed

pytestmark = pytest.mark.real


def judged(server: Server, disk: str, options: Options | None = None) -> DiskReport:
    """Validates a disk, and asserts that the server is afterwards as it was before."""
    before = (server.exports(), server.nodes(), server.nbd_server_runs())
    try:
        report = validate(str(server.qmp), [disk], options)
    finally:
        assert (server.exports(), server.nodes(), server.nbd_server_runs()) == before
    assert disk in (report.disks[0].name, report.disks[0].qom_path)
    assert report.verdict == report.disks[0].verdict
    return report.disks[0]


def totals(report: DiskReport) -> dict[int, int]:
    return {total.allocation_depth: total.bytes for total in report.totals}


@pytest.fixture(scope="module")
def empty_daemon() -> Iterator[Server]:
    with storage_daemon() as server:
        yield server


@contextlib.contextmanager
def added(server: Server, *nodes: dict[str, object]) -> Iterator[None]:
    """Adds nodes and removes them again, last first."""
    with contextlib.ExitStack() as stack:
        for node in nodes:
            server.side.execute("blockdev-add", node)
            stack.callback(server.side, "blockdev-del", node_name=node["node-name"])
        yield


def image(path: Path, name: str, **options: object) -> dict[str, object]:
    file = {"driver": "file", "filename": str(path)}
    return {"driver": "qcow2", "node-name": name, "read-only": True, "file": file, **options}


@each_qemu
def test_every_release_agrees_with_and_without_a_filter(
    binaries: QemuBinaries, three_layers: Path, folder: Path
) -> None:
    shutil.copy(three_layers / "top.qcow2", folder)
    qemu_img("rebase", "-u", "-b", three_layers / "mid.qcow2", "-F", "qcow2", folder / "top.qcow2")
    nodes = ["-object", "throttle-group,id=none", "-blockdev", blockdev(folder / "top.qcow2", "top")]
    nodes += ["-blockdev", json.dumps(throttle("filter", "top")), "-device", "virtio-blk-pci,id=vd0,drive=filter"]
    with binaries.qemu(*nodes) as server:
        filtered, plain = totals(judged(server, "vd0")), totals(judged(server, "top"))
    assert set(plain) == {1, 2, 3}
    assert filtered == {1: plain[1], 3: plain[2], 4: plain[3]}


@pytest.mark.parametrize("recipe", recipes(40, seed=77), ids=lambda recipe: recipe.id)
def test_agreement_over_the_matrix(empty_daemon: Server, recipe: ChainRecipe, tmp_path: Path) -> None:
    top = build(recipe, tmp_path)
    with added(empty_daemon, image(top, "top")):
        report = judged(empty_daemon, "top")
    with open_chain(str(top), format="qcow2") as chain:
        computed = chain.allocation_depth()
    assert (report.verdict, report.rounds, report.discrepancy_count) == ("agreed", 1, 0)
    assert (report.size, report.extents, totals(report)) == (computed.size, len(computed), computed.totals())
    assert len(report.layers) == len(recipe.layers)


def throttle(name: str, file: object) -> dict[str, object]:
    return {"driver": "throttle", "node-name": name, "throttle-group": "none", "file": file}


@pytest.fixture(scope="module")
def throttled() -> Iterator[Server]:
    with storage_daemon("--object", "throttle-group,id=none") as server:
        yield server


def test_filters_shift_what_is_served_and_what_is_computed(throttled: Server, three_layers: Path) -> None:
    base = {"driver": "raw", "node-name": "base", "read-only": True}
    base["file"] = {"driver": "file", "filename": str(three_layers / "base.raw")}
    mid = image(three_layers / "mid.qcow2", "mid", backing="base")
    top = image(three_layers / "top.qcow2", "top", backing="mid")
    with added(throttled, base, mid, top):
        plain = totals(judged(throttled, "top"))
        with added(throttled, throttle("one", "top")):
            once = totals(judged(throttled, "one"))
            with added(throttled, throttle("two", "one")):
                twice = totals(judged(throttled, "two"))
    assert set(plain) == {1, 2, 3}
    assert once == {1: plain[1], 3: plain[2], 4: plain[3]}
    assert twice == {1: plain[1], 4: plain[2], 5: plain[3]}


def test_filters_inside_the_chain(throttled: Server, three_layers: Path) -> None:
    base = {"driver": "raw", "node-name": "base", "read-only": True}
    base["file"] = {"driver": "file", "filename": str(three_layers / "base.raw")}
    mid = image(three_layers / "mid.qcow2", "mid", backing="over-base")
    top = image(three_layers / "top.qcow2", "top", backing="over-mid")
    with added(throttled, base, throttle("over-base", "base"), mid, throttle("over-mid", "mid"), top):
        report = judged(throttled, "top")
    assert report.verdict == "agreed"
    assert [layer.allocation_depth for layer in report.layers] == [1, 2, 4]


def test_a_raw_window_of_a_file(empty_daemon: Server, three_layers: Path) -> None:
    file = {"driver": "file", "filename": str(three_layers / "base.raw")}
    window = {"driver": "raw", "node-name": "w", "read-only": True, "offset": 4096, "size": 65536, "file": file}
    with added(empty_daemon, window):
        report = judged(empty_daemon, "w")
    assert (report.verdict, report.size, totals(report)) == ("agreed", 65536, {1: 65536})


@pytest.mark.parametrize("raw", ["off", "on"])
@pytest.mark.parametrize("replaced", [False, True])
def test_an_external_data_file(empty_daemon: Server, tmp_path: Path, raw: str, replaced: bool) -> None:
    """Under a backing file it is no layer; and QEMU may have been given another file than the one recorded."""
    base, top, data = tmp_path / "base.qcow2", tmp_path / "top.qcow2", tmp_path / "data.raw"
    behind = [] if raw == "on" else ["-b", str(base), "-F", "qcow2"]
    qemu_img("create", "-q", "-f", "qcow2", base, "8M")
    qemu_io(base, "write 4M 100k")
    options = f"data_file={data},data_file_raw={raw},preallocation={'metadata' if raw == 'on' else 'off'}"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, *behind, top, "8M")
    qemu_io(top, "write 1M 64k", "discard 1M 64k", "write 2M 1000k", "write -z 6M 64k")
    more: dict[str, object] = {}
    if replaced:
        data.rename(tmp_path / "moved.raw")
        more = {"data-file": {"driver": "file", "filename": str(tmp_path / "moved.raw")}}
    with added(empty_daemon, image(top, "top", **more)):
        report = judged(empty_daemon, "top")
    assert report.verdict == "agreed"
    assert len(report.layers) == 1 + len(behind) // 4
    assert totals(report)[1] > 1000 << 10


def test_nodes_inside_a_chain_and_protocol_nodes(empty_daemon: Server, three_layers: Path) -> None:
    file = {"driver": "file", "node-name": "f", "read-only": True, "filename": str(three_layers / "base.raw")}
    base = {"driver": "raw", "node-name": "base", "read-only": True, "file": "f"}
    mid = image(three_layers / "mid.qcow2", "mid", backing="base")
    with added(empty_daemon, file, base, mid, image(three_layers / "top.qcow2", "top", backing="mid")):
        assert set(totals(judged(empty_daemon, "mid"))) == {1, 2}
        assert totals(judged(empty_daemon, "f")) == {1: 8 << 20}


def test_a_backing_file_that_was_cut_off(empty_daemon: Server, three_layers: Path) -> None:
    with added(empty_daemon, image(three_layers / "top.qcow2", "top", backing=None)):
        report = judged(empty_daemon, "top")
    assert (report.verdict, set(totals(report)), len(report.layers)) == ("agreed", {0, 1}, 1)


DEVICES = {
    "virtio": ("-device", "virtio-blk-pci,id=disk,drive=node"),
    "scsi": ("-device", "virtio-scsi-pci,id=bus", "-device", "scsi-hd,id=disk,drive=node"),
    "ide": ("-device", "ich9-ahci,id=bus", "-device", "ide-hd,id=disk,drive=node,bus=bus.0"),
    "nvme": ("-device", "nvme,id=disk,serial=1,drive=node"),
}


@pytest.mark.parametrize("kind", DEVICES)
def test_every_kind_of_disk_of_a_guest(kind: str, three_layers: Path, folder: Path) -> None:
    top = folder / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", three_layers / "mid.qcow2", "-F", "qcow2", top)
    qemu_io(top, "write 0 64k", "write -z 1M 64k")
    with qemu("-blockdev", blockdev(top, "node"), *DEVICES[kind]) as server:
        assert judged(server, "disk").verdict == "agreed"
        assert judged(server, "/machine/peripheral/disk").verdict == "agreed"
        report = validate(str(server.qmp))
    assert [(disk.name, disk.qom_path, disk.node_name) for disk in report.disks] == [
        ("disk", "/machine/peripheral/disk", "node")
    ]
    assert (report.guest, report.verdict) == ("prelaunch", "agreed")


def test_legacy_drives_and_relative_names(three_layers: Path, folder: Path) -> None:
    for name in ("base.raw", "mid.qcow2", "top.qcow2"):
        shutil.copy(three_layers / name, folder)
    drives = ["-drive", "if=virtio,file=top.qcow2,format=qcow2", "-drive", "if=none,id=free,file=base.raw,format=raw"]
    drives[-1] += ",read-only=on,file.locking=off"
    with qemu(*drives, cwd=folder) as server:
        report = validate(str(server.qmp))
    assert report.verdict == "agreed"
    assert [disk.layers[0].file for disk in report.disks] == [str(folder / "top.qcow2")]


def cleared(path: Path, guest_offset: int) -> None:
    """Clears the L2 entry of a guest cluster, in an image of one L2 table and 64 KiB clusters."""
    with path.open("r+b") as file:
        file.seek(40)
        file.seek(int.from_bytes(file.read(8), "big"))
        table = int.from_bytes(file.read(8), "big") & 0x00FFFFFFFFFFFE00
        file.seek(table + guest_offset // 65536 * 8)
        assert int.from_bytes(file.read(8), "big") & 0x00FFFFFFFFFFFE00
        file.seek(table + guest_offset // 65536 * 8)
        file.write(bytes(8))


@pytest.fixture
def copies(three_layers: Path, folder: Path) -> Path:
    for name in ("base.raw", "mid.qcow2", "top.qcow2"):
        shutil.copy(three_layers / name, folder)
    return folder


def test_a_spoilt_entry_is_found_named_and_explained(empty_daemon: Server, copies: Path) -> None:
    with added(empty_daemon, image(copies / "top.qcow2", "top")):
        assert judged(empty_daemon, "top").verdict == "agreed"  # QEMU has read the tables now
        cleared(copies / "mid.qcow2", 0x110000)
        report = judged(empty_daemon, "top")
    assert (report.verdict, report.rounds, report.set_aside_bytes) == ("discrepancy", 2, 0)
    assert (report.compared[0].discrepancy_count, report.compared[0].discrepancy_bytes) == (1, 65536)  # of the depth
    found = report.discrepancies[0]
    assert (found.offset, found.end, found.served, found.computed) == (0x110000, 0x120000, 2, 3)
    assert found.file == str(copies / "base.raw")
    assert [step.file for step in found.why] == [str(copies / f"{n}") for n in ("top.qcow2", "mid.qcow2", "base.raw")]
    assert re.search(r"L2 entry at byte 0x\w+ is 0x0{16}: not allocated", found.why[1].read)


def test_only_so_many_discrepancies_are_listed_but_all_are_counted(empty_daemon: Server, copies: Path) -> None:
    with added(empty_daemon, image(copies / "top.qcow2", "top")):
        judged(empty_daemon, "top")
        for cluster in range(16, 32, 2):
            cleared(copies / "mid.qcow2", cluster * 65536)
        report = judged(empty_daemon, "top", Options(listed=3, choice=Choice(base=False, content="none")))
    assert (report.discrepancy_count, report.discrepancy_bytes, len(report.discrepancies)) == (8, 8 * 65536, 3)


def test_another_size_in_the_file_is_a_discrepancy(empty_daemon: Server, copies: Path) -> None:
    with added(empty_daemon, image(copies / "top.qcow2", "top")):
        with (copies / "top.qcow2").open("r+b") as file:
            file.seek(24)
            file.write((8 << 20).to_bytes(8, "big"))
        report = judged(empty_daemon, "top")
    assert (report.verdict, report.size, report.computed_size) == ("discrepancy", 16 << 20, 8 << 20)


def test_a_disk_that_is_written_all_the_time_is_never_accused(copies: Path) -> None:
    uri = f"nbd+unix:///?socket={copies}/guest"
    with storage_daemon("--blockdev", blockdev(copies / "top.qcow2", "top", discard="unmap")) as server:
        with writing(server, copies / "guest", 16 << 20):
            for _ in range(8):
                report = judged(server, "top", Options(nbd=uri))
                assert report.verdict in ("agreed", "incomplete")
                assert report.discrepancy_count == 0
                assert report.set_aside_bytes < report.size // 2
        assert judged(server, "top").verdict == "agreed"


def test_faults_are_found_on_a_disk_that_is_written_all_the_time(copies: Path) -> None:
    uri = f"nbd+unix:///?socket={copies}/guest"
    with storage_daemon("--blockdev", blockdev(copies / "top.qcow2", "top", discard="unmap")) as server:
        judged(server, "top")
        cleared(copies / "mid.qcow2", 0x1F0000)
        with writing(server, copies / "guest", 1 << 20):
            report = judged(server, "top", Options(nbd=uri))
    found = [(each.offset, each.end) for each in report.discrepancies if each.compared == "qemu:allocation-depth"]
    assert found == [(0x1F0000, 0x200000)]


def test_an_image_that_lags_behind_is_flushed_first(copies: Path) -> None:
    """QEMU keeps new table entries in memory until a flush; without one this would be a discrepancy."""
    uri = f"nbd+unix:///?socket={copies}/guest"
    with storage_daemon("--blockdev", blockdev(copies / "top.qcow2", "top")) as server:
        server.side("nbd-server-start", addr={"type": "unix", "data": {"path": str(copies / "guest")}})
        server.side("block-export-add", type="nbd", id="guest", node_name="top", name="guest", writable=True)
        with written_and_not_flushed(f"nbd+unix:///guest?socket={copies}/guest", "write 5M 64k"):
            report = judged(server, "top", Options(nbd=uri))
    assert (report.verdict, report.rounds) == ("agreed", 1)


def test_a_server_that_runs_is_shared_on_request_only(empty_daemon: Server, three_layers: Path, folder: Path) -> None:
    with added(empty_daemon, image(three_layers / "top.qcow2", "top")):
        empty_daemon.side("nbd-server-start", addr={"type": "unix", "data": {"path": str(folder / "theirs")}})
        try:
            with pytest.raises(ServerBusyError, match="--nbd"):
                judged(empty_daemon, "top")
            with pytest.raises(NbdConnectError):
                judged(empty_daemon, "top", Options(nbd=f"nbd+unix:///?socket={folder}/nothing"))
            report = judged(empty_daemon, "top", Options(nbd=f"nbd+unix:///?socket={folder}/theirs"))
            assert report.verdict == "agreed"
        finally:
            empty_daemon.side("nbd-server-stop")


def test_a_server_of_another_qemu_does_not_know_our_export(
    empty_daemon: Server, three_layers: Path, folder: Path
) -> None:
    with storage_daemon("--nbd-server", f"addr.type=unix,addr.path={folder}/other"):
        empty_daemon.side("nbd-server-start", addr={"type": "unix", "data": {"path": str(folder / "theirs")}})
        try:
            with added(empty_daemon, image(three_layers / "top.qcow2", "top")), pytest.raises(NbdRefusedError):
                judged(empty_daemon, "top", Options(nbd=f"nbd+unix:///?socket={folder}/other"))
        finally:
            empty_daemon.side("nbd-server-stop")


def spoil(path: Path, how: str) -> None:
    match how:
        case "missing":
            path.unlink()
        case "directory":
            path.unlink()
            path.mkdir()
        case "cut in the header":
            path.write_bytes(path.read_bytes()[:50])
        case "cut in the tables":
            path.write_bytes(path.read_bytes()[: 3 << 16])
        case "another format":
            path.write_bytes(b"KDMV" + bytes(1020))
        case "an unknown feature":
            with path.open("r+b") as file:
                file.seek(72)
                file.write((1 << 40).to_bytes(8, "big"))
        case "an unaligned table":
            with path.open("r+b") as file:
                file.seek(40)
                file.seek(int.from_bytes(file.read(8), "big"))
                file.write((0x8000000000000200).to_bytes(8, "big"))


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("missing", ImageMissingError),
        ("directory", ImageUnreadableError),
        ("cut in the header", ImageTruncatedError),
        ("cut in the tables", ImageTruncatedError),
        ("another format", ImageUnsupportedError),
        ("an unknown feature", ImageUnsupportedError),
        ("an unaligned table", ImageCorruptError),
    ],
)
def test_an_image_spoilt_under_qemu(empty_daemon: Server, copies: Path, how: str, error: type[QmpnbdError]) -> None:
    with added(empty_daemon, image(copies / "top.qcow2", "top")):
        spoil(copies / "mid.qcow2", how)
        with pytest.raises(error) as caught:
            judged(empty_daemon, "top")
    assert str(copies / "mid.qcow2") in caught.value.where
    assert caught.value.remedy


def test_disks_without_local_files_and_graphs_that_hide_layers(empty_daemon: Server, three_layers: Path) -> None:
    raw_over_qcow2 = {"driver": "raw", "node-name": "raw", "read-only": True, "file": "top"}
    null: dict[str, object] = {"driver": "null-co", "node-name": "null", "size": 65536, "read-zeroes": True}
    with added(empty_daemon, image(three_layers / "top.qcow2", "top"), raw_over_qcow2, null):
        with pytest.raises(GraphUnsupportedError, match="hidden"):
            judged(empty_daemon, "raw")
        with pytest.raises(DiskNotLocalError, match="null-co"):
            judged(empty_daemon, "null")
        with pytest.raises(NoSuchDiskError, match=r"nodes without a device: (raw, null|null, raw)"):
            judged(empty_daemon, "nothing")
        with pytest.raises(NoSuchDiskError, match="no guest device"):
            validate(str(empty_daemon.qmp))


def test_several_disks_one_of_which_cannot_be_validated(three_layers: Path) -> None:
    nodes = ["-blockdev", blockdev(three_layers / "top.qcow2", "a", read_only=True)]
    nodes += ["-blockdev", '{"driver": "null-co", "node-name": "b", "size": 65536}']
    devices = ["-device", "virtio-blk-pci,id=d0,drive=a", "-device", "virtio-blk-pci,id=d1,drive=b"]
    with qemu(*nodes, *devices) as server:
        report = validate(str(server.qmp))
        assert (server.exports(), server.nbd_server_runs()) == ([], False)
    verdicts = {disk.name: (disk.verdict, disk.error and disk.error.exit_code) for disk in report.disks}
    assert verdicts == {"d0": ("agreed", None), "d1": ("error", 21)}
    assert report.verdict == "error"


def test_a_disk_in_an_iothread_of_an_unsafe_qemu(three_layers: Path) -> None:
    node = ["-object", "iothread,id=io", "-blockdev", blockdev(three_layers / "top.qcow2", "a", read_only=True)]
    with qemu(*node, "-device", "virtio-blk-pci,id=d0,drive=a,iothread=io") as server:
        unsafe = server.side("query-version")["qemu"]["major"] in (7, 8)
        if unsafe:
            with pytest.raises(UnsafeOperationError, match="--allow-iothread"):
                judged(server, "d0")
        # Our order of taking down is survived even by the unsafe ones.
        assert judged(server, "d0", Options(allow_iothread=True)).verdict == "agreed"
        assert server.side("query-status")["status"] == "prelaunch"
