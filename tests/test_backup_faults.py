"""Whatever cuts a backup short: the guest is unharmed, the next run needs no repair, and no byte is lost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from qmpnbd.backup.begin import BegunBackup, begin
from qmpnbd.backup.catalog import shelf_of
from qmpnbd.backup.draft import Draft
from qmpnbd.backup.plan import Wish
from qmpnbd.backup.prove_layer import prove_layer
from qmpnbd.backup.run import back_up
from qmpnbd.backup.storing import Storing
from qmpnbd.backup.tally import DisksProgress
from qmpnbd.deadline import Deadline
from qmpnbd.errors import (
    BitmapError,
    DiskBusyError,
    InterferenceError,
    NbdError,
    NotProvedError,
    QmpnbdError,
    RepositoryBusyError,
    ScratchError,
    TargetError,
)
from qmpnbd.nbd.uri import NbdUri
from tests.backup_dying import mortal_backup
from tests.backups import CHAIN, BackupMachine, new_images, quit_in_order, restless, running
from tests.instants import SIZE, UNIT
from tests.qemu_versions import QemuBinaries, each_qemu, installed
from tests.servers import blockdev, wait_until
from tests.test_backup_reasons import ended, told, write

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]  # many runs in one test, on a machine that may be busy

T = TypeVar("T")

ROOT = Path(__file__).parent.parent


def arguments(machine: BackupMachine) -> list[str]:
    """The command line that does what `BackupMachine.back_up` does."""
    nbd = str(NbdUri.unix(str(machine.socket), ""))
    return [
        *(str(machine.repository.path), "--qmp", str(machine.server.qmp), "--chain", CHAIN, "--nbd", nbd),
        *("--runtime-dir", str(machine.folder), "--scratch", str(machine.folder)),
    ]


def names(machine: BackupMachine) -> list[str]:
    """What is in the chain: backups, and what is none."""
    chain = machine.repository.path / CHAIN
    return sorted(each.name for each in chain.iterdir()) if chain.exists() else []


def is_untouched(machine: BackupMachine, before: dict[str, list[str]], chain: list[str]) -> bool:
    return (machine.left(), machine.checkpoints(), names(machine)) == ([], before, chain)


@contextlib.contextmanager
def nothing_is_lost(machine: BackupMachine) -> Iterator[None]:
    """A body that has a backup fail leaves everything as it was; the next one is an increment, and right."""
    machine.back_up()
    write(machine, 1)
    checkpoints, chain = machine.checkpoints(), names(machine)
    yield
    assert is_untouched(machine, checkpoints, chain)
    write(machine, 2)
    done = machine.back_up()
    assert told(done) == [("increment", "")] * len(machine.disks)
    assert machine.is_right(done.backup)


@each_qemu
@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.timeout(1800)  # fifty cuts and as many backups, on a machine that may be busy
def test_ended_after_every_step_the_next_run_loses_nothing(
    binaries: QemuBinaries, number: signal.Signals, jobs: int, folder: Path
) -> None:
    """Each step on the installed QEMU, some on the others; with two disks at a time other steps come after each."""
    stride = 13 if binaries != installed() else 1 if (number, jobs) == (signal.SIGKILL, 1) else 7
    with running(binaries, folder, new_images(binaries, folder)) as machine:
        machine.back_up()
        published = cut = 0
        with mortal_backup(number, *arguments(machine), "--jobs", str(jobs)) as mortal:
            step, code = 1, -1
            while code:
                write(machine, step % 100)
                contents, chain = machine.contents(), names(machine)
                code = mortal.ends_after(step)
                cut += bool(code)
                assert code in (0, -number, 128 + number), (step, code)
                made = [each for each in names(machine) if each not in chain and not each.startswith(".")]
                if number is signal.SIGTERM:
                    assert machine.left() == [], step
                    assert len(names(machine)) == len(chain) + len(made), step
                for each in made:
                    published += 1
                    newest = machine.repository.find(CHAIN, "latest")
                    assert str(newest.name) == each
                    assert machine.is_right(newest, contents), step
                machine.write("vd0", (step % 97 + 20) * UNIT // 2, b"between" * 4)
                done = machine.back_up()
                assert [each.entry.kind for each in done.disks] == ["increment"] * 2, step
                assert done.damaged == (), step
                assert machine.left() == [], step
                assert machine.is_right(done.backup), step
                step += stride
        assert cut > 40 // stride
        assert published > 1 or stride > 1


@each_qemu
def test_a_run_that_was_killed_before_it_committed_is_committed_by_the_next(
    binaries: QemuBinaries, folder: Path
) -> None:
    """Or else every backup after it would stand beside it and not on it."""
    with running(binaries, folder, new_images(binaries, folder)) as machine:
        first = machine.back_up().backup
        write(machine, 1)

        async def publish_and_die() -> str:
            shelf = shelf_of(machine.repository, CHAIN)
            how = machine.options().begin
            async with begin(str(machine.server.qmp), CHAIN, shelf.catalog, options=how) as begun:
                with machine.repository.lock("test"):
                    draft = machine.repository.begin(CHAIN, begun.id, begun.number)
                    storing = Storing(draft, shelf.backups)
                    stored = [await asyncio.to_thread(storing.disk, task, Deadline(60)) for task in begun.tasks]
                    await begun.release()
                    manifest = first.manifest.model_copy(
                        update={
                            "id": begun.id, "number": begun.number, "extras": (), "parent": first.manifest.id,
                            "disks": tuple(each.entry for each in stored),
                        }
                    )  # fmt: skip
                    draft.publish(manifest)
                await begun.session.monitor.close()  # as a killed run does: nothing is taken down
            raise AssertionError("the context was left without a word")

        with pytest.raises(QmpnbdError):
            asyncio.run(publish_and_die())
        published = machine.repository.find(CHAIN, "latest")
        assert [len(each) for each in machine.checkpoints().values()] == [2, 2]
        write(machine, 2)
        done = machine.back_up()
        assert [each.entry.base for each in done.disks] == [published.manifest.id] * 2
        assert machine.is_right(done.backup)
        assert [len(each) for each in machine.checkpoints().values()] == [1, 1]


@each_qemu
def test_what_a_killed_run_left_undecided_is_decided_after_qemu_was_started_again(
    binaries: QemuBinaries, folder: Path
) -> None:
    images = new_images(binaries, folder)
    with running(binaries, folder, images) as machine:
        machine.back_up()
        write(machine, 1)
        with mortal_backup(signal.SIGKILL, *arguments(machine)) as mortal:
            step = 1
            while [len(each) for each in machine.checkpoints().values()] != [2, 2]:
                assert mortal.ends_after(step) == -signal.SIGKILL
                step += 1
        write(machine, 2)
        for each in machine.server.exports():
            if each.startswith("qmpnbd-"):
                machine.server.side("block-export-del", id=each, mode="hard")
        quit_in_order(machine)
        ended(machine)
    with running(binaries, folder, images) as machine:
        assert [len(each) for each in machine.checkpoints().values()] == [2, 2]
        done = machine.back_up()
        assert told(done) == [("increment", "")] * 2
        assert machine.is_right(done.backup)
        assert [len(each) for each in machine.checkpoints().values()] == [1, 1]


@each_qemu
def test_qemu_killed_in_the_middle_of_a_copy(binaries: QemuBinaries, folder: Path) -> None:
    images = new_images(binaries, folder)
    with running(binaries, folder, images) as machine:
        first = machine.back_up().backup
        contents = machine.contents()
        write(machine, 1)
        chain = names(machine)
        with pytest.raises(QmpnbdError):
            machine.back_up(Wish("full"), progress=lambda *_: os.kill(machine.server.pid, signal.SIGKILL))
        assert names(machine) == chain
        assert machine.is_right(first, contents)
    with running(binaries, folder, images) as machine:
        done = machine.back_up()
        assert {each.entry.kind for each in done.disks} == {"compared"}
        assert machine.is_right(done.backup)


def test_the_target_full_in_the_middle_of_a_copy(binaries: QemuBinaries, folder: Path) -> None:
    with running(binaries, folder, new_images(binaries, folder)) as machine, nothing_is_lost(machine):
        limit = 400 * 1024  # more than the scratch images that are made, less than a full layer

        def limited() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        command = [sys.executable, "-m", "qmpnbd", "backup", *arguments(machine), "--type", "full", "--json"]
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=60, preexec_fn=limited, cwd=ROOT
        )
        assert done.returncode == TargetError.exit_code, done.stderr
        assert json.loads(done.stdout)["error"]["type"] == "TargetError"


@each_qemu
def test_the_target_gone_in_the_middle_of_a_copy(binaries: QemuBinaries, folder: Path) -> None:
    with (
        running(binaries, folder, new_images(binaries, folder)) as machine,
        nothing_is_lost(machine),
        pytest.raises(TargetError),
    ):
        machine.back_up(progress=_gone(machine))


@each_qemu
def test_what_cannot_be_proved_is_neither_published_nor_committed(
    binaries: QemuBinaries, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A medium that changes a byte after it was written."""
    original = Storing.disk

    def rotten(storing: Storing, task: object, deadline: Deadline) -> object:
        stored = original(storing, task, deadline)  # type: ignore[arg-type]
        with stored.path.open("r+b") as file:
            file.seek(UNIT + 100)
            byte = file.read(1)
            file.seek(UNIT + 100)
            file.write(bytes([byte[0] ^ 1]))
        return stored

    with (
        running(binaries, folder, new_images(binaries, folder)) as machine,
        nothing_is_lost(machine),
        monkeypatch.context() as patch,
    ):
        patch.setattr(Storing, "disk", rotten)
        with pytest.raises(NotProvedError):
            machine.back_up()


@pytest.mark.parametrize(("proof", "left"), [("hashes", 1), ("sizes", 0)])
@pytest.mark.parametrize("file", ["machine.json", "*.nvram.raw"])
def test_what_is_kept_beside_the_disks_is_read_again_before_the_backup_counts(
    binaries: QemuBinaries, folder: Path, monkeypatch: pytest.MonkeyPatch, file: str, proof: str, left: int
) -> None:
    """A byte becomes another one, or all are cut off, after the point in time was released: long after the writing."""
    variables = folder / "vars.fd"
    variables.write_bytes(b"vars" * (1 << 15))
    flash = ["-blockdev", blockdev(variables, "vars", "raw"), "-machine", "pc,pflash0=vars"]
    release = BegunBackup.release

    async def rotten(begun: BegunBackup) -> None:
        await release(begun)
        (path,) = machine.repository.path.glob(f"{CHAIN}/.partial-*/{file}")
        content = path.read_bytes()
        path.write_bytes((content[:-1] + b"!") * left)

    with (
        running(binaries, folder, new_images(binaries, folder, 1), *flash) as machine,
        nothing_is_lost(machine),
        monkeypatch.context() as patch,
    ):
        patch.setattr(BegunBackup, "release", rotten)
        with pytest.raises(NotProvedError, match="hash is another" if left else "it has 0 bytes"):
            machine.back_up(proof=proof)


@each_qemu
def test_a_point_in_time_that_was_lost_is_neither_published_nor_committed(binaries: QemuBinaries, folder: Path) -> None:
    """What was read may be of two instants: only `release` tells."""
    images = new_images(binaries, folder)
    with running(binaries, folder, images) as machine, nothing_is_lost(machine), pytest.raises(InterferenceError):
        machine.back_up(progress=_lost(machine))


@each_qemu
def test_the_connection_cut_in_the_middle_of_a_copy(binaries: QemuBinaries, folder: Path) -> None:
    """With three disks: of two at a time all may have come already."""
    was_cut = False

    def cut(*_: object) -> None:
        nonlocal was_cut
        if not was_cut:
            was_cut = True  # once: QEMU refuses to end what is ending
            for each in machine.server.exports():
                if each.startswith("qmpnbd-"):
                    machine.server.side("block-export-del", id=each, mode="hard")

    with (
        running(binaries, folder, new_images(binaries, folder, 3)) as machine,
        nothing_is_lost(machine),
        pytest.raises(NbdError),
    ):
        machine.back_up(progress=cut)


@each_qemu
def test_a_guest_that_overwrites_more_than_the_scratch_takes_goes_on(binaries: QemuBinaries, folder: Path) -> None:
    """The backup is given up, the guest is not hurt."""

    def flood(*_: object) -> None:
        for at in range(0, SIZE, 1 << 20):
            machine.write("vd0", at, os.urandom(1 << 20))
        wait_until(lambda: not any(each.startswith("qmpnbd-") for each in machine.server.exports()), "the end of it")

    with running(binaries, folder, new_images(binaries, folder)) as machine, nothing_is_lost(machine):
        options = machine.options(progress=flood)
        begin_options = replace(options.begin, instant=replace(options.begin.instant, scratch_bytes=4 << 20))
        run = back_up(
            str(machine.server.qmp), machine.repository.path, CHAIN, (), replace(options, begin=begin_options)
        )
        with pytest.raises(ScratchError):
            asyncio.run(run)
        assert machine.server.side("query-status")["status"] != "io-error"


def test_two_runs_at_once_and_the_second_is_told_of_the_first(binaries: QemuBinaries, folder: Path) -> None:
    with (
        running(binaries, folder, new_images(binaries, folder)) as machine,
        nothing_is_lost(machine),
        machine.repository.lock("a backup of chain nightly"),
        pytest.raises(RepositoryBusyError, match=str(os.getpid())),
    ):
        machine.back_up()


@pytest.mark.parametrize("stage", ["copy", "proof"])
def test_two_repositories_at_once_and_the_first_is_not_disturbed(
    binaries: QemuBinaries, folder: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bitmaps are undecided, and not in use any more while it proves what it wrote: nobody else may decide."""
    codes: list[int] = []
    monitor = folder / "second.qmp"
    one_at_a_time = threading.Lock()  # layers are proved by several threads

    def second(*_: object) -> None:
        with one_at_a_time:
            if not codes:
                command = [sys.executable, "-m", "qmpnbd", "backup", str(other.path), "--qmp", str(monitor)]
                command += arguments(machine)[3:]
                done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, cwd=ROOT)
                codes.append(done.returncode)

    def proved(*given: Any, **more: Any) -> None:
        second()
        prove_layer(*given, **more)

    listening = ("-qmp", f"unix:{monitor},server=on,wait=off")
    with running(binaries, folder, new_images(binaries, folder), *listening) as machine:
        other = type(machine.repository).create(folder / "other")
        machine.back_up()
        write(machine, 1)
        with monkeypatch.context() as patch:
            if stage == "proof":
                patch.setattr("qmpnbd.backup.run.prove_layer", proved)
            done = machine.back_up(progress=second if stage == "copy" else None)
        assert told(done) == [("increment", "")] * 2
        assert machine.is_right(done.backup)
        assert codes[0] in (BitmapError.exit_code, DiskBusyError.exit_code)
        write(machine, 2)
        done = machine.back_up()
        assert told(done) == [("increment", "")] * 2
        assert machine.is_right(done.backup)


@each_qemu
def test_nothing_is_proved_or_published_before_what_was_read_is_known_to_hold(
    binaries: QemuBinaries, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The point in time is released first, so that a lost one is never published, and the guest is free early."""
    seen: list[tuple[str, list[str], list[str]]] = []
    one_at_a_time = threading.Lock()  # layers are proved by several threads, and there is one monitor

    def noted(what: str, original: Callable[..., T]) -> Callable[..., T]:
        def work(*given: Any, **more: Any) -> T:
            with one_at_a_time:
                jobs = [job["id"] for job in machine.server.side("query-jobs")]
                exports = [each for each in machine.server.exports() if each.startswith("qmpnbd-")]
                seen.append((what, jobs, exports))
            return original(*given, **more)

        return work

    with running(binaries, folder, new_images(binaries, folder)) as machine:
        monkeypatch.setattr("qmpnbd.backup.run.prove_layer", noted("prove", prove_layer))
        monkeypatch.setattr(Draft, "publish", noted("publish", Draft.publish))
        monkeypatch.setattr(BegunBackup, "commit", noted("commit", BegunBackup.commit))
        machine.back_up()
    assert seen == [(what, [], []) for what in ("prove", "prove", "publish", "commit")]


@each_qemu
def test_a_guest_that_writes_through_failures_is_backed_up_right(binaries: QemuBinaries, folder: Path) -> None:
    with running(binaries, folder, new_images(binaries, folder)) as machine:
        with restless(machine) as guest:
            done = [machine.back_up()]
            for fault in (_gone, _lost):
                with pytest.raises((TargetError, InterferenceError)):
                    machine.back_up(progress=fault(machine))
                done.append(machine.back_up())
        assert [each.disks[0].entry.kind for each in done] == ["full", "increment", "increment"]
        for each in done:
            guest.moment(machine.restored_disks(each.backup))


def _gone(machine: BackupMachine) -> Callable[[DisksProgress], None]:
    def remove(*_: object) -> None:
        for each in (machine.repository.path / CHAIN).glob(".partial-*"):
            each.rename(machine.folder / f"gone{each.name}")  # at once: another disk may just make a file in it

    return remove


def _lost(machine: BackupMachine) -> Callable[[DisksProgress], None]:
    def cancel(*_: object) -> None:
        for job in machine.server.side("query-jobs"):
            machine.server.side("job-cancel", id=job["id"])

    return cancel
