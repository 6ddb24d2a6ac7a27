"""Servers that are wrong, each in a way that real ones can be: every fault must be found, named, and told where."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qmpnbd.extents import ExtentMap
from qmpnbd.images.files import open_chain
from qmpnbd.nbd.client import Client
from qmpnbd.nbd.constants import ALLOCATION_DEPTH, BASE_ALLOCATION, Option
from qmpnbd.nbd.limits import DEFAULT_LIMITS, Limits
from qmpnbd.nbd.messages import RequestHeader
from qmpnbd.report.contexts import CONTENT
from qmpnbd.report.model import ValidationReport
from qmpnbd.report.text import validation_text
from qmpnbd.validate.choice import Choice
from qmpnbd.validate.target import ImageTarget, ServedTarget
from tests.fleets import WHOLE, judged, spoilt, wrong
from tests.hostile_nbd import Script, To, pattern, serving
from tests.option_bytes import ack, meta
from tests.qemu_versions import QemuBinaries, each_qemu
from tests.servers import Server, blockdev, qemu_img, qemu_io, storage_daemon, tool

DEPTH, BASE, BITMAP = ALLOCATION_DEPTH, BASE_ALLOCATION, "qemu:dirty-bitmap:daily"
DEPTH_ONLY = Choice(base=False, bitmaps=False, content="none")


@pytest.fixture
def copies(three_layers: Path, folder: Path) -> Path:
    for name in ("base.raw", "mid.qcow2", "top.qcow2"):
        shutil.copy(three_layers / name, folder)
    return folder


@contextlib.contextmanager
def exported(server: Server, node: str, *bitmaps: str) -> Iterator[str]:
    """Exports a node of a storage daemon and yields the URI."""
    path = server.folder / "nbd"
    server.side("nbd-server-start", addr={"type": "unix", "data": {"path": str(path)}})
    more: dict[str, object] = {"bitmaps": list(bitmaps)} if bitmaps else {}
    server.side("block-export-add", type="nbd", id="x", node_name=node, name="x", allocation_depth=True, **more)
    try:
        yield f"nbd+unix:///x?socket={path}"
    finally:
        server.side("nbd-server-stop")


def served_maps(uri: str, context: str) -> None:
    """Has a server read its tables, so that it answers from its cache from then on."""
    subprocess.run([tool("nbdinfo"), f"--map={context}", uri], check=True, capture_output=True, timeout=60)


def lying(depth: int, content: int) -> Script:
    """A server that tells one depth for all, and holds a pattern but for 64 KiB from `content` on."""

    def status(request: RequestHeader, _: int) -> Iterable[bytes]:
        yield To(request).status(7, [(request.length, depth)])
        yield To(request).status(4, [(request.length, 0)], done=True)

    def read(request: RequestHeader, _: int) -> Iterable[bytes]:
        data = bytearray(pattern(request.offset, request.length))
        for offset in range(max(content, request.offset), min(content + 65536, request.offset + request.length)):
            data[offset - request.offset] ^= 0x20
        yield To(request).data(request.offset, bytes(data), done=True)

    offered = b"".join(meta(id_, name, Option.LIST_META_CONTEXT) for id_, name in ((0, DEPTH), (0, BASE)))
    options: dict[int, bytes] = {Option.LIST_META_CONTEXT: offered + ack(Option.LIST_META_CONTEXT)}
    return Script(size=1 << 20, answer=status, read=read, options=options)


def test_a_server_that_invents_what_it_says(folder: Path) -> None:
    image = folder / "disk.raw"
    image.write_bytes(pattern(0, 1 << 20))
    with serving(folder, lying(depth=1, content=1 << 20)) as uri:
        assert judged(ServedTarget(uri, str(image), "raw")).verdict == "agreed"
    with serving(folder, lying(depth=3, content=192 << 10)) as uri:
        disk = judged(ServedTarget(uri, str(image), "raw"))
    assert disk.verdict == "discrepancy"
    assert wrong(disk) == {DEPTH: 1 << 20, "content": 65536}
    first, second = disk.discrepancies
    assert (first.compared, first.offset, first.end, first.served, first.computed) == (DEPTH, 0, 1 << 20, 3, 1)
    assert (second.compared, second.offset, second.end) == ("content", 192 << 10, 256 << 10)
    assert (second.served ^ 0x20) == second.computed
    assert second.served_sha256 != second.computed_sha256


def filtered(copies: Path) -> list[str]:
    throttle = {"driver": "throttle", "node-name": "slow", "throttle-group": "none", "file": "top"}
    top = blockdev(copies / "top.qcow2", "top", read_only=True)
    return ["--object", "throttle-group,id=none", "--blockdev", top, "--blockdev", json.dumps(throttle)]


@pytest.mark.real
@each_qemu
def test_a_filter_that_shifts_the_depth_of_the_lower_layers(binaries: QemuBinaries, copies: Path) -> None:
    with binaries.daemon(*filtered(copies)) as server, exported(server, "slow") as uri:
        disk = judged(ServedTarget(uri, str(copies / "top.qcow2")))
    assert disk.verdict == "discrepancy"
    assert set(wrong(disk)) == {DEPTH}
    pairs = {(each.served, each.computed) for each in disk.discrepancies}
    assert pairs == {(3, 2), (4, 3)}


@pytest.mark.real
def test_only_a_daemon_of_ours_is_asked_one_thing_at_a_time(copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answer of a server elsewhere may have a long way."""
    asked: list[int] = []
    maps = Client.maps

    def recorded(self: Client, *arguments: Any, limits: Limits | None, **more: Any) -> dict[str, ExtentMap]:
        asked.append((limits or DEFAULT_LIMITS).in_flight)
        return maps(self, *arguments, limits=limits, **more)

    monkeypatch.setattr(Client, "maps", recorded)
    image = str(copies / "top.qcow2")
    top = blockdev(copies / "top.qcow2", "top", read_only=True)
    with storage_daemon("--blockdev", top) as server, exported(server, "top") as uri:
        assert judged(ServedTarget(uri, image)).verdict == "agreed"
    assert judged(ImageTarget(image)).verdict == "agreed"
    assert asked == [DEFAULT_LIMITS.in_flight, 1]


def windowed(copies: Path) -> list[str]:
    window = {"driver": "raw", "node-name": "window", "read-only": True, "file": "top"}
    return ["--blockdev", blockdev(copies / "top.qcow2", "top", read_only=True), "--blockdev", json.dumps(window)]


@pytest.mark.real
@each_qemu
def test_a_raw_window_that_hides_the_backing_chain(binaries: QemuBinaries, copies: Path) -> None:
    with binaries.daemon(*windowed(copies)) as server, exported(server, "window") as uri:
        disk = judged(ServedTarget(uri, str(copies / "top.qcow2")))
    assert disk.verdict == "discrepancy"
    assert {(each.served, each.computed) for each in disk.discrepancies if each.compared == DEPTH} == {(0, 2), (0, 3)}
    assert "content" not in wrong(disk)


@pytest.mark.real
@each_qemu
def test_an_l2_entry_that_was_spoilt_behind_its_back(binaries: QemuBinaries, copies: Path) -> None:
    top = copies / "top.qcow2"
    with (
        binaries.daemon("--blockdev", blockdev(top, "top", read_only=True)) as server,
        exported(server, "top") as uri,
    ):
        served_maps(uri, DEPTH)
        spoilt(top, 12 << 20)
        disk = judged(ServedTarget(uri, str(top)))
    assert wrong(disk) == {DEPTH: 65536, BASE: 65536, "content": 65536}
    first = disk.discrepancies[0]
    assert (first.offset, first.served, first.computed) == (12 << 20, 1, 3)
    assert first.why
    assert "L2 entry" in first.why[0].read


@pytest.mark.real
@each_qemu
def test_a_bitmap_that_was_cleared_behind_its_back(binaries: QemuBinaries, copies: Path) -> None:
    top = copies / "top.qcow2"
    qemu_img("bitmap", "--add", top, "daily")
    qemu_io(top, "write -P 9 2M 128k")
    file = {"driver": "file", "filename": str(top), "locking": "off"}
    node = json.dumps({"driver": "qcow2", "node-name": "top", "read-only": True, "file": file})
    with binaries.daemon("--blockdev", node) as server, exported(server, "top", "daily") as uri:
        agreed = judged(ServedTarget(uri, str(top)))
        qemu_img("bitmap", "--clear", top, "daily")
        disk = judged(ServedTarget(uri, str(top)))
    assert agreed.verdict == "agreed"
    assert BITMAP in [entry.what for entry in agreed.compared]
    assert wrong(disk) == {BITMAP: 128 << 10}
    (found,) = disk.discrepancies
    assert (found.compared, found.offset, found.served, found.computed) == (BITMAP, 2 << 20, 1, 0)


def snapshot_access(binaries: QemuBinaries, disk: Path) -> list[str]:
    scratch = disk.with_name("scratch.qcow2")
    subprocess.run([binaries.img, "create", "-q", "-f", "qcow2", scratch, "16M"], check=True, timeout=60)
    cbw = {"driver": "copy-before-write", "node-name": "cbw", "file": "disk", "target": "scratch"}
    access = {"driver": "snapshot-access", "node-name": "then", "file": "cbw"}
    nodes = [blockdev(disk, "disk"), blockdev(scratch, "scratch"), json.dumps(cbw), json.dumps(access)]
    return [word for node in nodes for word in ("--blockdev", node)]


@pytest.mark.real
@each_qemu
def test_snapshot_access_tells_depth_0_for_data_of_the_backing_files(binaries: QemuBinaries, copies: Path) -> None:
    """A client that skips depth 0 would lose that data. And before QEMU 8.0, zeroes that the guest writes show through.

    A read of more than the run that was copied takes its status from the live disk: a hole there is served as one.
    """
    if binaries.version < (7, 0, 0):
        pytest.skip("snapshot-access came with QEMU 7.0")
    then, now = copies / "top.qcow2", copies / "now.qcow2"
    shutil.copy(then, now)
    with binaries.daemon(*snapshot_access(binaries, now)) as server, exported(server, "then") as uri:
        server.side("block-export-add", type="nbd", id="guest", node_name="cbw", name="guest", writable=True)
        writes = [part for offset in range(0, 16, 2) for part in ("-c", f"write -q -P 2 {offset}M 64k")]
        writes += [part for offset in range(1, 16, 2) for part in ("-c", f"write -q -z {offset}M 64k")]
        guest = uri.replace("///x", "///guest")
        subprocess.run([binaries.io, "-f", "raw", *writes, guest], check=True, timeout=60)
        disk = judged(ServedTarget(uri, str(then)), Choice(base=False, bitmaps=False, content="whole"))
    assert disk.verdict == "discrepancy"
    assert set(wrong(disk)) == ({DEPTH} if binaries.version >= (8, 0, 0) else {DEPTH, CONTENT})
    depths = [each for each in disk.discrepancies if each.compared == DEPTH]
    assert {(each.served, each.computed) for each in depths} >= {(0, 2), (0, 3)}
    lost = [each for each in disk.discrepancies if each.compared == CONTENT]
    assert all((each.served, each.offset % (2 << 20)) == (0, 1 << 20) for each in lost), lost


@pytest.mark.real
def test_the_report_names_what_differs_and_both_sides(copies: Path) -> None:
    top = copies / "top.qcow2"
    with storage_daemon("--blockdev", blockdev(top, "top", read_only=True)) as server, exported(server, "top") as uri:
        served_maps(uri, DEPTH)
        spoilt(top, 12 << 20)
        disk = judged(ServedTarget(uri, str(top)))
    report = ValidationReport(monitor="", qemu="", guest="", started="", verdict=disk.verdict, disks=(disk,))
    text = validation_text(report)
    assert "[12582912, 12648448)  served depth 1 (local), computed 3 (backing depth 3)" in text
    assert "base:allocation: discrepancy" in text
    assert "[12582912, 12648448)  content, from byte 0x03 against 0x00 on" in text
    with open_chain(str(top)) as chain:
        assert chain.explain(12 << 20).steps[0].text in text


@pytest.mark.real
def test_a_sample_looks_at_both_sides_of_every_boundary(copies: Path) -> None:
    """Content that is wrong in the first cluster of a layer's run is found without reading everything."""
    top = copies / "top.qcow2"
    with storage_daemon("--blockdev", blockdev(top, "top", read_only=True)) as server, exported(server, "top") as uri:
        served_maps(uri, DEPTH)
        spoilt(top, 12 << 20)
        disk = judged(ServedTarget(uri, str(top)), Choice(base=False, bitmaps=False))
    assert set(wrong(disk)) == {DEPTH, "content"}
    _, content = disk.compared
    assert content.bytes < 1 << 20
    assert "all" in content.note


@pytest.mark.real
def test_what_is_switched_off_is_not_compared(copies: Path) -> None:
    with storage_daemon(*filtered(copies)) as server, exported(server, "slow") as uri:
        target = ServedTarget(uri, str(copies / "top.qcow2"))
        assert [entry.what for entry in judged(target, DEPTH_ONLY).compared] == [DEPTH]
        base = judged(target, Choice(depth=False, bitmaps=False, content="none"))
        assert ([entry.what for entry in base.compared], base.verdict) == ([BASE], "agreed")
        assert [entry.what for entry in judged(target, WHOLE).compared] == [DEPTH, BASE, "content"]
