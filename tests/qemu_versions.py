"""Every QEMU release that is at hand: the installed one, and those that `scripts/get-qemu` unpacked beside it.

A test that asks for the fixture `binaries` gets the installed release; with `each_qemu`, it runs once for every one::

    from tests.qemu_versions import QemuBinaries, each_qemu

    @each_qemu
    def test_something(binaries: QemuBinaries) -> None:
        with binaries.qemu("-blockdev", ...) as server: ...

A release that is the installed one is not run twice; one that was not unpacked is skipped, and pytest prints why.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.servers import Server, qemu, storage_daemon, tool

UNPACKED = Path(__file__).parent.parent / ".work" / "qemu"
RELEASES = ("5.2", "7.2", "10.0")
INSTALLED = "installed"


@dataclass(frozen=True)
class QemuBinaries:
    """The programs of one QEMU release.

    Attributes:
        version: major, minor, micro.
        system: path of qemu-system-x86_64.
        storage_daemon: path of qemu-storage-daemon.
        nbd: path of qemu-nbd.
        img: path of qemu-img.
        io: path of qemu-io.
    """

    version: tuple[int, int, int]
    system: str
    storage_daemon: str
    nbd: str
    img: str
    io: str

    @property
    def release(self) -> str:
        """Major and minor, as `scripts/get-qemu` has them."""
        return f"{self.version[0]}.{self.version[1]}"

    def qemu(self, *arguments: str, cwd: Path | None = None) -> AbstractContextManager[Server]:
        """Runs this release's qemu-system-x86_64, paused; see `tests.servers.qemu`."""
        return qemu(*arguments, cwd=cwd, program=self.system)

    def daemon(self, *arguments: str, cwd: Path | None = None) -> AbstractContextManager[Server]:
        """Runs this release's qemu-storage-daemon; see `tests.servers.storage_daemon`."""
        return storage_daemon(*arguments, cwd=cwd, program=self.storage_daemon)


def _binaries(folder: Path | None) -> QemuBinaries:
    names = ("qemu-system-x86_64", "qemu-storage-daemon", "qemu-nbd", "qemu-img", "qemu-io")
    paths = [str(folder / name) if folder else tool(name) for name in names]
    told = subprocess.run([paths[0], "--version"], check=True, capture_output=True, text=True, timeout=60).stdout
    match = re.search(r"version (\d+)\.(\d+)\.(\d+)", told)
    assert match, told
    return QemuBinaries((int(match[1]), int(match[2]), int(match[3])), *paths)


@functools.cache
def installed() -> QemuBinaries:
    """The release on PATH."""
    return _binaries(None)


@functools.cache
def _unpacked(release: str) -> QemuBinaries:
    return _binaries(UNPACKED / release / "bin")


def binaries_of(name: str) -> QemuBinaries:
    """Returns a release by the name that it is parametrised with; skips the test if it was not unpacked."""
    if name == INSTALLED:
        return installed()
    if not (UNPACKED / name / "complete").exists():
        pytest.skip(f"QEMU {name} is not here (scripts/get-qemu {name})")
    return _unpacked(name)


def _others() -> tuple[str, ...]:
    here = installed().release if shutil.which("qemu-system-x86_64") else None
    return tuple(name for name in RELEASES if name != here)


OTHERS = _others()
"""Releases beside the installed one."""

each_qemu = pytest.mark.parametrize("binaries", [INSTALLED, *OTHERS], indirect=True)
"""Runs a test on the installed release and on each unpacked one that is another."""
