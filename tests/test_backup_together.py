"""Disks of a backup are copied at the same time, within one limit of bandwidth and of memory; one fault ends all."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qmpnbd.backup.copy import Progress
from qmpnbd.backup.pace import Pace
from qmpnbd.backup.plan import Wish
from qmpnbd.backup.run import JOBS, BackupOptions
from qmpnbd.backup.sources import NbdSource
from qmpnbd.backup.tally import DisksProgress, Tally
from qmpnbd.cli.backup import disks_text
from qmpnbd.cli.main import main
from qmpnbd.cli.parser import all_commands
from qmpnbd.deadline import Deadline
from qmpnbd.errors import TargetError
from tests.backups import BackupMachine, new_images, running
from tests.qemu_versions import QemuBinaries, each_qemu
from tests.servers import qemu_img, qemu_io
from tests.test_backup_faults import arguments, nothing_is_lost
from tests.test_backup_reasons import told, write

ROOT = Path(__file__).parent.parent
SECONDS = 60.0
MIB = 1 << 20

Chunks = Iterator[tuple[int, memoryview]]


def after_the_first_chunk(monkeypatch: pytest.MonkeyPatch, act: Callable[[NbdSource, Deadline], None]) -> None:
    """Has something done in the middle of the copy of each disk, when data of it has come and more is to come."""
    original = NbdSource.chunks

    def chunks(source: NbdSource, ranges: Any, deadline: Deadline, *more: Any) -> Chunks:
        for number, each in enumerate(original(source, ranges, deadline, *more)):
            yield each
            if not number:
                act(source, deadline)

    monkeypatch.setattr(NbdSource, "chunks", chunks)


@pytest.mark.real
@each_qemu
def test_disks_are_read_at_the_same_time(binaries: QemuBinaries, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No disk goes on before data of each of them has come."""
    both = threading.Barrier(2)
    with running(binaries, folder, new_images(binaries, folder)) as machine:
        with monkeypatch.context() as patch:
            after_the_first_chunk(patch, lambda *_: (both.wait(SECONDS), None)[1])
            done = machine.back_up()
        assert [each.entry.name for each in done.disks] == ["vd0", "vd1"]
        assert [each.path.name for each in done.disks] == ["vd0.qcow2", "vd1.qcow2"]
        assert machine.is_right(done.backup)


@pytest.mark.real
@pytest.mark.parametrize(("jobs", "disks"), [(1, 2), (2, 3)])
def test_no_more_disks_are_read_at_a_time_than_there_are_jobs(
    binaries: QemuBinaries, folder: Path, monkeypatch: pytest.MonkeyPatch, jobs: int, disks: int
) -> None:
    at_work, most, lock, original = 0, 0, threading.Lock(), NbdSource.chunks

    def counted(*given: Any) -> Chunks:
        nonlocal at_work, most
        with lock:
            at_work += 1
            most = max(most, at_work)
        yield from original(*given)
        with lock:
            at_work -= 1

    with running(binaries, folder, new_images(binaries, folder, disks)) as machine:
        monkeypatch.setattr(NbdSource, "chunks", counted)
        assert machine.is_right(machine.back_up(jobs=jobs).backup)
    assert most <= jobs


@pytest.mark.real
@each_qemu
def test_a_disk_that_fails_ends_the_others_and_the_backup(
    binaries: QemuBinaries, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one is in the middle of its copy, and would never end by itself."""
    both = threading.Barrier(2)

    def act(source: NbdSource, deadline: Deadline) -> None:
        if not both.wait(SECONDS):
            raise TargetError("no room for this one", where=source.where)
        while True:
            deadline.check("the other disk", source.where)

    with (
        running(binaries, folder, new_images(binaries, folder)) as machine,
        nothing_is_lost(machine),
        monkeypatch.context() as patch,
    ):
        after_the_first_chunk(patch, act)
        with pytest.raises(TargetError, match="no room for this one"):
            machine.back_up(Wish("full"))


@pytest.mark.real
def test_all_that_is_read_of_all_disks_shares_one_limit(
    binaries: QemuBinaries, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what is read to be compared with the last backup."""
    waited: list[tuple[Pace, int]] = []
    monkeypatch.setattr(Pace, "wait", lambda pace, length, *_: waited.append((pace, length)))
    with running(binaries, folder, new_images(binaries, folder)) as machine:
        done = machine.back_up(bytes_per_second=1)
        full = sum(each.entry.data_bytes for each in done.disks)
        assert sum(length for _, length in waited) == full
        assert len({id(pace) for pace, _ in waited}) == 1
        waited.clear()
        write(machine, 1)
        for name, bitmaps in machine.checkpoints().items():
            machine.server.side("block-dirty-bitmap-remove", node=f"n-{name}", name=bitmaps[0])
        done = machine.back_up(bytes_per_second=1)
        assert {kind for kind, _ in told(done)} == {"compared"}
        assert sum(length for _, length in waited) >= full
        assert len({id(pace) for pace, _ in waited}) == 1


def test_who_comes_later_does_not_make_those_wait_longer_who_wait_already() -> None:
    now, later = 100.0, list[float]()

    def sleep(seconds: float) -> None:
        nonlocal now
        if later:
            later.append(seconds)
            raise InterruptedError
        later.append(0.0)
        with pytest.raises(InterruptedError):
            pace.wait(100, Deadline(None), "the second")
        now += seconds

    pace = Pace(1000, lambda: now, sleep)
    pace.wait(50, Deadline(None), "the first")
    assert now == pytest.approx(100.05)
    assert later == pytest.approx([0.0, 0.15])


def test_the_disks_are_told_by_one_thread_at_a_time_and_add_up() -> None:
    told: list[DisksProgress] = []
    inside = threading.Lock()

    def tell(progress: DisksProgress) -> None:
        assert inside.acquire(blocking=False)
        told.append(progress)
        inside.release()

    tally = Tally(["a", "b", "c"], tell)

    def work(disk: str) -> None:
        tally.begin(disk, 1000)
        for done in range(1, 1001):
            tally.note(disk, Progress(done, 1000, 1.0))

    tally.begin("c", 0)
    threads = [threading.Thread(target=work, args=(disk,)) for disk in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert len(told) == 2000
    assert (told[-1].whole.data_bytes, told[-1].whole.of_bytes) == (2000, 2000)
    assert [each.whole.data_bytes for each in told] == list(range(1, 2001))


@pytest.mark.parametrize(
    ("disks", "text"),
    [
        ({"vd0": Progress(MIB, 4 * MIB, 1), "vd1": None}, "1 MiB, 1 MiB/s; 0 of 2 disks copied; vd0 25 %"),
        (
            {"vd0": Progress(4 * MIB, 4 * MIB, 1), "vd1": Progress(MIB, MIB * 6, 1), "vd2": Progress(0, 0, 1)},
            "5 MiB of 10 MiB (50 %), 5 MiB/s; 2 of 3 disks copied; vd1 17 %",
        ),
    ],
)
def test_how_far_all_disks_are_is_put_into_words(disks: dict[str, Progress | None], text: str) -> None:
    assert disks_text(DisksProgress("vd0", disks, 1.0)) == text


@pytest.mark.parametrize("words", ["backup R --chain c --qmp s", "restore R latest T", "repository prune R"])
def test_a_limit_of_no_bytes_at_all_is_refused(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*words.split(), "--rate", "0"])
    assert "--rate: '0' is not a whole number of 1 or more" in capsys.readouterr().err


def test_the_command_line_has_the_default_of_the_library() -> None:
    assert all_commands()["backup"].get_default("jobs") == BackupOptions().jobs == JOBS


@pytest.mark.real
@pytest.mark.parametrize("more", [(), ("--compress",)], ids=["plain", "compressed"])
def test_memory_is_bounded_whatever_the_disks_hold(binaries: QemuBinaries, folder: Path, more: tuple[str, ...]) -> None:
    """Two disks at a time, each larger than the bound."""
    images = {f"vd{number}": folder / f"large-{number}.qcow2" for number in range(2)}
    for image in images.values():
        qemu_img("create", "-q", "-f", "qcow2", image, "192M")
        qemu_io(image, "write -P 7 0 192M")
    with running(binaries, folder, images) as machine:
        assert peak_mib(machine, *more) <= 150


def peak_mib(machine: BackupMachine, *more: str) -> int:
    """Returns the peak memory of a backup: of the program itself, not of what it was forked from."""
    program = "import sys; from qmpnbd.cli.main import main; code = main(sys.argv[1:]); "
    program += "sys.stderr.write(open('/proc/self/status').read()); sys.exit(code)"
    command = [sys.executable, "-c", program, "backup", *arguments(machine), *more]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300, cwd=ROOT, env=os.environ)
    assert done.returncode == 0, done.stderr
    found = re.search(r"VmHWM:\s+(\d+) kB", done.stderr)
    assert found is not None
    return int(found[1]) >> 10
