"""``qmpnbd repository`` as its users see it: results, JSON, exit codes, signals, a full disk."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qmpnbd.backup.repository import Repository
from qmpnbd.report.model import RepositoryDocument
from tests.chains import converted
from tests.servers import wait_until
from tests.stored import CHAIN, Stored, make_backup

ROOT = Path(__file__).parent.parent


def qmpnbd(*arguments: object, code: int = 0, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the command, and expects an exit code; with `limit`, files that it writes end at so many bytes."""

    def limited() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-m", "qmpnbd", *map(str, arguments)]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=60, cwd=ROOT, preexec_fn=limited
    )
    assert done.returncode == code, done.stderr + done.stdout
    return done


def document(*arguments: object, code: int = 0) -> RepositoryDocument:
    return RepositoryDocument.model_validate_json(qmpnbd("repository", *arguments, "--json", code=code).stdout)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full backup and three increments, a day apart; never written by tests."""
    repository = Repository.create(tmp_path_factory.mktemp("cli") / "repository")
    backup = None
    for day in range(1, 5):
        writes = [f"write -P {day} {day}M 1M"] if backup else ["write -P 9 0 6M"]
        backup = make_backup(
            repository,
            {"vd0": Stored(writes, backup)},
            created=f"2026-01-0{day}T00:00:00Z",
            extras={"machine.json": b"{}"},
        )
    return repository.path


@pytest.fixture
def path(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "copy")


def test_one_is_made_once(tmp_path: Path) -> None:
    made = document("create", tmp_path / "new")
    assert (made.operation, made.chains) == ("create", ())
    assert Repository.open(tmp_path / "new").id == made.id
    assert "already" in qmpnbd("repository", "create", tmp_path / "new", code=84).stderr
    error = json.loads(qmpnbd("repository", "list", tmp_path, "--json", code=82).stdout)
    assert error["schema"] == "qmpnbd.error/1"


def test_what_is_in_it_is_listed(original: Path) -> None:
    (chain,) = document("list", original).chains
    assert chain.chain == CHAIN
    assert [(each.number, each.created, each.fault) for each in chain.backups] == [
        (day, f"2026-01-0{day}T00:00:00Z", "") for day in range(1, 5)
    ]
    first, second = (backup.disks[0] for backup in chain.backups[:2])
    assert (first.kind, first.base, first.data_bytes, first.restorable) == ("full", None, 6 << 20, None)
    assert (second.kind, second.base, second.data_bytes) == ("increment", chain.backups[0].id, 1 << 20)
    text = qmpnbd("repository", "list", original).stdout
    assert "increment" in text
    assert chain.backups[3].id in text
    assert document("list", original, "--chain", CHAIN).chains == (chain,)
    assert "no chain 'other'" in qmpnbd("repository", "list", original, "--chain", "other", code=82).stderr


def test_one_backup_is_shown(original: Path) -> None:
    for what in ("2", "2026-01-02T23:59:59Z"):
        (chain,) = document("show", original, what).chains
        assert [each.number for each in chain.backups] == [2]
        assert chain.backups[0].extras == ("machine.json",)
    assert "no backup '7'" in qmpnbd("repository", "show", original, 7, code=82).stderr
    assert "is no backup" in qmpnbd("repository", "show", original, "yesterday", code=2).stderr


def test_a_check_says_what_is_wrong_by_its_exit_code_too(path: Path) -> None:
    assert document("check", path, "--content").verdict == "clean"
    assert "CLEAN" in qmpnbd("repository", "check", path).stdout
    (path / CHAIN / ".partial-00000001-1").mkdir()
    assert document("check", path, code=3).verdict == "leftovers"
    (image,) = path.glob(f"{CHAIN}/0002-*/vd0.qcow2")
    os.truncate(image, 1000)
    found = document("check", path, code=1)
    assert (found.verdict, {each.rule for each in found.findings}) == ("damaged", {"unfinished", "file"})
    restorable = [backup.disks[0].restorable for backup in found.chains[0].backups]
    assert restorable == [True, False, False, False]
    text = qmpnbd("repository", "check", path, code=1).stdout
    assert "not restorable" in text
    assert "1000 bytes" in text


def test_pruning_tells_first_and_removes_then(path: Path, tmp_path: Path) -> None:
    files = sorted(path.rglob("*"))
    told = document("prune", path, "--keep-last", 1, "--keep-daily", 2, "--dry-run")
    assert sorted(path.rglob("*")) == files
    assert [(each.removed, each.kept_by) for each in told.chains[0].backups] == [
        (True, ()),
        (True, ()),
        (False, ("daily",)),
        (False, ("newest", "last", "daily")),
    ]
    ids = [each.id for each in told.chains[0].backups]
    (merge,) = told.merges
    assert (merge.backup, merge.over, merge.base) == (ids[2], (ids[1], ids[0]), None)
    newest = Repository.open(path).find(CHAIN, "latest").image("vd0")
    before = converted(newest, tmp_path)
    done = document("prune", path, "--keep-last", 1, "--keep-daily", 2)
    assert (done.dry_run, done.chains, done.merges) == (False, told.chains, told.merges)
    assert converted(newest, tmp_path) == before
    assert document("check", path, "--content").verdict == "clean"
    document("prune", path, "--remove", ids[2], "--rate", 1 << 30)
    assert [each.number for each in document("list", path).chains[0].backups] == [4]
    assert "the newest" in qmpnbd("repository", "prune", path, "--remove", ids[3], code=2).stderr
    assert "nothing says" in qmpnbd("repository", "prune", path, code=2).stderr


def test_what_is_damaged_is_removed_when_asked_for(path: Path) -> None:
    (manifest,) = path.glob(f"{CHAIN}/0003-*/manifest.json")
    manifest.unlink()
    assert "cannot be read" in qmpnbd("repository", "prune", path, "--keep-last", 1, code=81).stderr
    told = document("prune", path, "--damaged", "--dry-run")
    assert [each.removed for each in told.chains[0].backups] == [False, False, True, True]
    assert told.chains[0].backups[2].fault
    document("prune", path, "--damaged")
    assert document("check", path).verdict == "clean"


def test_disks_that_are_whole_are_not_given_up_for_one_that_is_damaged(tmp_path: Path) -> None:
    """Where no backup has all its disks, nobody is told to remove the chain, but to restore what is whole."""
    repository = Repository.create(tmp_path / "repository")
    backup = make_backup(repository, {"vd0": Stored(["write -P 1 0 1M"]), "vd1": Stored(["write -P 2 0 1M"])})
    (backup.path / backup.disk("vd0").file).unlink()
    done = qmpnbd("repository", "prune", repository.path, "--damaged", code=2)
    assert "no backup of the chain can be restored with all its disks" in done.stderr
    assert "Restore the disks that are whole before you remove the folder" in done.stderr
    qmpnbd("restore", repository.path, "latest", tmp_path / "vd1.raw", "--disk", "vd1")


@pytest.mark.parametrize("limit", [0, 4096, 1 << 20, 3 << 20])
def test_no_room_for_merged_layers_changes_nothing(path: Path, limit: int) -> None:
    """A limit on the size of files stops every write as a full disk does, at the first byte or in the middle."""
    before = {file: file.read_bytes() for file in (path / CHAIN).rglob("*") if file.is_file()}
    done = qmpnbd("repository", "prune", path, "--keep-last", 1, code=83, limit=limit)
    assert "File too large" in done.stderr
    assert {file: file.read_bytes() for file in (path / CHAIN).rglob("*") if file.is_file()} == before
    assert document("check", path, "--content").verdict == "clean"
    document("prune", path, "--keep-last", 1)
    assert document("check", path, "--content").verdict == "clean"


@pytest.mark.skipif(shutil.which("unshare") is None, reason="no unshare here")
def test_a_full_file_system_changes_nothing(path: Path, tmp_path: Path) -> None:
    """In a name space of its own, on a file system of 16 MiB: the merged layer does not fit beside the others."""
    (small := tmp_path / "small").mkdir()
    ours = f"{sys.executable} -m qmpnbd repository"
    script = (
        f"mount -t tmpfs -o size=16m none {small} && cp -r {path} {small}/r || exit 1; "
        f"{ours} prune {small}/r --keep-last 1; code=$?; "
        f"{ours} check {small}/r --content && ls -A {small}/r/{CHAIN}; exit $code"
    )
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, cwd=ROOT)
    if "unshare:" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no file system of one's own here: {done.stderr.splitlines()[0]}")
    assert done.returncode == 83, done.stderr
    assert "No space left on device" in done.stderr
    assert "CLEAN" in done.stdout
    assert ".pruning" not in done.stdout
    assert done.stdout.count("0001-") == 1


def test_sigterm_ends_pruning_in_order(path: Path) -> None:
    command = [sys.executable, "-m", "qmpnbd", "repository", "prune", str(path), "--keep-last", "1", "--rate", "65536"]
    before = sorted(each.name for each in (path / CHAIN).iterdir())
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) as process:
        wait_until(lambda: any((path / CHAIN).glob(".pruning-*/*/.*.part")), "the merge to begin")
        process.terminate()
        assert process.wait(30) == 143
    assert sorted(each.name for each in (path / CHAIN).iterdir()) == before
    assert document("check", path, "--content").verdict == "clean"


def test_who_holds_it_is_told(path: Path) -> None:
    with Repository.open(path).lock("a long backup"):
        for verb in (["recover", path], ["prune", path, "--keep-last", 1]):
            assert f"a long backup (process {os.getpid()} on " in qmpnbd("repository", *verb, code=80).stderr
        document("list", path)
        document("check", path)


def test_what_killed_runs_left_is_recovered(path: Path) -> None:
    for name in (".partial-00000001-1", ".pruning-77"):
        (path / CHAIN / name).mkdir()
        (path / CHAIN / name / "vd0.qcow2").touch()
    done: Any = document("recover", path)
    assert len(done.done) == 2
    assert document("check", path).verdict == "clean"
    assert "nothing to recover" in qmpnbd("repository", "recover", path).stdout
