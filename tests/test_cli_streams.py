"""The command line where stdout or stderr is full, closed, or read by nobody."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import qemu_img

COMMAND = [sys.executable, "-m", "qmpnbd"]
FULL, CLOSED = ">/dev/full", ">&-"


def shell(redirections: str, *arguments: str | Path, unbuffered: str = "") -> subprocess.CompletedProcess[bytes]:
    command = ["sh", "-c", f'exec "$@" {redirections}', "sh", *COMMAND, *map(str, arguments)]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, check=False, capture_output=True, timeout=60, env=environment)
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr
    return done


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(1 << 20))
    return path


@pytest.mark.parametrize("form", [[], ["--json"], ["--nbdinfo"]])
@pytest.mark.parametrize(("redirection", "why"), [(FULL, b"No space left"), (CLOSED, b"Bad file descriptor")])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_result_that_cannot_be_written_is_no_success(
    form: list[str], redirection: str, why: bytes, unbuffered: str, disk: Path
) -> None:
    done = shell(redirection, "chain", disk, *form, unbuffered=unbuffered)
    assert done.returncode == 51
    assert b"stdout: cannot write the result: " + why in done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["chain", "--help"], ["--version"]])
def test_help_that_cannot_be_written_is_no_success(arguments: list[str]) -> None:
    assert shell(FULL, *arguments).returncode == 51


@pytest.mark.parametrize("redirections", [f"2{FULL}", f"2{CLOSED}", f"2{FULL} {FULL}", f"2{CLOSED} {CLOSED}"])
def test_what_nobody_can_read_on_stderr_does_not_change_the_exit_code(redirections: str, tmp_path: Path) -> None:
    done = shell(redirections, "chain", tmp_path / "missing", "--json")
    assert done.returncode == 40
    assert b"qmpnbd: " not in done.stdout


@pytest.mark.parametrize("redirections", [f"2{FULL}", f"2{CLOSED}"])
def test_a_mistake_on_the_command_line_is_one_without_stderr_too(redirections: str) -> None:
    assert shell(redirections, "chian").returncode == 2


def test_an_error_keeps_its_exit_code_if_whoever_reads_went_away(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as pipe:
        command = [*COMMAND, "chain", str(tmp_path / "missing"), "--json"]
        done = subprocess.run(command, check=False, stdout=pipe, stderr=pipe, timeout=60)
    assert done.returncode == 40


def test_files_do_not_get_the_numbers_of_streams_that_were_closed(tmp_path: Path) -> None:
    """Else messages would be written into whatever has number 2, such as a connection, or an image of a program."""
    image, seen = tmp_path / "disk.qcow2", tmp_path / "seen"
    qemu_img("create", "-q", "-f", "qcow2", image, "1M")
    script = 'for each in $$ $PPID; do readlink /proc/$each/fd/[012]; done > "$0"'
    command: list[str | Path] = ["export", image, "--format", "qcow2", "--exec", "sh", "-c", script, seen]
    assert shell(f"<&- {CLOSED} 2{CLOSED}", *command).returncode == 0
    # stdout of the command is `seen`.
    assert seen.read_text().split() == ["/dev/null", str(seen), *["/dev/null"] * 4]
