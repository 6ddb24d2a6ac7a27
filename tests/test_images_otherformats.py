"""Layers that are not qcow2: as QEMU reads them, and what they may not be."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import pytest

from qmpnbd.errors import ImageCorruptError, ImageError, ImageTruncatedError, ImageUnsupportedError, UsageError
from qmpnbd.extents import Extent, ExtentMap
from qmpnbd.images.chain import LayerSpec
from qmpnbd.images.files import open_chain, open_layers
from qmpnbd.images.status import Status
from tests.chains import SECRET, create_with_key, run
from tests.judge import BASE, DEPTH, Judge, qemu_map
from tests.test_images_differential import entries

TABLED = [
    ("qed", "cluster_size=4k"),
    ("qed", "cluster_size=16k,table_size=2"),
    ("qed", "cluster_size=64k"),
    ("vmdk", "subformat=monolithicSparse"),
    ("vmdk", "subformat=monolithicSparse,zeroed_grain=on"),
    ("vmdk", "subformat=streamOptimized"),
]


@pytest.mark.real
@pytest.mark.parametrize(("kind", "options"), TABLED)
def test_layers_with_tables(kind: str, options: str, here: Path, qemu: Judge) -> None:
    base, mid, top = here / "base.img", here / f"mid.{kind}", here / "top.qcow2"
    below = "vmdk" if kind == "vmdk" else "raw"  # QEMU wants it so
    run("qemu-img", "create", "-q", "-f", below, base, "40M")
    behind = [] if "stream" in options else ["-b", base.name, "-F", below]
    run("qemu-img", "create", "-q", "-f", kind, "-o", options, *behind, mid, "40M")
    dice = random.Random(options)
    compressed, zeroes = "stream" in options, kind == "qed" or "zeroed" in options
    for _ in range(12):
        at = dice.randrange(38 << 20) // 65536 * 65536
        what = "write -q" + (" -c" if compressed else dice.choice(["", " -z" if zeroes else ""]))
        try:
            run("qemu-io", "-f", kind, "-c", f"{what} {at} 64k", mid)
        except RuntimeError:
            assert compressed, "only a grain that is in use already"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", mid.name, "-F", kind, top, "44M")
    run("qemu-io", "-f", "qcow2", "-c", "write -q 1M 9M", "-c", "write -q 40M 1M", top)
    for path, image_format in ((mid, kind), (top, "qcow2")):
        with open_chain(str(path), format=image_format) as chain:
            depth = chain.allocation_depth()
            assert depth == qemu.maps(path, image_format)[DEPTH]
            if not compressed:
                assert entries(chain) == qemu_map(path, image_format)
            for extent in list(depth)[:10]:
                assert chain.explain(extent.offset).allocation_depth == extent.value
    with open_chain(str(mid)) as chain:
        assert (chain.layers[0].format, chain.layers[0].format_probed) == (kind, True)
        assert set(chain.statuses(0).statuses.totals()) <= set(Status) - {Status.UNREADABLE}


@pytest.mark.real
def test_luks_is_data_everywhere(here: Path, qemu: Judge) -> None:
    """QEMU needs the key to open it, we do not; block status is nobody's secret."""
    base, top = "base.luks", "top.qcow2"
    create_with_key("-f", "luks", "-o", "key-secret=s,iter-time=10", base, "3000k")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", base, "-F", "luks", top, "4M")
    options = "driver=luks,key-secret=s,file.filename=base.luks"
    theirs = json.loads(run("qemu-img", "map", "--output=json", *SECRET, "--image-opts", options))
    qemu.command("object-add", qom_type="secret", id="s", data="123456")
    served = qemu.maps(here / base, "luks", key_secret="s")
    with open_chain(base) as chain:
        assert chain.layers[0].format == "luks"
        assert entries(chain) == theirs
        assert chain.base_allocation("7.2") == served[BASE]
        assert chain.allocation_depth() == served[DEPTH]
        assert chain.locate(0) == (0, base, None)
        with pytest.raises(ImageUnsupportedError, match="the data of the format luks is not read here"):
            chain.read(0, 1)
    with open_chain(top) as chain:
        assert chain.layers[1].size == 3000 << 10
        assert list(chain.allocation_depth()) == [Extent(0, 4 << 20, 2)]
        # Past the end of the luks layer nothing is encrypted.
        assert chain.read(3000 << 10, 100) == bytes(100)


@pytest.mark.real
@pytest.mark.parametrize("subformat", ["twoGbMaxExtentSparse", "monolithicSparse"])
def test_a_vmdk_of_several_sparse_files_is_refused(subformat: str, here: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "vmdk", "-o", f"subformat={subformat}", "a.vmdk", "1M")
    if subformat == "monolithicSparse":  # said to be in two parts, with one header
        image = Path("a.vmdk").read_bytes()
        Path("a.vmdk").write_bytes(image.replace(b"\nRW ", b'\nRW 1 SPARSE "x"\nRW ', 1))
    with pytest.raises(ImageUnsupportedError, match=r"'twoGbMaxExtentSparse'|several extents"):
        open_chain("a.vmdk")


def qed(entries_: dict[int, int], backing: bytes = b"", **fields: int) -> bytes:
    """A QED image of 16 clusters of 4 KiB: header, first table, second table, and two clusters of data."""
    values = {"cluster": 4096, "table": 1, "features": 1 if backing else 0, "top": 4096, "size": 16 * 4096, **fields}
    head = struct.pack("<4sIIIQQQQQII", b"QED\0", values["cluster"], values["table"], 1, values["features"], 0, 0,
                       values["top"], values["size"], 64 if backing else 0, len(backing))  # fmt: skip
    top = struct.pack("<Q", fields.get("second", 8192))
    second = b"".join(struct.pack("<Q", entries_.get(index, 0)) for index in range(512))
    return (head + backing).ljust(4096, b"\0") + top.ljust(4096, b"\0") + second + bytes(8192)


def test_qed_entries(here: Path) -> None:
    Path("a.qed").write_bytes(qed({1: 1, 3: 12288, 4: 16384, 6: 12289, 7: 1 << 40}))
    with open_chain("a.qed") as chain:
        statuses = chain.statuses(0)
        with pytest.raises(ImageCorruptError, match="guest offset 0x6000 lies at no place for a cluster"):
            chain.allocation_depth()
        assert len(chain.depth_with_errors()[1]) == 1
    pairs = [(1, 0), (1, 2), (1, 0), (2, 1), (1, 0), (2, 5), (8, 0)]
    assert statuses.statuses == ExtentMap.of_extents((count * 4096, value) for count, value in pairs)
    assert statuses.shifts.at(3 * 4096) == 0
    Path("b.raw").write_bytes(bytes(8192))
    Path("c.qed").write_bytes(qed({1: 1}, backing=b"b.raw", features=5))
    with open_chain("c.qed") as chain:
        assert chain.allocation_depth() == ExtentMap.of_extents([(4096, 2), (4096, 1), (14 * 4096, 2)])
        assert chain.layers[1].path == "b.raw"


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"cluster": 4095}, ImageCorruptError),
        ({"cluster": 1 << 27}, ImageCorruptError),
        ({"table": 3}, ImageCorruptError),
        ({"table": 32}, ImageCorruptError),
        ({"size": 100}, ImageCorruptError),
        ({"size": 1 << 62}, ImageCorruptError),
        ({"top": 0}, ImageCorruptError),
        ({"top": 4097}, ImageCorruptError),
        ({"features": 8}, ImageUnsupportedError),
        ({"top": 1 << 40}, ImageTruncatedError),
        ({"second": 1 << 40}, ImageTruncatedError),
    ],
)
def test_qed_headers_that_cannot_be(fields: dict[str, int], error: type[ImageError], here: Path) -> None:
    Path("a.qed").write_bytes(qed({1: 1}, b"", **fields))
    with pytest.raises(error), open_chain("a.qed") as chain:
        chain.allocation_depth()


def test_layers_given_by_somebody_who_errs(here: Path) -> None:
    with pytest.raises(UsageError, match="a vdi layer ends the chain"):
        open_layers([LayerSpec("a", "vdi", 1), LayerSpec("b", "raw", 2)])
