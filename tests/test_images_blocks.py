"""Layers of formats with one table of blocks, and vmdk in flat files: as QEMU reads them, and what they may not be."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qmpnbd.errors import (
    BackingNotLocalError,
    ChainError,
    ImageCorruptError,
    ImageError,
    ImageMissingError,
    ImageTruncatedError,
    ImageUnreadableError,
    ImageUnsupportedError,
)
from qmpnbd.extents import ExtentMap
from qmpnbd.images.chain import Format
from qmpnbd.images.files import open_chain
from qmpnbd.images.vhdx import _crc32c
from tests.chains import converted, run
from tests.handmade import put
from tests.judge import BASE, DEPTH, Judge, qemu_map
from tests.test_images_differential import entries

MIB = 1 << 20
REAL: list[tuple[Format, str, int]] = [
    ("vdi", "", 20 * MIB + 1536),
    ("vdi", "static=on", 3 * MIB),
    ("vpc", "", 20 * MIB),
    ("vpc", "force_size=on", 20 * MIB + 1536),
    ("vpc", "subformat=fixed", 20 * MIB),
    ("vpc", "subformat=fixed,force_size=on", 3 * MIB + 512),
    ("vhdx", "", 20 * MIB),
    ("vhdx", "block_size=1M", 20 * MIB),
    ("vhdx", "block_size=1M,block_state_zero=off", 5 * MIB),
    ("vhdx", "subformat=fixed,block_size=2M", 5 * MIB),
    ("parallels", "", 20 * MIB + 1536),
    ("parallels", "cluster_size=64k", 20 * MIB),
    ("vmdk", "subformat=monolithicFlat", 5 * MIB),
    ("vmdk", "subformat=twoGbMaxExtentFlat", 5 * MIB),
]


def made(kind: str, options: str, size: int, seed: int = 0) -> Path:
    """An image with some data and zeroes, in the working directory."""
    path, dice = Path(f"base.{kind}"), random.Random(f"{kind} {options} {seed}")
    run("qemu-img", "create", "-q", "-f", kind, *(["-o", options] if options else []), path, size)
    for _ in range(5):
        at = dice.randrange(size - 70000) // 512 * 512
        zeroes = "" if kind == "vhdx" or dice.random() < 0.7 else " -z"  # QEMU 7.2 cannot write zeroes to vhdx
        length = dice.choice([512, 4096, 65536])
        run("qemu-io", "-f", kind, "-c", f"write -q{zeroes} {at} {length}", path)
    return path


@pytest.mark.real
@pytest.mark.parametrize(("kind", "options", "size"), REAL)
def test_as_qemu_reads_them(kind: str, options: str, size: int, here: Path, qemu: Judge) -> None:
    """Alone and under an overlay that is longer: depth, block status, map, content."""
    base, top = made(kind, options, size), Path("top.qcow2")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", kind, top, size + 3 * MIB)
    run("qemu-io", "-f", "qcow2", "-c", "write -q 1M 100k", "-c", f"write -q {size + MIB} 64k", top)
    dice = random.Random(options)
    for path, image_format in ((base, kind), (top, "qcow2")):
        served = qemu.maps(here / path, image_format)
        with open_chain(str(path), format=image_format) as chain:
            assert chain.layers[-1].format == kind
            depth = chain.allocation_depth()
            assert depth == served[DEPTH]
            assert chain.base_allocation("7.2") == served[BASE]
            assert entries(chain) == qemu_map(path, image_format)
            wanted = converted(here / path, here, image_format)
            assert chain.read(0, chain.size) == wanted
            for _ in range(10):
                offset = dice.randrange(chain.size)
                assert chain.explain(offset).allocation_depth == depth.at(offset)
                layer, path_of_data, host = chain.locate(offset) or (None, "", None)
                if host is not None:
                    assert Path(path_of_data).read_bytes()[host : host + 1] == wanted[offset : offset + 1]
                    assert layer == depth.at(offset) - 1
    with open_chain(str(base)) as chain:
        assert chain.layers[0].format == ("raw" if "subformat=fixed" in options and kind == "vpc" else kind)


@pytest.mark.real
def test_a_flat_vmdk_in_several_files_has_a_depth_and_no_places(here: Path, qemu: Judge) -> None:
    size = 2 << 30 | MIB
    run("qemu-img", "create", "-q", "-f", "vmdk", "-o", "subformat=twoGbMaxExtentFlat", "base.vmdk", size)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.vmdk", "-F", "vmdk", "top.qcow2")
    run("qemu-io", "-f", "qcow2", "-c", "write -q 2G 64k", "top.qcow2")
    with open_chain("top.qcow2") as chain:
        assert chain.layers[1].size == size
        assert chain.allocation_depth() == qemu.maps(here / "top.qcow2")[DEPTH]
        assert chain.read(2 << 30, 65536) == b"\xcd" * 65536
        with pytest.raises(ImageUnsupportedError, match="a vmdk of several files places its data"):
            chain.base_allocation()
        with pytest.raises(ImageUnsupportedError, match="the data of the format vmdk"):
            chain.read(0, 1)


DESCRIPTOR = """# Disk DescriptorFile
version=1
CID=11111111
parentCID=ffffffff
createType="monolithicFlat"
RW 128 FLAT "data.img" 16
"""


def test_a_flat_vmdk_with_an_offset(here: Path) -> None:
    Path("sub").mkdir()
    Path("sub/a.vmdk").write_text(DESCRIPTOR)
    Path("sub/data.img").write_bytes(bytes(16 * 512) + b"x" * 65536)
    with open_chain("sub/a.vmdk") as chain:
        assert chain.read(0, chain.size) == b"x" * 65536
        assert chain.locate(1) == (0, "sub/data.img", 8193)
        assert chain.explain(5).text == "layer 0, sub/a.vmdk: vmdk, every byte of it is allocated"


@pytest.mark.parametrize(
    ("old", "new", "error", "words"),
    [
        ("monolithicFlat", "custom", ImageUnsupportedError, "type 'custom'"),
        ("createType=", "create=", ImageUnsupportedError, "type unknown"),
        ("parentCID=ffffffff", "parentCID=11111112", ImageUnsupportedError, "a flat vmdk with a parent"),
        ("FLAT", "SPARSE", ImageUnsupportedError, "RW 'SPARSE'"),
        ("RW 128", "RDONLY 128", ImageUnsupportedError, "RDONLY 'FLAT'"),
        ("RW 128", "NO 128", ImageUnsupportedError, "without extents"),
        ("RW 128", "RW 0", ImageCorruptError, "descriptor field extent at byte 0x5c: .*found 0x0"),
        ("RW 128", "RW 99999999999999999", ImageCorruptError, "descriptor field extent"),
        ('"data.img" 16', '"data.img"', ImageCorruptError, "descriptor field extent"),
        ('"data.img" 16', '"" 16', ImageCorruptError, "descriptor field extent"),
        ("RW 128", "RW 129", ImageTruncatedError, r"data\.img \(extent of a\.vmdk\): the extent should lie"),
        ("data.img", "nbd://host/x", BackingNotLocalError, "extent nbd://host/x"),
        ("data.img", "gone.img", ImageMissingError, r"gone\.img \(extent of a\.vmdk\): no such file"),
        ("data.img", "a.vmdk", ChainError, "loops"),
        ("data.img", "/dev/zero", ImageUnreadableError, "it is a character device"),
        ("RW", 'RW 1 FLAT "data.img" 0\n' * 3000 + "RW", ImageUnsupportedError, "more than 2048 extents"),
        ("# Disk", "#" * 300_000 + "\n#", ImageUnsupportedError, "more than 262144 bytes"),
    ],
)
def test_flat_descriptors_that_cannot_be(old: str, new: str, error: type[ImageError], words: str, here: Path) -> None:
    Path("data.img").write_bytes(bytes(16 * 512 + 65536))
    Path("a.vmdk").write_text(DESCRIPTOR.replace(old, new, 1))
    if error is ChainError or "extents" in words:
        Path("data.img").unlink()
    with pytest.raises(error, match=words):
        open_chain("a.vmdk", format="vmdk")


def vdi(**fields: int) -> bytes:
    """Five blocks: data, none, discarded, data, and one behind the end of the file."""
    values = {"version": 0x10001, "kind": 1, "table": 512, "data": 1024, "sector": 512, "size": 5 * MIB,
              "block": MIB, "extra": 0, "blocks": 5, "link": 0, "fourth": 1, **fields}  # fmt: skip
    image = bytearray(1024 + 2 * MIB)
    put(image, 64, struct.pack("<IIII", 0xBEDA107F, values["version"], 400, values["kind"]))
    put(image, 340, struct.pack("<II", values["table"], values["data"]))
    put(image, 360, struct.pack("<I", values["sector"]))
    put(image, 368, struct.pack("<QIII", values["size"], values["block"], values["extra"], values["blocks"]))
    put(image, 424, bytes([values["link"]]))
    table = [0, 0xFFFFFFFF, 0xFFFFFFFE, values["fourth"], fields.get("fifth", 0)]
    put(image, 512, struct.pack("<5I", *table))
    return bytes(image)


def vpc(*, true_sum: bool = True, **fields: Any) -> bytes:
    values = {"kind": 3, "creator": b"win ", "size": 5 * MIB, "header": 512, "magic": b"cxsparse", "table": 1536,
              "entries": 5, "block": MIB, "fourth": 4 + (MIB + 512) // 512, **fields}  # fmt: skip
    bitmap = 512
    image = bytearray(2048 + 2 * (MIB + bitmap) + 512)
    footer = bytearray(512)
    put(footer, 0, struct.pack(">8sIIQI4s", b"conectix", 2, 0x10000, values["header"], 0, values["creator"]))
    put(footer, 48, struct.pack(">QHBBI", values["size"], 10, 4, 17, values["kind"]))
    put(footer, 64, struct.pack(">I", ~sum(footer) & 0xFFFFFFFF if true_sum else 1))
    put(image, 0, bytes(footer))
    put(image, 512, struct.pack(">8sQQIII", values["magic"], (1 << 64) - 1, values["table"], 0x10000,
                                values["entries"], values["block"]))  # fmt: skip
    put(image, 1536, struct.pack(">5I", 4, 0xFFFFFFFF, 0xFFFFFFFF, values["fourth"], 4))
    put(image, len(image) - 512, bytes(footer))
    return bytes(image)


def parallels(**fields: Any) -> bytes:
    values = {"magic": b"WithouFreSpacExt", "version": 2, "tracks": 2048, "entries": 5, "sectors": 10240,
              "fourth": 2, **fields}  # fmt: skip
    image = bytearray(3 * MIB)
    put(image, 0, struct.pack("<16sIIIIIQ", values["magic"], values["version"], 16, 10, values["tracks"],
                              values["entries"], values["sectors"]))  # fmt: skip
    put(image, 64, struct.pack("<5I", 1, 0, 0, values["fourth"], 1))
    return bytes(image)


def region_entry(name: str, offset: int, length: int, flags: int = 1) -> bytes:
    return bytes.fromhex(name) + struct.pack("<QII", offset, length, flags)


def item(name: str, offset: int, length: int, flags: int = 4) -> bytes:
    return bytes.fromhex(name) + struct.pack("<IIII", offset, length, flags, 0)


BAT, METADATA = "6677c22d23f600429d64115e9bfd4a08", "06a27c8b90479a4bb8fe575f050f886e"
UNKNOWN = "00112233445566778899aabbccddeeff"


def summed(area: bytes) -> bytes:
    return area[:4] + struct.pack("<I", _crc32c(area[:4] + bytes(4) + area[8:])) + area[8:]


def vhdx(*, true_sum: bool = True, **fields: Any) -> bytes:
    places = {"log_at": 5 * MIB, "table": 2 * MIB, "length": MIB, "metadata": MIB, "parameters_at": 65536}
    disk = {"block": MIB, "size": 5 * MIB, "sector": 512, "flags": 0, "fourth": 4 << 20 | 6}
    head = {"log": bytes(16), "version": 1, "signature": b"metadata", "regions": 2, "items": 5}
    values: dict[str, Any] = {**places, **disk, **head, "more_regions": b"", "more_items": b"", **fields}
    image = bytearray(5 * MIB)
    put(image, 0, b"vhdxfile")
    for number in (1, 2):
        header = struct.pack("<4sIQ", b"head", 0, number) + bytes(32) + (values["log"] if number == 2 else bytes(16))
        header = (header + struct.pack("<HHIQ", 0, values["version"], MIB, values["log_at"])).ljust(4096, b"\0")
        put(image, number << 16, summed(header) if true_sum else header)
    regions = region_entry(BAT, values["table"], values["length"]) + region_entry(METADATA, values["metadata"], MIB)
    area = struct.pack("<4sII4x", b"regi", 0, values["regions"]) + regions + values["more_regions"]
    put(image, 192 << 10, summed(area.ljust(65536, b"\0")) if true_sum else area)
    items = item("3767a1ca36fa434db3b633f0aa44e76b", values["parameters_at"], 8)
    items += item("2442a52f1bcd7648b2115dbed83bf4b8", 65544, 8) + item("1dbf41816fa90947ba47f233a8faab5f", 65552, 4)
    items += item("c748a3cd5d4471449cc9e9885251c556", 65552, 4) + item("ab12cabee6b2234593efc309e000c746", 65560, 16)
    put(image, MIB, struct.pack("<8s2xH20x", values["signature"], values["items"]) + items + values["more_items"])
    put(image, MIB + 65536, struct.pack("<IIQI", values["block"], values["flags"], values["size"], values["sector"]))
    put(image, 2 * MIB, struct.pack("<5Q", 3 << 20 | 6, 0, 2, values["fourth"], 3))
    return bytes(image)


MAKERS: dict[str, Callable[..., bytes]] = {"vdi": vdi, "vpc": vpc, "parallels": parallels, "vhdx": vhdx}


@pytest.mark.parametrize("kind", MAKERS)
def test_entries(kind: str, here: Path) -> None:
    Path("a").write_bytes(MAKERS[kind]())
    none = 0 if kind == "parallels" else 2  # a zero cluster, but for parallels nothing
    last = {"vdi": 1, "vpc": 1, "parallels": 1, "vhdx": 2}[kind]
    with open_chain("a") as chain:
        pairs = [(MIB, 1), (2 * MIB, none), (MIB, 1), (MIB, last)]
        assert chain.statuses(0).statuses == ExtentMap.of_extents(pairs)
        assert chain.explain(2 * MIB).text.startswith("layer 0, a: entry 2 is ")
        fourth = chain.locate(3 * MIB + 7)
        assert fourth is not None
        assert (
            fourth[2]
            == {"vdi": 1024 + MIB, "vpc": 2048 + 512 + MIB + 512, "parallels": 2 * MIB, "vhdx": 4 * MIB}[kind] + 7
        )
        assert chain.layers[0].cluster_size == MIB


@pytest.mark.real
@pytest.mark.parametrize("kind", MAKERS)
def test_images_made_by_hand_are_what_qemu_takes_them_for(kind: str, here: Path, qemu: Judge) -> None:
    Path("a").write_bytes(MAKERS[kind]())
    with open_chain("a") as chain:
        served = qemu.maps(here / "a", kind)
        assert chain.allocation_depth() == served[DEPTH]
        assert chain.base_allocation() == served[BASE]
        assert entries(chain) == qemu_map("a", kind)


WRONG: list[tuple[str, dict[str, Any], type[ImageError], str]] = [
    ("vdi", {"version": 0x10002}, ImageUnsupportedError, "vdi version"),
    ("vdi", {"kind": 4}, ImageUnsupportedError, "of type 4"),
    ("vdi", {"link": 1}, ImageUnsupportedError, "needs another one"),
    ("vdi", {"block": 4 * MIB}, ImageUnsupportedError, "vdi blocks of 4194304"),
    ("vdi", {"extra": 512}, ImageUnsupportedError, "1048576 \\+ 512 bytes"),
    ("vdi", {"sector": 4096}, ImageUnsupportedError, "sectors of 4096"),
    ("vdi", {"table": 513}, ImageCorruptError, "offset_bmap"),
    ("vdi", {"data": 1}, ImageCorruptError, "offset_data"),
    ("vdi", {"size": 6 * MIB}, ImageCorruptError, "more than its 5 blocks hold"),
    ("vdi", {"size": (1 << 64) - 1}, ImageCorruptError, "disk_size"),
    ("vdi", {"blocks": 0xFFFFFFFF}, ImageCorruptError, "blocks_in_image"),
    ("vdi", {"blocks": 0x3FFFFFFF}, ImageTruncatedError, "its table of blocks should lie"),
    ("vdi", {"table": 0xFFFFFE00}, ImageTruncatedError, "its table of blocks should lie"),
    ("vdi", {"fourth": 2}, ImageTruncatedError, "the data of guest offset 0x300000 should lie at bytes 0x200400"),
    ("vdi", {"fourth": 0xFFFFFFFD}, ImageTruncatedError, "the data of guest offset 0x300000"),
    ("vpc", {"true_sum": False}, ImageCorruptError, "footer field checksum"),
    ("vpc", {"kind": 4}, ImageUnsupportedError, "vpc disks of type 4"),
    ("vpc", {"kind": 2}, ImageUnsupportedError, "vpc disks of type 2"),
    ("vpc", {"size": 1 << 62}, ImageCorruptError, "larger than 2040 GiB"),
    ("vpc", {"header": 1 << 63}, ImageTruncatedError, "its header should lie"),
    ("vpc", {"magic": b"cxsparsf"}, ImageCorruptError, "no header of a dynamic disk"),
    ("vpc", {"block": 3 * MIB}, ImageCorruptError, "block_size"),
    ("vpc", {"block": 256}, ImageCorruptError, "block_size"),
    ("vpc", {"block": 1 << 29}, ImageCorruptError, "block_size"),
    ("vpc", {"entries": 4}, ImageCorruptError, "max_table_entries"),
    ("vpc", {"entries": 0xFFFFFFFF}, ImageCorruptError, "max_table_entries"),
    ("vpc", {"entries": 1 << 29}, ImageTruncatedError, "its table of blocks should lie"),
    ("vpc", {"table": (1 << 64) - 8}, ImageTruncatedError, "its table of blocks should lie"),
    ("vpc", {"fourth": 1 << 20}, ImageTruncatedError, "the data of guest offset 0x300000"),
    ("parallels", {"version": 3}, ImageUnsupportedError, "parallels version 3"),
    ("parallels", {"tracks": 0}, ImageCorruptError, "tracks"),
    ("parallels", {"tracks": 0x7FFFFFFF}, ImageCorruptError, "tracks"),
    ("parallels", {"tracks": 63}, ImageUnsupportedError, "clusters of 63 sectors"),
    ("parallels", {"tracks": 1 << 21}, ImageUnsupportedError, "clusters of 2097152 sectors"),
    ("parallels", {"entries": 0xFFFFFFFF}, ImageCorruptError, "bat_entries"),
    ("parallels", {"entries": 1 << 28}, ImageTruncatedError, "its table of blocks should lie"),
    ("parallels", {"sectors": 1 << 63}, ImageCorruptError, "nb_sectors"),
    ("parallels", {"fourth": 3}, ImageTruncatedError, "the data of guest offset 0x300000"),
    ("parallels", {"magic": b"WithoutFreeSpacf"}, ImageUnsupportedError, "does not start like one"),
    ("vhdx", {"true_sum": False}, ImageCorruptError, "no header is sound"),
    ("vhdx", {"version": 2}, ImageCorruptError, "no header is sound"),
    ("vhdx", {"log": b"x" * 16}, ImageUnsupportedError, "its log was not replayed"),
    ("vhdx", {"log_at": 1 << 19}, ImageCorruptError, "LogOffset"),
    ("vhdx", {"regions": 2048}, ImageCorruptError, "no sound table"),
    ("vhdx", {"regions": 1}, ImageCorruptError, "a region is missing"),
    (
        "vhdx",
        {"regions": 3, "more_regions": region_entry(UNKNOWN, 0, 0)},
        ImageUnsupportedError,
        "region 33221100-5544",
    ),
    ("vhdx", {"regions": 3, "more_regions": region_entry(BAT, MIB, 0)}, ImageCorruptError, "FileOffset"),
    ("vhdx", {"table": MIB + 512}, ImageCorruptError, "FileOffset"),
    ("vhdx", {"table": 0}, ImageCorruptError, "FileOffset"),
    ("vhdx", {"table": MIB}, ImageCorruptError, "the regions overlap"),
    ("vhdx", {"table": 1 << 50}, ImageTruncatedError, "its table of blocks should lie"),
    ("vhdx", {"metadata": 1 << 50, "table": MIB}, ImageTruncatedError, "its metadata should lie"),
    ("vhdx", {"length": 16}, ImageCorruptError, "too short for 5 blocks"),
    ("vhdx", {"signature": b"metadatb"}, ImageCorruptError, "no metadata table"),
    ("vhdx", {"items": 2048}, ImageCorruptError, "no metadata table"),
    ("vhdx", {"items": 2}, ImageCorruptError, "an item is missing"),
    ("vhdx", {"items": 6, "more_items": item(UNKNOWN, 0, 0)}, ImageUnsupportedError, "the metadata item"),
    ("vhdx", {"parameters_at": 32}, ImageCorruptError, "metadata table field Offset"),
    ("vhdx", {"parameters_at": MIB - 4}, ImageCorruptError, "metadata table field Offset"),
    ("vhdx", {"flags": 2}, ImageUnsupportedError, "a differencing disk"),
    ("vhdx", {"sector": 4096}, ImageUnsupportedError, "sectors of 4096 bytes"),
    ("vhdx", {"block": 3 * MIB}, ImageCorruptError, "BlockSize"),
    ("vhdx", {"block": 512 * MIB}, ImageCorruptError, "BlockSize"),
    ("vhdx", {"size": 100}, ImageCorruptError, "VirtualDiskSize"),
    ("vhdx", {"size": 1 << 63}, ImageCorruptError, "VirtualDiskSize"),
    ("vhdx", {"size": 64 << 40}, ImageCorruptError, "too short for"),
    ("vhdx", {"fourth": 7}, ImageCorruptError, "table of blocks at byte 0x200018: .* guest offset 0x300000"),
    ("vhdx", {"fourth": 5 << 20 | 6}, ImageTruncatedError, "the data of guest offset 0x300000"),
    ("vhdx", {"fourth": (1 << 64) - (1 << 20) | 6}, ImageTruncatedError, "the data of guest offset 0x300000"),
]


@pytest.mark.usefixtures("no_file_stays_open", "memory_budget")
@pytest.mark.parametrize(("kind", "fields", "error", "words"), WRONG)
def test_what_cannot_be(kind: str, fields: dict[str, Any], error: type[ImageError], words: str, here: Path) -> None:
    Path("a").write_bytes(MAKERS[kind](**fields))
    with pytest.raises(error, match=words), open_chain("a", format=kind) as chain:
        chain.allocation_depth()


@pytest.mark.real
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        *[("vdi", {name: value}) for name, value in (("version", 3), ("link", 1), ("block", 4 * MIB), ("table", 513))],
        *[("vpc", {name: value}) for name, value in (("true_sum", False), ("entries", 4), ("block", 3 * MIB))],
        *[("parallels", {name: value}) for name, value in (("version", 3), ("tracks", 0), ("entries", 0xFFFFFFFF))],
        *[
            ("vhdx", {name: value})
            for name, value in (("true_sum", False), ("flags", 2), ("table", 0), ("sector", 100))
        ],
        ("vhdx", {"length": 16}),
        ("vhdx", {"log_at": 1 << 19}),
        ("vpc", {"fourth": 1 << 20}),
    ],
)
def test_what_qemu_refuses_too(kind: str, fields: dict[str, Any], here: Path) -> None:
    Path("a").write_bytes(MAKERS[kind](**fields))
    with pytest.raises(RuntimeError, match="Could not open"):
        run("qemu-img", "map", "-f", kind, "a")


@pytest.mark.parametrize("kind", MAKERS)
def test_cut_anywhere(kind: str, here: Path) -> None:
    whole = MAKERS[kind]()
    lengths = {*range(0, 2200, 37), *range(0, len(whole), 120_001), len(whole) - 513}
    for length in sorted(lengths):
        Path("a").write_bytes(whole[:length])
        with pytest.raises(ImageError), open_chain("a", format=kind) as chain:
            chain.allocation_depth()


def test_a_bitmap_slot_after_every_chunk_of_a_vhdx_table(here: Path) -> None:
    """Blocks of 256 MiB: every 16 of them a slot that describes none."""
    image = bytearray(vhdx(block=256 * MIB, size=18 * 256 * MIB))
    put(image, 2 * MIB, struct.pack("<19Q", *([0] * 16), 0xBAD << 20 | 7, 3 << 20 | 6, 0))
    image.extend(bytes(256 * MIB))
    with Path("a").open("wb") as file:
        file.write(image[: 5 * MIB])
        file.truncate(300 * MIB)
    with open_chain("a") as chain:
        assert chain.locate(16 * 256 * MIB) == (0, "a", 3 * MIB)
        assert chain.statuses(0).statuses == ExtentMap.of_extents([(16 * 256 * MIB, 2), (256 * MIB, 1), (256 * MIB, 2)])
