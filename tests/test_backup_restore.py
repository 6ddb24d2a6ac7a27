"""Restore: what comes out is what QEMU reads from the chain, or an error says what is wrong and nothing is left."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmpnbd.backup import destination as opening
from qmpnbd.backup.backups import Backup
from qmpnbd.backup.destination import Form, destination
from qmpnbd.backup.point import Wanted
from qmpnbd.backup.repository import Repository
from qmpnbd.backup.restore import RestoreOptions, restore
from qmpnbd.deadline import Deadline
from qmpnbd.errors import (
    DeadlineError,
    NoSuchBackupError,
    NotProvedError,
    QmpnbdError,
    RepositoryDamagedError,
    TargetError,
    TargetInUseError,
    UsageError,
)
from tests.chains import converted, run
from tests.qemu_versions import QemuBinaries, each_qemu
from tests.restorable import BECAME_ZERO, DATA_AT, copy_of, flip, make_chain, wanted
from tests.servers import blockdev, qemu_img, qemu_io, wait_until
from tests.stored import Stored, make_backup
from tests.test_cli import COMMAND, document, qmpnbd

pytestmark = pytest.mark.real

Made = tuple[Repository, list[Backup]]
FORMS: tuple[Form, ...] = ("raw", "qcow2", "chain")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A chain of three backups, never written by tests."""
    return make_chain(tmp_path_factory.mktemp("made") / "repository")


@pytest.fixture
def mine(made: Made, tmp_path: Path) -> Made:
    """A copy of it, to be damaged."""
    return copy_of(made[0], tmp_path / "repository")


@pytest.fixture
def targets(tmp_path: Path) -> Path:
    """An empty folder for targets."""
    folder = tmp_path / "targets"
    folder.mkdir()
    return folder


def restored(what: Wanted, target: Path, form: Form, *, force: bool = False, compress: bool = False) -> Path:
    """Restores and returns the image to look at."""
    options = RestoreOptions(force=force, compression="zstd" if compress else "")
    named = form if form in ("raw", "qcow2", "chain") else ""
    done = restore(what, destination(str(target), named), options, Deadline(60))
    assert done.read_back_bytes >= done.data_bytes or form == "chain"
    assert done.data_bytes + done.zero_bytes == done.point.disk.size
    return sorted(target.iterdir())[-1] if form == "chain" else target


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("form", FORMS)
def test_every_restore_point_is_what_qemu_reads_from_the_chain(
    made: Made, targets: Path, number: int, form: Form
) -> None:
    repository, backups = made
    image = restored(wanted(repository, number), targets / "disk", form)
    assert converted(image, targets, "raw" if form == "raw" else "qcow2") == converted(
        backups[number - 1].image("vda"), targets
    )


@each_qemu
@pytest.mark.parametrize("form", ["qcow2", "chain"])
def test_every_qemu_reads_and_checks_what_was_restored(
    made: Made, targets: Path, form: Form, binaries: QemuBinaries
) -> None:
    image = restored(wanted(made[0]), targets / "disk", form)
    for layer in sorted((targets / "disk").iterdir()) if form == "chain" else [image]:
        run(binaries.img, "check", "-f", "qcow2", layer)
    run(binaries.img, "compare", "-f", "qcow2", "-F", "qcow2", image, made[1][-1].image("vda"))


def test_a_restored_chain_has_a_layer_for_each_backup_and_can_be_moved(made: Made, targets: Path) -> None:
    restored(wanted(made[0]), targets / "disk", "chain")
    (targets / "disk").rename(targets / "moved")
    names = sorted(path.name for path in (targets / "moved").iterdir())
    assert names == ["0001-vda.qcow2", "0002-vda.qcow2", "0003-vda.qcow2"]
    qemu_img("compare", targets / "moved/0003-vda.qcow2", made[1][2].image("vda"))
    qemu_img("compare", targets / "moved/0002-vda.qcow2", made[1][1].image("vda"))


@pytest.mark.parametrize("form", ["qcow2", "chain"])
def test_restored_images_can_be_compressed(targets: Path, form: Form, tmp_path: Path) -> None:
    """Also where data and zeroes share a cluster, which is stored whole then."""
    repository = Repository.create(tmp_path / "odd")
    first = make_backup(repository, {"vda": Stored(("write -P 1 512 1024", "write -P 2 1M 1M"), cluster_size=4096)})
    backup = make_backup(repository, {"vda": Stored(("write -P 3 4M 64k",), first)})
    image = restored(wanted(repository), targets / "disk", form, compress=True)
    assert converted(image, targets) == converted(backup.image("vda"), targets)
    assert image.stat().st_size < 1 << 20


def test_a_disk_that_grew_and_one_of_no_whole_sectors_are_restored(targets: Path, tmp_path: Path) -> None:
    """What lies past the end of the shorter layer is zero; qcow2 knows sizes that QEMU rounds up."""
    repository = Repository.create(tmp_path / "grown")
    first = make_backup(repository, {"vda": Stored(("write -P 1 0 4M",), size=4 << 20)})
    backup = make_backup(repository, {"vda": Stored(("write -P 2 5M 64k",), first, size=(8 << 20) + 512)})
    for form in FORMS:
        image = restored(wanted(repository), targets / form, form)
        expected = converted(backup.image("vda"), targets)
        assert len(expected) == (8 << 20) + 512
        assert converted(image, targets, "raw" if form == "raw" else "qcow2") == expected


def test_a_disk_without_data_is_restored(targets: Path, tmp_path: Path) -> None:
    repository = Repository.create(tmp_path / "empty")
    make_backup(repository, {"vda": Stored()})
    for form in FORMS:
        image = restored(wanted(repository), targets / form, form)
        assert not any(converted(image, targets, "raw" if form == "raw" else "qcow2"))


def test_what_became_zero_is_zero_in_what_held_old_data(made: Made, targets: Path) -> None:
    """Row 6: an increment that became zero over data must not bring the old data back."""
    target = targets / "disk.raw"
    target.write_bytes(b"\xff" * (8 << 20))
    restored(wanted(made[0]), target, "raw", force=True)
    with target.open("rb") as file:
        file.seek(BECAME_ZERO)
        assert file.read(65536) == bytes(65536)
    with (made[1][0].image("vda")).open("rb"):
        assert converted(made[1][0].image("vda"), targets)[BECAME_ZERO : BECAME_ZERO + 65536] == b"\1" * 65536


# --- what is damaged -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_rotten_bit_in_any_layer_ends_a_restore_and_nothing_is_left(
    mine: Made, targets: Path, layer: int, form: Form
) -> None:
    repository, backups = mine
    flip(backups[layer], DATA_AT[layer])
    with pytest.raises(RepositoryDamagedError, match="not what was backed up") as told:
        restored(wanted(repository), targets / "disk", form)
    assert str(backups[layer].path) in told.value.where
    assert list(targets.iterdir()) == []


def test_rot_that_a_higher_layer_covers_in_part_is_found(mine: Made, targets: Path) -> None:
    """The piece has a hash as a whole, so the whole of it must be right."""
    flip(mine[1][0], 64 << 10)  # the second layer covers it
    with pytest.raises(RepositoryDamagedError, match="not what was backed up"):
        restored(wanted(mine[0]), targets / "disk.raw", "raw")


def test_a_backup_that_does_not_stand_on_what_is_rotten_is_restored(mine: Made, targets: Path) -> None:
    flip(mine[1][2], DATA_AT[2])
    image = restored(wanted(mine[0], 2), targets / "disk.raw", "raw")
    assert converted(image, targets, "raw") == converted(mine[1][1].image("vda"), targets)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("what", ["hashes", "image", "manifest", "folder"])
def test_whatever_is_missing_is_an_error_and_not_skipped(mine: Made, targets: Path, layer: int, what: str) -> None:
    backup = mine[1][layer]
    files = {"hashes": "vda.hashes", "image": "vda.qcow2", "manifest": "manifest.json"}
    if what == "folder":
        backup.path.rename(targets / "away")
    else:
        (backup.path / files[what]).unlink()
    kinds = (RepositoryDamagedError, NoSuchBackupError) if layer == 2 else RepositoryDamagedError
    with pytest.raises(kinds):
        restored(wanted(mine[0], 3), targets / "disk.raw", "raw")
    assert not (targets / "disk.raw").exists()


def test_an_image_that_says_zero_where_data_was_backed_up_is_damaged(mine: Made, targets: Path) -> None:
    image = mine[1][1].image("vda")
    content = image.read_bytes()
    qemu_io(image, f"write -z {DATA_AT[1]} 64k")
    image.write_bytes(image.read_bytes()[: len(content)].ljust(len(content), b"\0"))
    with pytest.raises(RepositoryDamagedError, match="zero where data was backed up"):
        restored(wanted(mine[0]), targets / "disk.raw", "raw")


def test_names_in_the_headers_lead_nowhere(mine: Made, targets: Path, tmp_path: Path) -> None:
    """Which layers there are is told by the manifests; a header that was changed shows nothing of another file."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret" * 100000)
    qemu_img("rebase", "-u", "-b", secret, "-F", "raw", mine[1][1].image("vda"))
    image = restored(wanted(mine[0]), targets / "disk.raw", "raw")
    assert b"secret" not in image.read_bytes()


def test_what_is_read_back_as_something_else_is_discarded(
    made: Made, targets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A medium that changes data between writing and reading."""

    def rot(path: str) -> None:
        with Path(path).open("r+b") as file:
            file.seek(-65536, 2)
            file.write(b"rot")

    monkeypatch.setattr(opening, "forget", rot)
    (targets / "disk.raw").write_bytes(b"precious")
    with pytest.raises(NotProvedError, match="must be zero"):
        restored(wanted(made[0], 1), targets / "disk.raw", "raw", force=True)
    assert [(path.name, path.read_bytes()) for path in targets.iterdir()] == [("disk.raw", b"precious")]


# --- targets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_overwritten_without_force(made: Made, targets: Path, form: Form) -> None:
    (targets / "disk").write_bytes(b"precious")
    with pytest.raises(TargetInUseError, match="it exists"):
        restored(wanted(made[0]), targets / "disk", form)
    assert [(path.name, path.read_bytes()) for path in targets.iterdir()] == [("disk", b"precious")]


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_with_force_a_file_is_replaced_unless_a_qemu_has_it_open(
    made: Made, targets: Path, form: Form, binaries: QemuBinaries
) -> None:
    target = targets / "disk"
    qemu_img("create", "-q", "-f", form, target, "8M")
    before = target.read_bytes()
    device = "virtio-blk-pci,drive=used"
    with binaries.qemu("-blockdev", blockdev(target, "used", form), "-device", device):
        with pytest.raises(TargetInUseError, match="another process uses it"):
            restored(wanted(made[0]), target, form, force=True)
        assert target.read_bytes() == before
    image = restored(wanted(made[0]), target, form, force=True)
    assert converted(image, targets, form) == converted(made[1][-1].image("vda"), targets)


@pytest.mark.parametrize("form", FORMS)
def test_a_target_in_no_folder_is_told(made: Made, targets: Path, form: Form) -> None:
    with pytest.raises(TargetError):
        restored(wanted(made[0]), targets / "missing" / "disk", form)


@pytest.mark.parametrize("form", FORMS)
def test_a_full_target_is_told_and_removed(made: Made, targets: Path, form: Form) -> None:
    """The kernel's limit on the size of files does what a full file system does, and needs no rights."""
    command = ["sh", "-c", 'ulimit -f 512; exec "$@"', "sh", *COMMAND, "restore", str(made[0].path), "1"]
    done = subprocess.run(
        [*command, str(targets / "disk"), "--format", form], check=False, capture_output=True, text=True, timeout=60
    )
    # A raw file is told that it cannot have its size before a byte is written.
    assert done.returncode == TargetError.exit_code, done.stderr
    assert list(targets.iterdir()) == []


# --- the end of a run ------------------------------------------------------------------------------------------


@pytest.fixture
def slow(made: Made, targets: Path) -> Iterator[subprocess.Popen[str]]:
    """A restore that takes long and has begun to write."""
    command = [*COMMAND, "restore", str(made[0].path), "1", str(targets / "disk.raw"), "--rate", "100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            wait_until(lambda: any(targets.iterdir()) or child.poll() is not None, "the restore to begin")
            yield child
        finally:
            child.kill()


def test_a_killed_restore_leaves_nothing_that_looks_complete(
    made: Made, targets: Path, slow: subprocess.Popen[str]
) -> None:
    slow.kill()
    slow.communicate(timeout=30)
    assert not (targets / "disk.raw").exists()
    image = restored(wanted(made[0], 1), targets / "disk.raw", "raw")
    assert list(targets.iterdir()) == [image]
    assert converted(image, targets, "raw") == converted(made[1][0].image("vda"), targets)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_a_restore_at_once_and_nothing_is_left(
    targets: Path, slow: subprocess.Popen[str], number: signal.Signals
) -> None:
    slow.send_signal(number)
    output, complaints = slow.communicate(timeout=30)
    assert (slow.returncode, output) == (128 + number, ""), complaints
    assert list(targets.iterdir()) == []


def test_a_restore_ends_with_its_time(made: Made, targets: Path) -> None:
    options = RestoreOptions(bytes_per_second=100000)
    with pytest.raises(DeadlineError):
        restore(wanted(made[0], 1), destination(str(targets / "disk.raw"), ""), options, Deadline(1))
    assert list(targets.iterdir()) == []


# --- what is meant ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"backup": "9"}, NoSuchBackupError, "no backup"),
        ({"chain": "other"}, NoSuchBackupError, "no chain"),
        ({"disk": "vdb"}, NoSuchBackupError, "no disk"),
        ({"backup": "2001-01-01"}, NoSuchBackupError, "no backup"),
        ({"backup": "yesterday"}, UsageError, "is no backup"),
        ({"repository": "/nonexistent"}, NoSuchBackupError, "no repository"),
    ],
)
def test_what_is_not_there_is_told(
    made: Made, targets: Path, change: dict[str, str], error: type[QmpnbdError], words: str
) -> None:
    facts = {"repository": str(made[0].path), "backup": "latest", "chain": "nightly", "disk": "vda", **change}
    with pytest.raises(error, match=words):
        restored(Wanted(**facts), targets / "disk.raw", "raw")


def test_the_only_chain_and_the_only_disk_need_not_be_named(made: Made, targets: Path, tmp_path: Path) -> None:
    image = restored(Wanted(str(made[0].path)), targets / "disk.raw", "raw")
    assert converted(image, targets, "raw") == converted(made[1][-1].image("vda"), targets)
    repository = Repository.create(tmp_path / "two")
    make_backup(repository, {"vda": Stored(), "vdb": Stored()})
    with pytest.raises(UsageError, match="it has 2 disks"):
        restored(Wanted(str(repository.path)), targets / "second.raw", "raw")
    make_backup(repository, {"vda": Stored()}, chain="other")
    with pytest.raises(UsageError, match="it has 2 chains"):
        restored(Wanted(str(repository.path)), targets / "second.raw", "raw")


def test_the_form_of_a_target_is_told_or_seen(tmp_path: Path) -> None:
    assert destination("a.qcow2", "").form == "qcow2"
    assert destination("a.img", "").form == "raw"
    assert destination("a.img", "chain").form == "chain"
    assert destination("nbd+unix:///x?socket=/s", "").form == "nbd"
    with pytest.raises(UsageError, match="what it shall be"):
        destination(str(tmp_path / "disk"), "")
    with pytest.raises(UsageError, match="no place for qcow2"):
        destination("nbd://localhost/x", "qcow2")


# --- the command line ------------------------------------------------------------------------------------------


def test_the_command_restores_and_tells_what_it_did(made: Made, targets: Path) -> None:
    repository, backups = made
    words = ("--chain", "nightly", "--disk", "vda", targets / "a.qcow2", "--progress")
    done = qmpnbd("restore", repository.path, "2", *words)
    assert f"disk vda of backup 2 ({backups[1].manifest.id})" in done.stdout
    assert "read back and proved" in done.stdout
    told = document(qmpnbd("restore", repository.path, "latest", targets / "b.raw", "--json").stdout)
    assert (told["schema"], told["form"], told["number"], told["size"]) == ("qmpnbd.restore/1", "raw", 3, 8 << 20)
    assert [layer["kind"] for layer in told["layers"]] == ["increment", "increment", "full"]  # type: ignore[attr-defined]
    qemu_img("compare", "-F", "raw", backups[2].image("vda"), targets / "b.raw")


def test_the_command_fails_loudly(mine: Made, targets: Path) -> None:
    """Row 8: a restore that failed has its own exit code, and JSON of the error."""
    flip(mine[1][0], DATA_AT[0])
    done = qmpnbd("restore", mine[0].path, "latest", targets / "a.raw", "--json", code=RepositoryDamagedError.exit_code)
    assert document(done.stdout)["error"]["type"] == "RepositoryDamagedError"  # type: ignore[index]
    (targets / "b.raw").write_bytes(b"")
    qmpnbd("restore", mine[0].path, "latest", targets / "b.raw", code=TargetInUseError.exit_code)
    qmpnbd("restore", mine[0].path, "latest", targets / "c", code=UsageError.exit_code)
    qmpnbd("restore", mine[0].path, "7", targets / "c.raw", code=NoSuchBackupError.exit_code)
    assert [path.name for path in targets.iterdir()] == ["b.raw"]
