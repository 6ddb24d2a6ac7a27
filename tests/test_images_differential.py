"""Hundreds of chains of every kind: whatever we say of them, QEMU says too.

A storage daemon serves depth, block status and bitmaps over NBD, ``qemu-img map`` speaks for itself.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from qmpnbd.errors import ImageUnsupportedError, UsageError
from qmpnbd.extents import ExtentMap
from qmpnbd.images import mapentries
from qmpnbd.images.check_file import check_image
from qmpnbd.images.files import Chain, open_chain
from qmpnbd.images.status import Status
from tests.chains import BITMAP, SECRET, SEED, build, converted, encrypted_options, make_encrypted, recipes, run
from tests.judge import BASE, DEPTH, Judge, judge, qemu_map
from tests.test_images_check import ours, theirs

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]

COUNT = 500
CHUNK = 50
MEMORY = Path("/dev/shm")  # building chains is all about small writes; a file system in memory halves the time


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="chain-", dir=MEMORY if MEMORY.is_dir() else None))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def keyed(qemu: Judge) -> Judge:
    """A judge that has the key."""
    qemu.command("object-add", qom_type="secret", id="s", data="123456")
    return qemu


def entries(chain: Chain) -> list[dict[str, Any]]:
    """Our map as `qemu-img map --output=json` of QEMU 7.2 prints it."""
    found = []
    for batch in chain.map_entries("7.2"):
        columns = zip(batch.starts, batch.lengths, batch.depths, batch.flags, batch.offsets, strict=True)
        for start, length, depth, flags, offset in columns:
            entry: dict[str, Any] = {"start": int(start), "length": int(length), "depth": int(depth)}
            entry["present"] = bool(flags & mapentries.PRESENT)
            entry["zero"] = bool(flags & mapentries.ZERO)
            entry["data"] = bool(flags & mapentries.DATA)
            if flags & mapentries.OFFSET:
                entry["offset"] = int(offset)
            found.append(entry)
    return found


def agree(
    chain: Chain, served: Mapping[str, ExtentMap], mapped: list[dict[str, Any]], *, is_encrypted: bool = False
) -> None:
    """Everything but the content says what QEMU says."""
    depth, own = chain.allocation_depth(), entries(chain)
    assert depth == served[DEPTH]
    assert chain.base_allocation("7.2") == served[BASE]
    assert own == mapped
    assert chain.depth_with_errors() == (depth, [])
    for layer in chain.layers:
        whole = chain.statuses(layer.index)
        assert whole.statuses.mapped(lambda values: values != Status.UNALLOCATED) == chain.allocated(layer.index)
        middle, end = layer.size // 3 + 100, layer.size // 2 + 1000
        if middle < end <= layer.size:
            part = chain.statuses(layer.index, middle, end - middle)
            assert part.statuses == whole.statuses.clip(middle, end)
            assert part.shifts == whole.shifts.clip(middle, end)
    for entry in own[:30]:
        place = chain.locate(entry["start"] + entry["length"] - 1)
        if entry["present"]:
            assert place is not None
            assert place[0] == entry["depth"]
            offset = entry.get("offset")
            if not is_encrypted:  # QEMU hides where encrypted data lies
                assert place[2] == (None if offset is None else offset + entry["length"] - 1)


@pytest.mark.parametrize("first", range(0, COUNT, CHUNK))
def test_chains(first: int, folder: Path, qemu: Judge) -> None:
    for recipe in recipes(CHUNK, SEED + 1_000_000 + first, data_files=True):
        home = folder / recipe.id
        home.mkdir()
        top, bitmaps = build(recipe, home), [BITMAP] if recipe.layers[-1].bitmap else []
        served = qemu.maps(top, bitmaps=bitmaps)
        with open_chain(str(top), format="qcow2") as chain:
            try:
                agree(chain, served, qemu_map(top))
                assert chain.read(0, chain.size) == converted(top, home)
                for name in bitmaps:
                    assert chain.bitmap(0, name) == served[f"qemu:dirty-bitmap:{name}"]
                checks_agree(home, random.Random(recipe.id))
            except AssertionError as error:
                raise AssertionError(f"{SEED + 1_000_000 + first} {recipe}") from error
        shutil.rmtree(home)


def checks_agree(home: Path, dice: random.Random) -> None:
    """One of a chain's files is checked; over all chains that is every kind of file."""
    path = dice.choice(sorted(home.glob("*.qcow2")))
    found = check_image(str(path), image_format="qcow2")
    assert found.findings.counts == {}
    assert ours(found) == theirs(path)


def test_the_matrix_is_covered() -> None:
    layers = [
        layer
        for first in range(0, COUNT, CHUNK)
        for chain in recipes(CHUNK, SEED + 1_000_000 + first, data_files=True)
        for layer in chain.layers
    ]
    assert sum(layer.extended_l2 for layer in layers) > 50
    assert {(layer.extended_l2, layer.data_file) for layer in layers} == {
        (extended, data) for extended in (False, True) for data in ("", "plain", "raw")
    }
    assert {layer.compression for layer in layers} == {"zlib", "zstd"}
    assert sum(layer.committed for layer in layers) > 10
    assert sum(layer.snapshot_after is not None for layer in layers) > 50
    qcow2 = [layer for layer in layers if layer.format == "qcow2"]
    assert {layer.cluster_bits for layer in qcow2} == set(range(9, 22))
    assert {layer.version for layer in qcow2} == {2, 3}
    assert {layer.preallocation for layer in qcow2} == {"off", "metadata", "falloc", "full"}
    assert sum(layer.lazy_refcounts for layer in qcow2) > 50
    assert sum(layer.odd > 0 for layer in qcow2) > 50
    assert sum(layer.bitmap > 0 for layer in qcow2) > 50


ENCRYPTED = [
    ("luks", "cluster_size=512", False),
    ("aes", "cluster_size=2M", True),
    ("luks", "cluster_size=64k,extended_l2=on", True),
    ("aes", "cluster_size=4k,lazy_refcounts=on", False),
]


@pytest.mark.parametrize(("kind", "options", "backed"), ENCRYPTED)
def test_encrypted_images(kind: str, options: str, backed: bool, folder: Path, keyed: Judge) -> None:
    """The tables are in the clear: QEMU needs the key to say what we say without."""
    base, top = folder / "base.raw", folder / "top.qcow2"
    base.write_bytes(b"b" * (3 << 20))
    make_encrypted(top, kind, options, *(["-b", base, "-F", "raw"] if backed else []), "8M")
    opened = encrypted_options(top, kind)
    commands = ("write -q 0 50k", "write -q 3M 9k", "write -q -z 1M 64k", "write -q 5M 2M", "discard -q 5M 64k")
    run("qemu-io", *SECRET, *(part for command in commands for part in ("-c", command)), "--image-opts", opened)
    mapped = json.loads(run("qemu-img", "map", "--output=json", *SECRET, "--image-opts", opened))
    with open_chain(str(top)) as chain:
        agree(chain, keyed.maps(top, encrypt={"format": kind, "key-secret": "s"}), mapped, is_encrypted=True)
        with pytest.raises(ImageUnsupportedError, match="the data is encrypted"):
            chain.read(0, 1)


@pytest.mark.parametrize("options", ["", ",extended_l2=on", ",cluster_size=512", ",cluster_size=2M", ",compat=0.10"])
def test_internal_snapshots(options: str, folder: Path, qemu: Judge) -> None:
    """Each snapshot's table leads to what the disk was then; a clone of the disk of that moment is the truth."""
    base, top = folder / "base.qcow2", folder / "top.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", base, "8M")
    run("qemu-io", "-f", "qcow2", "-c", "write -q 0 3M", base)
    options = f"lazy_refcounts=off{options}" if "compat" not in options else options[1:]
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, "-b", base, "-F", "qcow2", top, "8M")
    truth = {}
    for number, name in enumerate(["first", "2", "third"]):
        run("qemu-io", "-f", "qcow2", "-c", f"write -q {number}M 70k", "-c", f"discard -q {number + 3}M 1M", top)
        run("qemu-img", "snapshot", "-q", "-c", name, top)
        truth[name] = qemu.maps(top)[DEPTH]
    run("qemu-io", "-f", "qcow2", "-c", "write -q -z 0 8M", top)
    for name, wanted in truth.items():
        with open_chain(str(top), snapshot={"2": "2", "first": "1"}.get(name, name)) as chain:
            assert chain.allocation_depth() == wanted
            assert chain.facts(0) is not None
            assert len(chain.layers) == 2
    with open_chain(str(top)) as chain:
        facts = chain.facts(0)
        assert facts is not None
        assert [(each.id, each.name) for each in facts.snapshots] == [("1", "first"), ("2", "2"), ("3", "third")]
        assert {each.disk_size for each in facts.snapshots} == {8 << 20}
    with pytest.raises(UsageError, match=r"no internal snapshot fourth; there are: 1 \(first\), 2 \(2\), 3 \(third\)"):
        open_chain(str(top), snapshot="fourth")
    with pytest.raises(UsageError, match="it is raw"):
        open_chain(str(top), format="raw", snapshot="first")


@pytest.mark.parametrize(("cluster", "granularity"), [("512", 512), ("64k", 65536), ("64k", 512), ("2M", 1 << 20)])
def test_persistent_bitmaps(cluster: str, granularity: int, folder: Path, qemu: Judge) -> None:
    top = folder / "top.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}", top, 20 << 20)
    for name in ("one", "two", "off"):
        run("qemu-img", "bitmap", "--add", "-g", granularity, top, name)
        if name != "off":
            run("qemu-io", "-f", "qcow2", "-c", f"write -q {len(name)}M 1100k", "-c", "write -q 9000k 512", top)
    run("qemu-img", "bitmap", "--disable", top, "off")
    run("qemu-io", "-f", "qcow2", "-c", "write -q 15M 1M", "-c", "write -q -z 0 512", top)
    names = ("one", "two", "off")
    served = qemu.maps(top, bitmaps=names)
    with open_chain(str(top)) as chain:
        infos = {info.name: info for info in chain.bitmaps(0)}
        assert {name: infos[name].auto for name in names} == {"one": True, "two": True, "off": False}
        assert not any(info.inconsistent for info in infos.values())
        assert {info.granularity for info in infos.values()} == {granularity}
        for name in names:
            assert chain.bitmap(0, name) == served[f"qemu:dirty-bitmap:{name}"]
        assert chain.bitmap(0, "one").totals()[1] > 0
        with pytest.raises(UsageError, match="no bitmap 'three'; there are: 'one', 'two', 'off'"):
            chain.bitmap(0, "three")


def test_a_bitmap_in_use_is_named_inconsistent(folder: Path) -> None:
    """While QEMU has the image open for writing, and for ever if it is killed."""
    top = folder / "top.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", top, "1M")
    run("qemu-img", "bitmap", "--add", top, "b")
    with judge() as qemu:
        file = {"driver": "file", "filename": str(top)}
        qemu.command("blockdev-add", node_name="n", driver="qcow2", file=file)
        with open_chain(str(top)) as chain:
            (info,) = chain.bitmaps(0)
            assert info.inconsistent
            with pytest.raises(ImageUnsupportedError, match="the bitmap 'b' is inconsistent"):
                chain.bitmap(0, "b")
            assert chain.bitmap(0, "b", inconsistent=True) == ExtentMap.uniform(1 << 20, 0)
    with open_chain(str(top)) as chain:
        assert not chain.bitmaps(0)[0].inconsistent
