"""Verification finds each fault, names disk, backup and place, and proves what is sound; boot tests go both ways."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from qmpnbd.backup import verify as verifying
from qmpnbd.backup.backups import Backup
from qmpnbd.backup.boottest import BootImage, BootOptions, boot_test
from qmpnbd.backup.check import Checked
from qmpnbd.backup.point import find_point
from qmpnbd.backup.repository import Repository
from qmpnbd.backup.verify import Verified, VerifyOptions, compare, verify
from qmpnbd.deadline import Deadline
from qmpnbd.errors import DeadlineError, NoSuchBackupError, UsageError
from qmpnbd.nbd.uri import NbdUri
from qmpnbd.report import verify as reporting
from tests.bootable import SAYS, write_sector
from tests.qemu_versions import QemuBinaries, each_qemu
from tests.restorable import DATA_AT, copy_of, flip, make_chain, wanted
from tests.servers import qemu_img, qemu_io, wait_until
from tests.stored import Stored, make_backup
from tests.test_cli import COMMAND, document, qmpnbd, served
from tests.test_vm_images import PACKAGES, ROOT, guest

pytestmark = pytest.mark.real

Made = tuple[Repository, list[Backup]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A chain of three backups, never written by tests."""
    return make_chain(tmp_path_factory.mktemp("made") / "repository")


@pytest.fixture
def mine(made: Made, tmp_path: Path) -> Made:
    """A copy of it, to be damaged."""
    return copy_of(made[0], tmp_path / "repository")


def verified(repository: Repository, **options: object) -> Verified:
    choice = VerifyOptions(**options)  # type: ignore[arg-type]
    return asyncio.run(verify(str(repository.path), choice, Deadline(100)))


def content_of(folder: Path) -> dict[str, str]:
    """Every file of a repository with its hash."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_sound_backups_are_proved_and_not_changed(mine: Made, folder: Path) -> None:
    before = content_of(mine[0].path / "nightly")
    done = verified(mine[0], second_reader="all", runtime_dir=str(folder))
    assert done.is_sound
    assert done.skipped == ()
    assert [(each.point.backup.manifest.number, each.bytes > 1 << 20) for each in done.readings] == [
        (1, True),
        (2, True),
        (3, True),
    ]
    assert content_of(mine[0].path / "nightly") == before
    assert list(folder.iterdir()) == []


@each_qemu
def test_every_qemu_can_be_the_second_reader(made: Made, binaries: QemuBinaries) -> None:
    done = verified(made[0], program=binaries.storage_daemon)
    assert done.is_sound
    assert done.qemu.startswith(binaries.release)


def change_manifest(backup: Backup) -> None:
    path = backup.path / "manifest.json"
    facts = json.loads(path.read_bytes())
    facts["disks"][0]["data_bytes"] += 1
    path.write_text(json.dumps(facts))


def rebase(backup: Backup) -> None:
    qemu_img("rebase", "-u", "-b", "/dev/zero", "-F", "raw", backup.image("vda"))


def cut(backup: Backup) -> None:
    image = backup.image("vda")
    image.write_bytes(image.read_bytes()[:-512])


def foreign(backup: Backup) -> None:
    (backup.path / "notes.txt").write_text("x")


def cut_hashes(backup: Backup) -> None:
    (backup.path / "vda.hashes").write_bytes(b"QMPNBDH1")


DAMAGE: dict[str, tuple[Callable[[Backup], None], str]] = {
    "hashes missing": (lambda backup: (backup.path / "vda.hashes").unlink(), "hashes"),
    "hashes cut": (cut_hashes, "hashes"),
    "image missing": (lambda backup: (backup.path / "vda.qcow2").unlink(), "file"),
    "image cut": (cut, "file"),
    "other base": (rebase, "image"),
    "manifest edited": (change_manifest, "manifest"),
    "manifest missing": (lambda backup: (backup.path / "manifest.json").unlink(), "manifest"),
    "foreign file": (foreign, "foreign"),
}


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("damage", DAMAGE)
def test_each_fault_is_found_and_named(mine: Made, layer: int, damage: str) -> None:
    backup = mine[1][layer]
    change, rule = DAMAGE[damage]
    change(backup)
    done = verified(mine[0])
    assert not done.is_sound
    assert (rule, backup.manifest.id) in {(each.rule.value, each.backup) for each in done.checked.findings}
    # What is known to be broken is not handed to QEMU, whose reading of headers could lead anywhere.
    if damage == "other base":
        assert done.readings == ()


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_flipped_bit_is_found_with_disk_backup_and_offset(mine: Made, layer: int) -> None:
    backup, at = mine[1][layer], DATA_AT[layer]
    flip(backup, at)
    (finding,) = verified(mine[0]).checked.findings
    assert (finding.rule.value, finding.backup, finding.disk) == ("content", backup.manifest.id, "vda")
    assert finding.offset is not None
    assert finding.end is not None
    assert finding.offset <= at < finding.end <= finding.offset + (1 << 20)


def test_the_second_reader_finds_what_the_check_did_not(mine: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    def blind(repository: Repository, chain: str | None, *, content: bool, deadline: Deadline) -> Checked:
        return Checked((), {"nightly": repository.inspect("nightly")}, set())

    monkeypatch.setattr(verifying, "check", blind)
    flip(mine[1][0], DATA_AT[0])
    done = verified(mine[0])
    assert not done.is_sound
    assert "not what was backed up" in done.readings[0].differences[0].what


def test_bytes_that_qemu_reads_otherwise_are_told_with_their_place(made: Made, folder: Path) -> None:
    """QEMU is given a disk that differs in two places: in data, and where zeroes were backed up."""
    qemu_img("convert", "-O", "qcow2", made[1][2].image("vda"), folder / "other.qcow2")
    qemu_io(folder / "other.qcow2", "write -P 9 2M 512", "write -P 7 4M 4k")
    with served(folder / "other.qcow2", folder) as uri:
        reading = compare(NbdUri.parse(uri), find_point(wanted(made[0])), Deadline(60))
    found = sorted((each.offset, each.end, each.what) for each in reading.differences)
    assert found == [
        (2 << 20, (2 << 20) + 4096, "QEMU reads 0x09 where 0x01 was backed up"),
        (4 << 20, (4 << 20) + 4096, "QEMU reads 0x07 where 0x00 was backed up"),
    ]


def test_one_backup_can_be_named_for_the_second_reader(made: Made) -> None:
    done = verified(made[0], backup=made[1][1].manifest.id)
    assert [each.point.backup.manifest.number for each in done.readings] == [2]
    with pytest.raises(NoSuchBackupError):
        verified(made[0], backup="9")


# --- the command line ------------------------------------------------------------------------------------------


def test_the_command_tells_what_is_proved_and_what_is_damaged(mine: Made) -> None:
    path = mine[0].path
    assert "PROVED" in qmpnbd("verify", path).stdout
    told = document(qmpnbd("verify", path, "--json", "--second-reader", "none").stdout)
    assert (told["verdict"], told["backups"], told["qemu"], told["findings"]) == ("proved", 3, "", [])
    (mine[1][0].path / "vda.hashes").unlink()
    done = qmpnbd("verify", path, code=1)
    assert "DAMAGED" in done.stdout
    assert f"hashes: chain nightly, backup {mine[1][0].manifest.id}, disk vda" in done.stdout
    told = document(qmpnbd("verify", path, "--json", code=1).stdout)
    assert told["verdict"] == "damaged"
    assert told["second_readings"] == []


def test_the_command_knows_what_makes_no_sense(made: Made, tmp_path: Path) -> None:
    qmpnbd("verify", tmp_path, code=NoSuchBackupError.exit_code)
    qmpnbd("verify", made[0].path, "--chain", "other", code=NoSuchBackupError.exit_code)
    qmpnbd("verify", made[0].path, "--boot-argument=-S", code=UsageError.exit_code)
    qmpnbd("verify", made[0].path, "--boot", "x", "--boot-qemu", "no-such-qemu", code=UsageError.exit_code)


# --- boot tests ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bootable(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Three backups: the boot sector is in the first one, and gone in the last one."""
    folder = tmp_path_factory.mktemp("bootable")
    repository = Repository.create(folder / "repository")
    backups = [make_backup(repository, {"vda": Stored((write_sector(folder),))})]
    for writes in (("write -P 2 1M 64k",), ("write -z 0 64k",)):
        backups.append(make_backup(repository, {"vda": Stored(writes, backups[-1])}))
    return repository, backups


def booted(backup: Backup, marker: str = SAYS, **more: object) -> tuple[bool, str, str]:
    options = BootOptions(marker, memory=32, **{"seconds": 60.0, **more})  # type: ignore[arg-type]
    image = BootImage(str(backup.image("vda")), backup.disk("vda").size)
    result = asyncio.run(boot_test([image], options, Deadline(100)))
    return result.reached, result.why, result.console


@each_qemu
def test_a_backup_boots_from_its_chain(bootable: Made, binaries: QemuBinaries, folder: Path) -> None:
    before = content_of(bootable[0].path)
    reached, why, console = booted(bootable[1][1], program=binaries.system, runtime_dir=str(folder))
    assert (reached, why) == (True, "")
    assert SAYS in console
    assert content_of(bootable[0].path) == before
    assert list(folder.iterdir()) == []


def test_a_backup_without_its_boot_sector_does_not_boot(bootable: Made) -> None:
    reached, why, _ = booted(bootable[1][2], seconds=5.0)
    assert (reached, why) == (False, "no such words on the serial line within 5 s")


def test_a_guest_that_says_something_else_has_not_booted_and_its_words_are_kept(bootable: Made) -> None:
    reached, _, console = booted(bootable[1][1], marker=SAYS + " too", seconds=5.0)
    assert not reached
    assert SAYS in console


def test_a_qemu_that_ends_at_once_is_told_with_its_words(bootable: Made) -> None:
    reached, why, _ = booted(bootable[1][1], arguments=("-device", "no-such-device"))
    assert not reached
    assert "QEMU ended before" in why
    assert "no-such-device" in why
    reached, why, _ = booted(bootable[1][1], arguments=("-no-shutdown", "-machine", "none"))
    assert not reached


def test_a_boot_test_ends_with_the_time_of_the_whole(bootable: Made, folder: Path) -> None:
    image = BootImage(str(bootable[1][1].image("vda")), 8 << 20)
    options = BootOptions("never said", memory=32, runtime_dir=str(folder))
    with pytest.raises(DeadlineError):
        asyncio.run(boot_test([image], options, Deadline(1)))
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(("which", "code"), [("2", 0), ("latest", 1)])
def test_the_command_boots_the_backup_that_is_named(bootable: Made, which: str, code: int) -> None:
    words = ["--backup", which, "--boot", SAYS, "--boot-timeout", "5" if code else "60", "--boot-memory", "32"]
    told = document(qmpnbd("verify", bootable[0].path, *words, "--json", code=code).stdout)
    assert told["boots"][0]["reached"] == (code == 0)  # type: ignore[index]
    assert [finding["rule"] for finding in told["findings"]] == ["boot"] * code  # type: ignore[attr-defined]


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_an_image_that_holds_something_else_is_found_with_its_place(mine: Made, layer: int) -> None:
    """The layer's own logic: it holds exactly what was recorded for it, be it more, less or otherwise."""
    image, at = mine[1][layer].image("vda"), DATA_AT[layer]
    size = image.stat().st_size
    qemu_io(image, f"write -z {at} 64k")
    image.write_bytes(image.read_bytes()[:size].ljust(size, b"\0"))
    found = [each for each in verified(mine[0]).checked.findings if each.rule.value == "image"]
    assert [(each.backup, each.offset, each.end) for each in found if each.offset is not None] == [
        (mine[1][layer].manifest.id, at, at + 65536)
    ]


def test_nothing_boots_from_what_is_damaged(bootable: Made, tmp_path: Path) -> None:
    path = Path(shutil.copytree(bootable[0].path, tmp_path / "repository"))
    (bootable_backup,) = [each for each in Repository.open(path).backups("nightly") if each.manifest.number == 1]
    flip(bootable_backup, 0)
    told = document(qmpnbd("verify", path, "--backup", "2", "--boot", SAYS, "--json", code=1).stdout)
    assert told["boots"][0]["why"].startswith("not tried")  # type: ignore[index]


@pytest.mark.skipif(
    not (PACKAGES / "complete").exists(), reason="no kernel for a guest (scripts/setup demo fetches one)"
)
@pytest.mark.parametrize("does", [True, False])
def test_a_guest_with_a_kernel_boots_and_writes_and_the_backup_stays(made: Made, does: bool) -> None:
    """The guest reports a record only when its disk has taken it; the overlay has, the repository does not change."""
    linux = guest.build(PACKAGES, ROOT / ".work/guest")
    before = content_of(made[0].path)
    append = f"{linux.append} qmpnbd.places=1048576,3145728"
    words = ("-kernel", str(linux.kernel), "-initrd", str(linux.initramfs), "-append", append)
    options = BootOptions(
        "qmpnbd-guest: record 2 at 3145728" if does else "qmpnbd-guest: record 3",
        seconds=90.0 if does else 15.0,
        memory=192,
        arguments=words,
    )
    image = BootImage(str(made[1][2].image("vda")), 8 << 20)
    result = asyncio.run(boot_test([image], options, Deadline(110)))
    assert result.reached == does, result
    if not does:
        assert guest.READY in result.console
    assert content_of(made[0].path) == before


def machines_of(pid: int) -> list[str]:
    """The QEMUs that a process started; a copy of itself that is not QEMU yet still holds its lock."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [each for each in children if "qemu" in os.path.realpath(f"/proc/{each}/exe")]


def test_what_a_killed_boot_test_left_is_removed_by_the_next(bootable: Made, folder: Path) -> None:
    """A kill takes QEMU with it; its overlay, which can be large, must not stay for ever."""
    words = [
        "verify",
        str(bootable[0].path),
        "--boot",
        "never said",
        "--boot-memory",
        "32",
        "--runtime-dir",
        str(folder),
    ]
    with subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        wait_until(lambda: bool(machines_of(child.pid)) or child.poll() is not None, "QEMU")
        machines = machines_of(child.pid)
        child.kill()
        child.communicate(timeout=30)
    wait_until(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in machines), "QEMU to end")
    assert len(list(folder.iterdir())) == 1
    assert booted(bootable[1][1], runtime_dir=str(folder))[0]
    assert list(folder.iterdir()) == []


def test_what_a_killed_run_left_is_no_damage(mine: Made) -> None:
    (mine[0].path / "nightly" / ".partial-0123abcd-1").mkdir()
    told = document(qmpnbd("verify", mine[0].path, "--json", code=3).stdout)
    assert (told["verdict"], [each["rule"] for each in told["findings"]]) == ("incomplete", ["unfinished"])  # type: ignore[attr-defined]


def test_a_signal_ends_a_boot_test_and_nothing_is_left(bootable: Made, folder: Path) -> None:
    words = [
        "verify",
        str(bootable[0].path),
        "--boot",
        "never said",
        "--boot-memory",
        "32",
        "--runtime-dir",
        str(folder),
    ]
    with subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        wait_until(lambda: any(folder.glob("qmpnbd-*/disk0.qcow2")) or child.poll() is not None, "QEMU")
        child.terminate()
        output, complaints = child.communicate(timeout=30)
    assert (child.returncode, output) == (143, b""), complaints
    assert list(folder.iterdir()) == []


def test_a_backup_that_is_rotten_as_a_whole_has_a_report_that_ends(mine: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporting, "MAX_FINDINGS", 2)
    for at in (0, 1 << 20, 2 << 20):
        flip(mine[1][0], at)
    told = reporting.verify_document("repository", verified(mine[0]))
    assert (told.finding_count, len(told.findings)) == (3, 2)
    assert reporting.verify_text(told).splitlines()[-1] == "  … 1 more"
