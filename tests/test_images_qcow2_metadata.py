"""Snapshot table, bitmap directory and bitmap tables: fed whole, cut, and with every field wrong."""

from __future__ import annotations

import random
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qmpnbd.errors import ImageCorruptError, ImageError, ImageTruncatedError, ImageUnsupportedError
from qmpnbd.extents import ExtentMap
from qmpnbd.images.files import open_chain
from qmpnbd.images.qcow2 import ENTRY
from qmpnbd.images.qcow2_bitmaps import (
    BitmapInfo,
    bitmap_map,
    check_usable,
    table_offsets,
    unpack_directory,
    unpack_extension,
)
from qmpnbd.images.qcow2_format import BITMAPS_BIT, Qcow2Header
from qmpnbd.images.qcow2_snapshots import header_of_snapshot, unpack_snapshots
from tests.chains import run

AT = 0x10000
HEADER = Qcow2Header(size=1 << 30, l1_entries=2, l1_offset=0x30000, autoclear=BITMAPS_BIT, snapshots_offset=AT)


EXTRA = struct.pack(">QQQ", 5, 1 << 30, (1 << 64) - 1)


def snapshot(id_: bytes, name: bytes, extra: bytes = EXTRA, **kw: int) -> bytes:
    values = {"l1_offset": 0x40000, "l1_entries": 2, "extra_length": len(extra), **kw}
    fixed = struct.pack(">QIHHIIQII", values["l1_offset"], values["l1_entries"], len(id_), len(name), 7, 8, 9, 4,
                        values["extra_length"])  # fmt: skip
    whole = fixed + extra + id_ + name
    return whole + bytes(-len(whole) % 8)


def table(*entries: bytes, **fields: int) -> tuple[bytes, Qcow2Header]:
    return b"".join(entries), replace(HEADER, **{"snapshot_count": len(entries), **fields})


def unpack(data: bytes, header: Qcow2Header) -> list[tuple[str, str, int | None]]:
    def read(offset: int, length: int) -> bytes:
        piece = data[offset - AT : offset - AT + length]
        if len(piece) < length:
            raise ImageTruncatedError("cut", where="a")
        return piece

    return [(each.id, each.name, each.disk_size) for each in unpack_snapshots(read, header, "a")]


def test_a_snapshot_table() -> None:
    data, header = table(snapshot(b"1", b"first"), snapshot(b"22", b"\xff", b""), snapshot(b"3", b"", bytes(8)))
    assert unpack(data, header) == [("1", "first", 1 << 30), ("22", "\udcff", None), ("3", "", None)]
    for length in range(len(data) - 8):
        with pytest.raises(ImageTruncatedError):
            unpack(data[:length], header)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"snapshot_count": 65537}, ImageUnsupportedError),
        ({"snapshots_offset": 0}, ImageCorruptError),
        ({"snapshots_offset": AT + 8}, ImageCorruptError),
    ],
)
def test_a_snapshot_table_that_cannot_be(fields: dict[str, int], error: type[ImageError]) -> None:
    with pytest.raises(error):
        unpack(*table(snapshot(b"1", b"x"), **fields))
    with pytest.raises(ImageCorruptError, match="extra data"):
        unpack(*table(snapshot(b"1", b"x", extra_length=1025)))


@pytest.mark.parametrize("bad", [{"l1_offset": 0}, {"l1_offset": 8}, {"l1_entries": 1}, {"l1_entries": 1 << 30}])
def test_a_snapshot_whose_table_cannot_be(bad: dict[str, int]) -> None:
    data, header = table(snapshot(b"1", b"x", EXTRA, **bad))
    found = unpack_snapshots(lambda at, length: data[at - AT : at - AT + length], header, "a")
    with pytest.raises(ImageCorruptError, match="its L1 table"):
        header_of_snapshot(header, found, "x", "a")


def test_an_id_is_looked_for_before_a_name() -> None:
    data, header = table(snapshot(b"1", b"2", l1_offset=0x50000), snapshot(b"2", b"1", l1_offset=0x60000))
    found = unpack_snapshots(lambda at, length: data[at - AT : at - AT + length], header, "a")
    assert header_of_snapshot(header, found, "1", "a").l1_offset == 0x50000


def entry(name: bytes, **kw: int) -> bytes:
    values = {
        "table": 0x70000,
        "entries": 1,
        "flags": 2,
        "type": 1,
        "bits": 16,
        "extra": 0,
        "name_length": len(name),
        **kw,
    }
    fixed = struct.pack(">QIIBBHI", values["table"], values["entries"], values["flags"], values["type"],
                        values["bits"], values["name_length"], values["extra"])  # fmt: skip
    whole = fixed + bytes(values["extra"]) + name
    return whole + bytes(-len(whole) % 8)


def test_a_bitmap_directory() -> None:
    data = entry(b"one") + entry(b"two", flags=1) + entry(b"three", flags=4, extra=9)
    one, two, three = unpack_directory(data, 3, AT, HEADER, "a")
    assert one == BitmapInfo("one", 65536, False, True, 0, False, 0x70000, 1)
    assert (two.inconsistent, two.auto) == (True, False)
    assert (three.name, three.extra_data, three.extra_compatible) == ("three", 9, True)
    check_usable(three, "a")
    with pytest.raises(ImageUnsupportedError, match="extra data that is not known"):
        check_usable(replace(three, extra_compatible=False), "a")
    for length in range(len(data) - 2):  # the padding of the last entry may be missing
        with pytest.raises(ImageCorruptError):
            unpack_directory(data[:length], 3, AT, HEADER, "a")
    with pytest.raises(ImageCorruptError):
        unpack_directory(data, 2, AT, HEADER, "a")


@pytest.mark.parametrize(
    "bad",
    [
        {"table": 0},
        {"table": 8},
        {"entries": 2},
        {"entries": 1 << 31},
        {"type": 0},
        {"bits": 8},
        {"bits": 32},
        {"name_length": 0},
        {"name_length": 1024},
        {"name_length": 60},
    ],
)
def test_a_bitmap_that_cannot_be(bad: dict[str, int]) -> None:
    with pytest.raises(ImageCorruptError) as caught:
        unpack_directory(entry(b"one", **bad), 1, AT, HEADER, "a")
    assert caught.value.offset == AT


def test_two_bitmaps_of_one_name() -> None:
    with pytest.raises(ImageCorruptError, match="second bitmap"):
        unpack_directory(entry(b"x") * 2, 2, AT, HEADER, "a")


def test_the_bitmaps_extension() -> None:
    good = struct.pack(">IIQQ", 1, 0, 32, 0x20000)
    assert unpack_extension(good, HEADER, "a") == (1, 0x20000, 32)
    assert unpack_extension(None, HEADER, "a") == (0, 0, 0)
    assert unpack_extension(good, replace(HEADER, autoclear=0), "a") == (0, 0, 0), "written by who knows no bitmaps"
    for bad in (
        good[:-1],
        struct.pack(">IIQQ", 0, 0, 32, 0x20000),
        struct.pack(">IIQQ", 70000, 0, 32, 0x20000),
        struct.pack(">IIQQ", 1, 0, 8, 0x20000),
        struct.pack(">IIQQ", 1, 0, 1 << 62, 0x20000),
        struct.pack(">IIQQ", 1, 0, 32, 0x20008),
    ):
        with pytest.raises(ImageCorruptError):
            unpack_extension(bad, HEADER, "a")


def test_a_bitmap_table_and_its_bits() -> None:
    info = BitmapInfo("x", 512, False, False, 0, False, AT, 4)
    good = np.array([0, 1, 0x50000, 0], dtype=ENTRY)
    assert table_offsets(good, info, HEADER, "a").tolist() == [0, 1, 0x50000, 0]
    for bad in (2, 0x50001, 0x50200, 1 << 63):
        with pytest.raises(ImageCorruptError, match="bitmap table entry at byte 0x10008"):
            table_offsets(np.array([0, bad], dtype=ENTRY), info, HEADER, "a")
    found = bitmap_map([(3, False), (10, b"\x05\x02"), (2, True)], 512, 15 * 512 - 512)
    pairs = [(3, 0), (1, 1), (1, 0), (1, 1), (6, 0), (2, 1)]
    assert found == ExtentMap.of_extents((count * 512, value) for count, value in pairs)
    assert bitmap_map([], 512, 0) == ExtentMap([], [])


def test_random_directories_raise_documented_errors_only() -> None:
    dice = random.Random(9)
    whole = entry(b"one") + entry(b"two", flags=1)
    refused = 0
    for _ in range(5000):
        data = bytearray(whole)
        for _ in range(dice.randrange(1, 4)):
            data[dice.randrange(len(data))] = dice.randrange(256)
        try:
            assert len(unpack_directory(bytes(data), 2, AT, HEADER, "a")) == 2
        except ImageError:
            refused += 1
    assert 0 < refused < 5000


@pytest.mark.real
def test_the_facts_of_an_image(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    options = "cluster_size=16k,extended_l2=on,compression_type=zstd,lazy_refcounts=on,refcount_bits=8"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, "1M")
    with open_chain(str(path)) as chain:
        facts = chain.facts(0)
    assert facts is not None
    assert (facts.version, facts.cluster_size, facts.extended_l2, facts.compression_type) == (3, 16384, True, "zstd")
    assert (facts.lazy_refcounts, facts.refcount_bits, facts.encryption) == (True, 8, "none")
    assert (facts.dirty, facts.corrupt, facts.data_file, facts.snapshots, facts.bitmaps) == (False, False, None, (), ())
    image = bytearray(path.read_bytes())
    image[79] |= 3  # incompatible features: dirty, corrupt
    path.write_bytes(image)
    with open_chain(str(path)) as chain:
        facts = chain.facts(0)
    assert facts is not None
    assert (facts.dirty, facts.corrupt) == (True, True)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={path}.d,data_file_raw=on", path, "1M")
    with open_chain(str(path)) as chain:
        facts = chain.facts(0)
    assert facts is not None
    assert (facts.data_file, facts.data_file_raw) == (f"{path}.d", True)
    with open_chain(str(path), format="raw") as chain:
        assert chain.facts(0) is None
        assert chain.bitmaps(0) == ()
