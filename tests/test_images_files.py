"""Opening chains of files made by hand: what is found, and every way in which files can be wrong."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from qmpnbd.deadline import Deadline
from qmpnbd.errors import (
    BackingNotLocalError,
    ChainError,
    DeadlineError,
    ImageMissingError,
    ImageTruncatedError,
    ImageUnreadableError,
    ImageUnsupportedError,
    UsageError,
)
from qmpnbd.extents import ExtentMap
from qmpnbd.images.chain import LayerSpec
from qmpnbd.images.files import open_chain, open_layers
from tests.handmade import COPIED, DATA, END, SIZE, ZERO, depths, put, qcow2_bytes, runs, write

pytestmark = pytest.mark.usefixtures("no_file_stays_open")


@pytest.fixture
def three_layers(here: Path) -> str:
    write("base.raw", bytes(1000))
    write("mid.qcow2", qcow2_bytes({3: ZERO, 70: COPIED | DATA}, size=100 * 512, backing="base.raw"))
    return write("top.qcow2", qcow2_bytes({0: COPIED | DATA}, backing="mid.qcow2", backing_format="qcow2"))


def test_a_chain(three_layers: str) -> None:
    with open_chain(three_layers) as chain:
        assert chain.size == SIZE
        assert chain.allocated(0) == runs((1, 1), (127, 0))
        assert chain.allocated(1) == runs((3, 0), (1, 1), (66, 0), (1, 1), (29, 0))
        assert chain.allocated(2) == runs((2, 1))
        assert chain.allocation_depth() == runs((1, 1), (1, 3), (1, 3), (1, 2), (66, 3), (1, 2), (29, 3), (28, 2))
        top, mid, base = chain.layers
    assert (top.index, top.path, top.format, top.format_probed, top.size) == (0, "top.qcow2", "qcow2", True, SIZE)
    assert (top.cluster_size, top.has_backing, top.allocation_depth) == (512, True, 1)
    assert (mid.path, mid.format_probed, mid.size, mid.allocation_depth) == ("mid.qcow2", False, 100 * 512, 2)
    assert (base.path, base.format, base.format_probed, base.size) == ("base.raw", "raw", True, 1024)
    assert (base.cluster_size, base.has_backing, base.allocation_depth) == (None, False, 3)


def test_an_explanation_names_the_entry_that_decided(three_layers: str) -> None:
    with open_chain(three_layers) as chain:
        own, zero, short, past = (chain.explain(offset) for offset in (5, 3 * 512, 1024, SIZE - 1))
    assert (own.offset, own.layer, own.path, own.allocation_depth) == (5, 0, "top.qcow2", 1)
    assert own.text == (
        "layer 0, top.qcow2: L1 entry at byte 0x200 is 0x8000000000000400: L2 table at 0x400; "
        "L2 entry at byte 0x400 is 0x8000000000010000: standard cluster at host offset 0x10000"
    )
    assert (zero.layer, zero.path) == (1, "mid.qcow2")
    assert zero.text.splitlines()[0].endswith("L2 entry at byte 0x418 is 0x0000000000000000: not allocated")
    assert zero.text.splitlines()[1].endswith("L2 entry at byte 0x418 is 0x0000000000000001: zero cluster")
    assert (short.layer, short.path, len(short.steps)) == (2, "base.raw", 3)
    assert "past the end of this layer, which has 0x400 bytes" in short.steps[2].text
    assert (past.layer, past.allocation_depth) == (1, 2)
    assert "L1 entry at byte 0x208 is 0x0000000000000000: no L2 table" in past.steps[0].text


def test_an_explanation_of_what_nobody_holds_and_of_raw(here: Path) -> None:
    write("a.qcow2", qcow2_bytes({1: 0}))
    with open_chain("a.qcow2") as chain:
        explanation = chain.explain(512)
        assert (explanation.layer, explanation.path, explanation.allocation_depth) == (None, None, 0)
        assert explanation.text.endswith("not allocated; there is no layer below")
        with pytest.raises(UsageError, match="no byte 65536 in a disk of 65536"):
            chain.explain(SIZE)
        with pytest.raises(UsageError):
            chain.explain(-1)
    with open_chain(write("b.raw", bytes(512))) as chain:
        assert chain.explain(0).text == "layer 0, b.raw: raw, every byte of it is allocated"


def test_an_explanation_reads_the_file_anew(three_layers: str) -> None:
    with open_chain(three_layers) as chain:
        assert chain.explain(0).layer == 0
        image = bytearray(Path(three_layers).read_bytes())
        put(image, 0x400, bytes(8))
        Path(three_layers).write_bytes(image)
        assert chain.explain(0).layer == 2
        put(image, 0x400, (COPIED | END).to_bytes(8, "big"))
        Path(three_layers).write_bytes(image)
        with pytest.raises(ImageTruncatedError, match="guest offset 0x0 should lie at bytes 0x20000"):
            chain.explain(0)


def test_a_given_format_wins(here: Path) -> None:
    write("a.img", qcow2_bytes({}))
    with open_chain("a.img", format="raw") as chain:
        assert (chain.layers[0].format, chain.layers[0].format_probed, chain.size) == ("raw", False, END)
    with pytest.raises(ImageUnsupportedError, match=r"a\.img: the format dmg is not read here"):
        open_chain("a.img", format="dmg")
    write("b.img", b"x" * 512)
    with pytest.raises(ImageUnsupportedError, match=r"b\.img: the image is said to be qcow2"):
        open_chain("b.img", format="qcow2")


def test_names_follow_symlinks_as_qemu_does(here: Path) -> None:
    """A relative name is looked for beside the link, not beside the file it leads to."""
    for name in ("here", "there"):
        Path(name).mkdir()
        write(f"{name}/base.raw", bytes(512 if name == "here" else 1024))
    write("there/top.qcow2", qcow2_bytes({}, backing="base.raw", backing_format="raw"))
    Path("here/top.qcow2").symlink_to("../there/top.qcow2")
    with open_chain("here/top.qcow2") as chain:
        assert (chain.layers[1].path, chain.layers[1].size) == ("here/base.raw", 512)


def test_names_relative_to_qemus_working_directory(here: Path) -> None:
    Path("vm").mkdir()
    write("vm/base.raw", bytes(512))
    write("top.qcow2", qcow2_bytes({}, backing="file:base.raw", backing_format="raw"))
    with open_chain("top.qcow2", working_directory="vm") as chain:
        assert chain.layers[1].path == "vm/base.raw"
    with pytest.raises(ImageMissingError, match=r"base\.raw \(backing file of top\.qcow2\)"):
        open_chain("top.qcow2")


def test_json_names(here: Path) -> None:
    write("base.raw", bytes(4096))
    write("mid.qcow2", qcow2_bytes({}, backing="base.raw"))
    cut = '{"driver":"qcow2","file.filename":"mid.qcow2","backing":null}'
    with open_chain(write("top.qcow2", qcow2_bytes({}, backing="json:" + cut))) as chain:
        assert [layer.has_backing for layer in chain.layers] == [True, False]
        assert chain.allocation_depth() == runs((128, 0))
    window = '{"driver":"raw","offset":1024,"size":512,"file.filename":"base.raw"}'
    with open_chain(write("top.qcow2", qcow2_bytes({}, backing="json:" + window))) as chain:
        assert (chain.layers[1].offset, chain.layers[1].size) == (1024, 512)


def test_layers_told_by_somebody_else(three_layers: str) -> None:
    """Numbers may have gaps where filters sit; names in the headers, here of files that are gone, do not matter."""
    Path("mid.qcow2").rename("moved.qcow2")
    specs = [
        LayerSpec("top.qcow2", "qcow2", 1, "drive0"),
        LayerSpec("moved.qcow2", "qcow2", 4),
        LayerSpec("base.raw", "raw", 5, offset=512, size=512),
    ]
    with open_layers(specs) as chain:
        assert [layer.allocation_depth for layer in chain.layers] == [1, 4, 5]
        assert [layer.node_name for layer in chain.layers] == ["drive0", "", ""]
        assert (chain.layers[2].size, chain.layers[2].offset) == (512, 512)
        assert chain.allocation_depth() == runs((1, 1), (2, 5), (1, 4), (66, 5), (1, 4), (29, 5), (28, 4))
    with open_layers(specs[:2]) as chain:
        assert [layer.has_backing for layer in chain.layers] == [True, False]
        assert chain.allocation_depth().values.max() == 4


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        ([], "at least one layer"),
        ([LayerSpec("a", "qcow2", 0)], "start at 1"),
        ([LayerSpec("a", "qcow2", 2), LayerSpec("b", "qcow2", 2)], "must rise"),
        ([LayerSpec("a", "raw", 1), LayerSpec("b", "qcow2", 2)], "ends the chain"),
        ([LayerSpec("a", "qcow2", 1, offset=512)], "window"),
        ([LayerSpec("a", "qcow2", 1, size=512)], "window"),
    ],
)
def test_layers_that_make_no_chain(specs: list[LayerSpec], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        open_layers(specs)


def test_a_missing_file_is_named_with_its_overlay(here: Path) -> None:
    with pytest.raises(ImageMissingError, match=r"^top\.qcow2: no such file\. "):
        open_chain("top.qcow2")
    write("top.qcow2", qcow2_bytes({}, backing="gone/base.raw"))
    with pytest.raises(ImageMissingError, match=r"^gone/base\.raw \(backing file of top\.qcow2\): no such file\. "):
        open_chain("top.qcow2")
    with pytest.raises(ImageMissingError):
        open_chain("top.qcow2/below-a-file")
    with pytest.raises(ImageUnreadableError, match="no file can have this name"):
        open_chain("a\0b")


def test_a_backing_file_that_is_not_local(here: Path) -> None:
    write("top.qcow2", qcow2_bytes({}, backing="nbd://host/x"))
    with pytest.raises(BackingNotLocalError, match=r"^top\.qcow2: its backing file nbd://host/x"):
        open_chain("top.qcow2")


def test_a_block_device_is_as_large_as_it_can_be_sought(three_layers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device's status tells no size. Files with a device's mode stand in for devices, which tests cannot make."""
    real, real_of = os.stat, os.fstat

    def device(status: os.stat_result) -> os.stat_result:
        mode = stat.S_IFBLK | 0o600
        return os.stat_result((mode, *status[1:6], 0, *status[7:10]), {"st_rdev": status.st_ino})

    whole = depths(three_layers)
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", lambda path, **how: device(real(path, **how)))
        patch.setattr(os, "fstat", lambda fd: device(real_of(fd)))
        assert depths(three_layers) == whole
        write("self.qcow2", qcow2_bytes({}, backing="self.qcow2"))
        with pytest.raises(ChainError, match="loops"):
            open_chain("self.qcow2")


def test_short_reads_are_continued(three_layers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, real = depths(three_layers), os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: real(fd, [views[0][:100]], at))
    assert depths(three_layers) == whole


def test_a_stopped_deadline_ends_the_work(three_layers: str) -> None:
    deadline = Deadline(None)
    with open_chain(three_layers, deadline=deadline) as chain:
        deadline.stop()
        with pytest.raises(DeadlineError):
            chain.allocation_depth()
    with pytest.raises(DeadlineError):
        open_chain(three_layers, deadline=deadline)


def test_what_lies_behind_the_disks_end_does_not_count(here: Path) -> None:
    bad = COPIED | 0xFFFFFFFFFFE00
    entries = {0: COPIED | DATA, 10: bad, 64: bad}
    image = qcow2_bytes(entries, size=SIZE)
    with pytest.raises(ImageTruncatedError, match="guest offset 0x1400 "):
        depths(write("a.qcow2", image))
    small = bytearray(image)
    put(small, 24, (10 * 512 - 100).to_bytes(8, "big"))
    assert depths(write("b.qcow2", bytes(small))) == runs((1, 1), (8, 0)), "size rounded down, entry 9 not needed"
    # Behind a smaller overlay it is not looked at either, though it would count in the layer itself.
    write("top.qcow2", qcow2_bytes({}, size=10 * 512, backing="a.qcow2"))
    assert depths("top.qcow2") == runs((1, 2), (9, 0))


def test_tables_that_are_shared_or_out_of_order(here: Path) -> None:
    image = bytearray(qcow2_bytes({0: ZERO, 64: 0, 130: 0, 200: ZERO}, size=5 * 64 * 512))
    first, second = bytes(image[0x200:0x208]), bytes(image[0x208:0x210])
    put(image, 0x200, second + first + first + bytes(8) + first)
    wanted = runs((64, 0), (1, 1), (63, 0), (1, 1), (63, 0), (64, 0), (1, 1), (63, 0))
    assert depths(write("a.qcow2", bytes(image))) == wanted


def test_images_of_no_size(here: Path) -> None:
    assert depths(write("a.qcow2", qcow2_bytes({}, size=0))) == ExtentMap([], [])
    assert depths(write("b.raw", b"")) == ExtentMap([], [])
    write("top.qcow2", qcow2_bytes({}, backing="b.raw"))
    assert depths("top.qcow2") == runs((128, 2))
