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
from qmpnbd.report.text import validation_text
from tests.reports import MIB, disk, layers, report, sample

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


def told(image: Path, **environment: str) -> list[str]:
    """What the command says on a terminal of 50 columns."""
    leader, terminal = pty.openpty()
    try:
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 50, 0, 0))
        command = [sys.executable, "-m", "qmpnbd", "validate", str(image)]
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
    image = three_layers / "top.qcow2"
    assert 40 < max(map(len, told(image))) <= 50
    assert max(map(len, told(image, COLUMNS="40"))) <= 40
    assert max(map(len, told(image, COLUMNS="200"))) > 60
    assert max(map(len, told(image, COLUMNS="nonsense"))) <= 50
    command = [sys.executable, "-m", "qmpnbd", "validate", str(image)]
    known = {**os.environ, "COLUMNS": "40"}
    done = subprocess.run(command, env=known, stdout=subprocess.PIPE, text=True, timeout=60, check=True)
    assert max(map(len, done.stdout.splitlines())) > 60
    assert "\x1b" not in done.stdout
    assert any("\x1b[1;32mdisk" in line for line in told(image, NO_COLOR=""))
