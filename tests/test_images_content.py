"""What a guest reads, against ``qemu-img convert``; and compressed clusters that are none."""

from __future__ import annotations

import importlib
import random
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qmpnbd.errors import ImageCorruptError, ImageUnsupportedError, UsageError
from qmpnbd.images import compressed
from qmpnbd.images.chain import LayerSpec
from qmpnbd.images.compressed import decompressor
from qmpnbd.images.files import open_chain, open_layers
from tests.chains import ChainRecipe, build, converted, recipes, run
from tests.handmade import COPIED, DATA, SIZE, put, qcow2_bytes, write

NOISE = random.Random(0).randbytes(512)
MODULES = ("compression.zstd", "backports.zstd", "zstandard")
HAVE = [name for name in MODULES if compressed._imported(name) is not None]


@pytest.mark.real
@pytest.mark.parametrize("recipe", recipes(13), ids=lambda recipe: recipe.id)
def test_chains_read_as_qemu_reads_them(recipe: ChainRecipe, tmp_path: Path) -> None:
    top, dice = build(recipe, tmp_path), random.Random(recipe.id)
    wanted = converted(top, tmp_path, recipe.layers[-1].format)
    with open_chain(str(top), format=recipe.layers[-1].format) as chain:
        assert chain.size == len(wanted)
        assert chain.read(0, chain.size) == wanted
        for _ in range(20):
            start = dice.randrange(chain.size)
            length = min(chain.size - start, dice.choice([1, 511, 4096, 70000, 1 << 20]))
            assert chain.read(start, length) == wanted[start : start + length]
            dirty = bytearray(b"\xff" * length)
            chain.read_into(start, dirty)
            assert dirty == wanted[start : start + length]
        size = dice.choice([4096, 70001, 1 << 20])
        assert b"".join(bytes(piece) for piece in chain.read_pieces(0, chain.size, size)) == wanted


FEATURES = {
    "subclusters": (
        "extended_l2=on,cluster_size=64k",
        ["write -q -P 1 3k 7k", "write -q -z 4k 2k", "write -q -c 1M 64k"],
    ),
    "data file": ("data_file=outside.raw,cluster_size=4k", ["write -q -P 1 3k 7k", "write -q -P 2 1M 64k"]),
    "zlib": ("cluster_size=64k", ["write -q -c -P 5 0 64k", "write -q -c -P 6 1M 128k"]),
}
if HAVE:
    FEATURES["zstd"] = ("cluster_size=64k,compression_type=zstd", ["write -q -c -P 5 0 64k", "write -q -c 1M 128k"])


@pytest.mark.real
@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature: str, here: Path) -> None:
    options, commands = FEATURES[feature]
    (here / "base.raw").write_bytes(random.Random(feature).randbytes(2 << 20))
    backing = () if feature == "data file" else ("-b", "base.raw", "-F", "raw")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *backing, "a.qcow2", "4M")
    for command in commands:
        run("qemu-io", "-f", "qcow2", "-c", command, "a.qcow2")
    with open_chain("a.qcow2") as chain:
        assert chain.read(0, chain.size) == converted(here / "a.qcow2", here)


@pytest.mark.real
@pytest.mark.parametrize("kind", ["zlib", *(["zstd"] if HAVE else [])])
def test_a_whole_compressed_image(kind: str, here: Path) -> None:
    """Clusters that hardly compress, some that do not at all, and their ends beside each other."""
    dice = random.Random(kind)
    words = b"".join(dice.randbytes(dice.randrange(1, 900)) + bytes(dice.randrange(3000)) for _ in range(800))
    Path("plain.raw").write_bytes(words + bytes(-len(words) % 65536))
    run("qemu-img", "convert", "-c", "-O", "qcow2", "-o", f"compression_type={kind}", "plain.raw", "a.qcow2")
    wanted = Path("plain.raw").read_bytes()
    with open_chain("a.qcow2") as chain:
        assert chain.read(0, chain.size) == wanted
        assert chain.read(65530, 12) == wanted[65530:65542]


def test_a_raw_layer_is_read_through_its_window(here: Path) -> None:
    write("base.raw", bytes(range(256)) * 5)
    with open_layers([LayerSpec("base.raw", "raw", 1, offset=512, size=512)]) as chain:
        assert chain.read(0, 512) == bytes(range(256)) * 2
    with open_chain("base.raw", format="raw") as chain:
        assert chain.read(1024, 512) == bytes(range(256)) + bytes(256)


def test_only_what_is_inside_the_disk_is_read(here: Path) -> None:
    with open_chain(write("a.qcow2", qcow2_bytes({}))) as chain:
        assert chain.read(SIZE, 0) == b""
        for offset, length in ((-1, 1), (0, -1), (SIZE, 1), (0, SIZE + 1)):
            with pytest.raises(UsageError, match="is not inside a disk"):
                chain.read(offset, length)


def test_encrypted_data_is_refused_and_the_rest_is_read(here: Path) -> None:
    with open_chain(write("a.qcow2", qcow2_bytes({1: COPIED | DATA}, crypt_method=2))) as chain:
        assert chain.read(0, 512) == bytes(512)
        with pytest.raises(ImageUnsupportedError, match="encrypted"):
            chain.read(512, 1)


def deflated(data: bytes, window: int = -12) -> bytes:
    packer = zlib.compressobj(wbits=window)
    return packer.compress(data) + packer.flush()


def entry(host: int, sectors: int) -> int:
    """A compressed entry of a cluster of 512 bytes."""
    return 1 << 62 | (sectors - 1) << 61 | host


@pytest.mark.parametrize(
    "stream",
    [b"\xff" * 600, deflated(bytes(511)), bytes(512)],
    ids=["garbage", "too short", "zeroes"],
)
def test_what_is_no_compressed_cluster(stream: bytes, here: Path) -> None:
    image = bytearray(qcow2_bytes({3: entry(DATA + 7, 2)}))
    put(image, DATA + 7, stream.ljust(600, b"\xff"))
    with open_chain(write("a.qcow2", bytes(image))) as chain:
        with pytest.raises(ImageCorruptError, match=r"compressed cluster at byte 0x10007: .* guest offset 0x600 "):
            chain.read(3 * 512 + 5, 1)
        assert chain.read(0, 1536) == bytes(1536)


@pytest.mark.real
@pytest.mark.parametrize("window", [-9, -12, -15])
def test_streams_that_refer_back_far(window: int, here: Path) -> None:
    """QEMU writes with a window of 4 KiB, others may not; over the whole cluster any is read."""
    cluster = NOISE + random.Random(1).randbytes(31000) + NOISE + bytes(65536 - 32024)
    header: dict[str, Any] = {"cluster_bits": 16, "refcount_table_offset": 0x30000, "refcount_table_clusters": 1}
    image = bytearray(qcow2_bytes({0: 1 << 62 | 127 << 54 | 0x40000}, size=65536, length=0x60000, **header))
    put(image, 0x40000, deflated(cluster, window))
    write("a.qcow2", bytes(image))
    with open_chain("a.qcow2") as chain:
        assert chain.read(0, 65536) == cluster == converted(here / "a.qcow2", here)


def test_a_compressed_cluster_far_beyond_the_end(here: Path) -> None:
    image = qcow2_bytes({0: entry((1 << 61) - 1, 1)})
    with open_chain(write("a.qcow2", image)) as chain, pytest.raises(ImageCorruptError, match="compressed cluster"):
        chain.read(0, 512)


def test_a_bomb_is_unpacked_to_one_cluster_only() -> None:
    bomb = deflated(bytes(1 << 28))
    cluster = decompressor(0, "a.qcow2")(bomb, 4096)
    assert cluster == bytes(4096)


@pytest.fixture(params=HAVE)
def only(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """One of the modules for zstd, the others hidden."""
    for name in MODULES:
        if name != request.param:
            monkeypatch.setitem(sys.modules, name, None)
    return importlib.import_module(request.param)


def test_zstd_with_each_module(only: Any) -> None:
    pack = only.compress
    unpack = decompressor(1, "a.qcow2")
    cluster = random.Random(1).randbytes(1000) * 4
    assert unpack(pack(cluster) + b"\x00\x55" * 100, 4000) == cluster
    for wrong in (
        pack(cluster[:-1]),
        pack(cluster + b"x"),
        pack(cluster)[:-9],
        b"",
        b"garbage" * 9,
        pack(bytes(1 << 26)),
    ):
        assert unpack(wrong, 4000) is None


def test_without_any_zstd(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    image = qcow2_bytes({0: entry(DATA, 1)}, incompatible=8, compression_type=1, header_length=112)
    with open_chain(write("a.qcow2", image)) as chain:
        with pytest.raises(ImageUnsupportedError, match=r"pip install 'qmpnbd\[zstd\]'"):
            chain.read(0, 512)
        assert chain.read(512, 512) == bytes(512)


@pytest.mark.parametrize("size", [512, 700, 5 * 512, SIZE])
def test_pieces(size: int, here: Path) -> None:
    """Zeroes after data, in a buffer that is used again; a compressed cluster across two pieces."""
    image = bytearray(qcow2_bytes({1: COPIED | DATA, 2: entry(DATA + 512, 1), 90: COPIED | DATA}))
    put(image, DATA, NOISE)
    put(image, DATA + 512, deflated(b"y" * 512))
    with open_chain(write("a.qcow2", bytes(image))) as chain:
        whole = chain.read(0, SIZE)
        assert whole[512:1536] == NOISE + b"y" * 512
        pieces = [bytes(piece) for piece in chain.read_pieces(100, SIZE - 300, size)]
        assert b"".join(pieces) == whole[100:-200]
        assert {len(piece) for piece in pieces[:-1]} <= {size}
        assert list(chain.read_pieces(7, 0)) == []
        with pytest.raises(UsageError, match="no pieces of 0 bytes"):
            chain.read_pieces(0, 1, 0)
        with pytest.raises(UsageError, match="is not inside a disk"):
            chain.read_pieces(1, SIZE)


@pytest.mark.real
def test_compressed_grains_of_a_vmdk(here: Path) -> None:
    """With a size that is no multiple of a grain; and with a stream that is broken, or a length that cannot be."""
    dice = random.Random(3)
    plain = b"".join(dice.randbytes(300) + bytes(dice.randrange(9000)) for _ in range(200))
    write("plain.raw", plain[: len(plain) // 512 * 512])
    stream = ("-O", "vmdk", "-o", "subformat=streamOptimized")
    run("qemu-img", "convert", "-f", "raw", *stream, "plain.raw", "a.vmdk")
    with open_chain("a.vmdk") as chain:
        assert chain.size % 65536
        assert chain.read(0, chain.size) == converted(here / "a.vmdk", here, "vmdk")
        assert chain.read(65000, 1000) == plain[65000:66000]
        _, _, host = chain.locate(70000) or (0, "", None)
        assert host is None, "compressed data has no host offset"
    whole = Path("a.vmdk").read_bytes()
    marker = whole.index((128).to_bytes(8, "little"), 65536)  # of the second grain: its first sector
    for at, bytes_ in ((marker + 8, b"\xff\xff\xff\x7f"), (marker + 30, b"\0" * 64)):
        image = bytearray(whole)
        put(image, at, bytes_)
        with open_chain(write("b.vmdk", bytes(image))) as chain:
            assert chain.read(0, 65536) == plain[:65536]
            with pytest.raises(ImageCorruptError, match=r"compressed grain at byte .* guest offset 0x10000"):
                chain.read(65536, 1)
