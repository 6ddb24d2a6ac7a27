"""The header: fed whole, cut, and with every field wrong."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from qmpnbd.errors import ImageCorruptError, ImageError, ImageTruncatedError, ImageUnsupportedError
from qmpnbd.images.qcow2_format import (
    HEADER_MAX,
    Qcow2Header,
    pack_extensions,
    unpack_extensions,
    unpack_header,
)
from tests.handmade import BACKING_FORMAT

GOOD = Qcow2Header(
    backing_offset=0x200,
    backing_length=9,
    size=(1 << 30) + 1000,
    l1_entries=4,
    l1_offset=0x30000,
    refcount_table_offset=0x10000,
    refcount_table_clusters=1,
    snapshot_count=1,
    snapshots_offset=0x50000,
    incompatible=1 << 3 | 3,
    compatible=1,
    autoclear=1 << 40,
    header_length=112,
    compression_type=1,
)
GOOD_2 = Qcow2Header(version=2, size=1 << 20, l1_entries=1, l1_offset=0x30000, header_length=72)


@pytest.mark.parametrize("header", [GOOD, GOOD_2, Qcow2Header(), replace(GOOD_2, cluster_bits=9, l1_entries=32)])
def test_a_header_survives_and_what_follows_it_is_not_looked_at(header: Qcow2Header) -> None:
    packed = header.pack()
    assert unpack_header(packed, "a.qcow2") == header
    assert unpack_header(packed + b"\xff" * 50, "a.qcow2") == header


def test_the_numbers_that_follow_from_a_header() -> None:
    assert (GOOD.cluster_size, GOOD.l2_entries, GOOD.l1_needed) == (65536, 8192, 3)
    assert GOOD.disk_size == (1 << 30) + 512, "QEMU rounds down"
    assert GOOD.has_backing
    assert not replace(GOOD, backing_length=0).has_backing
    assert not replace(GOOD, backing_offset=0).has_backing
    assert (GOOD.extensions_end, GOOD_2.extensions_end) == (0x200, 65536)


@pytest.mark.parametrize("header", [GOOD, GOOD_2])
def test_a_header_cut_anywhere_is_truncated(header: Qcow2Header) -> None:
    needed = 105 if header.version == 3 else 72
    for length in range(needed):
        with pytest.raises(ImageTruncatedError, match=f"a.qcow2: .* byte {length},"):
            unpack_header(header.pack()[:length], "a.qcow2")
    assert unpack_header(header.pack()[:needed], "a.qcow2") == header


@pytest.mark.parametrize(
    ("change", "offset"),
    [
        ({"cluster_bits": 8}, 20),
        ({"cluster_bits": 22}, 20),
        ({"cluster_bits": 0xFFFFFFFF}, 20),
        ({"header_length": 103, "incompatible": 0}, 100),
        ({"header_length": 65537}, 100),
        ({"backing_offset": 65537}, 8),
        ({"backing_offset": 111}, 8),
        ({"backing_offset": 1 << 63}, 8),
        ({"backing_length": 1024}, 16),
        ({"backing_offset": 65530, "backing_length": 7}, 16),
        ({"l1_entries": (4 << 20) + 1}, 36),
        ({"l1_entries": 2}, 36),
        ({"l1_entries": 0}, 36),
        ({"size": (1 << 64) - 1}, 36),
        ({"l1_offset": 0x30200}, 40),
        ({"l1_offset": 0}, 40),
        ({"compression_type": 0}, 104),
        ({"incompatible": 0}, 104),
        ({"header_length": 104}, 104),
    ],
)
def test_a_field_that_contradicts_the_format(change: dict[str, int], offset: int) -> None:
    bad = replace(GOOD, **change)
    with pytest.raises(ImageCorruptError) as caught:
        unpack_header(bad.pack()[:HEADER_MAX].ljust(HEADER_MAX, b"\0"), "a.qcow2")
    assert (caught.value.offset, caught.value.where) == (offset, "a.qcow2")
    assert caught.value.value == getattr(bad, caught.value.structure.removeprefix("header field ")) or offset == 104


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 1}, "version 1"),
        ({"version": 4}, "version 4"),
        ({"incompatible": 1 << 5}, "0x20"),
        ({"incompatible": 1 << 63}, "0x8000000000000000"),
        ({"compression_type": 2}, "compression type 2"),
        ({"crypt_method": 3}, "encryption method 3"),
    ],
)
def test_what_is_not_read_is_refused_by_name(change: dict[str, int], words: str) -> None:
    with pytest.raises(ImageUnsupportedError, match=words):
        unpack_header(replace(GOOD, **change).pack(), "a.qcow2")


def test_another_file_than_said() -> None:
    with pytest.raises(ImageUnsupportedError, match="does not start like one"):
        unpack_header(b"KDMV" + bytes(200), "a.qcow2")


@pytest.mark.parametrize("change", [{"crypt_method": 1}, {"crypt_method": 2}, {"incompatible": 1 << 3 | 1}])
def test_encryption_and_a_dirty_image_do_not_matter(change: dict[str, int]) -> None:
    changed = replace(GOOD, **change)
    assert unpack_header(changed.pack(), "a.qcow2") == changed


def test_random_headers_raise_documented_errors_only() -> None:
    dice = random.Random(1)
    for _ in range(20000):
        data = bytearray(dice.choice([GOOD, GOOD_2]).pack())
        for _ in range(dice.randrange(1, 4)):
            data[dice.randrange(4, len(data))] = dice.choice([0, 1, 0x7F, 0x80, 0xFF, dice.randrange(256)])
        try:
            header = unpack_header(bytes(data), "a.qcow2")
        except ImageError:
            continue
        assert header.l1_needed <= header.l1_entries <= 4 << 20


def area(*extensions: tuple[int, bytes]) -> bytes:
    return pack_extensions(*extensions)


def found(data: bytes, header: Qcow2Header = GOOD) -> str:
    return unpack_extensions(data, header, "a.qcow2").backing_format


def test_the_backing_format_among_other_extensions() -> None:
    other = (0x6803F857, bytes(48))
    assert found(area(other, (BACKING_FORMAT, b"qcow2"), other)) == "qcow2"
    assert found(area(other)) == ""
    assert found(b"") == ""
    assert found(bytes(4)) == ""
    assert found(area((BACKING_FORMAT, b"raw"))[:-8]) == "raw", "the end marker may be missing"
    assert found(area((BACKING_FORMAT, b"raw"), (BACKING_FORMAT, b"qcow2"))) == "qcow2", "the last one wins"
    assert found(area((BACKING_FORMAT, b"raw"), (BACKING_FORMAT, b""))) == "", "and an empty one is none"
    assert found(area() + area((BACKING_FORMAT, b"raw"))) == "", "nothing after the end marker counts"
    assert found(area((BACKING_FORMAT, b"raw\0x"))) == "raw", "a C string"
    assert found(area((BACKING_FORMAT, b"\xff"))) == "\\xff"


@pytest.mark.parametrize(
    "data",
    [
        area((BACKING_FORMAT, b"0123456789abcdef")),
        area((1, bytes(64)))[:40],
        b"\x12\x34\x56\x78\xff\xff\xff\xff" + bytes(64),  # 4 GiB
        b"\xff" * 8,
        area((BACKING_FORMAT, b"raw"))[:10],
        area((BACKING_FORMAT, b"raw"))[:5],
        b"\0\0\0",
    ],
)
def test_an_extension_longer_than_its_room(data: bytes) -> None:
    with pytest.raises(ImageCorruptError) as caught:
        found(data)
    assert caught.value.offset == 112
    assert caught.value.structure == "header extension"


def test_extensions_cut_anywhere_or_random() -> None:
    whole = area((0x6803F857, bytes(16)), (BACKING_FORMAT, b"qcow2"), (7, b"\x01" * 9))
    dice = random.Random(2)
    pieces = [whole[:length] for length in range(len(whole))] + [dice.randbytes(64) for _ in range(2000)]
    for data in pieces:
        try:
            assert found(data) in ("", "qcow2")
        except ImageCorruptError:
            continue
