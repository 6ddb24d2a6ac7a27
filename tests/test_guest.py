"""A real guest that writes all the time: it must agree, be left as it was, and survive whatever ends a validation."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmpnbd.qmp.planning import Wishes
from qmpnbd.validate.choice import Choice
from qmpnbd.validate.run import Options, validate
from tests.fleets import spoilt
from tests.qemu_versions import QemuBinaries, each_qemu
from tests.servers import Server, blockdev, qemu, qemu_img, qemu_io, wait_until
from tests.test_vm_images import PACKAGES, ROOT, guest

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        not (PACKAGES / "complete").exists(), reason="no kernel for a guest (scripts/setup demo fetches one)"
    ),
]


@contextlib.contextmanager
def running(disk: Path, *devices: str, program: str = "", write: str = "steady") -> Iterator[Server]:
    """Boots the guest on a disk that its node `top` serves; it goes on writing to it."""
    linux = guest.build(PACKAGES, ROOT / ".work/guest")
    words = f"{linux.append} qmpnbd.places=1048576,3145728 qmpnbd.write={write}"
    serial = disk.with_suffix(".serial")
    boot = ["-m", "192", "-kernel", str(linux.kernel), "-initrd", str(linux.initramfs), "-append", words]
    with qemu(*boot, "-serial", f"file:{serial}", *devices, program=program) as server:
        server.side("cont")
        wait_until(lambda: serial.exists() and guest.READY in serial.read_text(errors="replace"), "the guest", 90)
        yield server


def edges(server: Server) -> object:
    graph = server.side("x-debug-query-block-graph")
    names = {vertex["id"]: vertex["name"] for vertex in graph["nodes"]}
    return sorted((names[edge["parent"]], edge["name"], names[edge["child"]]) for edge in graph["edges"])


def test_a_writing_guest_agrees_and_sigterm_leaves_everything_as_it_was(three_layers: Path, folder: Path) -> None:
    disk = folder / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", three_layers / "mid.qcow2", "-F", "qcow2", disk, "64M")
    qemu_io(disk, "write 20M 1M", "discard 21M 1M", "write -z 30M 1M")
    with running(disk, "-blockdev", blockdev(disk, "top"), "-device", "virtio-blk-pci,id=vd0,drive=top") as server:
        before = edges(server)
        for _ in range(3):
            report = validate(str(server.qmp), ["vd0"])
            assert report.verdict in ("agreed", "incomplete")
            assert report.guest == "running"
            assert report.disks[0].discrepancy_count == 0
        command = [sys.executable, "-m", "qmpnbd", "validate", "--qmp", str(server.qmp), "vd0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
            wait_until(lambda: bool(server.exports()) or child.poll() is not None, "the export")
            child.terminate()
            child.communicate(timeout=30)
        assert child.returncode in (143, 0, 3)  # a disk this small may be done before the signal comes
        assert (server.exports(), server.nbd_server_runs(), edges(server)) == ([], False, before)
        assert server.side("query-status")["status"] == "running"


def written(server: Server) -> int:
    """Bytes that the guest has written to its disk so far."""
    (disk,) = server.side("query-blockstats")
    return int(disk["stats"]["wr_bytes"])


@each_qemu
def test_a_guest_that_writes_and_discards_as_hard_as_it_can_is_judged_nearly_whole(
    binaries: QemuBinaries, folder: Path
) -> None:
    """No pause, no discrepancy that is none, at least 99 % of the disk judged, and a fault is found all the same."""
    base, disk = folder / "base.qcow2", folder / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", base, "1G")
    qemu_io(base, "write -q -P 5 0 64M", "write -q -P 6 1020M 4M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", disk, "1G")
    devices = ["-blockdev", blockdev(disk, "top", discard="unmap"), "-device", "virtio-blk-pci,id=vd0,drive=top"]
    with running(disk, *devices, program=binaries.system, write="hard") as server:
        for _ in range(4):
            before = written(server)
            wait_until(lambda before=before: written(server) - before > 32 << 20, "the guest to write")  # type: ignore[misc]
            (report,) = validate(str(server.qmp), ["vd0"]).disks
            assert report.discrepancy_count == 0, report.discrepancies[:2]
            assert report.verdict in ("agreed", "incomplete")
            for entry in report.compared:
                assert entry.set_aside_bytes <= entry.bytes // 100, entry
        assert {entry.what for entry in report.compared} == {"qemu:allocation-depth", "base:allocation", "content"}
        spoilt(base, (1 << 30) - 65536)  # the last cluster, where the guest does not write
        (report,) = validate(str(server.qmp), ["vd0"]).disks
        assert server.side("query-status")["status"] == "running"
    depth = [each for each in report.discrepancies if each.compared == "qemu:allocation-depth"]
    assert [(each.offset, each.end) for each in depth] == [((1 << 30) - 65536, 1 << 30)]


@each_qemu
@pytest.mark.parametrize("at_instant", [False, True], ids=["as it goes on", "at one instant"])
def test_a_guest_whose_filesystem_is_trimmed_all_the_time_is_judged_nearly_whole(
    binaries: QemuBinaries, folder: Path, *, at_instant: bool
) -> None:
    """fstrim on a mounted filesystem with files that come and go: discards of many ranges, as guests make them."""
    base, disk = folder / "base.qcow2", folder / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", base, "256M")
    qemu_io(base, "write -q -P 5 0 128M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", disk, "256M")
    devices = ["-blockdev", blockdev(disk, "top", discard="unmap"), "-device", "virtio-blk-pci,id=vd0,drive=top"]
    choice = Options(instant=Wishes() if at_instant else None, choice=Choice(content="whole"))
    with running(disk, *devices, program=binaries.system, write="files") as server:
        serial = disk.with_suffix(".serial")

        def trims() -> int:
            return serial.read_text(errors="replace").count("qmpnbd-guest: trim")

        for _ in range(3):
            before = trims()
            wait_until(lambda before=before: trims() > before + 1, "the guest to trim", 60)  # type: ignore[misc]
            (report,) = validate(str(server.qmp), ["vd0"], choice).disks
            assert report.discrepancy_count == 0, report.discrepancies[:2]
            for entry in report.compared:
                assert entry.set_aside_bytes <= entry.bytes // 20, entry
        assert server.side("query-status")["status"] == "running"
    told = serial.read_text(errors="replace")
    assert "failed" not in told
    assert sum(map(int, re.findall(r"(\d+) bytes trimmed", told))) > 256 << 20


@pytest.fixture
def endless(folder: Path) -> Path:
    """A disk so large that reading its map takes seconds, in two layers."""
    large = ("create", "-q", "-f", "qcow2", "-o", "cluster_size=2M")
    qemu_img(*large, folder / "mid.qcow2", "512T")
    qemu_img(*large, "-b", "mid.qcow2", "-F", "qcow2", folder / "top.qcow2", "512T")
    return folder / "top.qcow2"


@pytest.mark.parametrize("end", ["signal", "timeout"])
def test_a_guest_in_an_iothread_survives_the_end_of_a_validation(endless: Path, end: str) -> None:
    """QEMU 7.2 aborts when an NBD client of such a disk leaves before its export."""
    file = {"driver": "file", "filename": str(endless.with_name("mid.qcow2"))}
    mid = json.dumps({"driver": "qcow2", "node-name": "mid", "read-only": True, "file": file})
    devices = ["-object", "iothread,id=io", "-blockdev", mid, "-blockdev", blockdev(endless, "top", backing="mid")]
    with running(endless, *devices, "-device", "virtio-blk-pci,id=vd0,drive=top,iothread=io") as server:
        command = [sys.executable, "-m", "qmpnbd", "validate", "--qmp", str(server.qmp), "--allow-iothread", "vd0"]
        timeout = ["--timeout", "2"] if end == "timeout" else []
        with subprocess.Popen([*command, *timeout], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
            wait_until(lambda: bool(server.exports()), "the export")
            if end == "signal":
                child.send_signal(signal.SIGTERM)
            _, complaints = child.communicate(timeout=60)
        assert child.returncode == (143 if end == "signal" else 50), complaints
        assert server.side("query-status")["status"] == "running"
        assert (server.exports(), server.nbd_server_runs()) == ([], False)
