"""Points in time by root on a QEMU of another user, as hosts have them: QEMU can open all that it is given."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qmpnbd.export.depth import DepthReader
from qmpnbd.nbd.uri import NbdUri
from qmpnbd.qmp.plan import Recipe
from qmpnbd.qmp.pointintime import PointInTime
from tests.instants import Machine, Truth, build_chain, commands, machine_on
from tests.qemu_versions import QemuBinaries, each_qemu
from tests.test_cli import qmpnbd
from tests.test_cli_recover import killed
from tests.test_pointintime import RECIPES, content_of, hold, wishes_for

USER = "nobody"

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can work on a QEMU of another user"),
]


@contextmanager
def machine_of_another(binaries: QemuBinaries, folder: Path) -> Iterator[Machine]:
    """A machine whose QEMU is another user's, as its images are; it may look into our folder, not write there."""
    folder.chmod(0o711)
    images = [build_chain(binaries, folder, f"d{number}", number) for number in range(2)]
    for path in folder.iterdir():
        shutil.chown(path, USER)
    drop = ("-run-with", f"user={USER}") if binaries.version >= (9, 1) else ("-runas", USER)
    with machine_on(binaries, folder, images, *drop) as running:
        assert Path(f"/proc/{running.server.pid}").stat().st_uid != 0
        yield running


@each_qemu
@pytest.mark.parametrize("recipe", RECIPES)
def test_content_is_that_of_the_instant(binaries: QemuBinaries, recipe: Recipe, folder: Path) -> None:
    with machine_of_another(binaries, folder) as running:
        before = running.state()
        truth: list[Truth] = []
        found: list[bytes] = []

        async def body(point: PointInTime, server: NbdUri, reader: DepthReader) -> None:
            for number in range(2):
                running.write(number, *commands(200 + number, 25))
            found.extend([await content_of(server, offer) for offer in point.offers])

        asyncio.run(hold(running, wishes_for(recipe, folder), lambda: truth.extend(running.truth()), body))
        assert found == [each.content for each in truth]
        assert running.state() == before


@each_qemu
def test_what_a_killed_run_left_is_taken_down(binaries: QemuBinaries, folder: Path) -> None:
    with machine_of_another(binaries, folder) as running:
        before = running.state()
        killed(running)
        qmpnbd("recover", "--qmp", running.server.qmp, "--runtime-dir", folder)
        assert running.state() == before


@each_qemu
def test_a_backup_is_made_and_proved(binaries: QemuBinaries, folder: Path) -> None:
    with machine_of_another(binaries, folder) as running:
        repository = folder / "repository"
        qmpnbd("repository", "create", repository)
        for number, kind in enumerate(("full", "increment")):
            running.write(0, *commands(300 + number, 10))
            qmpnbd("backup", "--qmp", running.server.qmp, "--chain", "c", "--type", kind, repository)
        truth = running.truth()
        qmpnbd("restore", repository, "latest", folder / "restored.raw", "--disk", "vd0")
        assert (folder / "restored.raw").read_bytes() == truth[0].content
