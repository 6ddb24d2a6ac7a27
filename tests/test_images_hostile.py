"""Files that are not what they should be: a documented error at once, or the right map; never anything else."""

from __future__ import annotations

import errno
import os
import random
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from qmpnbd.errors import (
    ChainError,
    ImageCorruptError,
    ImageError,
    ImageTruncatedError,
    ImageUnreadableError,
    ImageUnsupportedError,
)
from qmpnbd.extents import ExtentMap
from qmpnbd.images import views
from qmpnbd.images.chain import LayerSpec
from qmpnbd.images.files import MAX_LAYERS, open_chain, open_layers
from tests.handmade import COPIED, DATA, END, SIZE, ZERO, depths, put, qcow2_bytes, write
from tests.judge import qemu_map

pytestmark = pytest.mark.usefixtures("no_file_stays_open")


@pytest.mark.parametrize("kind", ["fifo", "directory", "socket", "character device", "symlink loop"])
def test_what_is_no_file_is_refused_at_once(here: Path, kind: str) -> None:
    name, server = "base", socket.socket(socket.AF_UNIX)
    with server:
        match kind:
            case "fifo":
                os.mkfifo(name)
            case "directory":
                Path(name).mkdir()
            case "socket":
                server.bind(name)
            case "character device":
                Path(name).symlink_to("/dev/zero")
            case _:
                Path(name).symlink_to(name)
        write("top.qcow2", qcow2_bytes({}, backing=name))
        with pytest.raises(ImageUnreadableError, match=r"^base \(backing file of top\.qcow2\): "):
            open_chain("top.qcow2")


def test_a_file_that_becomes_a_fifo_while_it_is_opened(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("plain", b"")
    os.mkfifo("base")
    plain, real, told = Path("plain").stat(), os.stat, []
    monkeypatch.setattr(os, "stat", lambda path, **how: plain if path == "base" else real(path, **how))

    def attempt() -> None:
        with pytest.raises(ImageUnreadableError, match="it is a FIFO") as caught:
            open_chain("base")
        told.append(caught.value)

    worker = threading.Thread(target=attempt, daemon=True)
    worker.start()
    worker.join(5)
    if not told:
        os.close(os.open("base", os.O_WRONLY))  # lets the thread go before the test fails
    assert told, "it waits for a writer"


def test_a_chain_that_loops(here: Path) -> None:
    write("self.qcow2", qcow2_bytes({}, backing="self.qcow2"))
    with pytest.raises(ChainError, match=r"^self\.qcow2 \(backing file of self\.qcow2\): the chain loops"):
        open_chain("self.qcow2")
    write("a.qcow2", qcow2_bytes({}, backing="link.qcow2"))
    write("b.qcow2", qcow2_bytes({}, backing="./a.qcow2"))
    Path("link.qcow2").symlink_to("b.qcow2")
    with pytest.raises(ChainError, match=r"^\./a\.qcow2 \(backing file of link\.qcow2\): .* same file as a\.qcow2"):
        open_chain("a.qcow2")
    os.link("a.qcow2", "hard.qcow2")
    with pytest.raises(ChainError, match="loops"):
        open_layers([LayerSpec("a.qcow2", "qcow2", 1), LayerSpec("hard.qcow2", "qcow2", 2)])


def test_a_chain_that_is_too_deep(here: Path) -> None:
    for number in range(MAX_LAYERS + 1):
        write(f"{number}.qcow2", qcow2_bytes({}, size=512, length=4096, backing=f"{number + 1}.qcow2"))
    write(f"{MAX_LAYERS}.qcow2", qcow2_bytes({}, size=512, length=4096))
    with open_chain("1.qcow2") as chain:
        assert len(chain.layers) == MAX_LAYERS
    with pytest.raises(ChainError, match=f"more than {MAX_LAYERS} layers"):
        open_chain("0.qcow2")


def test_what_the_system_refuses(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    write("a.qcow2", qcow2_bytes({0: COPIED | DATA}))
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(ImageUnreadableError, match=r"cannot be opened: Permission denied\. Run as a user who may"):
            open_chain("a.qcow2")
    with open_chain("a.qcow2") as chain, monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        with pytest.raises(ImageUnreadableError, match="cannot be read at byte 0x200: Input/output error"):
            chain.allocated(0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", fail)
        with pytest.raises(ImageUnreadableError, match="cannot be opened: Input/output"):
            open_chain("a.qcow2")


def test_a_bad_entry_is_named_with_its_place(here: Path) -> None:
    write("a.qcow2", qcow2_bytes({5: COPIED | DATA | 0x200}, cluster_bits=10))
    with pytest.raises(ImageCorruptError, match=r"^a\.qcow2: L2 entry at byte 0x828: .*found 0x8000000000010200"):
        depths("a.qcow2")
    write("b.qcow2", qcow2_bytes({5: ZERO}, version=2))
    with pytest.raises(ImageCorruptError, match=r"^b\.qcow2: L2 entry at byte 0x428: a zero flag"):
        depths("b.qcow2")
    image = bytearray(qcow2_bytes({}, cluster_bits=10))
    put(image, 0x400, (COPIED | 0xA00).to_bytes(8, "big"))
    with pytest.raises(ImageCorruptError, match="L1 entry at byte 0x400: L2 table 0"):
        depths(write("c.qcow2", bytes(image)))
    with open_chain("c.qcow2") as chain, pytest.raises(ImageCorruptError):
        chain.explain(0)
    with open_chain("b.qcow2") as chain, pytest.raises(ImageCorruptError, match="0x428"):
        chain.explain(5 * 512)


EXTREMES: list[tuple[dict[str, Any], type[ImageError], str]] = [
    ({"said": 1 << 62}, ImageCorruptError, "header field l1_entries at byte 0x24"),
    ({"said": 1 << 62, "cluster_bits": 16, "l1_entries": 1 << 23}, ImageCorruptError, "header field l1_entries"),
    ({"l1_entries": (1 << 32) - 1}, ImageCorruptError, "the L1 table is larger than"),
    ({"l1_entries": 1 << 22, "l1_offset": 1 << 62}, ImageTruncatedError, "its L1 table should lie"),
    ({"l1_offset": 0x20000}, ImageTruncatedError, "its L1 table should lie at bytes 0x20000"),
    ({"l1": 0x00FFFFFFFFFFFE00}, ImageTruncatedError, "L2 table 0 should lie at bytes 0xfffffffffffe00"),
    ({"l1": 0x20000}, ImageTruncatedError, "L2 table 0 should lie at bytes 0x20000"),
    ({"entry": 0x00FFFFFFFFFFFE00}, ImageTruncatedError, "the data of guest offset 0x0 should lie"),
    ({"backing_offset": 1 << 62, "backing_length": 4}, ImageCorruptError, "header field backing_offset"),
    ({"backing_offset": 0x100, "backing_length": (1 << 32) - 1}, ImageCorruptError, "header field backing_length"),
    ({"snapshot_count": (1 << 32) - 1, "snapshots_offset": 0x200}, ImageError, "snapshot"),
    ({"snapshot_count": 3, "snapshots_offset": 1 << 62}, ImageError, "snapshot"),
]


@pytest.mark.usefixtures("memory_budget", "no_file_stays_open")
@pytest.mark.parametrize(("fields", "error", "words"), EXTREMES)
def test_numbers_as_large_as_they_can_be(
    fields: dict[str, Any], error: type[ImageError], words: str, here: Path
) -> None:
    of_header = {name: value for name, value in fields.items() if name not in ("entry", "l1", "said")}
    image = bytearray(qcow2_bytes({0: fields.get("entry", COPIED | DATA)}, **of_header))
    for name, offset in (("said", 24), ("l1", 512)):  # the size of the disk, the first L1 entry
        if name in fields:
            put(image, offset, fields[name].to_bytes(8, "big"))
    write("a.qcow2", bytes(image))
    with pytest.raises(error, match=words) as caught, open_chain("a.qcow2") as chain:
        _ = (chain.allocation_depth(), chain.facts(0))
    assert caught.value.where == "a.qcow2"


@pytest.mark.real
@pytest.mark.parametrize("l1", [0, 512, 1024])
def test_tables_that_overlap_are_read_as_qemu_reads_them(l1: int, here: Path) -> None:
    """An L2 table that is the header, which means none, the L1 table, or what it should be."""
    places: dict[str, Any] = {"refcount_table_offset": 0x10000, "refcount_table_clusters": 1}
    image = bytearray(qcow2_bytes({0: COPIED | DATA, 5: ZERO}, **places))
    put(image, 512, (COPIED | l1).to_bytes(8, "big"))
    with open_chain(write("a.qcow2", bytes(image))) as chain:
        depth = chain.allocation_depth()
    wanted = [(entry["length"], int(entry["present"])) for entry in qemu_map("a.qcow2")]
    assert depth == ExtentMap.of_extents(wanted)
    assert depth.totals().get(1, 0) == {0: 0, 512: 512, 1024: 1024}[l1]


def test_a_bomb_of_runs_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every L1 entry leads to one table of alternating entries; a small file could ask for terabytes of runs."""
    write("a.qcow2", qcow2_bytes(dict.fromkeys(range(0, 128, 2), ZERO)))
    with open_chain("a.qcow2") as chain:
        assert len(chain.allocated(0)) == 128
        monkeypatch.setattr(views, "MAX_RUNS", 127)
        with pytest.raises(ImageUnsupportedError, match="more than 127 runs"):
            chain.allocated(0)


def test_a_growing_file_is_asked_for_its_size_after_its_tables(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("a.qcow2", qcow2_bytes({0: COPIED | END}))
    real = os.preadv

    def grow(fd: int, views: list[memoryview], at: int) -> int:
        if at == 0x400:
            os.truncate("a.qcow2", END + 1)
        return real(fd, views, at)

    with open_chain("a.qcow2") as chain:
        monkeypatch.setattr(os, "preadv", grow)
        assert chain.allocated(0).at(0) == 1


def test_a_file_cut_anywhere(here: Path) -> None:
    """The right map, or a documented error; data cut off wholly is an error too."""
    whole = qcow2_bytes({0: COPIED | DATA, 63: ZERO, 64: COPIED | (END - 1024)}, backing="base.raw")
    write("base.raw", bytes(SIZE))
    right = depths(write("a.qcow2", whole))
    for length in (*range(0x900), *range(0x900, END, 997), *range(END - 1100, END)):
        write("a.qcow2", whole[:length])
        try:
            with open_chain("a.qcow2", format="qcow2") as chain:
                assert chain.allocation_depth() == right, length
            assert length > END - 1024, length
        except ImageTruncatedError:
            assert length <= END - 1024, length


def test_a_file_with_random_damage_raises_documented_errors_only(here: Path) -> None:
    dice = random.Random(3)
    write("base.raw", bytes(SIZE))
    whole = qcow2_bytes({0: COPIED | DATA, 63: ZERO, 64: COPIED | DATA}, backing="base.raw", backing_format="raw")
    for _ in range(1500):
        image = bytearray(whole)
        for _ in range(dice.randrange(1, 4)):
            image[dice.choice([dice.randrange(0x150), dice.randrange(0x200, 0x900)])] = dice.randrange(256)
        write("a.qcow2", bytes(image))
        try:
            with open_chain("a.qcow2") as chain:
                assert chain.allocation_depth().size == chain.size
                if chain.size:
                    chain.explain(chain.size - 1)
        except ImageError:
            continue
