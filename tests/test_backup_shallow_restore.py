"""Restore of shallow backups, whose template is not in the repository and is named by whoever restores."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path

import pytest

from qmpnbd.backup.backups import Backup
from qmpnbd.backup.destination import Form, destination
from qmpnbd.backup.fingerprint import sha256_of_disk
from qmpnbd.backup.instantly import InstantOptions, instant_restore
from qmpnbd.backup.manifest import TemplateEntry
from qmpnbd.backup.repository import Repository
from qmpnbd.backup.restore import Restored, RestoreOptions, restore
from qmpnbd.backup.sources import ImageSource
from qmpnbd.backup.template import with_sha256
from qmpnbd.deadline import Deadline
from qmpnbd.errors import RepositoryDamagedError, UsageError
from tests.chains import converted
from tests.restorable import wanted
from tests.servers import qemu_img, qemu_io
from tests.stored import Stored, make_backup
from tests.test_cli import document, qmpnbd

pytestmark = pytest.mark.real

Made = tuple[Repository, Backup, Path]


@pytest.fixture(params=["qcow2", "raw"])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Made:
    """A shallow backup and an increment, on a template with data that they cover in part."""
    form = request.param
    template = tmp_path / "template"
    qemu_img("create", "-q", "-f", form, template, "6M")
    qemu_io(template, "write -P 1 0 3M", "write -P 2 5M 64k", format=form)
    return (*backed_up(tmp_path, entry_of(template, form)), template)


def backed_up(folder: Path, entry: TemplateEntry) -> tuple[Repository, Backup]:
    repository = Repository.create(folder / "repository")
    shallow = make_backup(repository, {"vda": Stored(("write -P 3 64k 64k", "write -z 1M 64k"), template=entry)})
    return repository, make_backup(repository, {"vda": Stored(("write -P 4 5M 4k", "write -P 5 7M 64k"), shallow)})


def entry_of(template: Path, form: str, *, hashed: bool = True) -> TemplateEntry:
    status = template.stat()
    return TemplateEntry(
        path=str(template),
        format=form,
        size=6 << 20,
        file_bytes=status.st_size,
        mtime_ns=status.st_mtime_ns,
        sha256=digest_of(template, form) if hashed else "",
    )


def digest_of(image: Path, form: str) -> str:
    with ImageSource.open(str(image), format=form, deadline=Deadline(60)) as source:
        return sha256_of_disk(source, Deadline(60))


def restored(repository: Repository, template: str, target: Path, form: Form) -> Restored:
    what = replace(wanted(repository), template=template)
    named = form if form in ("raw", "qcow2", "chain") else ""
    return restore(what, destination(str(target), named), RestoreOptions(), Deadline(60))


@pytest.mark.parametrize("form", ["raw", "qcow2", "chain"])
def test_a_shallow_backup_is_restored_with_its_template_wherever_that_is_now(
    made: Made, tmp_path: Path, form: Form
) -> None:
    repository, backup, template = made
    expected = converted(backup.image("vda"), tmp_path)
    moved = template.rename(tmp_path / "moved")
    done = restored(repository, str(moved), tmp_path / "disk", form)
    assert done.unproved_bytes > 2 << 20
    image = tmp_path / "disk/0002-vda.qcow2" if form == "chain" else tmp_path / "disk"
    assert converted(image, tmp_path, "raw" if form == "raw" else "qcow2") == expected


def test_the_name_in_the_manifest_is_not_followed(made: Made, tmp_path: Path) -> None:
    """A repository does not decide which files of this host are read."""
    with pytest.raises(UsageError, match="stands on a template"):
        restored(made[0], "", tmp_path / "disk.raw", "raw")
    assert not (tmp_path / "disk.raw").exists()


@pytest.mark.parametrize("hashed", [True, False])
@pytest.mark.parametrize("change", ["bit", "size", "missing"])
def test_another_template_is_refused(tmp_path: Path, change: str, hashed: bool) -> None:
    template = tmp_path / "template"
    template.write_bytes(b"\1" * (6 << 20))
    repository, _ = backed_up(tmp_path, entry_of(template, "raw", hashed=hashed))
    if change == "bit":
        with template.open("r+b") as file:
            file.write(b"\0")
    elif change == "size":
        template.write_bytes(b"\1" * (5 << 20))
    else:
        template.unlink()
    with pytest.raises(RepositoryDamagedError, match="template"):
        restored(repository, str(template), tmp_path / "disk.raw", "raw")
    assert not (tmp_path / "disk.raw").exists()


def test_what_lies_below_a_template_is_part_of_it_and_times_are_not(tmp_path: Path) -> None:
    """A template is an overlay often; one that was copied to another host has new times."""
    qemu_img("create", "-q", "-f", "raw", tmp_path / "below", "6M")
    qemu_io(tmp_path / "below", "write -P 1 0 3M", format="raw")
    template = tmp_path / "template"
    qemu_img("create", "-q", "-f", "qcow2", "-F", "raw", "-b", "below", template)
    qemu_io(template, "write -P 2 1M 64k")
    repository, backup = backed_up(tmp_path, entry_of(template, "qcow2"))
    os.utime(template, (1, 1))
    restored(repository, str(template), tmp_path / "disk.qcow2", "qcow2")
    assert converted(tmp_path / "disk.qcow2", tmp_path) == converted(backup.image("vda"), tmp_path)
    qemu_io(tmp_path / "below", "write -P 3 2M 512", format="raw")
    with pytest.raises(RepositoryDamagedError, match="it holds something else"):
        restored(repository, str(template), tmp_path / "other.qcow2", "qcow2")
    told = document(qmpnbd("repository", "check", repository.path, "--content", "--json", code=1).stdout)
    assert "it holds something else" in str(told["findings"])


def test_the_digest_of_a_disk_is_that_of_what_is_read_from_it(tmp_path: Path) -> None:
    """Whatever holds it, and whether its zeroes are holes; and any change is another one."""
    content = bytes(1 << 20) + b"\1" * (1 << 20) + bytes(3 << 20) + b"\2" * 512
    (tmp_path / "full").write_bytes(content)
    for form, options in (("raw", ["-S", "4k"]), ("qcow2", []), ("qcow2", ["-c"])):
        image = tmp_path / f"{form}{len(options)}"
        qemu_img("convert", "-f", "raw", "-O", form, *options, tmp_path / "full", image)
        assert digest_of(image, form) == digest_of(tmp_path / "full", "raw")
    found = {digest_of(tmp_path / "full", "raw")}
    for changed in (content + bytes(512), b"\1" + content[1:], content[::-1]):
        (tmp_path / "full").write_bytes(changed)
        found.add(digest_of(tmp_path / "full", "raw"))
    assert len(found) == 4


def test_a_template_is_read_once_and_again_only_after_it_was_written_to(tmp_path: Path) -> None:
    template = tmp_path / "template"
    template.write_bytes(b"\1" * (6 << 20))
    entry = entry_of(template, "raw", hashed=False)
    known = entry.model_copy(update={"sha256": "0" * 64})
    assert with_sha256(entry, [None, entry, known], Deadline(60)) is known
    os.utime(template, (1, 1))
    now = entry_of(template, "raw")
    assert with_sha256(now.model_copy(update={"sha256": ""}), [known], Deadline(60)) == now
    template.unlink()
    assert with_sha256(entry, [], Deadline(60)) is entry


def test_a_shallow_backup_can_be_used_at_once(made: Made, tmp_path: Path, folder: Path) -> None:
    repository, backup, template = made
    what = replace(wanted(repository), template=str(template))

    async def use() -> None:
        options = InstantOptions(runtime_dir=str(folder))
        async with instant_restore(what, str(folder / "disk.qcow2"), options, Deadline(60)) as begun:
            assert await begun.filled() is None

    asyncio.run(use())
    assert converted(folder / "disk.qcow2", tmp_path) == converted(backup.image("vda"), folder)


def test_verify_says_what_it_cannot_judge_without_the_template(made: Made) -> None:
    repository, _, template = made
    told = document(qmpnbd("verify", repository.path, "--json", code=3).stdout)
    assert told["verdict"] == "incomplete"
    assert "--template" in told["skipped"][0]["what"]  # type: ignore[index]
    told = document(qmpnbd("verify", repository.path, "--json", "--template", template).stdout)
    assert (told["verdict"], len(told["second_readings"])) == ("proved", 1)  # type: ignore[arg-type]
