"""``qmpnbd backup`` as scripts see it: documents, text, exit codes."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qmpnbd.backup.destination import Destination
from qmpnbd.backup.raw_target import RawTarget
from qmpnbd.backup.restore import RestoreOptions
from qmpnbd.backup.restore_machine import WantedMachine, restore_machine
from qmpnbd.cli.exit_codes import FELL_BACK, NOT_QUIESCED
from qmpnbd.deadline import Deadline
from qmpnbd.errors import NoSuchBackupError, NoSuchDiskError, NotProvedError, UsageError
from qmpnbd.report.model import BackupDocument
from tests.backups import BackupMachine, new_images, running
from tests.instants import UNIT
from tests.qemu_versions import QemuBinaries, each_qemu
from tests.servers import blockdev
from tests.test_backup_faults import arguments
from tests.test_backup_reasons import write

pytestmark = pytest.mark.real

ROOT = Path(__file__).parent.parent


def qmpnbd(machine: BackupMachine, *more: str, code: int = 0) -> str:
    command = [sys.executable, "-m", "qmpnbd", "backup", *arguments(machine), *more]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return done.stdout


def document(machine: BackupMachine, *more: str, code: int = 0) -> Any:
    found = json.loads(qmpnbd(machine, *more, "--json", code=code))
    if not code or code in (FELL_BACK, NOT_QUIESCED):
        BackupDocument.model_validate(found)
    return found


@each_qemu
def test_a_backup_tells_everything_about_itself(binaries: QemuBinaries, folder: Path) -> None:
    with running(binaries, folder, new_images(binaries, folder)) as machine:
        first = document(machine)
        assert first["verdict"] == "done"
        assert first["number"] == 1
        assert first["folder"] == f"0001-{first['id']}"
        assert first["instant"]["recipe"] == "backup"
        assert first["extras"] == ["machine.json"]
        assert [(each["name"], each["kind"], each["reason"]) for each in first["disks"]] == [
            ("vd0", "full", "no backup yet"),
            ("vd1", "full", "no backup yet"),
        ]
        write(machine, 1)
        second = document(machine, "--disk", "vd1")
        (disk,) = second["disks"]
        assert (disk["kind"], disk["base"], disk["fell_back"]) == ("increment", first["id"], False)
        assert (disk["data_bytes"], disk["zero_bytes"]) == (UNIT, UNIT)
        folder_of = machine.repository.path / second["chain"] / second["folder"]
        assert (folder_of / disk["file"]).stat().st_size == disk["file_bytes"]
        text = qmpnbd(machine)
        assert "chain nightly" in text
        assert "disk vd0 (8 MiB): increment on" in text


def test_falling_back_is_an_exit_code(binaries: QemuBinaries, folder: Path) -> None:
    with running(binaries, folder, new_images(binaries, folder)) as machine:
        assert document(machine, "--type", "increment", code=FELL_BACK)["verdict"] == "fell-back"
        write(machine, 1)
        assert document(machine, "--type", "increment")["verdict"] == "done"
        (name,) = machine.checkpoints()["vd0"]
        machine.server.side("block-dirty-bitmap-remove", node="n-vd0", name=name)
        found = document(machine, "--type", "increment", code=FELL_BACK)
        assert [(each["fell_back"], each["reason"]) for each in found["disks"]] == [(True, "bitmap lost"), (False, "")]
        assert document(machine, "--type", "differential", "--since", "1")["verdict"] == "done"
        assert "FELL BACK: asked" not in qmpnbd(machine, "--type", "full")


def test_a_guest_that_was_not_at_rest_is_an_exit_code(binaries: QemuBinaries, folder: Path) -> None:
    """The backup is there all the same, crash-consistent."""
    with running(binaries, folder, new_images(binaries, folder, 1)) as machine:
        found = document(machine, "--agent", str(folder / "no-agent"), code=NOT_QUIESCED)
        assert found["verdict"] == "not-quiesced"
        assert found["instant"]["consistency"] == "crash-consistent"
        assert found["instant"]["reason"]
        assert machine.repository.find("nightly", found["id"])


def test_how_far_all_disks_are_is_shown_on_a_terminal(binaries: QemuBinaries, folder: Path) -> None:
    terminal, side = pty.openpty()
    with running(binaries, folder, new_images(binaries, folder)) as machine:
        how = ["--progress", "--rate", "1000000", "--jobs", "1"]  # so the second disk comes when a line is due again
        command = [sys.executable, "-m", "qmpnbd", "backup", *arguments(machine), *how]
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=side, timeout=60, cwd=ROOT)
    os.close(side)
    shown = os.read(terminal, 65536).decode()
    os.close(terminal)
    assert done.returncode == 0, shown
    assert re.search(r"[\d.]+ MiB of [\d.]+ MiB \(\d+ %\), \S+ \w+/s; [12] of 2 disks copied", shown)
    assert shown.endswith("\r\x1b[K")


def test_a_dry_run_tells_the_decisions_and_changes_nothing(binaries: QemuBinaries, folder: Path) -> None:
    with running(binaries, folder, new_images(binaries, folder)) as machine:
        document(machine, "--disk", "vd0")
        write(machine, 1)
        before = machine.checkpoints(), machine.left(), sorted(machine.repository.path.rglob("*"))
        found = document(machine, "--dry-run")
        assert found["verdict"] == "planned"
        assert [(each["name"], each["kind"], each["reason"]) for each in found["disks"]] == [
            ("vd0", "increment", ""),
            ("vd1", "full", "new disk"),
        ]
        assert "dry run: backup 2" in qmpnbd(machine, "--dry-run")
        assert (machine.checkpoints(), machine.left(), sorted(machine.repository.path.rglob("*"))) == before


def test_mistakes_have_their_exit_codes(binaries: QemuBinaries, folder: Path) -> None:
    with running(binaries, folder, new_images(binaries, folder, 1)) as machine:
        document(machine, "--disk", "no-such-disk", code=NoSuchDiskError.exit_code)
        document(machine, "--since", "1", code=UsageError.exit_code)
        document(machine, "--type", "differential", "--since", "7", code=NoSuchBackupError.exit_code)
        assert machine.left() == []
        assert machine.repository.backups("nightly") == ()


@each_qemu
def test_firmware_and_its_variables_are_kept_beside_the_disks(binaries: QemuBinaries, folder: Path) -> None:
    code, variables = folder / "code.fd", folder / "vars.fd"
    code.write_bytes(b"code" * (1 << 16))
    variables.write_bytes(b"vars" * (1 << 15))
    flash = [
        *("-blockdev", blockdev(code, "code", "raw", read_only=True)),
        *("-blockdev", blockdev(variables, "vars", "raw")),
        *("-machine", "pc,pflash0=code,pflash1=vars"),
    ]
    with running(binaries, folder, new_images(binaries, folder, 1), *flash) as machine:
        found = document(machine)
        assert [each["name"] for each in found["disks"]] == ["vd0"]
        backup = machine.repository.find("nightly", "latest")
        kept = {each.name: backup.extra_file(each.name) for each in backup.manifest.extras if each.name != "machine"}
        assert sorted(path.read_bytes() for path in kept.values()) == sorted(
            [code.read_bytes(), variables.read_bytes()]
        )
        for each in backup.manifest.extras:
            assert hashlib.sha256(backup.extra_file(each.name).read_bytes()).hexdigest() == each.sha256
        machine_facts = json.loads(backup.extra_file("machine").read_text())
        assert machine_facts["machine"].startswith("pc")
        assert "pflash1=vars" in " ".join(machine_facts["command_line"])
        assert machine.left() == []
        wanted = WantedMachine(str(machine.repository.path))
        restore_machine(wanted, Destination(str(folder / "vm"), "raw"), RestoreOptions(), Deadline(60))
        expected = {"vd0.raw": machine.restored(backup, "vd0")}
        expected |= {each.file: backup.extra_file(each.name).read_bytes() for each in backup.manifest.extras}
        assert {path.name: path.read_bytes() for path in (folder / "vm").iterdir()} == expected


def test_variables_that_are_not_what_was_read_are_not_backed_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch, binaries: QemuBinaries
) -> None:
    """The medium changes a byte between writing and reading again."""
    variables = folder / "vars.fd"
    variables.write_bytes(b"vars" * (1 << 15))
    flash = ["-blockdev", blockdev(variables, "vars", "raw"), "-machine", "pc,pflash0=vars"]
    write = RawTarget.write

    def change(target: RawTarget, offset: int, data: memoryview) -> None:
        write(target, offset, memoryview(bytes(data[:-1]) + b"!"))

    with running(binaries, folder, new_images(binaries, folder, 1), *flash) as machine:
        monkeypatch.setattr(RawTarget, "write", change)
        with pytest.raises(NotProvedError, match="not what was written"):
            machine.back_up()
        assert machine.repository.backups("nightly") == ()


def test_a_disc_in_a_drive_is_left_out_unless_it_is_named(binaries: QemuBinaries, folder: Path) -> None:
    disc = folder / "disc.iso"
    disc.write_bytes(b"disc" * (1 << 14))
    drive = ["-blockdev", blockdev(disc, "disc", "raw", read_only=True), "-device", "ide-cd,id=cd0,drive=disc"]
    with running(binaries, folder, new_images(binaries, folder, 1), *drive) as machine:
        found = document(machine)
        assert [each["disk"] for each in found["left_out"]] == ["cd0"]
        assert [each["name"] for each in found["disks"]] == ["vd0"]
        assert [each["name"] for each in document(machine, "--disk", "cd0")["disks"]] == ["cd0"]
        assert machine.restored(machine.repository.find("nightly", "latest"), "cd0") == disc.read_bytes()
