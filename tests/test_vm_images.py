"""The recipes in vm-images/ make what they say, and the same every time."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shutil
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ROOT / ".work/guest-packages"


def recipe(name: str) -> ModuleType:
    """A module of vm-images/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"vm_images_{name}", ROOT / "vm-images" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


chain = recipe("chain")
guest = recipe("guest")


def tool(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chain")
    active: Path = chain.build(folder)
    return active


@pytest.fixture
def mine(built: Path, tmp_path: Path) -> Path:
    """A copy of the chain to break, at another place: its backing names are relative."""
    return Path(shutil.copytree(built.parent, tmp_path / "copy")) / built.name


@pytest.mark.real
class TestChain:
    def layers(self, active: Path) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(
            tool("qemu-img", "info", "--backing-chain", "--output=json", str(active))
        )
        return found

    def test_has_five_layers_with_a_short_raw_one_at_the_bottom(self, mine: Path) -> None:
        layers = self.layers(mine)
        assert [layer["format"] for layer in layers] == ["qcow2"] * 4 + ["raw"]
        sizes = [layer["virtual-size"] for layer in layers]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[-1] < sizes[-2] < sizes[0]

    def test_differs_in_version_and_cluster_size(self, built: Path) -> None:
        overlays = self.layers(built)[:-1]
        assert len({layer["cluster-size"] for layer in overlays}) == 4
        assert {layer["format-specific"]["data"]["compat"] for layer in overlays} == {"0.10", "1.1"}

    def test_backing_names_are_relative_and_have_a_format(self, built: Path) -> None:
        for layer in self.layers(built)[:-1]:
            assert "/" not in layer["backing-filename"]
            assert layer["backing-filename-format"] in {"qcow2", "raw"}

    def test_is_clean(self, built: Path) -> None:
        for overlay in chain.OVERLAYS:
            tool("qemu-img", "check", "-q", "-f", "qcow2", str(built.parent / overlay.name))

    def test_shows_every_layer_and_holes_and_zero_clusters_and_compressed_ones(self, built: Path) -> None:
        extents = json.loads(tool("qemu-img", "map", "--output=json", str(built)))
        assert {extent["depth"] for extent in extents} == {0, 1, 2, 3, 4}
        assert any(extent["zero"] and extent["present"] for extent in extents)
        assert any(not extent["present"] for extent in extents)
        assert any(extent["data"] and "offset" not in extent for extent in extents)

    def test_is_the_same_every_time(self, built: Path, tmp_path: Path) -> None:
        again = chain.build(tmp_path / "again").parent
        names = sorted(path.name for path in built.parent.iterdir())
        assert names == sorted(path.name for path in again.iterdir())
        for name in names:
            assert (built.parent / name).read_bytes() == (again / name).read_bytes(), name


@pytest.mark.real
class TestSpoil:
    def test_clears_the_eight_bytes_of_one_entry(self, mine: Path) -> None:
        image = mine.parent / chain.SPOILED_LAYER
        before = image.read_bytes()
        said = chain.spoil(image, chain.SPOILED_OFFSET)
        after = image.read_bytes()
        assert len(before) == len(after)
        changed = [place for place, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
        entry = changed[0] // 8 * 8
        assert all(entry <= place < entry + 8 for place in changed)
        assert after[entry : entry + 8] == bytes(8)
        assert f"{struct.unpack('>Q', before[entry : entry + 8])[0]:#018x}" in said

    def test_what_it_clears_was_read_through_from_the_top(self, mine: Path) -> None:
        def depth() -> int:
            extents = json.loads(tool("qemu-img", "map", "--output=json", str(mine)))
            at = next(e for e in extents if e["start"] <= chain.SPOILED_OFFSET < e["start"] + e["length"])
            return int(at["depth"]) if at["present"] else -1

        assert depth() == 3
        chain.spoil(mine.parent / chain.SPOILED_LAYER, chain.SPOILED_OFFSET)
        assert depth() != 3

    @pytest.mark.parametrize(
        ("layer", "offset"),
        [("installed.qcow2", 60 << 20), ("installed.qcow2", 70 << 20), ("monday.qcow2", 33 << 20)],
        ids=["compressed", "unallocated", "zero"],
    )
    def test_leaves_everything_but_data_clusters_alone(self, mine: Path, layer: str, offset: int) -> None:
        before = (mine.parent / layer).read_bytes()
        with pytest.raises(ValueError, match="no standard data cluster"):
            chain.spoil(mine.parent / layer, offset)
        assert (mine.parent / layer).read_bytes() == before

    def test_refuses_what_is_no_qcow2(self, mine: Path) -> None:
        with pytest.raises(ValueError, match="not a qcow2"):
            chain.spoil(mine.parent / chain.TEMPLATE, 0)


def newc(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """Mode and content of every member, read back independently."""
    members: dict[str, tuple[int, bytes]] = {}
    position = 0
    while True:
        assert archive[position : position + 6] == b"070701"
        fields = [int(archive[position + 6 + 8 * i : position + 14 + 8 * i], 16) for i in range(13)]
        mode, size, name_length = fields[1], fields[6], fields[11]
        name = archive[position + 110 : position + 110 + name_length - 1].decode()
        content = (position + 110 + name_length + 3) // 4 * 4
        if name == "TRAILER!!!":
            return members
        members[name] = (mode, archive[content : content + size])
        position = (content + size + 3) // 4 * 4


class TestInitramfs:
    def parts(self) -> Any:
        return guest._Parts(vmlinuz=b"", busybox=b"busybox!", modules=(("virtio", b"one"), ("virtio_blk", b"three")))

    def test_has_what_the_kernel_and_the_script_need(self) -> None:
        members = newc(guest._initramfs(self.parts()))
        assert members["init"][0] == 0o100755
        assert members["dev/console"][0] == 0o020600
        assert members["bin/busybox"] == (0o100755, b"busybox!")
        assert members["bin/sh"] == (0o120777, b"busybox")
        assert members["lib/virtio_blk.ko"] == (0o100644, b"three")

    def test_every_placeholder_of_the_script_is_filled_in(self) -> None:
        script = newc(guest._initramfs(self.parts()))["init"][1].decode()
        assert not re.search("@[A-Z]+@", script)
        assert "for module in virtio virtio_blk;" in script
        subprocess.run(["sh", "-n"], input=script, text=True, check=True)

    def test_an_agent_comes_with_the_libraries_that_it_names(self, tmp_path: Path) -> None:
        libraries = tmp_path / "usr/lib/x86_64-linux-gnu"
        libraries.mkdir(parents=True)
        (tmp_path / "usr/sbin").mkdir()
        (tmp_path / guest.AGENT).write_bytes(b"ELF\0libone.so.1\0ld-linux-x86-64.so.2\0libabsent.so.6\0")
        (libraries / "libone.so.1").write_bytes(b"ELF\0libtwo-2.0.so.0\0libone.so.1\0")
        for name in ("libtwo-2.0.so.0", "ld-linux-x86-64.so.2", "libthree.so.3"):
            (libraries / name).write_bytes(b"ELF")
        members = newc(guest._initramfs(replace(self.parts(), agent=guest._agent(tmp_path))))
        found = {name for name, (mode, _) in members.items() if "." in name and mode == 0o100755}
        wanted = {f"lib/x86_64-linux-gnu/{name}" for name in ("libone.so.1", "libtwo-2.0.so.0")}
        assert found == wanted | {"lib64/ld-linux-x86-64.so.2"}
        assert members["bin/qemu-ga"][0] == 0o100755
        with pytest.raises(guest.GuestError, match="scripts/setup test"):
            guest._agent(tmp_path / "empty")

    def test_places_are_whole_records_on_the_disk(self) -> None:
        size = int(chain.OVERLAYS[-1].size.rstrip("M")) << 20
        assert all(place % guest.RECORD == 0 and place < size for place in guest.PLACES)

    def test_without_a_kernel_it_says_how_to_get_one(self, tmp_path: Path) -> None:
        with pytest.raises(guest.GuestError, match="scripts/setup demo"):
            guest.build(tmp_path, tmp_path / "out")


@pytest.mark.real
@pytest.mark.skipif(
    not (PACKAGES / "complete").exists(), reason="no kernel for a guest (scripts/setup demo fetches one)"
)
class TestGuest:
    def test_is_the_same_to_the_bit_and_not_made_twice(self, tmp_path: Path) -> None:
        def digests(folder: Path) -> dict[str, str]:
            return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}

        one = guest.build(PACKAGES, tmp_path / "one")
        guest.build(PACKAGES, tmp_path / "two")
        assert digests(tmp_path / "one") == digests(tmp_path / "two")
        made = one.initramfs.stat().st_mtime_ns
        assert guest.build(PACKAGES, tmp_path / "one") == one
        assert one.initramfs.stat().st_mtime_ns == made

    @pytest.mark.parametrize("word", ["", "qmpnbd.places=8192,1048576", "qmpnbd.write=steady"])
    def test_writes_its_records_and_says_so(self, tmp_path: Path, word: str) -> None:
        linux = guest.build(PACKAGES, ROOT / ".work/guest")
        disk, console = tmp_path / "disk.raw", tmp_path / "console"
        with disk.open("wb") as file:
            file.truncate(128 << 20)
        qemu = subprocess.Popen(
            [
                *("qemu-system-x86_64", "-accel", "tcg", "-m", "192", "-nodefaults", "-display", "none"),
                *("-kernel", str(linux.kernel), "-initrd", str(linux.initramfs), "-append", f"{linux.append} {word}"),
                *("-serial", f"file:{console}", "-drive", f"if=virtio,format=raw,file={disk}"),
            ]
        )
        try:
            said = self.wait(console, at_least=12 if "steady" in word else 0)
        finally:
            qemu.kill()
            qemu.wait()
        expected = [8192, 1048576] if "places" in word else list(guest.PLACES)
        records = {int(number): int(place) for number, place in re.findall(r"record (\d+) at (\d+)\n", said)}
        assert [records[number + 1] for number in range(len(expected))] == expected
        assert (len(records) > len(expected)) == ("steady" in word)
        # Where a later record fell on an earlier one, only the later is there.
        latest = {place: number for number, place in sorted(records.items())}
        content = disk.read_bytes()
        for place, number in latest.items():
            assert content[place : place + 4096] == f"qmpnbd record {number} at {place}".ljust(4095).encode() + b"\n"

    def test_stamps_what_it_writes_to_all_disks(self, tmp_path: Path) -> None:
        linux = guest.build(PACKAGES, ROOT / ".work/guest")
        console = tmp_path / "console"
        disks = []
        for name in ("one", "two"):
            (tmp_path / name).write_bytes(bytes(16 << 20))
            disks += ["-drive", f"if=virtio,format=raw,file={tmp_path / name}"]
        words = f"{linux.append} printk.devkmsg=on qmpnbd.places=0 qmpnbd.write=stamped"
        command = ["qemu-system-x86_64", "-accel", "tcg", "-m", "192", "-nodefaults", "-display", "none", *disks]
        command += ["-kernel", str(linux.kernel), "-initrd", str(linux.initramfs), "-append", words]
        qemu = subprocess.Popen([*command, "-serial", f"file:{console}"])
        try:
            said = self.wait(console, at_least=10, of="wrote ")
        finally:
            qemu.kill()
            qemu.wait()
        found = re.findall(r"\[ *(\d+\.\d{6})\] qmpnbd-guest: wrote (\d+)", said)
        assert [int(number) for _, number in found] == list(range(2, 2 + len(found)))  # the first one was at its place
        stamps = [float(stamp) for stamp, _ in found]
        assert stamps == sorted(stamps)
        for number in range(2, 10):
            place = guest.pair_place(number, 16 << 20)
            record = (tmp_path / ("one", "two")[number % 2]).read_bytes()[place : place + 4096]
            assert re.fullmatch(rb"qmpnbd record %d at %d after \d+\.\d\d *\n" % (number, place), record)

    def wait(self, console: Path, at_least: int, of: str = "record ") -> str:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            said = console.read_text(errors="replace") if console.exists() else ""
            if guest.READY in said and said.count(of) >= at_least:
                return said[: said.rindex("\n") + 1]
            time.sleep(0.05)
        pytest.fail("the guest was not ready in time")
