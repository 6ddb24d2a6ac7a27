"""A repository: what is published is whole, in order, and found again; one run at a time changes it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpnbd.backup import repository_lock
from qmpnbd.backup.check import check
from qmpnbd.backup.content import ABSENT, DATA, PIECE, ZERO, pieces
from qmpnbd.backup.copy import CopyOptions
from qmpnbd.backup.hashes import DIGEST, Hashes
from qmpnbd.backup.layout import FILE_NAME, BackupName, backup_of, stem_of
from qmpnbd.backup.locks import is_locked
from qmpnbd.backup.manifest import TemplateEntry
from qmpnbd.backup.prune import carry_out, choose_without
from qmpnbd.backup.repository import Repository, chain_of
from qmpnbd.backup.repository_lock import Holder
from qmpnbd.deadline import Deadline
from qmpnbd.errors import (
    NoSuchBackupError,
    NotProvedError,
    RepositoryBusyError,
    RepositoryDamagedError,
    TargetError,
    TargetInUseError,
    UsageError,
)
from qmpnbd.extents import ExtentMap
from tests.chains import converted
from tests.qemu_versions import QemuBinaries, each_qemu
from tests.stored import CHAIN, SIZE, Stored, make_backup, make_draft

ROOT = Path(__file__).parent.parent


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository.create(tmp_path / "repository")


def test_a_published_backup_is_found_again(repository: Repository) -> None:
    first = make_backup(repository, {"vd0": Stored(["write -P 1 0 1M"])})
    second = make_backup(repository, {"vd0": Stored(["write -P 2 64k 128k"], first)})
    again = Repository.open(repository.path)
    assert again.id == repository.id
    assert again.chains() == [CHAIN]
    assert again.backups(CHAIN) == (first, second)
    for what in (second.manifest.id, "2", "latest", "2999-01-01T00:00:00Z"):
        assert again.find(CHAIN, what) == second
    assert chain_of(second, "vd0") == (second, first)
    assert second.manifest.before is not None
    assert second.manifest.before.id == first.manifest.id == second.manifest.parent
    assert again.newest_number(CHAIN) == 2


@pytest.mark.parametrize("what", ["deadbeef", "3", "99999999999999999999999", "2020-01-01"])
def test_what_is_not_there_is_told(repository: Repository, what: str) -> None:
    make_backup(repository, {"vd0": Stored()})
    with pytest.raises(NoSuchBackupError, match="there is no backup"):
        repository.find(CHAIN, what)


def test_a_backup_names_its_disks(repository: Repository) -> None:
    backup = make_backup(repository, {"vd0": Stored()}, extras={"machine.json": b"{}"})
    with pytest.raises(NoSuchBackupError, match="no disk 'vd1'"):
        backup.image("vd1")
    with pytest.raises(NoSuchBackupError, match="no 'nvram'"):
        backup.extra_file("nvram")
    assert backup.extra_file("machine.json").read_bytes() == b"{}"


@each_qemu
def test_a_repository_that_was_moved_is_read_by_stock_tools(binaries: QemuBinaries, tmp_path: Path) -> None:
    repository = Repository.create(tmp_path / "repository")
    first = make_backup(repository, {"vd0": Stored(["write -P 1 0 1M"])})
    second = make_backup(repository, {"vd0": Stored(["write -P 2 64k 128k"], first)})
    third = make_backup(repository, {"vd0": Stored(["write -z 0 64k"], second)})
    choice = choose_without(repository.backups(CHAIN), {second.manifest.id}, where="test")
    with repository.lock("test"):
        carry_out(repository, choice, CopyOptions(), Deadline(60))
    moved = Repository.open(Path(shutil.move(repository.path, tmp_path / "elsewhere")))
    image = moved.find(CHAIN, third.manifest.id).image("vd0")
    flat = tmp_path / "flat"
    subprocess.run([binaries.img, "convert", "-f", "qcow2", "-O", "raw", image, flat], check=True, timeout=60)
    expected = bytes(65536) + bytes([2]) * 131072 + bytes([1]) * ((1 << 20) - 196608)
    assert flat.read_bytes() == expected.ljust(SIZE, b"\0")
    for backup in moved.backups(CHAIN):
        subprocess.run([binaries.img, "check", "-q", backup.image("vd0")], check=True, timeout=60)


def test_a_folder_with_something_in_it_becomes_no_repository(tmp_path: Path, repository: Repository) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(TargetInUseError, match="no empty folder"):
        Repository.create(tmp_path / "full")
    with pytest.raises(TargetInUseError, match="already"):
        Repository.create(repository.path)
    with pytest.raises(TargetInUseError, match="no empty folder"):
        Repository.create(tmp_path / "full" / "file")
    (tmp_path / "empty").mkdir()
    assert Repository.create(tmp_path / "empty").chains() == []
    with pytest.raises(TargetError, match="No such file"):
        Repository.create(tmp_path / "no" / "such")
    with pytest.raises(NoSuchBackupError, match="no repository"):
        Repository.open(tmp_path / "full")


def test_only_the_owner_may_look_into_a_repository(repository: Repository) -> None:
    make_backup(repository, {"vd0": Stored()})
    folders = [repository.path, *(path for path in repository.path.rglob("*") if path.is_dir())]
    assert {stat.S_IMODE(path.stat().st_mode) for path in folders} == {0o700}


class TestLock:
    def test_it_names_its_holder(self, repository: Repository) -> None:
        expected = rf"a backup of nightly \(process {os.getpid()} on .*, since 20"
        with (
            repository.lock("a backup of nightly"),
            pytest.raises(RepositoryBusyError, match=expected) as busy,
            Repository.open(repository.path).lock("another"),
        ):
            pass
        assert busy.value.exit_code == 80
        with repository.lock("another") as killed:
            assert killed is None

    def test_one_of_a_run_that_was_killed_is_taken_over(self, repository: Repository) -> None:
        code = (
            "import sys, pathlib, time\nfrom qmpnbd.backup.repository import Repository\n"
            "with Repository.open(pathlib.Path(sys.argv[1])).lock('a long backup'):\n"
            "    print('held', flush=True)\n    time.sleep(100)"
        )
        with subprocess.Popen(
            [sys.executable, "-c", code, repository.path], stdout=subprocess.PIPE, cwd=ROOT, text=True
        ) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            expected = rf"a long backup \(process {holder.pid} on "
            with pytest.raises(RepositoryBusyError, match=expected), repository.lock("another"):
                pass
            holder.send_signal(signal.SIGKILL)
        with repository.lock("another") as killed:
            assert killed is not None
            assert (killed.pid, killed.what) == (holder.pid, "a long backup")
        with repository.lock("another") as killed:
            assert killed is None

    @pytest.mark.parametrize(
        "content",
        [
            *(b"", b"nonsense", b"[" * 5000, b'{"pid": "x"}', b"\xff"),
            *(b'{"pid": %s, "host": "x", "since": "", "what": ""}' % pid for pid in (b"1e999", b"9" * 40, b"0", b"-1")),
        ],
    )
    def test_one_that_says_nothing_of_sense_is_still_held(self, repository: Repository, content: bytes) -> None:
        with repository.lock("a backup"):
            (repository.path / ".lock").write_bytes(content)
            with pytest.raises(RepositoryBusyError, match="does not say who"), repository.lock("another"):
                pass

    def test_whether_it_is_held_can_be_asked_without_being_in_anybodys_way(
        self, repository: Repository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also not for the moment of the question, and where a killed run's number is another process's now."""
        asked = []

        def ask(fd: int) -> bool:
            dead = Holder(os.getpid(), os.uname().nodename, "", "a backup")
            (repository.path / ".lock").write_text(json.dumps(asdict(dead)))
            with Repository.open(repository.path).lock("another"):
                asked.append(is_locked(fd))
            return is_locked(fd)

        with repository.lock("a backup"):
            assert repository.is_held()
        monkeypatch.setattr(repository_lock, "is_locked", ask)
        assert (repository.is_held(), asked) == (False, [True])

    def test_whoever_changes_something_has_to_hold_it(self, repository: Repository) -> None:
        for change in (lambda: repository.begin(CHAIN, "00000001", 1), repository.recover):
            with pytest.raises(UsageError, match="whoever holds it"):
                change()

    def test_readers_do_not_keep_each_other_nor_new_backups_out(self, repository: Repository) -> None:
        with repository.reading(), Repository.open(repository.path).reading():
            made = make_backup(repository, {"vd0": Stored()})
            assert [each.name for each in repository.backups(CHAIN)] == [made.name]

    def test_nobody_reads_while_backups_are_removed(self, repository: Repository) -> None:
        with (
            repository.lock("prune"),
            repository.alone(),
            pytest.raises(RepositoryBusyError, match="being removed"),
            repository.reading(),
        ):
            pass


class TestDraft:
    def test_one_that_is_discarded_leaves_nothing(self, repository: Repository) -> None:
        with repository.lock("test"):
            draft, _ = make_draft(repository, {"vd0": Stored(["write 0 64k"])})
            draft.discard()
            draft.discard()
        assert list((repository.path / CHAIN).iterdir()) == []
        assert repository.backups(CHAIN) == ()

    def test_one_that_is_published_is_not_discarded_afterwards(self, repository: Repository) -> None:
        with repository.lock("test"):
            draft, manifest = make_draft(repository, {"vd0": Stored(["write 0 64k"])})
            backup = draft.publish(manifest)
            draft.discard()
        assert repository.backups(CHAIN) == (backup,)

    @pytest.mark.parametrize(
        ("harm", "message"),
        [
            (lambda path: (path / "vd0.qcow2").unlink(), "is missing"),
            (lambda path: (path / "vd0.hashes").unlink(), "is missing"),
            (lambda path: os.truncate(path / "vd0.qcow2", 5), "has 5 bytes"),
            (lambda path: (path / "more").touch(), "does not name: more"),
            (lambda path: os.truncate(path / "machine.json", 0), "has 0 bytes"),
        ],
    )
    def test_one_whose_files_are_not_those_of_the_manifest_is_not_published(
        self, repository: Repository, harm: Callable[[Path], object], message: str
    ) -> None:
        with repository.lock("test"):
            draft, manifest = make_draft(repository, {"vd0": Stored()}, extras={"machine.json": b"{}"})
            harm(draft.path)
            with pytest.raises((NotProvedError, RepositoryDamagedError), match=message):
                draft.publish(manifest)
            draft.discard()
        assert repository.backups(CHAIN) == ()

    def test_numbers_rise_and_ids_are_used_once(self, repository: Repository) -> None:
        first = make_backup(repository, {"vd0": Stored()})
        with repository.lock("test"):
            for id_, number in ((first.manifest.id, 2), ("00000001", 1), ("00000001", 0), ("xyz", 2), ("0000000A", 2)):
                with pytest.raises(UsageError, match="cannot follow"):
                    repository.begin(CHAIN, id_, number)
            repository.begin(CHAIN, "00000001", 10**9).discard()

    def test_disks_with_like_names_have_files_of_their_own(self, repository: Repository) -> None:
        names = ["a/b", "a_b", "A_B", "../..", ".lock", "\n", "/machine/peripheral/vd0", "x" * 500, "manifest"]
        first = make_backup(repository, {name: Stored([f"write -P {n} 0 64k"]) for n, name in enumerate(names, 1)})
        second = make_backup(repository, {name: Stored(["write 1M 64k"], first) for name in names})
        for number, name in enumerate(names, 1):
            image = second.image(name)
            assert image.parent == second.path
            assert converted(image, repository.path.parent)[:65536] == bytes([number]) * 65536
        assert check(repository, None, content=True, deadline=Deadline(60)).findings == ()


def test_everything_is_on_the_disk_before_it_has_its_name(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut leaves: a name is given only to what was brought to the disk, and is itself brought there."""
    first = make_backup(repository, {"vd0": Stored(["write -P 1 0 64k"])}, extras={"machine.json": b"{}"})
    second = make_backup(repository, {"vd0": Stored(["write -P 2 0 64k"], first)})
    synced: dict[int, int] = {}  # inode -> when it had been changed last
    pending: set[int] = set()

    def fsync(file: int) -> None:
        synced[os.fstat(file).st_ino] = os.fstat(file).st_mtime_ns
        pending.discard(os.fstat(file).st_ino)

    def renaming(rename: Callable[..., None]) -> Callable[..., None]:
        def call(old: Any, new: Any, **options: Any) -> None:
            old = Path(old)
            for status in (path.stat() for path in [old, *old.rglob("*")]):
                assert synced.get(status.st_ino) == status.st_mtime_ns, f"{old} to {new}"
            rename(old, new, **options)
            pending.update({old.parent.stat().st_ino, Path(new).parent.stat().st_ino})

        return call

    def removing(remove: Callable[..., None]) -> Callable[..., None]:
        def call(path: Any, **options: Any) -> None:
            if not str(path).startswith((".", str(repository.path / CHAIN / "."))):
                assert not pending, f"{path} is removed before what takes its place is there to stay"
            remove(path, **options)

        return call

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", renaming(os.rename))
    monkeypatch.setattr(os, "replace", renaming(os.replace))
    monkeypatch.setattr(os, "rmdir", removing(os.rmdir))
    make_backup(repository, {"vd0": Stored(["write -P 3 0 64k"], second)}, extras={"machine.json": b"{}"})
    assert not pending
    choice = choose_without(repository.backups(CHAIN), {first.manifest.id}, where="test")
    with repository.lock("test"):
        carry_out(repository, choice, CopyOptions(), Deadline(60))
    assert not pending


def test_a_shallow_layer_is_held_against_its_template(repository: Repository, tmp_path: Path) -> None:
    template = tmp_path / "template.raw"
    template.write_bytes(bytes([7]) * SIZE)
    status = template.stat()
    entry = TemplateEntry(path=str(template), format="raw", size=SIZE, file_bytes=SIZE, mtime_ns=status.st_mtime_ns)
    first = make_backup(repository, {"vd0": Stored(["write -P 1 0 64k"], template=entry)})
    second = make_backup(repository, {"vd0": Stored(["write -P 2 64k 64k"], first)})
    before = converted(second.image("vd0"), tmp_path)
    assert before == bytes([1]) * 65536 + bytes([2]) * 65536 + bytes([7]) * (SIZE - 131072)
    choice = choose_without(repository.backups(CHAIN), {first.manifest.id}, where="test")
    with repository.lock("test"):
        carry_out(repository, choice, CopyOptions(), Deadline(60))
    left = repository.find(CHAIN, "latest")
    assert (left.disk("vd0").kind, left.disk("vd0").template) == ("shallow", entry)
    assert converted(left.image("vd0"), tmp_path) == before
    assert check(repository, None, content=True, deadline=Deadline(60)).findings == ()
    os.utime(template)
    (finding,) = check(repository, None, content=True, deadline=Deadline(60)).findings
    assert "written to since" in finding.what
    template.unlink()
    (finding,) = check(repository, None, content=True, deadline=Deadline(60)).findings
    assert "missing" in finding.what or "cannot be read" in finding.what


@settings(deadline=None)
@given(st.integers(1, 10**17), st.from_regex("[0-9a-f]{8}", fullmatch=True))
def test_names_of_folders_say_what_they_were_made_of(number: int, id_: str) -> None:
    assert backup_of(str(BackupName(number, id_))) == BackupName(number, id_)


@pytest.mark.parametrize(
    "name", ["0000-00000000", "00001-00000000", "1-00000000", "0001-0000000G", "0001-00000000\n", ""]
)
def test_other_names_are_no_backups(name: str) -> None:
    assert backup_of(name) is None


@settings(deadline=None)
@given(st.lists(st.text(max_size=80), max_size=8, unique=True))
def test_disks_of_any_names_have_safe_files_of_their_own(names: list[str]) -> None:
    stems: list[str] = []
    for name in names:
        stems.append(stem_of(name, stems))
    assert len({stem.casefold() for stem in stems}) == len(names)
    assert all(FILE_NAME.fullmatch(f"{stem}.qcow2") for stem in stems)


RUNS = st.lists(st.tuples(st.integers(1, 3 * PIECE), st.sampled_from([ABSENT, DATA, ZERO])), max_size=12)


@settings(deadline=None)
@given(RUNS, st.randoms(use_true_random=False))
def test_hashes_come_back_as_they_were_saved(
    tmp_path_factory: pytest.TempPathFactory, runs: list[tuple[int, int]], dice: Any
) -> None:
    content = ExtentMap.of_extents(runs)
    hashes = Hashes(content, dice.randbytes(DIGEST * pieces(content)[0].size))
    path = tmp_path_factory.mktemp("hashes") / "vd0.hashes"
    hashes.save(path)
    assert Hashes.load(path) == hashes
    assert Hashes.load(path).root() == hashes.root()


def test_the_root_is_that_of_rfc_6962() -> None:
    """The tree for three leaves, written out: two digests, and the columns of the content."""
    content = ExtentMap.of_extents([(PIECE, DATA), (PIECE, ZERO), (5, DATA)])
    digests = bytes(range(2 * DIGEST))
    columns = b"".join(end.to_bytes(8, "little") for end in (PIECE, 2 * PIECE, 2 * PIECE + 5)) + bytes([1, 2, 1])

    def sha256(data: bytes) -> bytes:
        return hashlib.sha256(data).digest()

    leaves = [sha256(b"\0" + leaf) for leaf in (digests[:DIGEST], digests[DIGEST:], sha256(columns))]
    expected = sha256(b"\1" + sha256(b"\1" + leaves[0] + leaves[1]) + leaves[2])
    assert Hashes(content, digests).root() == expected.hex()


@settings(deadline=None)
@given(RUNS.filter(lambda runs: any(value == DATA for _, value in runs)), st.data())
def test_the_root_depends_on_every_digest_and_on_the_content(runs: list[tuple[int, int]], data: st.DataObject) -> None:
    content = ExtentMap.of_extents(runs)
    digests = bytearray(DIGEST * pieces(content)[0].size)
    root = Hashes(content, bytes(digests)).root()
    digests[data.draw(st.integers(0, len(digests) - 1))] ^= 1
    assert Hashes(content, bytes(digests)).root() != root
    longer = content.resized(content.size + 1, ZERO)
    assert Hashes(longer, bytes(len(digests))).root() != root


def test_digests_go_with_the_pieces() -> None:
    with pytest.raises(ValueError, match="0 bytes of digests for 1 pieces"):
        Hashes(ExtentMap.uniform(1, DATA), b"")
    hashes = Hashes(ExtentMap.uniform(1, DATA), bytes(range(DIGEST)))
    assert hashes.digest(0) == bytes(range(DIGEST))
    with pytest.raises(IndexError):
        hashes.digest(1)
