"""The qcow2 writer: what it writes is what QEMU reads, and what qemu-img check finds nothing wrong with."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qmpnbd.backup.content import ABSENT, DATA, PIECE, ZERO, aligned
from qmpnbd.backup.copy import CopyOptions, copy
from qmpnbd.backup.layer import Layer
from qmpnbd.backup.qcow2_layout import refcount_clusters
from qmpnbd.backup.qcow2_target import Backing, Qcow2Target
from qmpnbd.deadline import Deadline
from qmpnbd.errors import TargetError, TargetInUseError, UsageError
from qmpnbd.extents import ExtentMap
from tests.drawn_disks import DISKS, Drawn, MemorySource, drawn
from tests.qemu_versions import QemuBinaries, each_qemu
from tests.servers import tool

pytestmark = pytest.mark.real

CLUSTERS = st.sampled_from([512, 4096, 1 << 16, 1 << 20])
SLOW = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def has_zstd(binaries: QemuBinaries) -> bool:
    """Whether this build of QEMU can read zstd: those of some distributions cannot."""
    with tempfile.TemporaryDirectory() as folder:
        command = [binaries.img, "create", "-q", "-f", "qcow2", "-o", "compression_type=zstd", f"{folder}/x", "1M"]
        return subprocess.run(command, check=False, capture_output=True).returncode == 0


def write(
    path: Path,
    disk: Drawn,
    content: ExtentMap,
    cluster_size: int,
    *,
    backing: Backing | None = None,
    compression: Literal["", "zstd"] = "",
) -> None:
    target = Qcow2Target.create(
        path, content, backing=backing, cluster_size=cluster_size, compression=compression, force=True
    )
    copy(MemorySource(disk.disk, content, seed=1), target, content, CopyOptions(), Deadline(60))
    target.finish()


def require_same(binaries: QemuBinaries, image: Path, disk: Path) -> None:
    for command in (("check", image), ("compare", "-F", "raw", "-f", "qcow2", image, disk)):
        done = subprocess.run([binaries.img, *map(str, command)], check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@each_qemu
@given(disk=DISKS, cluster_size=CLUSTERS)
@SLOW
def test_over_a_base_qemu_reads_the_disk(
    binaries: QemuBinaries, tmp_path: Path, disk: Drawn, cluster_size: int
) -> None:
    (tmp_path / "base.raw").write_bytes(disk.base or bytes(512))
    (tmp_path / "disk.raw").write_bytes(disk.disk)
    content = aligned(disk.content, cluster_size)
    write(tmp_path / "top", disk, content, cluster_size, backing=Backing("base.raw", "raw", len(disk.base)))
    require_same(binaries, tmp_path / "top", tmp_path / "disk.raw")
    with Layer(tmp_path / "top", Deadline(60)) as layer:
        assert layer.content() == content


@each_qemu
@given(disk=DISKS, cluster_size=CLUSTERS)
@SLOW
def test_on_its_own_qemu_reads_the_disk(binaries: QemuBinaries, tmp_path: Path, disk: Drawn, cluster_size: int) -> None:
    alone = Drawn(disk.content, b"", drawn_alone(disk))
    (tmp_path / "disk.raw").write_bytes(alone.disk)
    write(tmp_path / "top", alone, disk.content, cluster_size)
    require_same(binaries, tmp_path / "top", tmp_path / "disk.raw")


def drawn_alone(disk: Drawn) -> bytes:
    """What the disk reads as if there were no base."""
    found = bytearray(disk.disk)
    for each in disk.content:
        if each.value == ABSENT:
            found[each.offset : each.end] = bytes(each.length)
    return bytes(found)


@each_qemu
@given(disk=DISKS, cluster_size=CLUSTERS, share=st.sampled_from([0, 1, 3]))
@SLOW
def test_compressed_over_a_base_qemu_reads_the_disk(
    binaries: QemuBinaries, tmp_path: Path, disk: Drawn, cluster_size: int, share: int
) -> None:
    if not has_zstd(binaries):
        pytest.skip(f"this QEMU {binaries.release} was built without zstd")
    mixed = compressible(disk, share)
    (tmp_path / "base.raw").write_bytes(disk.base or bytes(512))
    (tmp_path / "disk.raw").write_bytes(mixed.disk)
    content = aligned(disk.content, cluster_size)
    backing = Backing("base.raw", "raw", len(disk.base))
    write(tmp_path / "top", mixed, content, cluster_size, backing=backing, compression="zstd")
    require_same(binaries, tmp_path / "top", tmp_path / "disk.raw")
    with Layer(tmp_path / "top", Deadline(60)) as layer:
        assert layer.content() == content


def compressible(disk: Drawn, share: int) -> Drawn:
    """Makes of `share` + 1 parts of the data all but one easy to compress, in stretches of 8 KiB."""
    found = bytearray(disk.disk)
    for each in disk.content:
        if each.value == DATA:
            for start in range(each.offset, each.end, 8192 * (share + 1)):
                stop = min(start + 8192 * share, each.end)
                found[start:stop] = (start // 512).to_bytes(4, "big") * ((stop - start) // 4)
    return Drawn(disk.content, disk.base, bytes(found))


@each_qemu
@pytest.mark.parametrize("compression", ["", "zstd"])
def test_more_data_than_one_refcount_block_counts(
    binaries: QemuBinaries, tmp_path: Path, compression: Literal["", "zstd"]
) -> None:
    if compression and not has_zstd(binaries):
        pytest.skip(f"this QEMU {binaries.release} was built without zstd")
    # Long stretches that compress: some of their frames cross from one host cluster into the next.
    disk = compressible(drawn([(3 * PIECE, DATA), (512, ZERO), (PIECE + 512, DATA)], 0, 7), 63)
    (tmp_path / "disk.raw").write_bytes(disk.disk)
    write(tmp_path / "top", disk, disk.content, 512, compression=compression)
    require_same(binaries, tmp_path / "top", tmp_path / "disk.raw")


def test_a_disk_of_a_tebibyte_takes_what_its_data_takes(tmp_path: Path) -> None:
    content = ExtentMap.of_extents([(1 << 39, ZERO), (1 << 16, DATA), ((1 << 39) - (1 << 16), ABSENT)])
    target = Qcow2Target.create(tmp_path / "top", content)
    target.write(1 << 39, memoryview(b"\1" * (1 << 16)))
    target.finish()
    subprocess.run([tool("qemu-img"), "check", tmp_path / "top"], check=True, capture_output=True)
    assert (tmp_path / "top").stat().st_size < 1 << 20


def test_until_it_is_settled_it_is_no_image_and_until_it_is_finished_it_has_no_name(tmp_path: Path) -> None:
    content = ExtentMap.uniform(PIECE, DATA)
    target = Qcow2Target.create(tmp_path / "top", content)
    target.write(0, memoryview(bytes(PIECE)))
    assert Path(target.read_from).read_bytes()[:4] == bytes(4)
    target.settle()
    subprocess.run([tool("qemu-img"), "check", "-f", "qcow2", target.read_from], check=True, capture_output=True)
    assert not (tmp_path / "top").exists()
    target.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["top"]


def test_an_image_whose_data_did_not_all_come_is_refused(tmp_path: Path) -> None:
    target = Qcow2Target.create(tmp_path / "top", ExtentMap.uniform(2 * PIECE, DATA))
    target.write(0, memoryview(bytes(PIECE)))
    with pytest.raises(UsageError, match="1048576 bytes of data were written, and 2097152 announced"):
        target.finish()
    target.discard()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("compression", ["", "zstd"])
def test_data_where_there_is_to_be_none_is_refused(tmp_path: Path, compression: Literal["", "zstd"]) -> None:
    content = ExtentMap.of_extents([(PIECE, DATA), (PIECE, ZERO)])
    target = Qcow2Target.create(tmp_path / "top", content, compression=compression)
    with pytest.raises(UsageError, match="no data at 0x100000"):
        target.write(PIECE, memoryview(bytes(65536)))
    target.discard()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"cluster_size": 1000}, "clusters of 1000 bytes"),
        ({"cluster_size": 4 << 20}, "clusters of 4194304 bytes"),
        ({"cluster_size": 2 << 20, "compression": "zstd"}, "compressed clusters of 2097152 bytes"),
        ({"backing": Backing("x" * 1024, "raw", 512)}, "has 1024 bytes, with room for 1023"),
        ({"backing": Backing("x", "raw", 512)}, "not made of clusters"),
        ({"compression": "zstd"}, "not made of clusters"),
    ],
)
def test_what_does_not_fit_together_is_told_before_anything_is_made(
    tmp_path: Path, options: dict[str, object], why: str
) -> None:
    content = ExtentMap.of_extents([(512, DATA), (PIECE, ABSENT)])
    if "1024" in why or "cluster_size" in options:
        content = aligned(content, 2 << 20)
    with pytest.raises(UsageError, match=why):
        Qcow2Target.create(tmp_path / "top", content, **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_large_for_its_clusters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="too many for such clusters"):
        Qcow2Target.create(tmp_path / "top", ExtentMap.uniform(1 << 40, ZERO), cluster_size=512)


def test_what_exists_is_replaced_only_when_asked_and_only_at_the_end(tmp_path: Path) -> None:
    content, place = ExtentMap.uniform(PIECE, ZERO), tmp_path / "top"
    place.write_text("old")
    with pytest.raises(TargetInUseError, match="it exists"):
        Qcow2Target.create(place, content)
    target = Qcow2Target.create(place, content, force=True)
    assert place.read_text() == "old"
    target.finish()
    assert place.read_bytes()[:4] == b"QFI\xfb"


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"cannot be made: No such file.*Make the folder first"):
        Qcow2Target.create(tmp_path / "none" / "top", ExtentMap.uniform(PIECE, ZERO))


@given(st.integers(0, 5000), st.sampled_from([512, 4096]))
def test_refcounts_have_room_for_all_clusters_and_their_own(others: int, cluster_size: int) -> None:
    table, blocks = refcount_clusters(others, cluster_size)
    total = others + table + blocks
    assert blocks == -(-total // (cluster_size // 2))
    assert table == -(-blocks * 8 // cluster_size)
    assert np.uint64(total) >= others
