"""Restore of a whole machine: every disk and file of a backup under its name, proved; or nothing at all."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from qmpnbd.backup.backups import Backup
from qmpnbd.backup.destination import Destination, Form
from qmpnbd.backup.repository import Repository
from qmpnbd.backup.restore import RestoreOptions
from qmpnbd.backup.restore_machine import RestoredMachine, WantedMachine, restore_machine
from qmpnbd.backup.template import template_for
from qmpnbd.deadline import Deadline
from qmpnbd.errors import NotProvedError, RepositoryDamagedError, TargetInUseError, UsageError
from tests.chains import converted
from tests.servers import qemu_img, qemu_io, wait_until
from tests.stored import Stored, make_backup
from tests.test_backup_shallow_restore import entry_of
from tests.test_cli import COMMAND, document, qmpnbd

pytestmark = pytest.mark.real

EXTRAS = {"machine.json": b"{}\n", "pflash1.nvram.raw": bytes(range(256)) * 4096 + b"odd"}
NAMES = ("disk 0", "vdb")
"""A disk whose name is no file's, and one whose name is."""


@pytest.fixture
def made(tmp_path: Path) -> tuple[Repository, Backup]:
    """Two backups of two disks, and what is kept beside them."""
    repository = Repository.create(tmp_path / "repository")
    first = make_backup(repository, {name: Stored((f"write -P {at} 0 3M",)) for at, name in enumerate(NAMES, 1)})
    second = {name: Stored((f"write -P {at} 1M 64k", "write -z 2M 64k"), first) for at, name in enumerate(NAMES, 5)}
    return repository, make_backup(repository, second, extras=EXTRAS)


def restored(repository: Repository, target: Path, form: Form = "qcow2", *templates: str) -> RestoredMachine:
    wanted = WantedMachine(str(repository.path), templates=templates)
    return restore_machine(wanted, Destination(str(target), form), RestoreOptions(), Deadline(60))


@pytest.mark.parametrize("form", ["raw", "qcow2", "chain"])
def test_all_disks_and_files_of_one_instant_are_there(
    made: tuple[Repository, Backup], tmp_path: Path, form: Form
) -> None:
    repository, backup = made
    done = restored(repository, tmp_path / "vm", form)
    assert {path.name for path in (tmp_path / "vm").iterdir()} == {
        *EXTRAS,
        *(Path(each.destination.target).name for each in done.disks),
    }
    assert [each.point.disk.name for each in done.disks] == list(NAMES)
    for each in done.disks:
        place = Path(each.destination.target)
        image = sorted(place.iterdir())[-1] if form == "chain" else place
        expected = converted(backup.image(each.point.disk.name), tmp_path)
        assert converted(image, tmp_path, "raw" if form == "raw" else "qcow2") == expected
    for name, content in EXTRAS.items():
        assert (tmp_path / "vm" / name).read_bytes() == content


def test_the_command_tells_where_everything_is(made: tuple[Repository, Backup], here: Path) -> None:
    repository, backup = made
    told = document(qmpnbd("restore", repository.path, "latest", "vm", "--machine", "--json").stdout)
    assert (told["backup"], told["target"]) == (backup.manifest.id, "vm")
    disks, files = told["disks"], told["files"]
    assert isinstance(disks, list)
    assert isinstance(files, list)
    assert {path.name for path in Path("vm").iterdir()} == {Path(disk["target"]).name for disk in disks} | {
        file["file"] for file in files
    }
    text = qmpnbd("restore", repository.path, "1", "old", "--machine", "--format", "raw").stdout
    assert f"disk vdb of backup 1 ({repository.find('nightly', '1').manifest.id})" in text


def test_templates_are_named_for_each_disk(tmp_path: Path) -> None:
    repository, templates = Repository.create(tmp_path / "repository"), {}
    for at, name in enumerate(NAMES, 1):
        templates[name] = tmp_path / f"template-{at}"
        qemu_img("create", "-q", "-f", "raw", templates[name], "6M")
        qemu_io(templates[name], f"write -P {at} 0 {at}M", format="raw")
    disks = {name: Stored(("write -P 9 64k 64k",), template=entry_of(templates[name], "raw")) for name in NAMES}
    backup = make_backup(repository, disks)
    with pytest.raises(UsageError, match="stands on a template"):
        restored(repository, tmp_path / "vm")
    with pytest.raises(RepositoryDamagedError, match="not the template"):
        restored(repository, tmp_path / "vm", "qcow2", str(templates["vdb"]))
    assert not list(tmp_path.glob("*vm*"))
    named = (str(templates["disk 0"]), f"vdb={templates['vdb']}")
    done = restored(repository, tmp_path / "vm", "qcow2", *named)
    for each in done.disks:
        expected = converted(backup.image(each.point.disk.name), tmp_path)
        assert converted(Path(each.destination.target), tmp_path) == expected


@pytest.mark.parametrize(
    ("named", "disk", "file"),
    [
        ([], "vda", ""),
        (["base"], "vda", "base"),
        (["vdb=other", "base"], "vda", "base"),
        (["vdb=other", "base"], "vdb", "other"),
        (["a=b.raw"], "vda", "a=b.raw"),
        (["vda=a=b"], "vda", "a=b"),
        (["vdb=other"], "vda", ""),
    ],
)
def test_which_template_is_meant(named: list[str], disk: str, file: str) -> None:
    assert template_for(disk, named, ["vda", "vdb"]) == file


@pytest.mark.parametrize("rotten", ["pflash1.nvram.raw", "vdb"])
def test_what_is_rotten_is_told_and_nothing_is_left(
    made: tuple[Repository, Backup], tmp_path: Path, rotten: str
) -> None:
    """Also of what would have been restored before it."""
    repository, backup = made
    path = backup.image(rotten) if rotten == "vdb" else backup.extra_file(rotten)
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1  # in the data of the image, which is written last
    path.write_bytes(content)
    with pytest.raises(RepositoryDamagedError):
        restored(repository, tmp_path / "vm")
    assert not list(tmp_path.glob("*vm*"))


def test_no_folder_is_replaced(made: tuple[Repository, Backup], here: Path) -> None:
    Path("vm").mkdir()
    with pytest.raises(TargetInUseError, match="it exists"):
        restored(made[0], Path("vm"))
    qmpnbd("restore", made[0].path, "latest", "vm", "--machine", "--force", code=84)
    assert list(Path("vm").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "why"), [(("--disk", "vdb"), "all disks"), (("--instant", "serve"), "one disk is served")]
)
def test_what_does_not_go_together(made: tuple[Repository, Backup], here: Path, arguments: str, why: str) -> None:
    assert why in qmpnbd("restore", made[0].path, "latest", "vm", "--machine", *arguments, code=2).stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_ended_leaves_no_folder_and_the_next_one_is_whole(
    made: tuple[Repository, Backup], here: Path, number: signal.Signals
) -> None:
    command = [*COMMAND, "restore", str(made[0].path), "latest", "vm", "--machine"]
    with subprocess.Popen([*command, "--rate", "100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        try:
            wait_until(lambda: any(Path().glob(".vm.*/.*")) or child.poll() is not None, "the first disk")
            child.send_signal(number)
            child.communicate(timeout=30)
        finally:
            child.kill()
    assert not Path("vm").exists()
    assert len(list(here.glob("*vm*"))) == (number == signal.SIGKILL)
    qmpnbd(*command[len(COMMAND) :])
    assert [path.name for path in here.glob("*vm*")] == ["vm"]


@pytest.mark.parametrize(
    ("form", "ending", "message"),
    [("raw", ".raw", "its hash is another one"), ("chain", ".qcow2", "are not what was backed up")],
)
def test_what_is_read_back_as_something_else_leaves_no_folder(
    made: tuple[Repository, Backup],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    form: Form,
    ending: str,
    message: str,
) -> None:
    """A medium that changes a byte: of a file beside the disks, and of a layer of a chain."""
    repository, _ = made

    changed = {"0002-disk_0.qcow2": bytes([5]) * 4096, "pflash1.nvram.raw": b"odd"}

    def rot(path: str) -> None:
        for name, sought in changed.items():
            if name in path and path.endswith((ending, ".part")):
                content = bytearray(Path(path).read_bytes())
                content[content.index(sought)] ^= 1
                Path(path).write_bytes(content)

    monkeypatch.setattr("qmpnbd.backup.prove_layer.forget", rot)
    with pytest.raises(NotProvedError, match=message):
        restored(repository, tmp_path / "vm", form)
    assert [path.name for path in tmp_path.iterdir()] == ["repository"]


def test_who_does_not_say_which_backup_or_which_disk_is_told_what_to_say(
    made: tuple[Repository, Backup], here: Path
) -> None:
    repository, _ = made
    told = qmpnbd("restore", repository.path, "vm", code=2).stderr
    assert "required: TARGET. The newest backup is called latest: qmpnbd restore REPO latest FILE for a disk" in told
    assert "qmpnbd restore REPO latest FOLDER --machine" in told
    assert "with --machine" in qmpnbd("restore", repository.path, "latest", "vm", code=2).stderr
    assert "or --machine, for all" in qmpnbd("restore", repository.path, "latest", "vm.raw", code=2).stderr
    assert [path.name for path in here.iterdir()] == ["repository"]
    qmpnbd("restore", repository.path, "latest", "vm", "--machine")
