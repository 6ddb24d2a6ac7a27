"""Text for terminals of any width: nothing sticks out, nothing is lost, tables stay tables as long as they can."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpnbd.extents import ExtentMap
from qmpnbd.report.columns import columns, folded, table
from qmpnbd.report.maptext import maps_text
from qmpnbd.report.model import DiskEntry, DisksDocument, ErrorEntry, NodeEntry
from qmpnbd.report.text import disks_text, validation_text
from tests.reports import MIB, disk, layers, report, sample
from tests.servers import blockdev, qemu_img, storage_daemon

words = st.text(st.sampled_from("ab/é漢字🙂e\u0301- "), max_size=60)
WIDE = "/images/漢字の名前/磁盤映像檔案-한국어-🙂.qcow2"


def solid(text: str) -> str:
    """A text without what folding adds and takes."""
    return "".join(text.split())


def test_wide_glyphs_take_two_columns_and_marks_none() -> None:
    assert [columns(each) for each in ("abc", "漢字", "🙂", "e\u0301", "한", "")] == [3, 4, 2, 1, 2, 0]


@given(words, st.integers(20, 50), st.integers(0, 6))
def test_a_folded_line_fits_and_loses_nothing(text: str, width: int, indent: int) -> None:
    line = " " * indent + text
    pieces = list(folded(line, width))
    assert all(columns(piece) <= width for piece in pieces)
    assert solid("".join(pieces)) == solid(line)
    assert list(folded(line, None)) == [line]


def test_names_are_broken_behind_a_slash_and_words_at_blanks() -> None:
    assert list(folded("  at /srv/images/today/disk.qcow2", 24)) == ["  at /srv/images/today/", "      disk.qcow2"]
    assert list(folded("one two three four five six", 20)) == ["one two three four", "    five six"]


@given(st.lists(st.tuples(words, words, words), min_size=1, max_size=4), st.integers(20, 60))
def test_a_table_fits_and_loses_nothing(rows: list[tuple[str, str, str]], width: int) -> None:
    rows = [("depth", "seen", "file"), *((a[:6], b[:9], c) for a, b, c in rows)]
    lines = list(table(rows, right=(0,), width=width))
    assert all(columns(line) <= width for line in lines)
    told = solid("".join(lines))
    for row in rows[1:]:
        assert all(solid(cell) in told for cell in row)


def test_columns_stand_below_each_other_with_wide_glyphs() -> None:
    rows = [("node", "depth"), ("漢字", "1"), ("abcd", "2")]
    assert list(table(rows)) == ["node  depth", "漢字  1", "abcd  2"]


def test_a_narrow_table_keeps_its_columns_and_has_the_last_one_below() -> None:
    rows = [("depth", "bytes seen", "file"), ("1", "64 KiB", "/srv/images/today.qcow2")]
    assert list(table(rows, right=(0, 1), width=24)) == [
        "depth  bytes seen",
        "    file",
        "    1      64 KiB",
        "    /srv/images/",
        "        today.qcow2",
    ]


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
def test_a_report_fits_whatever_the_width(width: int) -> None:
    served = ExtentMap.of_extents([(8 * MIB, 1), (16 * MIB, 2), (8 * MIB, 0), (32 * MIB, 3)])
    whole = sample()
    wide = report(*whole.disks, disk("漢字", served, layers(WIDE, "/base")), left_behind=())
    for each in (wide, wide.model_copy(update={"monitor": ""})):
        lines = validation_text(each, width=width).splitlines()
        assert [line for line in lines if columns(line) > width] == []
        assert solid(WIDE) in solid("".join(lines)) or not each.monitor
        assert solid("".join(lines)).count("3" * 32) == solid(validation_text(each)).count("3" * 32) or width < 40
    coloured = validation_text(wide, colours=True, width=width)
    assert "\x1b[1;31m" in coloured


@pytest.mark.parametrize("width", [20, 40, 80])
def test_a_list_of_disks_fits_whatever_the_width(width: int) -> None:
    layer = NodeEntry(allocation_depth=1, node_name="node", format="qcow2\x1b[2J", file=WIDE)
    problem = ErrorEntry(type="x", exit_code=1, where=WIDE, what="cannot be exported now", remedy="Wait.")
    first = DiskEntry(
        name="vd0",
        attached=True,
        qdev="vd0",
        qom_path="/machine/peripheral/the-first-disk-of-the-guest",
        device="virtio-blk-pci",
        drive="",
        node_name="node",
        driver="qcow2",
        size=1,
        read_only=False,
        layers=(layer,),
        problem=None,
    )
    disks = (first, first.model_copy(update={"name": "vd1", "layers": (), "problem": problem}))
    document = DisksDocument(monitor=WIDE, qemu="7.2.22", guest="running", disks=disks)
    text = disks_text(document, width)
    assert [line for line in text.splitlines() if columns(line) > width] == []
    assert solid(text).count(solid(WIDE)) == 3
    assert "\x1b" not in text
    assert len(disks_text(document).splitlines()) < len(text.splitlines())


def test_a_picture_that_does_not_fit_goes_below_its_name_in_rows() -> None:
    maps = {"qemu:allocation-depth": ExtentMap.of_extents([(MIB, 1), (MIB, 2)])}
    wide = ["qemu:allocation-depth [" + "1" * 32 + "2" * 32 + "]"]
    assert "".join(map(str, maps_text(maps))).splitlines()[:1] == wide
    narrow = ["qemu:allocation-depth", "[" + "1" * 32 + "]", "[" + "2" * 32 + "]"]
    assert "".join(map(str, maps_text(maps, width=60))).splitlines()[:3] == narrow


def told(*arguments: str | Path, **environment: str) -> list[str]:
    """What a command says on a terminal of 50 columns."""
    leader, terminal = pty.openpty()
    try:
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 50, 0, 0))
        command = [sys.executable, "-m", "qmpnbd", *map(str, arguments)]
        known = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
        known |= {"NO_COLOR": "1", "TERM": "xterm", **environment}
        subprocess.run(command, env=known, stdout=terminal, stderr=subprocess.DEVNULL, timeout=60, check=True)
        return os.read(leader, 1 << 16).decode().splitlines()
    finally:
        os.close(leader)
        os.close(terminal)


@pytest.mark.real
def test_the_terminal_counts_columns_of_the_environment_before_it_and_a_file_is_as_wide_as_it_takes(
    three_layers: Path,
) -> None:
    command = ("validate", three_layers / "top.qcow2")
    assert 40 < max(map(len, told(*command))) <= 50
    assert max(map(len, told(*command, COLUMNS="40"))) <= 40
    assert max(map(len, told(*command, COLUMNS="200"))) > 60
    assert max(map(len, told(*command, COLUMNS="nonsense"))) <= 50
    known = {**os.environ, "COLUMNS": "40"}
    done = subprocess.run(
        [sys.executable, "-m", "qmpnbd", *command], env=known, stdout=subprocess.PIPE, text=True, timeout=60, check=True
    )
    assert max(map(len, done.stdout.splitlines())) > 60
    assert "\x1b" not in done.stdout
    assert any("\x1b[1;32mdisk" in line for line in told(*command, NO_COLOR=""))


@pytest.mark.real
def test_what_other_commands_list_fits_the_terminal_too(three_layers: Path, folder: Path) -> None:
    image = three_layers / "top.qcow2"
    assert max(map(len, told("chain", image))) > 50  # rows of numbers, which are not folded
    head = told("chain", image)[:20]
    assert max(map(len, head[: head.index("qemu:allocation-depth") + 3])) <= 50
    with storage_daemon("--blockdev", blockdev(image, "top", read_only=True)) as server:
        lines = told("disks", "--qmp", server.qmp)
        assert 40 < max(map(len, lines)) <= 50
        assert str(image) in solid("".join(lines))
    qemu_img("create", "-q", "-f", "qcow2", folder / "top.qcow2", "1M")
    qemu_img("bitmap", "--add", folder / "top.qcow2", "a-bitmap-with-a-name-that-is-\x1b[2Jtoo-long")
    lines = told("chain", folder / "top.qcow2", "--bitmaps")
    assert 20 < max(map(len, lines)) <= 50
    assert r"a-bitmap-with-a-name-that-is-\x1b[2Jtoo-long" in solid("".join(lines))
