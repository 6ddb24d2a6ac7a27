"""Every generation of QEMU that is installed, or unpacked beside the checkout, against what we say of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from qmpnbd.errors import ImageCorruptError
from qmpnbd.images.chain import Format
from qmpnbd.images.files import open_chain
from qmpnbd.images.mapentries import Generation
from qmpnbd.report.qemuimg import map_json
from tests.chains import build, recipes, run
from tests.handmade import qcow2_bytes, write
from tests.judge import BASE, DEPTH, Judge, judge
from tests.qemu_versions import installed
from tests.test_images_blocks import REAL, made

pytestmark = pytest.mark.real

UNPACKED = Path(__file__).parent.parent / ".work/qemu"


@pytest.fixture(scope="module", params=get_args(Generation))
def generation(request: pytest.FixtureRequest) -> Iterator[Generation]:
    """A generation; its tools come first on the PATH for the whole module, if they are not the installed ones."""
    found: Generation = request.param
    if found == installed().release:
        yield found
        return
    folder = UNPACKED / found / "bin"
    if not folder.is_dir():
        pytest.skip(f"QEMU {found} is not unpacked: scripts/get-qemu {found}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        yield found


@pytest.fixture(scope="module")
def judged(generation: Generation) -> Iterator[Judge]:
    """A storage daemon of that generation."""
    with judge() as started:
        yield started


def agree(path: Path, image_format: Format, judged: Judge, generation: Generation) -> None:
    """The depth, the block status, and the very bytes of the map."""
    served = judged.maps(path.absolute(), image_format)
    with open_chain(str(path), format=image_format) as chain:
        assert chain.allocation_depth() == served[DEPTH]
        assert chain.base_allocation(generation) == served[BASE]
        text = b"".join(map_json(chain.map_entries(generation), generation)).decode()
    assert text == run("qemu-img", "map", "--output=json", "-f", image_format, path)


def test_chains(generation: Generation, judged: Judge, here: Path) -> None:
    for recipe in recipes(20, seed=31, data_files=True):
        folder = here / recipe.id
        folder.mkdir()
        try:
            agree(build(recipe, folder), "qcow2", judged, generation)
        except AssertionError as error:
            raise AssertionError(f"{recipe}") from error


def test_other_formats(generation: Generation, judged: Judge, here: Path) -> None:
    known = run("qemu-img", "--help").rpartition("Supported formats:")[2].split()
    done = 0
    for kind, options, size in REAL:
        if kind in known:
            agree(made(kind, options, size, seed=2), kind, judged, generation)
            done += 1
    assert done >= len(REAL) - 2, "Debian's 5.2 has no parallels"


def test_a_raw_data_file_that_is_none(generation: Generation, judged: Judge, here: Path) -> None:
    """All of them refuse it; version 2 of the format has no such bit."""
    places: dict[str, Any] = {"refcount_table_offset": 0x10000, "refcount_table_clusters": 1, "autoclear": 2}
    write("new.qcow2", qcow2_bytes({}, **places))
    with pytest.raises(ImageCorruptError, match=r"field autoclear .* data file is raw, but there is none"):
        open_chain("new.qcow2")
    with pytest.raises(RuntimeError, match="data-file-raw requires a data file"):
        run("qemu-img", "map", "-f", "qcow2", "new.qcow2")
    write("old.qcow2", qcow2_bytes({}, version=2, **places))
    agree(Path("old.qcow2"), "qcow2", judged, generation)
