"""Fixtures that several modules use."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.judge import Judge, judge
from tests.memory_budget import memory_budget
from tests.qemu_versions import INSTALLED, QemuBinaries, binaries_of
from tests.servers import qemu_img, qemu_io, short_folder

# How long an example takes says how busy the machine is.
settings.register_profile("qmpnbd", deadline=None)
settings.load_profile("qmpnbd")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short name, for sockets."""
    with short_folder() as path:
        yield path


@pytest.fixture
def binaries(request: pytest.FixtureRequest) -> QemuBinaries:
    """The programs of one QEMU release: the installed one, or one after the other with `qemu_versions.each_qemu`."""
    return binaries_of(getattr(request, "param", INSTALLED))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, so that paths in messages are short."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_file_stays_open() -> Iterator[None]:
    """Whatever a test opens is closed at its end, however it ended."""
    open_files = Path("/proc/self/fd")
    gc.collect()  # or what tests before have left may be closed meanwhile, and make up for what this one leaves
    before = len(list(open_files.iterdir()))
    yield
    assert len(list(open_files.iterdir())) <= before


@pytest.fixture(scope="module")
def qemu() -> Iterator[Judge]:
    """QEMU as the judge of chains; one storage daemon a module."""
    with judge() as started:
        yield started


@pytest.fixture(scope="session")
def three_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw template, a layer and an active layer, each holding something; never written by tests."""
    folder = tmp_path_factory.mktemp("three")
    qemu_img("create", "-q", "-f", "raw", folder / "base.raw", "8M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", folder / "mid.qcow2", "16M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", folder / "top.qcow2", "16M")
    qemu_io(folder / "mid.qcow2", "write -P 1 1M 1M", "write -z 10M 64k")
    qemu_io(folder / "top.qcow2", "write -P 2 64k 128k", "write -P 3 12M 64k")
    return folder


@pytest.fixture
def copies(three_layers: Path, folder: Path) -> Path:
    """Copies of `three_layers` that a test may change."""
    for name in ("base.raw", "mid.qcow2", "top.qcow2"):
        shutil.copy(three_layers / name, folder)
    return folder


@pytest.fixture(name="memory_budget")
def within_memory_budget() -> Iterator[None]:
    """256 MiB more than the process has, and no byte beyond."""
    with memory_budget():
        yield
