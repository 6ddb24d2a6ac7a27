"""A repository that was damaged: what is wrong is told, what is whole can still be found, and nothing is believed."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qmpnbd.backup.backups import Backup
from qmpnbd.backup.check import Checked, check
from qmpnbd.backup.check_rules import Rule
from qmpnbd.backup.copy import CopyOptions
from qmpnbd.backup.hashes import Hashes
from qmpnbd.backup.layout import JOURNAL
from qmpnbd.backup.manifest import MAX_MANIFEST, Journal, Manifest, Replaced
from qmpnbd.backup.prune import carry_out, choose_restorable
from qmpnbd.backup.repository import Repository, chain_of
from qmpnbd.deadline import Deadline
from qmpnbd.errors import NoSuchBackupError, RepositoryDamagedError, UsageError
from tests.chains import converted
from tests.servers import qemu_img
from tests.stored import CHAIN, Stored, make_backup, make_draft

MIB = 1 << 20


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full backup and two increments; never written by tests."""
    repository = Repository.create(tmp_path_factory.mktemp("damage") / "repository")
    first = make_backup(repository, {"vd0": Stored(["write -P 1 0 1M"])}, extras={"machine.json": b"{}"})
    second = make_backup(repository, {"vd0": Stored(["write -P 2 64k 128k", "write -z 2M 64k"], first)})
    make_backup(repository, {"vd0": Stored(["write -P 3 3M 64k"], second)})
    return repository.path


@pytest.fixture
def repository(original: Path, tmp_path: Path) -> Repository:
    return Repository.open(shutil.copytree(original, tmp_path / "copy", symlinks=True))


def checked(repository: Repository, *, content: bool = False) -> Checked:
    return check(repository, None, content=content, deadline=Deadline(60))


def rules(repository: Repository, *, content: bool = False) -> set[tuple[Rule, str]]:
    """What a check finds: rules, and the number of the backup that each concerns (empty for none)."""
    numbers = {each.name.id: str(each.name.number) for each in repository.inspect(CHAIN)}
    return {(each.rule, numbers.get(each.backup, "")) for each in checked(repository, content=content).findings}


def restorable(repository: Repository, *, content: bool = False) -> set[str]:
    """Numbers of the backups that a check says can be restored and proved."""
    result = checked(repository, content=content)
    return {
        str(each.name.number)
        for each in result.found[CHAIN]
        if each.backup is not None
        and all((CHAIN, each.name.id, disk.name) not in result.broken for disk in each.backup.manifest.disks)
    }


def manifest_path(repository: Repository, number: int) -> Path:
    (path,) = (repository.path / CHAIN).glob(f"{number:04}-*/manifest.json")
    return path


def edit(
    repository: Repository, number: int, change: Callable[[dict[str, Any]], object], *, seal: bool = False
) -> None:
    """Edits a manifest; with `seal` as somebody would who knows how its digest is made."""
    path = manifest_path(repository, number)
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))
    if seal:
        content["disks"] = tuple(content["disks"])
        path.write_bytes(Manifest.model_validate_json(path.read_bytes()).sealed().to_json())


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def test_a_repository_that_nobody_touched_is_clean(repository: Repository) -> None:
    assert checked(repository, content=True).findings == ()
    assert restorable(repository, content=True) == {"1", "2", "3"}


def test_times_of_files_do_not_matter(repository: Repository) -> None:
    before = repository.backups(CHAIN)
    for number, path in enumerate(sorted(repository.path.rglob("*"), reverse=True)):
        os.utime(path, (number, number))
    assert repository.backups(CHAIN) == before
    assert checked(repository, content=True).findings == ()


def test_a_clock_that_went_back_does_not_matter(tmp_path: Path) -> None:
    repository = Repository.create(tmp_path / "repository")
    times = ["2026-01-03T00:00:00Z", "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"]
    made: list[Backup] = []
    for created in times:
        made.append(make_backup(repository, {"vd0": Stored(base=made[-1] if made else None)}, created=created))
    assert repository.backups(CHAIN) == tuple(made)
    assert repository.find(CHAIN, "latest") == made[2]
    assert repository.find(CHAIN, "2026-01-01T12:00:00") == made[1]
    assert repository.find(CHAIN, "2026-01-03T02:00:00+01:00") == made[2]
    with pytest.raises(NoSuchBackupError):
        repository.find(CHAIN, "2025-12-31")


@pytest.mark.parametrize("size", [0, 1, 100, -1])
def test_a_manifest_that_is_cut_is_told(repository: Repository, size: int) -> None:
    path = manifest_path(repository, 2)
    path.write_bytes(path.read_bytes().rstrip()[:size])
    with pytest.raises(RepositoryDamagedError, match="cannot be understood"):
        repository.backups(CHAIN)
    assert (Rule.MANIFEST, "2") in rules(repository)
    assert restorable(repository) == {"1"}
    assert repository.find(CHAIN, "1").manifest.number == 1
    with pytest.raises(RepositoryDamagedError):
        repository.find(CHAIN, "2")
    with pytest.raises(RepositoryDamagedError):
        chain_of(repository.find(CHAIN, "3"), "vd0")


def test_a_manifest_that_is_missing_is_told(repository: Repository) -> None:
    manifest_path(repository, 3).unlink()
    assert (Rule.MANIFEST, "3") in rules(repository)
    with pytest.raises(RepositoryDamagedError, match="No such file"):
        repository.find(CHAIN, "latest")


def test_a_time_stands_for_no_older_backup_than_it_should(repository: Repository) -> None:
    """Where the right one may be one whose time cannot be read, the one before it is not given out in its place."""
    second = repository.find(CHAIN, "2").manifest
    manifest_path(repository, 3).unlink()
    assert repository.find(CHAIN, repository.find(CHAIN, "1").manifest.created).manifest.number == 1
    with pytest.raises(RepositoryDamagedError):
        repository.find(CHAIN, second.created)
    make_backup(repository, {"vd0": Stored()}, created="2999-01-01T00:00:00Z")
    with pytest.raises(RepositoryDamagedError):
        repository.find(CHAIN, "2998-01-01")
    assert repository.find(CHAIN, "2999-01-01").manifest.number == 4


def test_what_a_living_run_is_writing_is_no_finding(repository: Repository) -> None:
    with repository.lock("a backup"):
        draft, _ = make_draft(repository, {"vd0": Stored()})
        assert rules(repository) == set()
    assert rules(repository) == {(Rule.UNFINISHED, "")}
    assert draft.path.exists()


def test_a_manifest_that_was_edited_is_told(repository: Repository) -> None:
    edit(repository, 2, lambda content: content["disks"][0].update(data_bytes=1))
    with pytest.raises(RepositoryDamagedError, match="its digest is another one"):
        repository.backups(CHAIN)


def test_a_manifest_that_was_edited_with_its_digest_is_told_by_the_next_one(repository: Repository) -> None:
    edit(repository, 2, lambda content: content.update(created="2020-01-01T00:00:00Z"), seal=True)
    with pytest.raises(RepositoryDamagedError, match="is not the one that was there"):
        repository.backups(CHAIN)
    assert rules(repository) == {(Rule.ORDER, "3")}


def test_a_backup_from_another_chain_is_foreign(repository: Repository, tmp_path: Path) -> None:
    other = Repository.create(tmp_path / "other")
    backup = make_backup(other, {"vd0": Stored()}, chain="weekly")
    shutil.copytree(backup.path, repository.path / CHAIN / backup.path.name)
    with pytest.raises(RepositoryDamagedError, match="belongs to backup"):
        repository.backups(CHAIN)
    assert rules(repository) == {(Rule.MANIFEST, "1")}
    assert restorable(repository) >= {"1", "2", "3"}


def test_a_backup_of_another_repository_is_foreign(repository: Repository, tmp_path: Path) -> None:
    other = Repository.create(tmp_path / "other")
    for _ in range(4):
        backup = make_backup(other, {"vd0": Stored()})
    shutil.copytree(backup.path, repository.path / CHAIN / backup.path.name)
    with pytest.raises(RepositoryDamagedError, match="is missing"):
        repository.backups(CHAIN)
    assert rules(repository) == {(Rule.ORDER, "4")}


def test_backups_that_were_reordered_are_told(repository: Repository) -> None:
    second, third = (manifest_path(repository, number).parent for number in (2, 3))
    second.rename(second.with_name(second.name.replace("0002", "0009")))
    with pytest.raises(RepositoryDamagedError, match="is missing"):
        repository.backups(CHAIN)
    with pytest.raises(RepositoryDamagedError, match="belongs to backup 2-"):
        repository.find(CHAIN, "9")
    assert {(Rule.MANIFEST, "9"), (Rule.ORDER, "3"), (Rule.BASE, "3")} <= rules(repository)
    assert third.exists()
    assert restorable(repository) == {"1"}


def test_a_missing_increment_is_noticed(repository: Repository) -> None:
    shutil.rmtree(manifest_path(repository, 2).parent)
    with pytest.raises(RepositoryDamagedError, match="is missing"):
        repository.backups(CHAIN)
    assert {(Rule.ORDER, "3"), (Rule.BASE, "3")} <= rules(repository)
    assert restorable(repository) == {"1"}


def test_a_foreign_file_is_told(repository: Repository) -> None:
    for path in (repository.path, repository.path / CHAIN, manifest_path(repository, 2).parent):
        (path / "notes.txt").write_text("")
    assert [finding.rule for finding in checked(repository).findings] == [Rule.FOREIGN] * 3
    assert restorable(repository) == {"1", "2", "3"}


def test_an_image_that_is_cut_is_told(repository: Repository) -> None:
    image = repository.find(CHAIN, "2").image("vd0")
    os.truncate(image, image.stat().st_size - 1)
    assert (Rule.FILE, "2") in rules(repository)
    assert restorable(repository) == {"1"}
    with pytest.raises(RepositoryDamagedError, match="bytes, and had"):
        repository.find(CHAIN, "2").image("vd0")


def test_a_bit_that_flips_in_data_is_told_when_all_is_read(repository: Repository) -> None:
    image = repository.find(CHAIN, "2").image("vd0")
    flip(image, image.read_bytes().index(bytes([2]) * 4096) + 5)
    assert rules(repository) == set()
    assert rules(repository, content=True) == {(Rule.CONTENT, "2")}
    (finding,) = checked(repository, content=True).findings
    assert (finding.disk, finding.offset, finding.end) == ("vd0", 64 << 10, 192 << 10)
    assert restorable(repository, content=True) == {"1"}


def test_what_flips_in_header_or_tables_is_told_unless_stock_tools_read_the_same(
    repository: Repository, tmp_path: Path
) -> None:
    """One bit in each byte that is not zero, and in some that are: a name of a feature may change, a guest byte not."""
    image = repository.find(CHAIN, "3").image("vd0")
    whole, disk = image.read_bytes(), converted(image, tmp_path)
    data = whole.index(bytes([3]) * 4096)
    tables = [offset for offset in range(len(whole)) if not data <= offset < data + 65536]
    said = [offset for offset in tables if whole[offset]]
    assert 60 < len(said) < 500
    unnoticed = 0
    for offset in [*range(104), *said[40::3], *random.Random(3).sample(tables, 30)]:
        flip(image, offset)
        if not rules(repository):
            unnoticed += 1
            assert converted(image, tmp_path) == disk, f"byte {offset}"
        flip(image, offset)
    assert unnoticed < 200
    # A refcount (16 bits; those of a new image are in its third cluster) that is too large is a leak to stock tools.
    assert whole[2 * 65536 : 2 * 65536 + 2] == b"\0\1"
    flip(image, 2 * 65536 + 1)
    assert rules(repository) == {(Rule.IMAGE, "3")}


def test_every_byte_of_the_hashes_is_guarded(repository: Repository) -> None:
    path = repository.find(CHAIN, "2").path / "vd0.hashes"
    for offset in range(path.stat().st_size):
        flip(path, offset)
        with pytest.raises(RepositoryDamagedError, match="hashes"):
            repository.find(CHAIN, "2").hashes("vd0")
        flip(path, offset)
    for size in range(path.stat().st_size):
        os.truncate(shutil.copy(path, path.with_suffix(".cut")), size)
        with pytest.raises(RepositoryDamagedError, match="hashes"):
            Hashes.load(path.with_suffix(".cut"))


def test_hashes_of_another_layer_are_told(repository: Repository) -> None:
    first, second = (repository.find(CHAIN, number).path / "vd0.hashes" for number in "12")
    shutil.copy(first, second)
    assert rules(repository) == {(Rule.HASHES, "2")}
    assert restorable(repository) == {"1"}


def test_missing_hashes_are_damage(repository: Repository) -> None:
    (repository.find(CHAIN, "3").path / "vd0.hashes").unlink()
    assert rules(repository) == {(Rule.HASHES, "3")}
    assert restorable(repository) == {"1", "2"}


def test_a_layer_that_stands_on_something_else_is_told(repository: Repository) -> None:
    image = repository.find(CHAIN, "3").image("vd0")
    first = repository.find(CHAIN, "1")
    qemu_img("rebase", "-u", "-F", "qcow2", "-b", f"../{first.path.name}/vd0.qcow2", image)
    assert rules(repository) == {(Rule.IMAGE, "3")}


def test_what_is_kept_beside_the_disks_is_guarded(repository: Repository) -> None:
    path = repository.find(CHAIN, "1").extra_file("machine.json")
    path.write_bytes(b"[]")
    assert rules(repository) == {(Rule.FILE, "1")}
    path.unlink()
    assert rules(repository) == {(Rule.FILE, "1")}
    assert restorable(repository) == {"1", "2", "3"}


@pytest.mark.parametrize("name", ["manifest.json", "vd0.qcow2", "vd0.hashes"])
def test_links_are_not_followed(repository: Repository, tmp_path: Path, name: str) -> None:
    path = manifest_path(repository, 2).parent / name
    path.rename(tmp_path / name)
    path.symlink_to(tmp_path / name)
    assert {number for _, number in rules(repository)} >= {"2"}
    assert restorable(repository) == {"1"}


def test_a_backup_that_is_a_link_is_not_followed(repository: Repository, tmp_path: Path) -> None:
    folder = manifest_path(repository, 2).parent
    folder.rename(tmp_path / folder.name)
    folder.symlink_to(tmp_path / folder.name)
    assert (Rule.MANIFEST, "2") in rules(repository)
    assert restorable(repository) == {"1"}


def test_a_journal_that_is_a_link_is_not_carried_out(repository: Repository, tmp_path: Path) -> None:
    """Files of somebody else's would be moved into the repository."""
    name = manifest_path(repository, 2).parent.name
    theirs = tmp_path / "theirs"
    (theirs / name).mkdir(parents=True)
    (theirs / name / "vd0.qcow2").write_bytes(b"theirs")
    (theirs / "journal.json").write_bytes(
        Journal(replaced=(Replaced(folder=name, files=("vd0.qcow2",)),), removed=()).to_json()
    )
    (repository.path / CHAIN / JOURNAL).symlink_to(theirs)
    with repository.lock("test"), pytest.raises(RepositoryDamagedError, match="it is no folder"):
        repository.recover()
    assert (theirs / name / "vd0.qcow2").read_bytes() == b"theirs"
    (repository.path / CHAIN / JOURNAL).unlink()
    assert restorable(repository) == {"1", "2", "3"}


def test_a_fifo_is_not_waited_for(repository: Repository) -> None:
    for name in ("manifest.json", "vd0.qcow2", "vd0.hashes"):
        path = manifest_path(repository, 3).parent / name
        path.unlink()
        os.mkfifo(path)
        assert {number for _, number in rules(repository)} == {"3"}
        path.unlink()
        shutil.copy(repository.find(CHAIN, "2").path / name, path)


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "a huge number": lambda content: content.update(number=10**30),
    "a negative size": lambda content: content["disks"][0].update(size=-1),
    "a size beyond all files": lambda content: content["disks"][0].update(size=1 << 63),
    "a float": lambda content: content["disks"][0].update(size=1.0),
    "a path upwards": lambda content: content["disks"][0].update(file="../../../etc/passwd"),
    "an absolute path": lambda content: content["disks"][0].update(hashes="/etc/passwd"),
    "two dots": lambda content: content["disks"][0].update(file=".."),
    "a hidden file": lambda content: content["disks"][0].update(file=".lock"),
    "a newline": lambda content: content["disks"][0].update(file="vd0.qcow2\n"),
    "the manifest as image": lambda content: content["disks"][0].update(file="manifest.json"),
    "one file twice": lambda content: content["disks"][0].update(hashes="VD0.qcow2"),
    "no disk name": lambda content: content["disks"][0].update(name=""),
    "an endless name": lambda content: content["disks"][0].update(name="x" * 2000),
    "a disk twice": lambda content: content["disks"].append(content["disks"][0]),
    "a million disks": lambda content: content.update(disks=content["disks"] * 10**4),
    "an unknown field": lambda content: content.update(more=1),
    "an unknown schema": lambda content: content.update(schema="qmpnbd.manifest/2"),
    "a base that is itself": lambda content: content["disks"][0].update(base=content["id"]),
    "a full one with a base": lambda content: content["disks"][0].update(kind="full"),
    "an increment without a base": lambda content: content["disks"][0].update(base=None),
    "a month that is none": lambda content: content.update(created="2026-13-01T00:00:00Z"),
    "a time that is none": lambda content: content.update(created="2026-12-01T::::::::Z"),
    "not a number": lambda content: content.update(
        statement={"recipe": "", "why": "", "consistency": "", "window_ms": float("nan"), "paused_ms": 0}
    ),
    "a list": lambda content: content.update(disks=[[]]),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_manifest_is_refused(repository: Repository, change: Callable[[dict[str, Any]], object]) -> None:
    edit(repository, 3, change)
    with pytest.raises(RepositoryDamagedError, match="cannot be understood"):
        repository.find(CHAIN, "3")


@pytest.mark.parametrize("content", [b"[" * 10**6, b'{"a":' * 10**5, b"\xff\xfe", b"null", b"1" * 10**5, b"\0" * 100])
def test_what_is_no_manifest_is_refused(repository: Repository, content: bytes) -> None:
    manifest_path(repository, 3).write_bytes(content)
    with pytest.raises(RepositoryDamagedError, match="cannot be understood"):
        repository.find(CHAIN, "3")


def test_an_endless_manifest_is_refused_before_it_is_read(repository: Repository, memory_budget: None) -> None:
    os.truncate(manifest_path(repository, 3), 1 << 40)
    with pytest.raises(RepositoryDamagedError, match=f"more than {MAX_MANIFEST} bytes"):
        repository.find(CHAIN, "3")


def test_hashes_that_promise_much_are_refused_before_memory_is_taken(tmp_path: Path, memory_budget: None) -> None:
    path = tmp_path / "x.hashes"
    for runs, count in ((1 << 60, 0), (0, 1 << 60), ((1 << 64) - 1, (1 << 64) - 1)):
        path.write_bytes(b"QMPNBDH1sha256\0\0" + runs.to_bytes(8, "little") + count.to_bytes(8, "little") + bytes(64))
        with pytest.raises(RepositoryDamagedError, match="should have"):
            Hashes.load(path)
    os.truncate(path, 1 << 43)
    with pytest.raises(RepositoryDamagedError, match="more than"):
        Hashes.load(path)


@pytest.mark.parametrize("chain", ["", "..", "a/b", "/etc", ".hidden", "x" * 65, "a\n"])
def test_a_chain_name_is_no_path(repository: Repository, chain: str) -> None:
    with pytest.raises(UsageError, match="no chain is called"):
        repository.inspect(chain)


def test_the_next_backup_needs_no_repair(repository: Repository) -> None:
    """A full backup follows whatever happened to the ones before, and can be restored."""
    manifest_path(repository, 3).write_bytes(b"")
    (repository.find(CHAIN, "2").path / "vd0.hashes").unlink()
    made = make_backup(repository, {"vd0": Stored(["write -P 9 0 64k"])})
    assert made.manifest.number == 4
    assert "4" in restorable(repository, content=True)
    again = make_backup(repository, {"vd0": Stored(["write -P 8 0 64k"], made)})
    assert repository.find(CHAIN, "latest") == again
    assert {number for _, number in rules(repository)} == {"2", "3"}


class TestPrunedOfDamage:
    """What cannot be restored is removed when asked for, and the chain is clean again."""

    def pruned(self, repository: Repository) -> set[str]:
        where = str(repository.path / CHAIN)
        choice = choose_restorable(checked(repository, content=True), CHAIN, where=where)
        with repository.lock("prune"):
            carry_out(repository, choice, CopyOptions(), Deadline(60))
        assert checked(repository, content=True).findings == ()
        return {str(each.manifest.number) for each in repository.backups(CHAIN)}

    def test_of_manifests_that_are_missing_or_cut(self, repository: Repository) -> None:
        manifest_path(repository, 2).write_bytes(b"{")
        made = make_backup(repository, {"vd0": Stored(["write -P 9 0 64k"])})
        manifest_path(repository, 3).unlink()
        assert self.pruned(repository) == {"1", "4"}
        assert repository.find(CHAIN, "latest").manifest.id == made.manifest.id

    def test_of_a_backup_that_is_missing(self, repository: Repository) -> None:
        shutil.rmtree(manifest_path(repository, 1).parent)
        make_backup(repository, {"vd0": Stored(["write -P 9 0 64k"])})
        assert self.pruned(repository) == {"4"}

    def test_of_data_that_is_rotten_while_another_disk_stands_on_the_same_backups(
        self, repository: Repository, tmp_path: Path
    ) -> None:
        first = make_backup(repository, {"vd0": Stored(["write -P 1 0 1M"]), "vd1": Stored(["write -P 2 0 1M"])})
        second = make_backup(repository, {"vd0": Stored(base=first), "vd1": Stored(["write -P 3 64k 64k"], first)})
        third = make_backup(repository, {"vd0": Stored(["write -P 7 0 64k"]), "vd1": Stored(base=second)})
        expected = converted(third.image("vd1"), tmp_path)
        image = first.image("vd0")
        flip(image, image.read_bytes().index(bytes([1]) * 4096) + 5)
        assert self.pruned(repository) == {"1", "2", "3", "6"}
        left = repository.find(CHAIN, "latest")
        assert left.disk("vd1").kind == "full"
        assert converted(left.image("vd1"), tmp_path) == expected

    def test_where_nothing_would_be_left(self, repository: Repository) -> None:
        (repository.find(CHAIN, "1").path / "vd0.hashes").unlink()
        with pytest.raises(UsageError, match="no backup of the chain can be restored"):
            self.pruned(repository)
        assert len(repository.backups(CHAIN)) == 3
