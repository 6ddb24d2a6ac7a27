"""Backups removed: what stays reads the same to stock tools, byte for byte, and is proved."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from qmpnbd.backup.backups import Backup
from qmpnbd.backup.check import check
from qmpnbd.backup.copy import CopyOptions
from qmpnbd.backup.prune import Choice, carry_out, choose, choose_without
from qmpnbd.backup.repository import Repository, chain_of
from qmpnbd.backup.retention import Policy
from qmpnbd.deadline import Deadline
from qmpnbd.errors import NotProvedError, RepositoryBusyError, RepositoryDamagedError, UsageError
from tests.chains import converted, run
from tests.stored import CHAIN, SIZE, Stored, make_backup


def remove(repository: Repository, *backups: Backup) -> Choice:
    """Removes backups, and expects a chain that is clean afterwards."""
    choice = choose_without(
        repository.backups(CHAIN), {each.manifest.id for each in backups}, where=str(repository.path)
    )
    with repository.lock("prune"):
        carry_out(repository, choice, CopyOptions(), Deadline(60))
    assert check(repository, None, content=True, deadline=Deadline(60)).findings == ()
    return choice


def contents(repository: Repository, folder: Path) -> dict[str, dict[str, bytes]]:
    """What qemu-img reads of every disk of every backup."""
    return {
        backup.manifest.id: {disk.name: converted(backup.image(disk.name), folder) for disk in backup.manifest.disks}
        for backup in repository.backups(CHAIN)
    }


def without(found: dict[str, dict[str, bytes]], removed: Sequence[Backup]) -> dict[str, dict[str, bytes]]:
    gone = {each.manifest.id for each in removed}
    return {id_: disks for id_, disks in found.items() if id_ not in gone}


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository.create(tmp_path / "repository")


def four(repository: Repository) -> tuple[Backup, ...]:
    """A full backup, two increments on it, and one more."""
    first = make_backup(repository, {"vd0": Stored(["write -P 1 0 3M", "write -P 9 7M 100k"])})
    second = make_backup(repository, {"vd0": Stored(["write -P 2 64k 128k", "write -z 2M 64k"], first)})
    third = make_backup(repository, {"vd0": Stored(["write -P 3 128k 2M", "write -z 0 64k"], second)})
    fourth = make_backup(repository, {"vd0": Stored(["write -P 4 4M 64k"], third)})
    return first, second, third, fourth


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)])
def test_whatever_is_removed_the_others_read_the_same(
    repository: Repository, tmp_path: Path, which: tuple[int, ...]
) -> None:
    backups = four(repository)
    before = contents(repository, tmp_path)
    gone = [backups[index] for index in which]
    remove(repository, *gone)
    assert contents(repository, tmp_path) == without(before, gone)
    left = repository.backups(CHAIN)
    assert [each.manifest.before and each.manifest.before.id for each in left] == [
        None,
        *(each.manifest.id for each in left[:-1]),
    ]
    for backup in left:
        run("qemu-img", "check", "-q", backup.image("vd0"))
    assert sorted(each.name for each in (repository.path / CHAIN).iterdir()) == [str(each.name) for each in left]


def test_an_increment_becomes_a_full_backup_when_the_full_one_goes(repository: Repository) -> None:
    first, second, *_ = four(repository)
    remove(repository, first)
    disk = repository.find(CHAIN, second.manifest.id).disk("vd0")
    assert (disk.kind, disk.base, disk.merged) == ("full", None, 1)


def test_a_differential_backup_gets_the_layers_that_it_stood_on_too(repository: Repository, tmp_path: Path) -> None:
    first, second, third, fourth = four(repository)
    differential = make_backup(
        repository, {"vd0": Stored(["write -P 5 6M 64k", "write -z 7M 64k"], second, "differential")}
    )
    last = make_backup(repository, {"vd0": Stored(["write -P 6 0 64k"], differential)})
    before = contents(repository, tmp_path)
    choice = remove(repository, second, third)
    assert [step.backup for step in choice.steps] == [fourth.manifest.id, differential.manifest.id]
    assert contents(repository, tmp_path) == without(before, [second, third])
    assert [each.manifest.id for each in chain_of(repository.find(CHAIN, "latest"), "vd0")] == [
        last.manifest.id,
        differential.manifest.id,
        first.manifest.id,
    ]


def test_random_chains_read_the_same_after_random_removals(repository: Repository, tmp_path: Path) -> None:
    dice = random.Random(7)
    made: list[Backup] = []
    for _ in range(8):
        disks = {}
        for disk, size in (("vd0", SIZE), ("vd1", 3 * (1 << 20) + 512 * 5)):
            base = dice.choice([*made[-2:], None]) if made else None
            writes = []
            for _write in range(dice.randrange(6)):
                start = dice.randrange(size // 512) * 512
                length = min(dice.randrange(1, 1 << 10) * 512, size - start)
                writes.append(f"write {dice.choice(['-z', f'-P {dice.randrange(1, 255)}'])} {start} {length}")
            disks[disk] = Stored(writes, base, size=size, cluster_size=1 << dice.choice([12, 16, 18]))
        made.append(make_backup(repository, disks))
    while len(left := repository.backups(CHAIN)) > 1:
        before = contents(repository, tmp_path)
        gone = dice.sample(left[:-1], dice.randrange(1, min(3, len(left))))
        remove(repository, *gone)
        assert contents(repository, tmp_path) == without(before, gone)


@pytest.mark.parametrize("sizes", [(SIZE, SIZE // 2, SIZE), (SIZE // 2, SIZE, SIZE // 4), (SIZE, SIZE // 4, SIZE // 2)])
def test_past_the_end_of_a_shorter_layer_there_are_zeroes(
    repository: Repository, tmp_path: Path, sizes: tuple[int, ...]
) -> None:
    """Not what lies below it: a disk that shrank and grew again reads as zeroes there."""
    made: list[Backup] = []
    for number, size in enumerate(sizes, 1):
        writes = [f"write -P {number} {size // 2 - 65536} {64 << 10}", f"write -P {number + 10} {size - 512} 512"]
        made.append(make_backup(repository, {"vd0": Stored(writes, made[-1] if made else None, size=size)}))
    last = make_backup(repository, {"vd0": Stored(["write -P 77 0 64k"], made[-1], size=SIZE)})
    before = converted(last.image("vd0"), tmp_path)
    for gone in (made[1:], made[:1]):
        remove(repository, *gone)
        assert converted(repository.find(CHAIN, "latest").image("vd0"), tmp_path) == before


def test_compressed_layers_stay_compressed(repository: Repository, tmp_path: Path) -> None:
    first = make_backup(repository, {"vd0": Stored(["write -P 1 0 3M"], compression="zstd")})
    second = make_backup(repository, {"vd0": Stored(["write -c -P 2 64k 64k"], first, compression="zstd")})
    before = converted(second.image("vd0"), tmp_path)
    remove(repository, first)
    left = repository.find(CHAIN, "latest")
    assert converted(left.image("vd0"), tmp_path) == before
    assert left.disk("vd0").compression == "zstd"
    assert left.image("vd0").stat().st_size < 1 << 20


def test_the_newest_backup_cannot_be_removed(repository: Repository) -> None:
    *_, newest = four(repository)
    with pytest.raises(UsageError, match="the newest"):
        choose_without(repository.backups(CHAIN), {newest.manifest.id}, where="here")


def test_no_rule_removes_nothing(repository: Repository) -> None:
    four(repository)
    with pytest.raises(UsageError, match="nothing says"):
        choose(repository.backups(CHAIN), Policy(), where="here")


def test_nothing_is_removed_while_somebody_reads(repository: Repository) -> None:
    first, *_ = four(repository)
    before = sorted((repository.path / CHAIN).rglob("*"))
    with repository.reading(), pytest.raises(RepositoryBusyError, match="somebody reads"):
        remove(repository, first)
    assert sorted((repository.path / CHAIN).rglob("*")) == before


def test_rotten_data_is_not_merged_into_a_layer_with_fresh_hashes(repository: Repository) -> None:
    first, *_ = four(repository)
    image = first.image("vd0")
    content = bytearray(image.read_bytes())
    place = content.index(bytes([1]) * 4096)
    content[place + 100] ^= 1
    image.write_bytes(content)
    with pytest.raises(RepositoryDamagedError, match="is rotten"):
        remove(repository, first)
    assert len(repository.backups(CHAIN)) == 4
    assert not [each for each in (repository.path / CHAIN).iterdir() if each.name.startswith(".")]


def test_a_merged_layer_is_read_again_before_what_it_was_made_of_goes(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The medium changes a byte of it."""
    first, *_ = four(repository)

    def rot(path: str) -> None:
        content = bytearray(Path(path).read_bytes())
        content[content.index(bytes([1]) * 4096)] ^= 1
        Path(path).write_bytes(content)

    monkeypatch.setattr("qmpnbd.backup.prove_layer.forget", rot)
    with pytest.raises(NotProvedError, match="are not what was backed up"):
        remove(repository, first)
    monkeypatch.undo()
    assert len(repository.backups(CHAIN)) == 4
    assert not [each for each in (repository.path / CHAIN).iterdir() if each.name.startswith(".")]
    remove(repository, first)
