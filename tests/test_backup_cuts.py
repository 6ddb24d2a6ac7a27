"""Work on a repository, killed before each change that it makes: nothing is lost, and the next run needs no help."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qmpnbd.backup.check import check
from qmpnbd.backup.check_rules import Rule
from qmpnbd.backup.layout import JOURNAL
from qmpnbd.backup.repository import Repository
from qmpnbd.deadline import Deadline
from qmpnbd.errors import RepositoryDamagedError
from tests.chains import converted
from tests.cutting import SMALL, WORK, cut_before_each_change
from tests.stored import CHAIN, Stored, make_backup

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full backup, two increments, and a differential backup on the first of them; never written by tests."""
    repository = Repository.create(tmp_path_factory.mktemp("cuts") / "repository")
    first = make_backup(repository, {"vd0": Stored(["write -P 1 0 1200k"], size=SMALL)})
    second = make_backup(repository, {"vd0": Stored(["write -P 2 64k 128k", "write -z 1M 64k"], first, size=SMALL)})
    make_backup(repository, {"vd0": Stored(["write -P 3 128k 512k", "write -z 0 64k"], second, size=SMALL)})
    make_backup(repository, {"vd0": Stored(["write -P 4 1M 64k"], second, "differential", size=SMALL)})
    return repository.path


@pytest.fixture(scope="module")
def pruned(original: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """What each cut of pruning left."""
    return tuple(cuts("prune", original, tmp_path_factory.mktemp("pruned")))


@pytest.fixture(scope="module")
def decided(pruned: tuple[Path, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the first cut left after the decision; never written by tests."""
    first = next(path for path in pruned if (path / CHAIN / JOURNAL).exists())
    return shutil.copytree(first, tmp_path_factory.mktemp("decided") / "repository")


def images(repository: Repository, folder: Path) -> dict[str, bytes]:
    """What qemu-img reads of the disk of every backup that is there."""
    return {
        each.name.id: converted(each.path / "vd0.qcow2", folder)
        for each in repository.inspect(CHAIN)
        if each.backup is not None
    }


def recovered(path: Path) -> Repository:
    """Opens what a cut left, has it recovered, and expects a clean repository."""
    repository = Repository.open(path)
    with repository.lock("test") as killed:
        assert killed is None or killed.what in ("prune", "test", "recover")
        repository.recover()
        assert repository.recover() == []
    assert check(repository, None, content=True, deadline=Deadline(60)).findings == ()
    return repository


def cuts(work: str, original: Path, folder: Path) -> list[Path]:
    left = cut_before_each_change(work, original, folder)
    assert len(left) > 5
    return left


def test_a_backup_is_whole_or_cleanly_gone_wherever_its_run_is_killed(original: Path, tmp_path: Path) -> None:
    before = images(Repository.open(original), tmp_path)
    (tmp_path / "cuts").mkdir()
    published = []
    for path in cuts("publish", original, tmp_path / "cuts"):
        cut = Repository.open(path)
        found = cut.backups(CHAIN)
        rules = {finding.rule for finding in check(cut, None, content=True, deadline=Deadline(60)).findings}
        assert rules <= {Rule.UNFINISHED}
        repository = recovered(path)
        assert repository.backups(CHAIN) == found
        after = images(repository, tmp_path)
        assert {id_: after[id_] for id_ in before} == before
        published.append(len(after) - len(before))
        if published[-1]:
            assert after[found[-1].manifest.id][1 << 20 : 3 << 19] == bytes([77]) * (1 << 19)
        WORK["publish"](repository)
        assert len(repository.backups(CHAIN)) == len(found) + 1
    assert set(published) == {0, 1}
    assert published == sorted(published)


@pytest.mark.usefixtures("decided")
def test_pruning_loses_no_byte_of_what_stays_wherever_it_is_killed(
    original: Path, pruned: tuple[Path, ...], tmp_path: Path
) -> None:
    before = images(Repository.open(original), tmp_path)
    stays = list(before)[2:]
    counts, decided = [], 0
    for path in pruned:
        # Even before anything is recovered, stock tools read what stays as it was.
        for id_ in stays:
            (image,) = path.glob(f"{CHAIN}/*-{id_}/vd0.qcow2")
            assert converted(image, tmp_path) == before[id_]
        if (path / CHAIN / JOURNAL).exists():
            decided += 1
            with pytest.raises(RepositoryDamagedError, match="repository recover"):
                Repository.open(path).backups(CHAIN)
        repository = recovered(path)
        after = images(repository, tmp_path)
        assert after == {id_: before[id_] for id_ in after}
        assert set(stays) <= set(after)
        counts.append(len(after))
        WORK["publish"](repository)
        assert len(repository.backups(CHAIN)) == counts[-1] + 1
    assert decided > 5
    assert set(counts) == {4, 2}
    assert counts == sorted(counts, reverse=True)


def test_recovering_may_be_killed_too(original: Path, decided: Path, tmp_path: Path) -> None:
    before = images(Repository.open(original), tmp_path)
    (tmp_path / "cuts").mkdir()
    for path in cuts("recover", decided, tmp_path / "cuts"):
        after = images(recovered(path), tmp_path)
        assert after == {id_: before[id_] for id_ in after}
        assert set(list(before)[2:]) <= set(after)
