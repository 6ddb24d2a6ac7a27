"""``qmpnbd copy``: its documents, its refusals, and that no way out leaves half a disk under its name."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmpnbd.report.model import CopyDocument, ErrorDocument
from tests.nbd_servers import qemu_nbd
from tests.servers import qemu_img, tool, wait_until
from tests.test_cli import document, qmpnbd

pytestmark = pytest.mark.real

MIB = 1 << 20
COMMAND = [sys.executable, "-m", "qmpnbd", "copy"]


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli-copy") / "disk.raw"
    with path.open("wb") as file:
        file.truncate(32 * MIB)
        for at in range(0, 32, 4):
            file.seek(at * MIB)
            file.write(random.Random(at).randbytes(MIB + 4096))
    return path


@pytest.mark.parametrize("target_format", ["raw", "qcow2"])
@pytest.mark.parametrize("how", [(), ("--verify",), ("--verify", "--rate", "900000000", "--progress")])
def test_a_copy_is_the_disk_and_the_document_tells_it(
    here: Path, disk: Path, target_format: str, how: tuple[str, ...]
) -> None:
    name = f"copy.{target_format}"
    found = document(qmpnbd("copy", str(disk), name, "--format", "raw", "--json", *how).stdout)
    told = CopyDocument.model_validate(found)
    assert (told.form, told.size, told.data_bytes + told.zero_bytes) == (target_format, 32 * MIB, 32 * MIB)
    assert told.data_bytes == 8 * (MIB + 4096)
    assert (told.read_back_bytes is not None) == ("--verify" in how)
    qemu_img("compare", "-q", "-f", "raw", "-F", target_format, disk, name)
    assert [path.name for path in here.iterdir()] == [name]


def test_a_compressed_copy_is_smaller_and_the_disk(here: Path, disk: Path) -> None:
    (here / "text.raw").write_bytes(b"".join(b"%015d\n" % n for n in range(4 * MIB // 16)))
    text = qmpnbd("copy", "text.raw", "copy.qcow2", "--format", "raw", "--compress", "--verify").stdout
    assert text.startswith("text.raw: copied to copy.qcow2 (qcow2)\n  4 MiB: 4 MiB of data and 0 B of zeroes, in ")
    qemu_img("compare", "-q", "-f", "raw", "-F", "qcow2", "text.raw", "copy.qcow2")
    qemu_img("check", "-q", "copy.qcow2")
    assert Path("copy.qcow2").stat().st_size < MIB


def test_an_export_to_an_export(here: Path, folder: Path, disk: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "there.qcow2", "40M")
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    with (
        qemu_nbd(folder / "a", "-r", "-f", "raw", str(disk)) as source,
        qemu_nbd(folder / "b", "-f", "qcow2", "there.qcow2") as target,
    ):
        uris = (str(source), str(target))
        assert document(qmpnbd("copy", *uris, "--verify", "--connections", "2", "--json").stdout)["form"] == "nbd"
        failed = document(qmpnbd("copy", *uris, "--json", code=84).stdout)
        assert ErrorDocument.model_validate(failed).error.type == "TargetInUseError"
        qmpnbd("copy", *uris, "--force")
    qemu_img("resize", "-q", "--shrink", "there.qcow2", "32M")
    qemu_img("compare", "-q", "-f", "raw", "-F", "qcow2", disk, "there.qcow2")


def test_what_is_there_stays_without_force(here: Path, disk: Path) -> None:
    Path("copy.raw").write_text("mine")
    done = qmpnbd("copy", str(disk), "copy.raw", "--format", "raw", code=84)
    assert done.stderr == "qmpnbd: copy.raw: it exists. Choose another name, or replace it (--force).\n"
    assert Path("copy.raw").read_text() == "mine"
    qmpnbd("copy", str(disk), "copy.raw", "--format", "raw", "--force")
    assert Path("copy.raw").read_bytes() == disk.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "code", "why"),
    [
        (("copy.vhd",), 2, "its name does not tell what it shall be"),
        (("none/copy.raw",), 83, "Make the folder first"),
        (("copy.qcow2", "--cluster-size", "1000"), 2, "clusters of 1000 bytes"),
        (("copy.raw", "--rate", "0"), 2, "is not a whole number of 1 or more"),
    ],
)
def test_refusals(here: Path, disk: Path, arguments: tuple[str, ...], code: int, why: str) -> None:
    assert why in qmpnbd("copy", str(disk), "--format", "raw", *arguments, code=code).stderr
    assert list(here.iterdir()) == []


def test_a_source_that_is_not_there(here: Path) -> None:
    qmpnbd("copy", "none.qcow2", "copy.raw", code=40)
    qmpnbd("copy", "nbd+unix:///?socket=none", "copy.raw", code=30)
    assert list(here.iterdir()) == []


def test_a_full_file_system_is_told_and_nothing_is_left(here: Path, disk: Path) -> None:
    """On a file system of 4 MiB of its own, in a mount namespace of its own."""
    probe = subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True)
    if probe.returncode:
        pytest.skip("this machine lets nobody mount anything, not even in a namespace of one's own")
    Path("small").mkdir()
    command = " ".join([*COMMAND, str(disk), "small/copy.{}", "--format", "raw"])
    for target_format in ("raw", "qcow2"):
        script = f"mount -t tmpfs -o size=4M none small && {command.format(target_format)}; echo $?; ls -A small"
        done = subprocess.run(["unshare", "-rm", "sh", "-c", script], check=False, capture_output=True, text=True)
        assert done.stdout == "83\n"
        assert "No space left on device. Make room, or choose another place." in done.stderr


@contextlib.contextmanager
def slow_copy(disk: Path, target: str) -> Iterator[subprocess.Popen[str]]:
    """A copy that has written something, and would go on for minutes."""
    command = [*COMMAND, str(disk), target, "--format", "raw", "--rate", "1000000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            wait_until(lambda: any(path.stat().st_blocks for path in Path().glob(".copy.*.part")), "the first bytes")
            yield child
        finally:
            child.kill()


@pytest.mark.parametrize("target", ["copy.raw", "copy.qcow2"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it_and_nothing_is_left(here: Path, disk: Path, target: str, number: signal.Signals) -> None:
    with slow_copy(disk, target) as child:
        child.send_signal(number)
        out, told = child.communicate(timeout=20)
    assert (child.returncode, out, told) == (128 + number, "", f"qmpnbd: {number.name}\n")
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("target", ["copy.raw", "copy.qcow2"])
def test_after_kill_9_there_is_nothing_under_the_name_and_no_image_beside(here: Path, disk: Path, target: str) -> None:
    with slow_copy(disk, target) as child:
        child.send_signal(signal.SIGKILL)
        child.wait(20)
    assert not Path(target).exists()
    (left,) = here.iterdir()
    assert left.name.startswith(f".{target}.")
    assert left.name.endswith(".part")
    if target.endswith("qcow2"):
        probed = subprocess.run([tool("qemu-img"), "info", "-f", "qcow2", left], check=False, capture_output=True)
        assert b"not in qcow2 format" in probed.stderr
    qmpnbd("copy", str(disk), target, "--format", "raw")
    qemu_img("compare", "-q", "-f", "raw", disk, target)
    assert [path.name for path in here.iterdir()] == [target]


@pytest.mark.parametrize("target", ["copy.raw", "copy.qcow2"])
def test_killed_at_any_moment_there_is_the_whole_disk_or_nothing(here: Path, disk: Path, target: str) -> None:
    """Ten cuts, spread over twice the time that a copy takes once its file was made; both outcomes are right ones."""
    for cut in range(10):
        command = [*COMMAND, str(disk), target, "--format", "raw"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as child:
            wait_until(lambda: child.poll() is not None or any(here.iterdir()), "the file")
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(0.01 * cut)
            child.kill()
        if Path(target).exists():
            qemu_img("compare", "-q", "-f", "raw", disk, target)
        for left in here.iterdir():
            assert left.name == target or left.name.endswith(".part"), left
            left.unlink()


def resumed(disk: Path, *more: str, code: int = 0) -> dict[str, object]:
    return document(
        qmpnbd("copy", str(disk), "copy.raw", "--format", "raw", "--resume", "--json", *more, code=code).stdout
    )


@contextlib.contextmanager
def slow_resumable(disk: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A copy that would take eight seconds, each of which is noted."""
    command = [*COMMAND, str(disk), "copy.raw", "--format", "raw", "--resume", "--rate", "1000000"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        try:
            yield child
        finally:
            child.kill()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_copy_that_was_ended_is_resumed(here: Path, disk: Path, number: signal.Signals) -> None:
    journal = Path(".copy.raw.resume.journal")
    with slow_resumable(disk) as child:
        wait_until(lambda: journal.exists() and journal.stat().st_size > 92, "a piece to be noted")
        resumed(disk, code=84)  # while it lives, nobody else goes on with it
        child.send_signal(number)
        child.wait(20)
    assert not Path("copy.raw").exists()
    told = resumed(disk, "--verify")
    before, data = told["resumed_bytes"], told["data_bytes"]
    assert isinstance(before, int)
    assert isinstance(data, int)
    assert before >= MIB
    assert before + data == 8 * (MIB + 4096)
    assert Path("copy.raw").read_bytes() == disk.read_bytes()
    assert [path.name for path in here.iterdir()] == ["copy.raw"]


def test_a_copy_that_is_killed_again_and_again_is_the_disk_in_the_end(here: Path, disk: Path) -> None:
    """At moments that are spread over the start of a run, its proof of what is there, and its first pieces."""
    for cut in range(8):
        with slow_resumable(disk) as child, contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(0.15 + 0.2 * cut)
    resumed(disk)
    assert Path("copy.raw").read_bytes() == disk.read_bytes()
    assert [path.name for path in here.iterdir()] == ["copy.raw"]


def test_an_export_is_resumed_only_if_somebody_says_that_it_has_not_changed(
    here: Path, folder: Path, disk: Path
) -> None:
    with qemu_nbd(folder, "-r", "-f", "raw", str(disk)) as uri:
        told = qmpnbd("copy", str(uri), "copy.raw", "--resume", code=2).stderr
        assert "--source-unchanged" in told
        qmpnbd("copy", str(uri), "copy.raw", "--resume", "--source-unchanged")
    assert Path("copy.raw").read_bytes() == disk.read_bytes()
    qmpnbd("copy", str(disk), "other.raw", "--format", "raw", "--source-unchanged", code=2)
    qmpnbd("copy", str(disk), "other.qcow2", "--format", "raw", "--resume", code=2)
    assert [path.name for path in here.glob("*other*")] == []
