"""Restore over what is there already: block devices and NBD exports, which cannot be hidden while they are written."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmpnbd.backup.backups import Backup
from qmpnbd.backup.destination import destination
from qmpnbd.backup.repository import Repository
from qmpnbd.backup.restore import Restored, RestoreOptions, restore
from qmpnbd.deadline import Deadline
from qmpnbd.errors import NbdError, NotProvedError, RepositoryDamagedError, TargetError, TargetInUseError
from tests.chains import converted
from tests.restorable import BECAME_ZERO, DATA_AT, copy_of, flip, make_chain, wanted
from tests.servers import listening, process, qemu_img, tool, wait_until
from tests.test_cli import COMMAND, qmpnbd

pytestmark = pytest.mark.real

Made = tuple[Repository, list[Backup]]
SIZE = 8 << 20


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A chain of three backups, never written by tests."""
    return make_chain(tmp_path_factory.mktemp("made") / "repository")


def restored(repository: Repository, which: int | str, target: str, *, force: bool = True) -> Restored:
    return restore(wanted(repository, which), destination(target, ""), RestoreOptions(force=force), Deadline(60))


@contextlib.contextmanager
def nbd_export(image: Path, folder: Path, *options: str, image_format: str = "raw") -> Iterator[str]:
    """An image, writable over NBD."""
    path = folder / "nbd"
    command = [tool("qemu-nbd"), "-t", "-f", image_format, "-e", "8", "-k", str(path), *options, str(image)]
    with process(command, folder / "log"):
        wait_until(lambda: listening(path), "qemu-nbd to listen")
        yield f"nbd+unix:///?socket={path}"


@pytest.fixture
def old(folder: Path) -> Path:
    """A disk that is full of old data, and a MiB larger than what is restored."""
    path = folder / "old.raw"
    path.write_bytes(b"\xff" * (SIZE + (1 << 20)))
    return path


@pytest.mark.parametrize("number", [1, 2, 3])
def test_an_nbd_export_full_of_old_data_is_what_qemu_reads_from_the_chain(
    made: Made, folder: Path, old: Path, number: int
) -> None:
    """Row 6 again, where zeroes that are not written would leave old data; what lies behind the disk is left alone."""
    with nbd_export(old, folder) as uri:
        done = restored(made[0], number, uri)
    assert done.destination.form == "nbd"
    content = old.read_bytes()
    assert content[:SIZE] == converted(made[1][number - 1].image("vda"), folder)
    assert content[SIZE:] == b"\xff" * (1 << 20)
    if number > 1:
        assert content[BECAME_ZERO : BECAME_ZERO + 65536] == bytes(65536)


def test_an_nbd_export_that_holds_data_is_not_overwritten_without_force(made: Made, folder: Path, old: Path) -> None:
    with nbd_export(old, folder) as uri, pytest.raises(TargetInUseError):
        restored(made[0], 1, uri, force=False)
    assert not old.read_bytes().strip(b"\xff")


def test_an_nbd_export_that_is_too_small_or_read_only_is_refused(made: Made, folder: Path, old: Path) -> None:
    small = folder / "small.raw"
    small.write_bytes(b"\xff" * (SIZE - 512))
    with nbd_export(small, folder) as uri, pytest.raises(TargetError):
        restored(made[0], 1, uri)
    with nbd_export(old, folder, "-r") as uri, pytest.raises(TargetError):
        restored(made[0], 1, uri)
    assert not small.read_bytes().strip(b"\xff")
    assert not old.read_bytes().strip(b"\xff")


def test_rot_in_the_repository_ends_a_restore_over_nbd(made: Made, folder: Path, old: Path, tmp_path: Path) -> None:
    repository, backups = copy_of(made[0], tmp_path / "repository")
    flip(backups[0], DATA_AT[0])
    with nbd_export(old, folder) as uri, pytest.raises(RepositoryDamagedError):
        restored(repository, 3, uri)


def test_a_server_that_dies_ends_a_restore(made: Made, folder: Path, old: Path) -> None:
    path = folder / "nbd"
    command = [tool("qemu-nbd"), "-t", "-f", "raw", "-e", "8", "-k", str(path), str(old)]
    with process(command, folder / "log") as server:
        wait_until(lambda: listening(path), "qemu-nbd to listen")
        words = [*COMMAND, "restore", str(made[0].path), "1", f"nbd+unix:///?socket={path}", "--force"]
        with subprocess.Popen(
            [*words, "--rate", "100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as child:
            wait_until(lambda: b"\1" in old.read_bytes()[:4096] or child.poll() is not None, "the restore to begin")
            server.kill()
            output, complaints = child.communicate(timeout=60)
    kinds = {TargetError.exit_code, *(kind.exit_code for kind in NbdError.__subclasses__())}
    assert child.returncode in kinds, complaints
    assert output == ""


def test_a_server_that_forgets_what_it_is_told_is_found_out(made: Made, folder: Path) -> None:
    """What was written is read back over a new connection."""
    path = folder / "nbd"
    with process([tool("nbdkit"), "-f", "-U", str(path), "null", str(SIZE)], folder / "log"):
        wait_until(lambda: listening(path), "nbdkit to listen")
        with pytest.raises(NotProvedError):
            restored(made[0], 1, f"nbd+unix:///?socket={path}")


# --- block devices ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def loop_device(file: Path) -> Iterator[str]:
    """A block device on a file."""
    if os.geteuid() != 0 or not Path("/dev/loop-control").exists():
        pytest.skip("block devices can be made of files by root only")
    made = subprocess.run([tool("losetup"), "-f", "--show", file], check=False, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no loop devices here: {made.stderr.strip()}")
    device = made.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run([tool("losetup"), "-d", device], check=True)


@pytest.mark.parametrize("number", [1, 3])
def test_a_block_device_full_of_old_data_is_what_qemu_reads_from_the_chain(
    made: Made, folder: Path, old: Path, number: int
) -> None:
    with loop_device(old) as device:
        done = restored(made[0], number, device)
        assert done.destination.form == "device"
        with Path(device).open("rb") as file:
            assert file.read(SIZE) == converted(made[1][number - 1].image("vda"), folder)
            assert file.read() == b"\xff" * (1 << 20)


def test_a_block_device_is_not_overwritten_without_force_nor_while_it_is_in_use(made: Made, old: Path) -> None:
    with loop_device(old) as device:
        with pytest.raises(TargetInUseError):
            restored(made[0], 1, device, force=False)
        held = os.open(device, os.O_RDONLY | os.O_EXCL)  # what a mount does
        try:
            with pytest.raises(TargetInUseError, match="mounted or in use"):
                restored(made[0], 1, device)
        finally:
            os.close(held)
        with Path(device).open("rb") as file:
            assert not file.read().strip(b"\xff")


def test_a_block_device_that_is_too_small_is_refused(made: Made, folder: Path) -> None:
    small = folder / "small.raw"
    small.write_bytes(b"\xff" * (SIZE - (1 << 20)))
    with loop_device(small) as device:
        with pytest.raises(TargetError, match="it has 7340032 bytes, and the disk 8388608"):
            restored(made[0], 1, device)
        qmpnbd("restore", made[0].path, "1", device, "--force", code=TargetError.exit_code)
    assert not small.read_bytes().strip(b"\xff")


def test_a_file_system_that_is_full_is_told_and_left_as_it_was(made: Made, tmp_path: Path) -> None:
    """A real one: the kernel's own ENOSPC in the middle of the data."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2M", "tmpfs", str(place)], check=False, capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small file system can be mounted by root only: {mounted.stderr.strip()}")
    try:
        for form in ("raw", "qcow2", "chain"):
            words = ("restore", made[0].path, "1", place / "disk", "--format", form)
            done = qmpnbd(*words, code=TargetError.exit_code)
            assert "No space left" in done.stderr
            assert list(place.iterdir()) == []
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_what_a_qemu_uses_over_nbd_is_compared_by_qemu_img(made: Made, folder: Path) -> None:
    """A blank qcow2 image behind a server stays sparse: zeroes are no data."""
    qemu_img("create", "-q", "-f", "qcow2", folder / "blank.qcow2", str(SIZE))
    with nbd_export(folder / "blank.qcow2", folder, image_format="qcow2") as uri:
        restored(made[0], 3, uri, force=False)
    qemu_img("compare", folder / "blank.qcow2", made[1][2].image("vda"))
    assert (folder / "blank.qcow2").stat().st_size < 5 << 20
