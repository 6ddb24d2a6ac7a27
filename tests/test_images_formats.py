"""Guessing formats, and the size of raw layers."""

from __future__ import annotations

import pytest

from qmpnbd.errors import ImageUnsupportedError
from qmpnbd.images.formats import probe
from qmpnbd.images.raw import raw_size


@pytest.mark.parametrize(
    ("start", "found"),
    [
        (b"QFI\xfb\0\0\0\x01", "qcow"),
        (b"Bochs Virtual HD Image", "bochs"),
        (b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop", "cloop"),
    ],
)
def test_other_formats_are_refused_by_name(start: bytes, found: str) -> None:
    with pytest.raises(ImageUnsupportedError, match=f"looks like the format {found}"):
        probe(start.ljust(512, b"\0"), "x.img", "x.img")


@pytest.mark.parametrize(
    ("start", "found"),
    [
        (b"KDMV\x01", "vmdk"),
        (b"COWD", "vmdk"),
        (b"# Disk DescriptorFile\nversion=1\n", "vmdk"),
        (b"# x\r\n\r\nversion=3\r\nmore", "vmdk"),
        (b"QED\0", "qed"),
        (b"conectix\0", "vpc"),
        (b"vhdxfile", "vhdx"),
        (b"WithoutFreeSpace", "parallels"),
        (b"WithouFreSpacExt", "parallels"),
        (b"LUKS\xba\xbe\0\x01", "luks"),
        (b"<<< Oracle VM".ljust(64) + b"\x7f\x10\xda\xbe", "vdi"),
    ],
)
def test_other_formats_that_are_read(start: bytes, found: str) -> None:
    assert probe(start.ljust(512, b"\0"), "x.img", "x.img") == found


def test_a_format_known_by_its_name() -> None:
    with pytest.raises(ImageUnsupportedError, match="format dmg"):
        probe(bytes(512), "x.dmg", "x.dmg")


def test_qcow2_and_all_else() -> None:
    assert probe(b"QFI\xfb\0\0\0\x02", "x", "x") == "qcow2"
    assert probe(b"QFI\xfb\0\0\0\x09", "x.dmg", "x") == "qcow2"
    assert {probe(start, "x", "x") for start in (b"", b"QF", b"# version=1", b"\xeb\x63", bytes(512))} == {"raw"}


def test_raw_sizes_are_rounded_up() -> None:
    assert [raw_size(length, "x") for length in (0, 1, 512, 513)] == [0, 512, 512, 1024]
    assert raw_size(1000, "x", offset=512) == 512
    assert raw_size(1000, "x", offset=512, size=512) == 512
    assert raw_size(1000, "x", offset=1024) == 0


@pytest.mark.parametrize(
    ("offset", "size"), [(1, None), (0, 1000), (-512, None), (0, -512), (1536, None), (512, 1024), (1 << 70, None)]
)
def test_windows_that_do_not_fit(offset: int, size: int | None) -> None:
    with pytest.raises(ImageUnsupportedError, match=f"raw window at offset {offset} of size {size}"):
        raw_size(1000, "x", offset=offset, size=size)
