"""Instant restore: a guest starts at once, writes, and ends up with a disk that stands on nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from qmpnbd.backup.backups import Backup
from qmpnbd.backup.boottest import BootOptions, boot_test
from qmpnbd.backup.instantly import Begun, InstantOptions, instant_restore
from qmpnbd.backup.repository import Repository
from qmpnbd.deadline import Deadline
from qmpnbd.errors import RepositoryBusyError, RepositoryDamagedError, TargetInUseError, UsageError
from qmpnbd.nbd.aio import Client
from tests.bootable import SAYS, write_sector
from tests.chains import converted
from tests.qemu_versions import QemuBinaries, each_qemu
from tests.restorable import BECAME_ZERO, DATA_AT, copy_of, flip, make_chain, wanted
from tests.servers import qemu_img, wait_until
from tests.stored import Stored, make_backup
from tests.test_cli import COMMAND, document, qmpnbd

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


@contextlib.asynccontextmanager
async def begun(repository: Repository, folder: Path, **options: object) -> AsyncIterator[Begun]:
    choice = InstantOptions(runtime_dir=str(folder), **options)  # type: ignore[arg-type]
    target = str(folder / "disk.qcow2")
    async with instant_restore(wanted(repository), target, choice, Deadline(100)) as found:
        yield found


def backing(image: Path) -> str | None:
    found: str | None = json.loads(qemu_img("info", "-U", "--output=json", image)).get("backing-filename")
    return found


@each_qemu
def test_a_guest_reads_and_writes_at_once_and_its_disk_is_filled(
    made: Made, folder: Path, binaries: QemuBinaries
) -> None:
    """What it writes before, while and after the disk is filled stays; all else is the backup's."""
    expected = bytearray(converted(made[1][2].image("vda"), folder))

    async def use() -> None:
        async with (
            begun(made[0], folder, program=binaries.storage_daemon) as found,
            await Client.connect(found.uri, deadline=Deadline(60)) as guest,
        ):
            assert await guest.read(0, 1 << 20) == expected[: 1 << 20]
            assert await guest.read(BECAME_ZERO, 65536) == bytes(65536)
            for at, byte in ((64 << 10, b"\x77"), (4 << 20, b"\x78")):
                await guest.write(at, byte * 4096)
                expected[at : at + 4096] = byte * 4096
            stood = [found.stands_on_repository]
            assert await found.filled() is None
            stood.append(found.stands_on_repository)
            assert stood == [True, False]
            await guest.write(5 << 20, b"\x79" * 512)
            expected[5 << 20 : (5 << 20) + 512] = b"\x79" * 512
            await guest.flush()

    asyncio.run(use())
    target = folder / "disk.qcow2"
    assert backing(target) is None
    assert converted(target, folder) == expected
    qemu_img("check", target)
    target.unlink()
    (folder / "converted.raw").unlink()
    assert list(folder.iterdir()) == []


def test_a_guest_boots_before_anything_was_copied(tmp_path: Path, folder: Path) -> None:
    """A QEMU finds the boot sector over NBD while the target holds nothing yet."""
    repository = Repository.create(tmp_path / "repository")
    first = make_backup(repository, {"vda": Stored((write_sector(tmp_path),))})
    make_backup(repository, {"vda": Stored(("write -P 2 1M 64k",), first)})

    async def use() -> tuple[bool, str]:
        async with begun(repository, folder) as found:
            held = (folder / "disk.qcow2").stat().st_blocks * 512
            assert held < 1 << 20
            server, _, path = found.uri.partition("?socket=")
            where = {"type": "unix", "path": path}
            node = {"driver": "nbd", "node-name": "served", "server": where, "export": server.rpartition("/")[2]}
            words = ("-blockdev", json.dumps(node), "-device", "virtio-blk-pci,drive=served,bootindex=1")
            options = BootOptions(SAYS, seconds=60, memory=32, arguments=words)
            result = await boot_test([], options, Deadline(90))
            return result.reached, result.why

    assert asyncio.run(use()) == (True, "")


def test_rot_is_told_and_the_guest_keeps_its_disk(mine: Made, folder: Path) -> None:
    flip(mine[1][0], DATA_AT[0])

    async def use() -> RepositoryDamagedError | None:
        async with begun(mine[0], folder) as found:
            fault = await found.filled()
            async with await Client.connect(found.uri, deadline=Deadline(60)) as guest:
                await guest.read(0, 512)
            return fault

    fault = asyncio.run(use())
    assert fault is not None
    assert str(mine[1][0].path) in fault.where


def test_what_is_cut_or_missing_is_found_before_anything_begins(mine: Made, folder: Path) -> None:
    (mine[1][1].path / "vda.hashes").unlink()

    async def use() -> None:
        async with begun(mine[0], folder):
            raise AssertionError("it has begun")

    with pytest.raises(RepositoryDamagedError):
        asyncio.run(use())
    assert list(folder.iterdir()) == []


def test_nobody_prunes_what_the_target_stands_on(mine: Made, folder: Path) -> None:
    async def use() -> None:
        async with begun(mine[0], folder) as found:
            with mine[0].lock("test"), pytest.raises(RepositoryBusyError), mine[0].alone():
                raise AssertionError("alone while a target stands on it")
            await found.filled()
            with mine[0].lock("test"), mine[0].alone():
                pass

    asyncio.run(use())


def test_what_is_there_is_not_overwritten(made: Made, folder: Path) -> None:
    (folder / "disk.qcow2").write_bytes(b"precious")

    async def use() -> None:
        async with begun(made[0], folder):
            raise AssertionError("it has begun")

    with pytest.raises(TargetInUseError):
        asyncio.run(use())
    assert [(path.name, path.read_bytes()) for path in folder.iterdir()] == [("disk.qcow2", b"precious")]


def test_without_a_storage_daemon_nothing_is_left(made: Made, folder: Path) -> None:
    async def use() -> None:
        async with begun(made[0], folder, program="no-such-daemon"):
            raise AssertionError("it has begun")

    with pytest.raises(UsageError):
        asyncio.run(use())
    assert list(folder.iterdir()) == []


# --- the command line ------------------------------------------------------------------------------------------


def test_the_command_serves_fills_and_ends(made: Made, folder: Path) -> None:
    words = ("--instant", "serve", "--end-when-filled", "--runtime-dir", str(folder), "--json")
    done = qmpnbd("restore", made[0].path, "latest", folder / "disk.qcow2", *words)
    told = document(done.stdout)
    assert (told["form"], str(told["uri"])[:14]) == ("served", "nbd+unix:///qm")
    assert "filled and proved" in done.stderr
    assert backing(folder / "disk.qcow2") is None
    qemu_img("compare", folder / "disk.qcow2", made[1][2].image("vda"))


def test_the_command_tells_rot_with_its_exit_code(mine: Made, folder: Path) -> None:
    flip(mine[1][2], DATA_AT[2])
    words = ("--instant", "serve", "--end-when-filled", "--runtime-dir", str(folder))
    code = RepositoryDamagedError.exit_code
    done = qmpnbd("restore", mine[0].path, "latest", folder / "disk.qcow2", *words, code=code)
    assert "damaged backup" in done.stderr


def test_the_command_makes_an_overlay_that_any_qemu_fills(made: Made, folder: Path) -> None:
    target = folder / "disk.qcow2"
    done = qmpnbd("restore", made[0].path, "2", target, "--instant", "overlay")
    assert "stands on the repository" in done.stdout
    assert backing(target) == str(made[1][1].image("vda"))
    qemu_img("compare", target, made[1][1].image("vda"))
    qemu_img("rebase", "-f", "qcow2", "-b", "", target)  # what block-stream does in a QEMU that runs
    qemu_img("compare", target, made[1][1].image("vda"))


@pytest.fixture
def serving(made: Made, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A restore that serves, and is filled so slowly that it will not end."""
    words = [*COMMAND, "restore", str(made[0].path), "latest", str(folder / "disk.qcow2"), "--instant", "serve"]
    with subprocess.Popen(
        [*words, "--runtime-dir", str(folder), "--rate", "65536"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        try:
            assert child.stdout is not None
            assert "nbd+unix:///" in child.stdout.readline()
            yield child
        finally:
            child.kill()


def test_a_signal_takes_everything_down_but_the_target(
    made: Made, folder: Path, serving: subprocess.Popen[str]
) -> None:
    serving.send_signal(signal.SIGTERM)
    _, complaints = serving.communicate(timeout=60)
    assert serving.returncode == 143, complaints
    assert "still stands on the repository" in complaints
    assert [path.name for path in folder.iterdir()] == ["disk.qcow2"]
    qemu_img("compare", folder / "disk.qcow2", made[1][2].image("vda"))


def test_a_kill_leaves_a_disk_that_is_right(made: Made, folder: Path, serving: subprocess.Popen[str]) -> None:
    """The daemon ends with us; what the target does not have yet it still finds in the repository."""
    (run,) = folder.glob("qmpnbd-*")
    children = Path(f"/proc/{serving.pid}/task/{serving.pid}/children").read_text().split()
    serving.kill()
    serving.communicate(timeout=60)
    wait_until(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in children), "the daemon to end")
    assert run.exists()
    qemu_img("compare", folder / "disk.qcow2", made[1][2].image("vda"))
    qmpnbd("restore", made[0].path, "latest", folder / "disk.qcow2", "--instant", "overlay", "--force")


def test_the_command_knows_what_makes_no_sense(made: Made, folder: Path) -> None:
    place, code = folder / "disk.qcow2", UsageError.exit_code
    qmpnbd("restore", made[0].path, "1", place, "--end-when-filled", code=code)
    qmpnbd("restore", made[0].path, "1", place, "--instant", "serve", "--format", "raw", code=code)
    qmpnbd("restore", made[0].path, "1", place, "--instant", "serve", "--compress", code=code)
    assert list(folder.iterdir()) == []
