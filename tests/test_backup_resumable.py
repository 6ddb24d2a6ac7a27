"""Copies that are resumed: what was noted is proved before it counts, and what is not the same is never mixed."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qmpnbd.backup import parts
from qmpnbd.backup.content import DATA, PIECE, ZERO
from qmpnbd.backup.copy_journal import CopyJournal, Written, read_journal
from qmpnbd.backup.destination import Destination, TargetTerms
from qmpnbd.backup.newfile import NewFile
from qmpnbd.backup.resumable import ResumableTarget, key_of
from qmpnbd.backup.whole_copy import Origin, WholeCopy, WholeCopyOptions, copy_disk
from qmpnbd.deadline import Deadline
from qmpnbd.errors import ImageChangedError, TargetError, TargetInUseError, UsageError
from qmpnbd.extents import ExtentMap

MIB = 1 << 20
SIZE = 8 * MIB
PIECES = 5
"""Of the data of `source`: at 1, 2, 3, 4 and 6 MiB."""


@pytest.fixture
def source(here: Path) -> Path:
    """An image with a hole before, between and behind its data."""
    path = here / "source.raw"
    with path.open("wb") as file:
        file.truncate(SIZE)
        for at in (1, 2, 3, 4, 6):
            file.seek(at * MIB)
            file.write(random.Random(at).randbytes(MIB))
    return path


def copied(source: Path, *, force: bool = False, prove: bool = True) -> WholeCopy:
    options = WholeCopyOptions(TargetTerms(force=force), prove, resume=True)
    return copy_disk(Origin(str(source), "raw"), Destination("copy.raw", "raw"), options, Deadline(60))


class StoppedError(Exception):
    """What ends a copy in these tests."""


@pytest.fixture
def ended_after(source: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Has a copy end after some pieces."""

    def end(count: int) -> None:
        write, written = ResumableTarget.write, 0

        def some(target: ResumableTarget, offset: int, data: memoryview) -> None:
            nonlocal written
            if written == count:
                raise StoppedError
            write(target, offset, data)
            written += 1

        with monkeypatch.context() as patched:
            patched.setattr(ResumableTarget, "write", some)
            with pytest.raises(StoppedError):
                copied(source)

    return end


def part() -> Path:
    return Path(".copy.raw.resume.part")


def is_whole(source: Path) -> bool:
    """Whether the copy is the disk, and nothing is beside it."""
    names = {path.name for path in Path().iterdir()}
    return names == {"source.raw", "copy.raw"} and Path("copy.raw").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("count", range(PIECES))
def test_what_was_copied_is_not_copied_again(
    source: Path, ended_after: Callable[[int], None], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended_after(count)
    assert not Path("copy.raw").exists()
    done = copied(source)
    assert (done.resumed_bytes, done.copied.data_bytes) == (count * MIB, (PIECES - count) * MIB)
    assert done.copied.zero_bytes == SIZE - PIECES * MIB
    assert is_whole(source)


def test_a_copy_that_nothing_ends_is_made_at_once(source: Path) -> None:
    assert copied(source, prove=False).resumed_bytes == 0
    assert is_whole(source)


def _flip(where: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[where] ^= 1
        path.write_bytes(content)

    return change


def _cut(length: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, length)


@pytest.mark.parametrize(
    ("name", "damage", "left"),
    [
        ("part", _flip(2 * MIB + 7), 3),
        ("part", _cut(4 * MIB), 3),
        ("part", _cut(0), 0),
        ("part", _flip(5 * MIB + 7), 4),
        ("part", Path.unlink, 0),
        ("journal", _flip(-1), 3),
        ("journal", _flip(44 + 48 + 3), 3),
        ("journal", _cut(44 + 48 * 2 + 47), 2),
        ("journal", _flip(9), 0),
        ("journal", _cut(20), 0),
        ("journal", Path.unlink, 0),
    ],
)
def test_what_is_not_what_was_noted_is_copied_again(
    source: Path, ended_after: Callable[[int], None], name: str, damage: Callable[[Path], None], left: int
) -> None:
    """Also a byte that came where zeroes must be."""
    ended_after(4)
    damage(part().with_suffix(f".{name}"))
    assert copied(source, prove=False).resumed_bytes == left * MIB
    assert is_whole(source)


def test_a_piece_is_noted_only_when_it_is_on_the_medium(
    source: Path, ended_after: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    for owner, name in ((NewFile, "write"), (NewFile, "settle"), (CopyJournal, "append")):
        own = getattr(owner, name)

        def spy(*arguments: object, own: Callable[..., None] = own, name: str = name) -> None:
            events.append(name)
            own(*arguments)

        monkeypatch.setattr(owner, name, spy)
    monkeypatch.setattr("qmpnbd.backup.resumable._SECONDS", 0.0)
    ended_after(2)
    assert events[:7] == ["append", "write", "settle", "append", "write", "settle", "append"]


@pytest.mark.parametrize("force", [False, True])
def test_another_source_is_not_mixed_with_what_was_begun(
    source: Path, ended_after: Callable[[int], None], force: bool
) -> None:
    ended_after(2)
    before = part().read_bytes()
    other = Path("other.raw")
    other.write_bytes(source.read_bytes())
    with pytest.raises(TargetInUseError, match="a copy of something else"):
        copied(other, force=force)
    other.unlink()
    assert part().read_bytes() == before
    assert copied(source).resumed_bytes == 2 * MIB


def test_a_source_that_was_written_to_since_is_not_gone_on_with(
    source: Path, ended_after: Callable[[int], None]
) -> None:
    ended_after(2)
    with source.open("r+b") as file:
        file.seek(MIB)
        file.write(b"new")
    with pytest.raises(TargetInUseError, match="written to since"):
        copied(source)
    options = WholeCopyOptions()
    copy_disk(Origin(str(source), "raw"), Destination("copy.raw", "raw"), options, Deadline(60))
    assert is_whole(source)


def test_a_source_that_is_written_to_meanwhile_is_told(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = ResumableTarget.write

    def touch(target: ResumableTarget, offset: int, data: memoryview) -> None:
        os.utime(source)
        write(target, offset, data)

    monkeypatch.setattr(ResumableTarget, "write", touch)
    with pytest.raises(ImageChangedError, match="while it was copied"):
        copied(source)
    assert not Path("copy.raw").exists()


def test_two_runs_do_not_write_to_one_file(source: Path) -> None:
    content = ExtentMap.uniform(SIZE, DATA)
    target = ResumableTarget("copy.raw", content, key_of("x", content), force=False, deadline=Deadline(60))
    with pytest.raises(TargetInUseError, match="another run copies there"):
        copied(source)
    target.discard()


def test_a_run_that_was_killed_while_its_file_got_its_name_does_not_have_that_written_to(source: Path) -> None:
    copied(source)
    os.link("copy.raw", part())
    with pytest.raises(TargetInUseError, match="it exists"):
        copied(source)
    kept = Path("copy.raw").stat().st_ino
    assert copied(source, force=True).resumed_bytes == 0
    assert Path("copy.raw").stat().st_ino != kept
    assert is_whole(source)


@pytest.mark.parametrize("where", ["qmpnbd.backup.newfile.write_all", "qmpnbd.backup.copy_journal.write_all"])
def test_a_target_that_is_full_keeps_what_was_copied(
    source: Path, ended_after: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Be it the file that cannot be written, or its journal."""

    def full(*_: object) -> None:
        raise TargetError("it is full", where="here")

    ended_after(3)
    with monkeypatch.context() as patched:
        patched.setattr(where, full)
        with pytest.raises(TargetError, match="full"):
            copied(source)
    assert copied(source).resumed_bytes == 3 * MIB
    assert is_whole(source)


def test_only_raw_files_are_resumed(source: Path) -> None:
    for form, target in (("qcow2", "copy.qcow2"), ("device", "/dev/null")):
        where = Destination(target, form)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="only a copy to a raw file"):
            copy_disk(Origin(str(source), "raw"), where, WholeCopyOptions(resume=True), Deadline(60))


def test_a_key_tells_sources_and_contents_apart() -> None:
    contents = [ExtentMap.uniform(SIZE, DATA), ExtentMap.uniform(SIZE, ZERO), ExtentMap.uniform(SIZE + 1, DATA)]
    contents.append(ExtentMap(np.array([PIECE, SIZE], np.uint64), np.array([DATA, ZERO], np.uint64)))
    assert len({key_of(name, content) for name in ("a", "b", "") for content in contents}) == 12


def test_a_journal_of_too_many_records_is_read_as_far_as_it_can_be_right(tmp_path: Path) -> None:
    records = [Written(at, 1, bytes(32)) for at in range(100)]
    CopyJournal(tmp_path / "journal", bytes(32), records).close()
    found = read_journal(tmp_path / "journal", 10)
    assert found is not None
    assert list(found[1]) == list(range(10))


def test_no_link_is_followed(source: Path) -> None:
    Path("precious").write_text("precious")
    part().symlink_to("precious")
    with pytest.raises(TargetError, match="cannot be made"):
        copied(source)
    part().unlink()
    parts.journal_of(part()).symlink_to("precious")
    with pytest.raises(TargetError, match="cannot be told"):
        copied(source)
    assert Path("precious").read_text() == "precious"
