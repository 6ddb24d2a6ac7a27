"""What is beside a place until it is whole: a killed run's is removed by the next one, a living run's never."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qmpnbd.backup import parts
from qmpnbd.backup.newfile import NewFile
from qmpnbd.backup.newfolder import new_folder

_DIES = """
import os, sys
from pathlib import Path
from qmpnbd.backup import parts
from qmpnbd.backup.newfile import NewFile
place = Path(sys.argv[1])
file = NewFile(place)
file.write(0, memoryview(b"half"))
lock, folder = parts.make_folder(place)
(folder / "half").write_text("half")
os.kill(os.getpid(), 9)
"""


def killed(place: Path) -> list[Path]:
    """Has a run die in the middle, and returns what it left."""
    subprocess.run([sys.executable, "-c", _DIES, str(place)], check=False, timeout=60)
    left = sorted(place.parent.glob(f".{place.name}.*{parts.SUFFIX}"))
    assert sorted(path.is_dir() for path in left) == [False, True]
    return left


def test_the_next_run_for_a_file_removes_what_killed_ones_left(tmp_path: Path) -> None:
    killed(tmp_path / "x")
    file = NewFile(tmp_path / "x")
    assert list(tmp_path.iterdir()) == [file.beside]
    file.publish(force=False)
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


def test_the_next_run_for_a_folder_removes_what_killed_ones_left(tmp_path: Path) -> None:
    killed(tmp_path / "x")
    with new_folder(str(tmp_path / "x")) as folder:
        assert list(tmp_path.iterdir()) == [folder]
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


def test_what_a_living_run_writes_stays(tmp_path: Path) -> None:
    first = NewFile(tmp_path / "x")
    with new_folder(str(tmp_path / "x")) as folder:
        second = NewFile(tmp_path / "x")
        assert sorted(tmp_path.iterdir()) == sorted([first.beside, second.beside, folder])
        second.discard()
        first.publish(force=False)
        (tmp_path / "x").unlink()


def test_nothing_is_removed_for_its_name_alone(tmp_path: Path) -> None:
    """Parts of other places, names that are nearly those of parts, and what a link leads to."""
    (tmp_path / "precious").write_text("precious")
    kept = [".y.3f9a01c7.part", ".x.3f9a01c.part", ".x.3f9a01c7.parts", ".x.resume.part", "x.3f9a01c7.part"]
    for name in kept:
        (tmp_path / name).write_text("mine")
    (tmp_path / ".x.00000000.part").symlink_to("precious")
    parts.clear(tmp_path / "x")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {*kept, "precious", ".x.00000000.part"}


def test_what_was_removed_before_it_was_locked_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run clears between the making and the lock."""
    claimed, times = parts.is_claimed, 0

    def clear_first(fd: int, part: Path) -> bool:
        nonlocal times
        times += 1
        if times == 1:
            parts.clear(tmp_path / "x")
        return claimed(fd, part)

    monkeypatch.setattr(parts, "is_claimed", clear_first)
    fd, part = parts.make_file(tmp_path / "x")
    assert (times, list(tmp_path.iterdir())) == (2, [part])
    os.close(fd)
    times = 0
    fd, part = parts.make_folder(tmp_path / "x")
    assert (times, list(tmp_path.iterdir())) == (2, [part])
    os.close(fd)
