"""Real images with bytes changed: a documented error or a map of the right size, soon and in bounded memory.

Everything happens in memory; no system call a mutation, so that tens of thousands fit into half a minute.
"""

from __future__ import annotations

import random
import resource
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from qmpnbd.errors import ImageError, UsageError
from qmpnbd.extents import ExtentMap
from qmpnbd.images.chain import Format, Layer, LayerSpec
from qmpnbd.images.files import _Opening
from qmpnbd.images.hostfile import HostFile
from qmpnbd.images.layers import Chain
from qmpnbd.images.members import Member
from qmpnbd.images.qcow2_file import Qcow2File
from qmpnbd.images.qcow2_metadata import select_snapshot
from qmpnbd.images.qcow2_source import Qcow2Source
from qmpnbd.images.vmdk_flat import flat_extents
from tests.chains import run
from tests.test_images_blocks import DESCRIPTOR, MAKERS, summed
from tests.test_images_otherformats import qed

COUNT = 20_000
CHUNKS = 8
SECONDS_EACH = 2.0  # of one image, on a loaded machine
MEMORY = 512 << 20
INTERESTING = [0, 1, 2, 0x3F, 0x40, 0x7F, 0x80, 0xC0, 0xFF]


class MemoryFile(HostFile):
    """A file that lies in memory."""

    def __init__(self, data: bytes, where: str) -> None:
        self.path = self.where = where
        self.data = data
        self.identity = ("memory", 0, 0)
        self._fd = -1

    def size(self) -> int:
        return len(self.data)

    def allocated_bytes(self) -> int:
        return len(self.data) // 3

    def holes(self) -> ExtentMap:
        return ExtentMap.of_extents([(len(self.data) // 2, 1), (len(self.data) - len(self.data) // 2, 0)])

    def read_into(self, buffer: memoryview, offset: int) -> int:
        piece = self.data[offset : offset + len(buffer)]
        buffer[: len(piece)] = piece
        return len(piece)


def layer_of(data: bytes, kind: Format) -> Chain:
    """Opens an image that is not qcow2 as the last layer of a chain."""
    opening = _Opening(None, "")
    with opening.files:
        opening.add(MemoryFile(data, f"a.{kind}"), LayerSpec(f"a.{kind}", kind, 1), is_last=True)
        return opening.chain()


def chain_of(data: bytes, snapshot: str | None) -> Chain:
    """Opens an image as the only layer of a chain."""
    file = MemoryFile(data, "a.qcow2")
    qcow2 = Qcow2File(file)
    if snapshot is not None:
        select_snapshot(qcow2, snapshot)
    size = qcow2.header.disk_size
    layer = Layer(0, "a.qcow2", "qcow2", False, size, "", 1, qcow2.header.cluster_size, False)
    return Chain([Member(layer, file, Qcow2Source(qcow2), qcow2)], ExitStack(), None)


@pytest.fixture(scope="module")
def images() -> list[bytes]:
    """Small images with everything in them."""
    found = []
    for number, options in enumerate(
        [
            "cluster_size=512",
            "cluster_size=4k,compat=0.10",
            "cluster_size=16k,extended_l2=on",
            "cluster_size=4k,compression_type=zstd",
            "cluster_size=4k,data_file={}.data,data_file_raw=on",
            "cluster_size=4k,refcount_bits=1",
        ]
    ):
        with tempfile.TemporaryDirectory() as home:
            path = Path(home) / f"{number}.qcow2"
            run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options.format(path), path, "300k")
            compressed = [] if "data_file" in options else ["-c", "write -q -c 128k 16k"]
            run("qemu-io", "-f", "qcow2", *compressed, "-c", "write -q 16k 20k", "-c", "write -q -z 64k 16k", path)
            if "data_file" not in options and "refcount_bits" not in options:
                run("qemu-img", "snapshot", "-q", "-c", "s", path)
            if "0.10" not in options:
                run("qemu-img", "bitmap", "--add", "-g", "512", path, "b")
                run("qemu-io", "-f", "qcow2", "-c", "write -q 100k 3k", path)
            found.append(path.read_bytes())
    return found


def mutated(image: bytes, dice: random.Random) -> bytes:
    """Changes, mostly where the image is not empty, and sometimes cuts it."""
    data = bytearray(image)
    for _ in range(dice.choice([1, 1, 1, 2, 4])):
        kind = dice.random()
        at = dice.randrange(min(len(data), 152)) if kind < 0.4 else dice.choice(range(len(data)))
        if kind > 0.6:  # near something
            for _ in range(200):
                at = dice.randrange(len(data) - 8)
                if any(data[at : at + 8]):
                    break
        if dice.random() < 0.3:
            at = min(at // 8 * 8, len(data) - 8)
            words = [b"\xff" * 8, bytes(8), dice.randbytes(8), bytes(data[:8]), bytes(data[at - 8 : at])]
            data[at : at + 8] = dice.choice(words).ljust(8)[:8]
        else:
            data[at] = dice.choice([*INTERESTING, dice.randrange(256), data[at] ^ 1 << dice.randrange(8)])
    if dice.random() < 0.05:
        del data[dice.randrange(len(data)) :]
    return bytes(data)


def look_at_everything(data: bytes, dice: random.Random) -> None:
    try:
        with chain_of(data, dice.choice([None, None, "s"])) as chain:
            if chain.size > 1 << 40:
                return  # tables that all share one place take minutes to read, for QEMU too: see Deadline
            depth, unreadable = chain.depth_with_errors()
            assert depth.size == chain.size
            assert all(0 <= bad.offset < bad.end <= chain.size for bad in unreadable)
            if not unreadable:
                assert chain.allocation_depth() == depth
                assert sum(int(batch.lengths.sum()) for batch in chain.map_entries()) == chain.size
            if chain.size:
                chain.explain(dice.randrange(chain.size))
            for info in chain.bitmaps(0):
                assert chain.bitmap(0, info.name, inconsistent=True).size == chain.size
            chain.facts(0)
    except (ImageError, UsageError):
        return


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_mutated_images(chunk: int, images: list[bytes]) -> None:
    dice = random.Random(1000 + chunk)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    for number in range(COUNT // CHUNKS):
        data = mutated(dice.choice(images), dice)
        started = time.monotonic()
        try:
            look_at_everything(data, dice)
        except Exception as error:
            raise AssertionError(f"chunk {chunk}, image {number}") from error
        assert time.monotonic() - started < SECONDS_EACH, f"chunk {chunk}, image {number}"
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before < MEMORY


OTHERS = 6_000
SPOTS = {
    "vdi": [(64, 80), (340, 456), (512, 532)],
    "vpc": [(0, 84), (512, 560), (1536, 1556)],
    "parallels": [(0, 84)],
    "vhdx": [(64 << 10, (64 << 10) + 80), (128 << 10, (128 << 10) + 80), (192 << 10, (192 << 10) + 80),
             (1 << 20, (1 << 20) + 192), ((1 << 20) + 65536, (1 << 20) + 65576), (2 << 20, (2 << 20) + 40)],
    "qed": [(0, 72), (4096, 4104), (8192, 8256)],
    "vmdk": [(0, 80), (512, 700), (0x2A00, 0x2A10), (0x2C00, 0x2C20), (0x5400, 0x5440)],
    "luks": [(0, 112)],
}  # fmt: skip
"""Where the structures of our small images lie."""


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[Format, bytes]:
    """An image of every format that is not qcow2 and has a header of its own."""
    path = tmp_path_factory.mktemp("others") / "a.vmdk"
    run("qemu-img", "create", "-q", "-f", "vmdk", path, "8M")
    run("qemu-io", "-f", "vmdk", "-c", "write -q 1M 100k", path)
    head = b"LUKS\xba\xbe\0\1".ljust(104, b"\0") + (8).to_bytes(4, "big")
    made: dict[Format, bytes] = {
        "qed": qed({1: 1, 3: 12288}),
        "vmdk": path.read_bytes(),
        "luks": head.ljust(9000, b"x"),
    }
    made.update({"vdi": MAKERS["vdi"](), "vpc": MAKERS["vpc"]()})
    made.update({"parallels": MAKERS["parallels"](), "vhdx": MAKERS["vhdx"]()})
    return made


def damaged(image: bytes, kind: Format, dice: random.Random) -> bytes:
    """Changes something in the structures; most checksums are made good again, or nothing behind them is ever read."""
    data = bytearray(image)
    for _ in range(dice.choice([1, 1, 2, 3])):
        at = dice.randrange(*dice.choice(SPOTS[kind]))
        words = [
            b"\xff" * 8,
            bytes(8),
            dice.randbytes(8),
            dice.randbytes(2),
            b"\xff",
            b"\x80",
            b"\x01",
            dice.randbytes(1),
        ]
        word = dice.choice(words)
        data[at : at + len(word)] = word
    if kind == "vpc" and dice.random() < 0.9:
        data[64:68] = bytes(4)
        data[64:68] = (~sum(data[:512]) & 0xFFFFFFFF).to_bytes(4, "big")
    if kind == "vhdx":
        for start, length in ((64 << 10, 4096), (128 << 10, 4096), (192 << 10, 65536)):
            if data[start : start + length] != image[start : start + length] and dice.random() < 0.9:
                data[start : start + length] = summed(bytes(data[start : start + length]))
    if dice.random() < 0.1:
        del data[dice.randrange(len(data)) :]
    return bytes(data)


def look_at_layer(data: bytes, kind: Format, dice: random.Random) -> bool:
    """Whether all that can be asked of it was answered; what is wrong may only ever end in a documented error."""
    try:
        with layer_of(data, kind) as chain:
            if chain.size > 1 << 40:
                return False
            depth, unreadable = chain.depth_with_errors()
            assert depth.size == chain.size
            if chain.size:
                chain.explain(dice.randrange(chain.size))
                chain.locate(dice.randrange(chain.size))
            if not unreadable:
                assert sum(int(batch.lengths.sum()) for batch in chain.map_entries()) == chain.size
                assert chain.base_allocation().size == chain.size
            chain.read(0, min(chain.size, 1 << 20))
            return True
    except (ImageError, UsageError):
        return False


def test_mutated_images_of_other_formats(others: dict[Format, bytes]) -> None:
    dice = random.Random(5)
    answered: dict[Format, int] = dict.fromkeys(others, 0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    for kind, image in others.items():
        for number in range(OTHERS // (40 if kind == "vhdx" else 8)):  # its checksums take longer than all the rest
            started = time.monotonic()
            try:
                answered[kind] += look_at_layer(damaged(image, kind, dice), kind, dice)
            except Exception as error:
                raise AssertionError(f"{kind}, image {number}") from error
            assert time.monotonic() - started < SECONDS_EACH, f"{kind}, image {number}"
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before < MEMORY
    assert not answered.pop("luks"), "the data of luks is never read"
    assert all(answered.values()), answered


def test_mutated_vmdk_descriptors() -> None:
    dice = random.Random(6)
    for _ in range(3000):
        data = bytearray(DESCRIPTOR.encode())
        for _ in range(dice.randrange(1, 5)):
            at = dice.randrange(len(data))
            data[at : at + dice.randrange(3)] = dice.choice(
                [b"9", b" ", b"\n", b'"', b"\xff", b"\0", dice.randbytes(3), b"RW 9"]
            )
        try:
            assert all(extent.size > 0 <= extent.offset for extent in flat_extents(bytes(data), "a.vmdk"))
        except ImageError:
            continue
