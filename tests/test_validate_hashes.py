"""The hash of each range that was compared: what ``dd | sha256sum`` tells of a copy of the disk, or nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpnbd.deadline import Deadline
from qmpnbd.extents import ExtentMap
from qmpnbd.images.chain import LayerSpec
from qmpnbd.images.files import open_layers
from qmpnbd.images.layers import Chain
from qmpnbd.nbd.client import Client
from qmpnbd.nbd.uri import NbdUri
from qmpnbd.qmp.plan import Recipe
from qmpnbd.report.model import DiskReport
from qmpnbd.report.text import disk_text
from qmpnbd.validate import hashes, instant
from qmpnbd.validate.choice import Choice
from qmpnbd.validate.hashes import Hashes
from qmpnbd.validate.run import Options, validate
from qmpnbd.validate.sample import MAX_RANGES, whole
from qmpnbd.validate.target import ImageTarget, ServedTarget
from tests.dying import wishes_for
from tests.fleets import WHOLE, judged, spoilt
from tests.instants import WRITES, commands, machine
from tests.qemu_versions import QemuBinaries, each_qemu
from tests.servers import blockdev, qemu_img, storage_daemon
from tests.test_validate_live import one, reading
from tests.writers import writing

MIB = 1 << 20


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def content_of(image: Path, folder: Path) -> bytes:
    """What QEMU's own program makes of an image."""
    copy = folder / "content.raw"
    qemu_img("convert", "-U", "-O", "raw", image, copy)
    return copy.read_bytes()


def without_hash(disk: DiskReport, content: bytes) -> list[int]:
    """Returns the offsets of the ranges that have no hash; all others must have that of the content."""
    for each in disk.content_hashes:
        expected = sha256(content[each.offset : each.offset + each.length])
        assert each.sha256 in (None, expected), each
    return [each.offset for each in disk.content_hashes if each.sha256 is None]


pieces_of_ranges = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=4), min_size=1, max_size=4)


@given(pieces_of_ranges, st.data())
def test_pieces_may_come_in_any_order(ranges: list[list[int]], data: st.DataObject) -> None:
    """A range of which a piece is missing, differs, or was written has no hash."""
    pieces, bounds, at = [], [], 0
    for lengths in ranges:
        bounds.append((at, sum(lengths)))
        for length in lengths:
            pieces.append((at, bytes(data.draw(st.binary(min_size=length, max_size=length)))))
            at += length
        at += 3  # between two ranges
    kinds = [data.draw(st.sampled_from(["good", "missing", "differs", "written"])) for _ in ranges]
    tested = Hashes(bounds)
    touched = ExtentMap.uniform(at, 0)
    spared = {}
    for (offset, length), kind in zip(bounds, kinds, strict=True):
        byte = data.draw(st.integers(offset, offset + length - 1))
        spared[offset] = byte
        if kind == "written":
            mark = [(byte, 0), (1, 1), (at - byte - 1, 0)]
            touched = touched.combine(
                ExtentMap.of_extents(each for each in mark if each[0]), lambda one, two: one | two
            )
    for offset, piece in data.draw(st.permutations(pieces)):
        number = max(place for place, (start, _) in enumerate(bounds) if start <= offset)
        here = offset <= spared[bounds[number][0]] < offset + len(piece)
        if here and kinds[number] == "differs":
            tested.lose(offset)
        elif not (here and kinds[number] == "missing"):
            tested.add(offset, piece)
    assert not any(each.sha256 for each in tested.told())
    tested.settle(touched)
    content = dict(pieces)
    for each, lengths, kind in zip(tested.told(), ranges, kinds, strict=True):
        whole_range, place = b"", each.offset
        for length in lengths:
            whole_range, place = whole_range + content[place], place + length
        assert each.sha256 == (sha256(whole_range) if kind == "good" else None)


def test_a_round_that_was_not_judged_leaves_no_hash_and_the_next_begins_anew() -> None:
    tested = Hashes([(0, 8)])
    tested.add(0, b"old.")
    tested.begin()
    tested.add(0, b"new.")
    tested.add(4, b"new.")
    tested.settle(ExtentMap.uniform(8, 0))
    tested.begin()
    tested.add(0, b"late")
    tested.settle(ExtentMap.uniform(8, 0))
    assert [each.sha256 for each in tested.told()] == [sha256(b"new.new.")]


def test_if_nobody_watched_there_are_no_hashes() -> None:
    tested = Hashes([(0, 4)])
    tested.add(0, b"four")
    tested.settle(None)
    assert [each.sha256 for each in tested.told()] == [None]


def test_what_waits_for_a_piece_that_does_not_come_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "MAX_HELD", 8)
    tested = Hashes([(0, 16), (16, 8)])
    for offset in (4, 8, 12, 20, 16, 0):  # the third would be the third to be held
        tested.add(offset, b"four")
    tested.settle(ExtentMap.uniform(24, 0))
    assert [each.sha256 for each in tested.told()] == [None, sha256(b"fourfour")]


@pytest.mark.parametrize("size", [1, MIB, MIB + 1, MAX_RANGES * MIB, MAX_RANGES * MIB + 1, 1 << 40, (1 << 63) - 1])
def test_a_whole_disk_is_cut_into_few_ranges_of_a_power_of_two(size: int) -> None:
    ranges = whole(size).ranges
    step = ranges[0][1] if len(ranges) > 1 else 1 << (max(size, MIB) - 1).bit_length()
    assert step >= MIB
    assert step & (step - 1) == 0
    assert step == MIB or -(-size // (step // 2)) > MAX_RANGES
    assert len(ranges) <= MAX_RANGES
    assert [offset for offset, _ in ranges] == list(range(0, size, step))
    assert sum(length for _, length in ranges) == size


@pytest.mark.real
@pytest.mark.parametrize("content", ["sample", "whole"])
def test_an_image_that_stands_still_has_a_hash_of_every_range(copies: Path, content: str) -> None:
    qemu_img("resize", "-q", copies / "top.qcow2", str(16 * MIB + 4608))
    disk = judged(
        ImageTarget(str(copies / "top.qcow2")), Choice.of(["depth"], "whole" if content == "whole" else "sample")
    )
    assert without_hash(disk, content_of(copies / "top.qcow2", copies)) == []
    ranges = [(each.offset, each.length) for each in disk.content_hashes]
    (compared,) = (entry.bytes for entry in disk.compared if entry.what == "content")
    assert sum(length for _, length in ranges) == compared
    if content == "whole":
        assert ranges == [*((number * MIB, MIB) for number in range(16)), (16 * MIB, 4608)]
    assert f"SHA-256 of {len(ranges)} ranges of it: content_hashes in --json" in disk_text(disk)


@pytest.mark.real
def test_a_range_that_differs_has_no_hash_but_both_in_the_discrepancy(copies: Path) -> None:
    with storage_daemon("--blockdev", blockdev(copies / "top.qcow2", "top", read_only=True)) as server:
        server.side("nbd-server-start", addr={"type": "unix", "data": {"path": str(copies / "s")}})
        server.side("block-export-add", type="nbd", id="x", node_name="top", name="x", allocation_depth=True)
        before = content_of(copies / "top.qcow2", copies)
        target = ServedTarget(f"nbd+unix:///x?socket={copies}/s", str(copies / "top.qcow2"), "qcow2")
        assert without_hash(judged(target), before) == []  # now QEMU has the table in its cache
        spoilt(copies / "top.qcow2", 12 * MIB)
        disk = judged(target)
    assert without_hash(disk, before) == [12 * MIB]
    assert {each.offset for each in disk.discrepancies if each.served_sha256} == {12 * MIB}
    assert "SHA-256 of 15 of 16 ranges of it" in disk_text(disk)


@pytest.mark.real
def test_no_bytes_no_hashes(copies: Path) -> None:
    disk = judged(ImageTarget(str(copies / "top.qcow2")), Choice(content="none"))
    assert disk.content_hashes == ()
    assert "SHA-256" not in disk_text(disk)


@pytest.mark.real
@each_qemu
def test_a_running_disk_has_hashes_where_nobody_writes(binaries: QemuBinaries, copies: Path) -> None:
    """A writer that never rests stays below 4 MiB; the rest has the hashes of what is there."""
    uri = f"nbd+unix:///?socket={copies}/guest"
    above = content_of(copies / "top.qcow2", copies)
    with binaries.daemon("--blockdev", blockdev(copies / "top.qcow2", "top", discard="unmap")) as server:
        with writing(server, copies / "guest", 4 * MIB):
            disk = one(validate(str(server.qmp), ["top"], Options(nbd=uri, choice=WHOLE)))
        for each in disk.content_hashes[4:]:
            assert each.sha256 == sha256(above[each.offset : each.offset + each.length])
        disk = one(validate(str(server.qmp), ["top"], Options(choice=WHOLE)))
        assert without_hash(disk, content_of(copies / "top.qcow2", copies)) == []


@pytest.mark.real
def test_a_range_that_was_written_while_it_was_compared_has_no_hash(
    copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although both sides agree on its bytes: they need not be those of one moment."""
    uri = f"nbd+unix:///guest?socket={copies}/guest"

    def write(count: int) -> None:
        if count == 0:
            with Client.connect(NbdUri.parse(uri), deadline=Deadline(30)) as client:
                client.write(5 * MIB, bytes([77]) * 65536, deadline=Deadline(30))
                client.flush(Deadline(30))

    with storage_daemon("--blockdev", blockdev(copies / "top.qcow2", "top")) as server:
        server.side("nbd-server-start", addr={"type": "unix", "data": {"path": str(copies / "guest")}})
        server.side("block-export-add", type="nbd", id="guest", node_name="top", name="guest", writable=True)
        with reading(monkeypatch, write):
            options = Options(nbd=uri.replace("/guest?", "/?"), choice=WHOLE)
            disk = one(validate(str(server.qmp), ["top"], options))
    assert (disk.verdict, disk.rounds) == ("agreed", 1)
    assert without_hash(disk, content_of(copies / "top.qcow2", copies)) == [5 * MIB]


@pytest.mark.real
@each_qemu
@pytest.mark.parametrize("recipe", list(Recipe))
def test_at_a_point_in_time_every_range_has_the_hash_of_that_instant(
    binaries: QemuBinaries, recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is written since, which is done each time before the files are looked at."""
    options = Options(instant=wishes_for(recipe, folder), choice=Choice(depth=False, base=False, content="whole"))
    with machine(binaries, folder) as running:
        seeds = iter(range(1000))

        def open_later(specs: Sequence[LayerSpec], *, deadline: Deadline) -> Chain:
            for number in range(len(running.images)):
                running.write(number, *commands(next(seeds), 4, WRITES), "flush")
            return open_layers(specs, deadline=deadline)

        then = running.truth()
        monkeypatch.setattr(instant, "open_layers", open_later)
        report = validate(str(running.server.qmp), [], options)
        assert [each.content for each in running.truth()] != [each.content for each in then]
    for disk, truth in zip(report.disks, then, strict=True):
        assert len(disk.content_hashes) == len(truth.content) // MIB
        assert without_hash(disk, truth.content) == []
