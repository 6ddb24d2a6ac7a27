"""Validation at a point in time: a disk that is written all the time is judged whole, and faults are found."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpnbd.deadline import Deadline
from qmpnbd.extents import ExtentMap
from qmpnbd.images.chain import LayerSpec
from qmpnbd.images.files import open_chain, open_layers
from qmpnbd.images.layers import Chain
from qmpnbd.images.mapentries import Generation
from qmpnbd.nbd.aio import Client
from qmpnbd.qmp.models import VersionInfo
from qmpnbd.qmp.plan import Recipe
from qmpnbd.report.model import DiskReport
from qmpnbd.report.text import disk_text
from qmpnbd.validate import instant, instant_run
from qmpnbd.validate.changes import Blocks, block_size, misses
from qmpnbd.validate.choice import Choice
from qmpnbd.validate.compare import MapFinding
from qmpnbd.validate.instant import InstantDisk
from qmpnbd.validate.reading import Reading, read_chain
from qmpnbd.validate.releases import base_refusal
from qmpnbd.validate.run import Options, validate
from tests.dying import wishes_for
from tests.fleets import overwritten, spoilt
from tests.instants import DISCARDS, SIZE, UNIT, WRITES, Machine, commands, machine
from tests.qemu_versions import QemuBinaries, each_qemu
from tests.servers import Server, blockdev, qemu_img, qemu_io, wait_until
from tests.test_guest import running as booted
from tests.test_guest import written
from tests.test_pointintime_guest import needs_a_kernel

pytestmark = pytest.mark.real

RECIPES = list(Recipe)
DAILY, OTHER = "qemu:dirty-bitmap:daily", "qemu:dirty-bitmap:other"


def told(disk: DiskReport) -> dict[str, str]:
    return {entry.what: entry.verdict for entry in disk.compared}


def emptied(image: Path) -> None:
    """Clears the stored bitmap `daily`, which QEMU has read already: the entry of its table says 'all zeroes'."""
    with open_chain(str(image), format="qcow2") as chain:
        (table,) = (each.table_offset for each in chain.bitmaps(0) if each.name == "daily")
    overwritten(image, table, bytes(8))


@pytest.fixture
def in_between(monkeypatch: pytest.MonkeyPatch) -> Callable[[Machine], None]:
    """Writes, zeroes and discards at random places of all disks each time before and after files are looked at.

    A write of the monitor's is waited for, so it falls between what is done over NBD, which a guest's need not.
    """

    def begin(running: Machine) -> None:
        seeds = count(1000)

        def write() -> None:
            for number in range(len(running.images)):
                running.write(number, *commands(next(seeds), 4, WRITES + DISCARDS), "flush")

        def open_later(specs: Sequence[LayerSpec], *, deadline: Deadline) -> Chain:
            write()
            return open_layers(specs, deadline=deadline)

        def read(specs: Sequence[LayerSpec], deadline: Deadline, generation: Generation | None) -> Reading:
            write()
            try:
                return read_chain(specs, deadline, generation)
            finally:
                write()

        monkeypatch.setattr(instant, "open_layers", open_later)
        monkeypatch.setattr(instant, "read_chain", read)

    return begin


@each_qemu
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_disk_that_is_written_all_the_time_is_judged_whole(
    binaries: QemuBinaries, recipe: Recipe, folder: Path, in_between: Callable[[Machine], None]
) -> None:
    """Not judged is only what the guest wrote both between the first look and the instant, and since: of maps alone."""
    options = Options(instant=wishes_for(recipe, folder), choice=Choice(content="whole"))
    with machine(binaries, folder, discard="unmap") as running:
        before = running.state()
        for disk in validate(str(running.server.qmp), [], options).disks:
            assert (disk.verdict, disk.set_aside_bytes) == ("agreed", 0), disk
        in_between(running)
        verdicts = set()
        for _ in range(3):
            for disk in validate(str(running.server.qmp), [], options).disks:
                assert disk.discrepancy_count == 0, disk.discrepancies[:3]
                assert disk.files_verified
                compared = {entry.what: entry for entry in disk.compared}
                assert set(compared) == {"qemu:allocation-depth", "base:allocation", "content"}
                assert (compared["content"].verdict, compared["content"].set_aside_bytes) == ("agreed", 0)
                verdicts.add(disk.verdict)
        assert ("incomplete" in verdicts) == (recipe is not Recipe.SNAPSHOT)
        assert running.state() == before


def changed_at_most(server: Server) -> int:
    """Bytes of the clusters that the guest has written or discarded so far, counted each time."""
    (disk,) = server.side("query-blockstats")
    stats = disk["stats"]
    edges = (stats["wr_operations"] + stats["unmap_operations"]) * 2 * UNIT
    return int(stats["wr_bytes"] + stats["unmap_bytes"] + edges)


@needs_a_kernel
@each_qemu
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_guest_that_writes_and_discards_as_hard_as_it_can_is_judged_whole(
    binaries: QemuBinaries, recipe: Recipe, folder: Path
) -> None:
    """Set aside is at most what it wrote twice: between the first look and the instant, and since."""
    base, disk = folder / "base.qcow2", folder / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", base, "256M")
    qemu_io(base, "write -q -P 5 0 64M", "write -q -P 6 252M 4M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", disk, "256M")
    devices = ["-blockdev", blockdev(disk, "top", discard="unmap"), "-device", "virtio-blk-pci,id=vd0,drive=top"]
    options = Options(instant=wishes_for(recipe, folder), choice=Choice(content="whole"))
    with booted(disk, *devices, program=binaries.system, write="hard") as server:
        for _ in range(2):
            before = written(server)
            wait_until(lambda before=before: written(server) - before > 32 << 20, "the guest to write")  # type: ignore[misc]
            before = changed_at_most(server)
            (report,) = validate(str(server.qmp), ["vd0"], options).disks
            twice = (changed_at_most(server) - before) // 2
            assert report.discrepancy_count == 0, report.discrepancies[:3]
            for entry in report.compared:
                told = recipe is Recipe.SNAPSHOT or entry.what == "content"
                assert entry.set_aside_bytes <= (0 if told else twice), entry
        assert server.side("query-status")["status"] == "running"


@each_qemu
@pytest.mark.parametrize("recipe", RECIPES)
def test_an_entry_that_was_spoilt_behind_qemus_back_is_found(
    binaries: QemuBinaries, recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot makes QEMU read its tables anew, so there it is spoilt later: just before our look at the file."""

    def spoilt_first(specs: Sequence[LayerSpec], deadline: Deadline, generation: Generation | None) -> Reading:
        spoilt(running.images[0], 4 << 20)
        return read_chain(specs, deadline, generation)

    options = Options(instant=wishes_for(recipe, folder), choice=Choice(content="whole"))
    with machine(binaries, folder, disks=1, layers=1) as running:
        running.write(0, "write -P 7 4M 128k", "flush")
        assert validate(str(running.server.qmp), ["vd0"], options).verdict == "agreed"
        monkeypatch.setattr(instant, "read_chain", spoilt_first)
        (disk,) = validate(str(running.server.qmp), ["vd0"], options).disks
    assert disk.verdict == "discrepancy"
    found = {each.compared: (each.offset, each.end) for each in disk.discrepancies}
    expected = (4 << 20, (4 << 20) + UNIT)
    assert found == dict.fromkeys(("qemu:allocation-depth", "base:allocation", "content"), expected)


@each_qemu
def test_stored_bitmaps_are_compared_where_the_image_stands_still(
    binaries: QemuBinaries, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU stores them when the snapshot makes the image read-only; one that is cleared in the file then is found."""
    options = Options(instant=wishes_for(Recipe.SNAPSHOT, folder))
    compare = InstantDisk._persistent

    async def cleared(disk: InstantDisk, client: Client, specs: Sequence[LayerSpec], name: str) -> MapFinding:
        if name == "daily":
            emptied(running.images[0])
        return await compare(disk, client, specs, name)

    with machine(binaries, folder, disks=1) as running:
        for name in ("daily", "other"):
            running.server.side("block-dirty-bitmap-add", node="disk0", name=name, persistent=True)
        running.server.side("block-dirty-bitmap-add", node="disk0", name="transient")
        running.write(0, "write -P 9 2M 128k")
        (disk,) = validate(str(running.server.qmp), ["vd0"], options).disks
        assert told(disk)[DAILY] == told(disk)[OTHER] == "agreed"
        assert disk.verdict == "agreed"
        monkeypatch.setattr(InstantDisk, "_persistent", cleared)
        (disk,) = validate(str(running.server.qmp), ["vd0"], options).disks
    assert (told(disk)[DAILY], told(disk)[OTHER], disk.verdict) == ("discrepancy", "agreed", "discrepancy")
    assert [(each.offset, each.end, each.served) for each in disk.discrepancies] == [(2 << 20, (2 << 20) + 2 * UNIT, 1)]


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Does something between the two points in time, in place of waiting."""

    def begin(work: Callable[[], None]) -> None:
        async def between(_run: instant_run._Run, _seconds: float) -> None:
            work()

        monkeypatch.setattr(instant_run._Run, "_sleep", between)

    return begin


@each_qemu
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_bitmap_holds_what_changed_between_two_points_in_time(
    binaries: QemuBinaries, recipe: Recipe, folder: Path, meanwhile: Callable[[Callable[[], None]], None]
) -> None:
    """Also where it is in memory only, is finer than what is compared, or was dirty before."""
    options = Options(instant=wishes_for(recipe, folder), change_seconds=1)
    with machine(binaries, folder, discard="unmap") as running:
        for name, size in (("daily", UNIT), ("other", 4096), ("stopped", UNIT)):
            running.server.side("block-dirty-bitmap-add", node="disk0", name=name, granularity=size)
        running.server.side("block-dirty-bitmap-disable", node="disk0", name="stopped")
        running.write(0, *commands(500, 5))
        before = running.state()
        meanwhile(lambda: running.write(0, *commands(501, 10, WRITES + DISCARDS)))
        first, second = validate(str(running.server.qmp), [], options).disks
        assert running.state() == before
    assert {name: told(first)[name] for name in (DAILY, OTHER)} == {DAILY: "agreed", OTHER: "agreed"}
    assert first.verdict == "agreed"
    assert "qemu:dirty-bitmap:stopped" not in told(first)
    assert (told(second)["bitmaps"], second.verdict) == ("not-judged", "incomplete")


@each_qemu
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_bitmap_that_misses_a_change_is_found_and_named(
    binaries: QemuBinaries, recipe: Recipe, folder: Path, meanwhile: Callable[[Callable[[], None]], None]
) -> None:
    options = Options(instant=wishes_for(recipe, folder), change_seconds=1)
    with machine(binaries, folder, disks=1) as running:
        for name in ("daily", "other"):
            running.server.side("block-dirty-bitmap-add", node="disk0", name=name)

        def broken() -> None:
            running.write(0, "write -P 238 1M 128k")
            running.server.side("block-dirty-bitmap-clear", node="disk0", name="daily")
            running.write(0, "write -P 239 4M 64k")

        meanwhile(broken)
        (disk,) = validate(str(running.server.qmp), ["vd0"], options).disks
        assert (told(disk)[DAILY], told(disk)[OTHER], disk.verdict) == ("discrepancy", "agreed", "discrepancy")
        (found,) = disk.discrepancies
        assert (found.finding, found.compared) == ("bitmap-misses-change", DAILY)
        assert (found.offset, found.end, found.served, found.computed) == (1 << 20, (1 << 20) + 2 * UNIT, 0, 1)
        text = disk_text(disk)
        assert "[1048576, 1179648)  bitmap-misses-change: changed, and clean in qemu:dirty-bitmap:daily" in text

        running.server.side("block-dirty-bitmap-remove", node="disk0", name="daily")
        meanwhile(lambda: running.server.side("block_resize", node_name="disk0", size=SIZE + UNIT))
        (disk,) = validate(str(running.server.qmp), ["vd0"], options).disks
        assert disk.verdict == "incomplete"
        assert f"bitmaps: not judged (the disk had {SIZE} bytes at the earlier point in time" in disk_text(disk)

        meanwhile(lambda: running.server.side("block-dirty-bitmap-disable", node="disk0", name="other"))
        (disk,) = validate(str(running.server.qmp), ["vd0"], options).disks
        assert disk.verdict == "incomplete"
        assert "other did not record all the time" in disk_text(disk)


@given(st.data())
def test_blocks_that_differ_and_bits_that_are_missing(data: st.DataObject) -> None:
    """Against a byte-by-byte reckoning, also where the disk ends inside a block and blocks are coarser than bits."""
    size, unit = data.draw(st.integers(1, 2000)), data.draw(st.sampled_from((64, 256)))
    block = data.draw(st.sampled_from((64, 128, 256)))
    old = bytearray(size)
    new = bytearray(old)
    for place in data.draw(st.lists(st.integers(0, size - 1), max_size=6)):
        new[place] ^= 1
    marked = data.draw(st.sets(st.integers(0, (size - 1) // unit), max_size=6))
    first, second = Blocks(size, block), Blocks(size, block)
    for blocks, content in ((first, old), (second, new)):
        for start in range(0, size, 4 * block):
            blocks.add(start, memoryview(content)[start : start + 4 * block])
    dirty = ExtentMap.of_lengths(
        [min(unit, size - start) for start in range(0, size, unit)],
        [int(start // unit in marked) for start in range(0, size, unit)],
    )
    found = misses("x", first.changed(second), dirty, block, "")
    assert found.comparison is not None
    missed = {byte for each in found.comparison.discrepancies() for byte in range(each.offset, each.end)}
    expected = set()
    for start in range(0, size, block):
        inside = range(start, min(start + block, size))
        if old[start : start + block] != new[start : start + block] and not any(at // unit in marked for at in inside):
            expected |= set(inside)
    assert missed == expected


def test_blocks_are_as_fine_as_the_bitmap_unless_there_were_too_many() -> None:
    assert block_size(1 << 40, 65536) == 65536
    assert block_size(1 << 42, 65536) == 4 * 65536
    assert block_size(1 << 30, 4096) == 4096
    assert block_size(1 << 30, 1 << 30) == 256 << 10


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "qmpnbd", "validate", *map(str, arguments)]
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr
    return done


def test_the_command_says_how_the_instant_was_taken(binaries: QemuBinaries, folder: Path) -> None:
    with machine(binaries, folder) as running:
        asked = ("--qmp", running.server.qmp, "--point-in-time", "--content", "whole")
        done = command(*asked, "--html", folder / "page.html", "vd1")
        assert done.returncode == 0, done.stderr
        assert "consistent: one instant, crash-consistent" in done.stdout
        assert "recipe: backup: " in done.stdout
        assert "recipe: backup: " in (folder / "page.html").read_text()
        done = command(*asked, "--json", "--exact-chain", "--scratch", folder)
        document = json.loads(done.stdout)
        assert [disk["instant"]["recipe"] for disk in document["disks"]] == ["snapshot", "snapshot"]
        assert document["verdict"] == "agreed"
        assert command(*asked, "--exact-chain").returncode == 25  # where would the guest's newest data be?
        done = command("--plan", plan_of(folder, running.server.qmp), "--point-in-time")
        assert (done.returncode, done.stdout.count("recipe: backup")) == (0, 0)  # one line for each that agrees


def plan_of(folder: Path, qmp: Path) -> Path:
    (folder / "plan.toml").write_text(f'[[vm]]\nqmp = "{qmp}"\n')
    return folder / "plan.toml"


def test_a_bitmap_that_misses_a_change_ends_the_command_with_1(binaries: QemuBinaries, folder: Path) -> None:
    """A guest that writes to one place all the time, and somebody who clears the bitmap all the time."""
    with machine(binaries, folder, disks=1) as running:
        running.server.side("block-dirty-bitmap-add", node="disk0", name="daily")
        words = [sys.executable, "-m", "qmpnbd", "validate", "--qmp", str(running.server.qmp), "--point-in-time"]
        words += ["--bitmap-change", "1", "--junit", str(folder / "report.xml")]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as child:
            value = 0
            while child.poll() is None:
                value = value % 250 + 1
                running.write(0, f"write -P {value} 1M 64k")
                running.server.side("block-dirty-bitmap-clear", node="disk0", name="daily")
                time.sleep(0.02)
            assert child.stdout is not None
            told = child.stdout.read()
    assert child.returncode == 1, told
    assert "[1048576, 1114112)  bitmap-misses-change: changed, and clean in qemu:dirty-bitmap:daily" in told
    assert "bitmap-misses-change" in (folder / "report.xml").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--point-in-time", "disk.qcow2"], "only running guests have one"),
        (["--qmp", "x", "--exact-chain"], "--exact-chain: only with --point-in-time"),
        (["--qmp", "x", "--bitmap-change", "3"], "--bitmap-change: only with --point-in-time"),
    ],
)
def test_what_goes_with_a_point_in_time_is_of_no_use_without(arguments: list[str], words: str) -> None:
    done = command(*arguments)
    assert (done.returncode, words in done.stderr) == (2, True), done.stderr


def test_what_qemu_6_2_cannot_tell_beside_the_depth_is_refused_by_name() -> None:
    def version(major: int, minor: int) -> VersionInfo:
        return VersionInfo.model_validate({"qemu": {"major": major, "minor": minor, "micro": 0}, "package": ""})

    assert "refused, allocation-after-depth: QEMU 6.2" in base_refusal(version(6, 2))
    assert base_refusal(version(5, 2)) == base_refusal(version(7, 0)) == ""


@each_qemu
@pytest.mark.parametrize("recipe", RECIPES)
def test_after_kill_9_the_next_run_takes_everything_down(binaries: QemuBinaries, recipe: Recipe, folder: Path) -> None:
    """Killed while the second point in time is held, with a bitmap copied."""
    with machine(binaries, folder) as running:
        running.server.side("block-dirty-bitmap-add", node="disk0", name="daily")
        before = running.state()
        wished = {Recipe.SNAPSHOT: ["--exact-chain"], Recipe.COPY_BEFORE_WRITE: ["--protect-guest"]}.get(recipe, [])
        words = [sys.executable, "-m", "qmpnbd", "validate", "--qmp", str(running.server.qmp), "--point-in-time"]
        words += [*wished, "--scratch", str(folder), "--bitmap-change", "0.01"]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
            wait_until(lambda: copied(running) or child.poll() is not None, "the copy of the bitmap", 60)
            child.kill()
        assert child.returncode == -9
        done = command("--qmp", running.server.qmp)
        assert done.returncode == 0, done.stderr
        assert running.state() == before


def copied(running: Machine) -> bool:
    nodes = running.server.side("query-named-block-nodes", flat=True)
    names = [each.get("name", "") for node in nodes for each in node.get("dirty-bitmaps", ())]
    return any(re.fullmatch(r"qmpnbd-[0-9a-f]{8}-b\d+", name) for name in names)
