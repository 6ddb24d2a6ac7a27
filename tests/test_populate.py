"""Filling bitmaps on real QEMUs: exactly the extents, rounded out, and nothing that the guest writes is lost."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmpnbd.control import populate as module
from qmpnbd.control.populate import Filling, ImageDifference, ListedExtents, Source, populate, populate_bitmap
from qmpnbd.control.ranges import DepthRange
from qmpnbd.errors import BitmapError, NoSuchDiskError, QmpnbdError, ServerBusyError, UsageError
from qmpnbd.nbd.aio import Client
from qmpnbd.qmp.naming import run_of
from tests.guestwrites import Range, Writer, bitmaps_of, dirty, rounded
from tests.qemu_versions import QemuBinaries, each_qemu
from tests.qmp_cutter import FAILURES, Failure, cutting
from tests.servers import Server, blockdev, qemu_img, qemu_io, storage_daemon

pytestmark = pytest.mark.real

KIB = 1 << 10
MIB = 1 << 20
SIZE = 64 * MIB


@pytest.fixture
def images(folder: Path) -> Path:
    """A base, a layer and an active layer, each holding something."""
    qemu_img("create", "-q", "-f", "raw", folder / "base.raw", "16M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", folder / "mid.qcow2", "64M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", folder / "top.qcow2", "64M")
    qemu_io(folder / "mid.qcow2", "write -P 1 20M 1M")
    qemu_io(folder / "top.qcow2", "write -P 2 30M 128k", "write -P 3 40000k 1k", "write -z 50M 64k")
    return folder


@pytest.fixture
def server(binaries: QemuBinaries, images: Path) -> Iterator[Server]:
    with binaries.qemu(
        "-blockdev", blockdev(images / "top.qcow2", "top"), "-device", "virtio-blk-pci,drive=top,id=vd0"
    ) as running:
        yield running


def fill(server: Server, source: Source, name: str = "filled", **options: object) -> module.Filled:
    chosen = {"runtime_dir": str(server.folder), **options}
    return populate(str(server.qmp), Filling("vd0", name, source, **chosen))  # type: ignore[arg-type]


def listed(*ranges: Range) -> ListedExtents:
    return ListedExtents(ranges, "a list")


def ours(server: Server) -> list[str]:
    """Everything in this QEMU that a run of ours made."""
    infos = server.side("query-named-block-nodes", flat=True)
    names = [info["node-name"] for info in infos]
    names += [bitmap["name"] for info in infos for bitmap in info.get("dirty-bitmaps", ()) if "name" in bitmap]
    return [name for name in [*names, *server.exports()] if run_of(name)]


def is_clean(server: Server) -> bool:
    """Whether nothing of ours is left, in QEMU or beside its sockets."""
    return not ours(server) and not server.nbd_server_runs() and not list(server.folder.glob("qmpnbd-*"))


TOP = [(30 * MIB, 30 * MIB + 128 * KIB), (40000 * KIB, 40000 * KIB + 64 * KIB), (50 * MIB, 50 * MIB + 64 * KIB)]


@each_qemu
def test_allocation_depth_becomes_a_bitmap(binaries: QemuBinaries, server: Server) -> None:
    filled = fill(server, DepthRange(1, 1))
    assert dirty(server, "top", ["filled"]) == TOP
    assert (filled.created, filled.extents, filled.bitmap.recording, filled.bitmap.persistent) == (True, 3, True, True)
    fill(server, DepthRange(2, 2), "lower")
    assert dirty(server, "top", ["lower"]) == [(20 * MIB, 21 * MIB)]
    assert is_clean(server)


@each_qemu
@pytest.mark.parametrize("granularity", [512, 4096, MIB])
def test_any_extents_are_marked_to_the_granule(binaries: QemuBinaries, server: Server, granularity: int) -> None:
    dice = random.Random(granularity)
    places = sorted(dice.sample(range(0, SIZE, 512), 400))
    ranges = [(place, min(place + dice.randrange(1, 3000), SIZE)) for place in places] + [(SIZE - 1, SIZE)]
    filled = fill(server, listed(*ranges), granularity=granularity)
    assert filled.bitmap.granularity == granularity
    assert dirty(server, "top", ["filled"]) == rounded(ranges, granularity)
    assert is_clean(server)


@each_qemu
def test_a_bitmap_that_exists_keeps_what_it_marks(binaries: QemuBinaries, server: Server) -> None:
    server.side("block-dirty-bitmap-add", node="top", name="mine", granularity=4096)
    writer = Writer(server, "vd0")
    writer.write(MIB, 512)
    filled = fill(server, listed((2 * MIB, 2 * MIB + 1)), "mine")
    assert (filled.created, filled.bitmap.granularity) == (False, 4096)
    writer.write(3 * MIB, 512)
    assert dirty(server, "top", ["mine"]) == rounded([*writer.written, (2 * MIB, 2 * MIB + 1)], 4096)


@each_qemu
@pytest.mark.parametrize("exists", [False, True])
def test_what_the_guest_writes_meanwhile_is_not_lost(
    binaries: QemuBinaries, server: Server, exists: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest writes before and after every step; what the depth no longer shows, a bitmap has recorded."""
    writer = Writer(server, "vd0")
    offsets = iter(range(0, 16 * MIB, 256 * KIB))
    steps = 0

    def wrote(name: str) -> None:
        original = getattr(module, name)

        async def stepped(*arguments: object, **more: object) -> object:
            nonlocal steps
            steps += 1
            writer.write(next(offsets), 512)
            result = await original(*arguments, **more)
            writer.write(next(offsets), 512)
            return result

        monkeypatch.setattr(module, name, stepped)

    for name in ("start_server", "open_window", "add_scratch", "add_export", "write_zeroes", "require_marked"):
        wrote(name)
    for name in ("add_bitmap", "transact"):
        wrote(name)
    if exists:
        server.side("block-dirty-bitmap-add", node="top", name="filled", granularity=65536)
    fill(server, DepthRange(1, 1))
    writer.write(next(offsets), 512)
    assert steps == (7 if exists else 8)
    assert dirty(server, "top", ["filled"]) == rounded([*TOP, *writer.written], 65536)


def test_a_hundred_thousand_extents(folder: Path) -> None:
    """Every other granule of a disk, so that none can be joined with the next."""
    node = json.dumps({"driver": "null-co", "node-name": "top", "size": 256 * MIB})
    ranges = [(place, place + 100) for place in range(0, 100_000 * KIB, KIB)]
    with storage_daemon("--blockdev", node) as server:
        filling = Filling("top", "filled", listed(*ranges), granularity=512, runtime_dir=str(server.folder))
        filled = populate(str(server.qmp), filling)
        assert (filled.extents, filled.bitmap.count) == (100_000, 100_000 * 512)
        assert dirty(server, "top", ["filled"]) == rounded(ranges, 512)


@each_qemu
@pytest.mark.parametrize("size", [512, MIB + 512, 3 * MIB - 512])
def test_a_disk_that_ends_within_a_granule(binaries: QemuBinaries, size: int) -> None:
    node = json.dumps({"driver": "null-co", "node-name": "top", "size": size})
    with binaries.daemon("--blockdev", node) as server:
        filling = Filling("top", "filled", listed((size - 1, size)), runtime_dir=str(server.folder))
        assert populate(str(server.qmp), filling).filled_bytes == size - (size - 1) // 65536 * 65536
        assert dirty(server, "top", ["filled"]) == [((size - 1) // 65536 * 65536, size)]
        assert is_clean(server)


def test_the_difference_of_two_images(server: Server, images: Path) -> None:
    for name in ("old", "new"):
        qemu_img("create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", images / f"{name}.qcow2", "64M")
    qemu_io(images / "old.qcow2", "write -P 1 0 1M", "write -P 5 8M 64k", "write -z 60M 1M")
    qemu_io(images / "new.qcow2", "write -P 1 0 1M", "write -P 6 8200k 1k", "write -z 20M 4k", "write -z 61M 1M")
    source = ImageDifference(str(images / "old.qcow2"), str(images / "new.qcow2"))
    fill(server, source, granularity=4096)
    expected = [(8 * MIB, 8 * MIB + 64 * KIB), (20 * MIB, 20 * MIB + 4096)]
    assert dirty(server, "top", ["filled"]) == expected
    fill(server, ImageDifference(source.first, source.first), "none")
    assert dirty(server, "top", ["none"]) == []
    qemu_img("create", "-q", "-f", "raw", images / "small.raw", "1M")
    with pytest.raises(UsageError, match="differ in size"):
        fill(server, ImageDifference(source.first, str(images / "small.raw")))
    assert is_clean(server)


@each_qemu
@pytest.mark.timeout(300)
@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_at_any_command_leaves_a_whole_bitmap_or_none(
    binaries: QemuBinaries, server: Server, failure: Failure
) -> None:
    """Whatever is lost in the middle: the bitmap is there and complete, or not there; the next run clears up."""
    for number in range(1, 100):
        name, before = f"filled{number}", set(ours(server))
        filling = Filling("vd0", name, DepthRange(1, 1), runtime_dir=str(server.folder))
        with cutting(server.qmp, number, failure) as (address, cutter):
            try:
                populate(address, filling)
            except QmpnbdError:
                assert cutter.happened
        if failure == "refused":  # the connection lasts: the run has cleared up itself, but for what was refused
            assert set(ours(server)) <= before or cutter.commands[number - 1] in TAKING_DOWN
        if not cutter.happened:
            break
        fill(server, listed(), "next")  # directly: through the seam, the process that answers is not QEMU
        assert server.exports() == []
        if name in bitmaps_of(server, "top"):
            assert dirty(server, "top", [name]) == TOP
    assert not cutter.happened
    assert number > 15
    assert dirty(server, "top", [name]) == TOP


TAKING_DOWN = {
    "block-export-del",
    "blockdev-del",
    "nbd-server-stop",
    "query-block-exports",
    "block-dirty-bitmap-remove",
    "qom-list",
    "object-del",
}


def test_cancelled_anywhere_nothing_is_left(server: Server) -> None:
    async def work() -> None:
        filling = Filling("vd0", "filled", DepthRange(1, 1), runtime_dir=str(server.folder))
        for step in range(40):
            task = asyncio.ensure_future(populate_bitmap(str(server.qmp), filling))
            await asyncio.sleep(step * 0.002)
            task.cancel()
            await asyncio.wait({task})
            assert is_clean(server)

    asyncio.run(work())


def test_writes_of_others_to_our_node_are_noticed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    original = module.write_zeroes

    async def too_much(client: Client, ranges: object, deadline: object) -> None:
        await original(client, ranges, deadline)  # type: ignore[arg-type]
        await client.write_zeroes(0, 512)

    monkeypatch.setattr(module, "write_zeroes", too_much)
    with pytest.raises(BitmapError, match=r"marked 131072 bytes where 65536.*Nothing was merged"):
        fill(server, listed((MIB, MIB + 1)))
    assert is_clean(server)
    assert bitmaps_of(server, "top") == {}


def test_a_server_that_runs_already_is_shared_and_left(server: Server) -> None:
    path = server.folder / "theirs"
    server.side("nbd-server-start", addr={"type": "unix", "data": {"path": str(path)}})
    with pytest.raises(ServerBusyError):
        fill(server, DepthRange(1, 1))
    fill(server, DepthRange(1, 1), nbd=f"nbd+unix:///?socket={path}")
    assert ours(server) == []
    assert server.nbd_server_runs()


def test_what_cannot_be_filled_is_refused(server: Server) -> None:
    server.side("block-dirty-bitmap-add", node="top", name="mine", granularity=4096)
    with pytest.raises(BitmapError, match="has the granularity 4096"):
        fill(server, listed(), "mine", granularity=512)
    with pytest.raises(UsageError, match="outside a disk of 67108864"):
        fill(server, listed((SIZE, SIZE + 1)))
    for wrong in ("", "x" * 1024, "qmpnbd-01234567-b0"):
        with pytest.raises(UsageError, match="not a name"):
            fill(server, listed(), wrong)
    with pytest.raises(NoSuchDiskError):
        populate(str(server.qmp), Filling("vd7", "x", listed()))
    server.side("block-dirty-bitmap-disable", node="top", name="mine")
    server.side("nbd-server-start", addr={"type": "unix", "data": {"path": str(server.folder / "theirs")}})
    server.side("block-export-add", type="nbd", id="read", node_name="top", bitmaps=["mine"])
    with pytest.raises(BitmapError, match="in use"):
        fill(server, listed(), "mine")


def test_the_command_line(server: Server, images: Path) -> None:
    command = [sys.executable, "-m", "qmpnbd", "bitmap", "populate", "--qmp", str(server.qmp), "--disk", "vd0"]
    command += ["--runtime-dir", str(server.folder)]
    text = '[{"offset": 0, "length": 1}]'
    done = subprocess.run(
        [*command, "--name", "a", "--extents", "-", "--json"], input=text, capture_output=True, text=True, check=True
    )
    told = json.loads(done.stdout)
    assert (told["schema"], told["extents"], told["dirty_bytes"]) == ("qmpnbd.populate/1", 1, 65536)
    done = subprocess.run([*command, "--name", "b", "--from-depth", "1.."], capture_output=True, text=True, check=True)
    assert "from depth 1.." in done.stdout
    assert "made, recording, persistent, granularity 64 KiB" in done.stdout
    broken = subprocess.run([*command, "--name", "c", "--from-depth", "x"], capture_output=True, text=True, check=False)
    assert broken.returncode == 2


def test_after_kill_9_the_next_run_clears_up(server: Server) -> None:
    command = [sys.executable, "-c", KILLED, str(server.qmp), str(server.folder)]
    assert subprocess.run(command, check=False, timeout=60).returncode == -9
    assert ours(server)
    assert "filled" not in bitmaps_of(server, "top")
    fill(server, DepthRange(1, 1))
    assert dirty(server, "top", ["filled"]) == TOP


KILLED = """
import os, sys
from qmpnbd.control import populate as module
from qmpnbd.control.ranges import DepthRange

async def killed(*_):
    os.kill(os.getpid(), 9)

module.write_zeroes = killed
module.populate(sys.argv[1], module.Filling("vd0", "filled", DepthRange(1, 1), runtime_dir=sys.argv[2]))
"""
