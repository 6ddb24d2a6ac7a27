"""Where a disk differs from its backup: judged byte by byte, without a QEMU."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from qmpnbd.backup.compare_base import differing
from qmpnbd.backup.content import ABSENT
from qmpnbd.backup.sources import ImageSource
from qmpnbd.deadline import Deadline
from qmpnbd.extents import ExtentMap
from qmpnbd.images.files import open_chain
from tests.servers import qemu_img, qemu_io

SIZE = 3 * (1 << 20) + 512
UNIT = 1 << 16
SOON = Deadline(None)  # pytest bounds each test


def commands(seed: int, count: int) -> list[str]:
    chance = random.Random(seed)
    found = []
    for _ in range(count):
        offset = chance.randrange(SIZE // 512) * 512
        length = min(chance.choice((512, 4096, 65536, 200704)), SIZE - offset)
        found.append(
            chance.choice((f"write -P {chance.randrange(1, 9)}", "write -z", "write -z -u")) + f" {offset} {length}"
        )
    return found


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("unit", [512, 4096, UNIT])
def test_a_layer_of_what_differs_makes_the_base_into_the_disk(tmp_path: Path, seed: int, unit: int) -> None:
    """And a unit that is equal is not in it, unless it reads as zeroes where the base has data."""
    for name, kinds in (("base", 0), ("disk", 1)):
        qemu_img("create", "-q", "-f", "qcow2", tmp_path / name, str(SIZE))
        qemu_io(tmp_path / name, *commands(seed, 12), *commands(seed + 100, 3 * kinds))
    with (
        open_chain(str(tmp_path / "base"), format="qcow2") as base,
        ImageSource.open(str(tmp_path / "disk"), format="qcow2", deadline=SOON) as source,
    ):
        content = source.content(SOON)
        layer = differing(source, content, base, unit, SOON)
        old = bytes(base.read(0, SIZE))
    with open_chain(str(tmp_path / "disk"), format="qcow2") as disk:
        new = bytes(disk.read(0, SIZE))
    found = bytearray(old)
    for extent in layer:
        if extent.value != ABSENT:
            found[extent.offset : extent.end] = new[extent.offset : extent.end]
    assert bytes(found) == new
    for start in range(0, SIZE, unit):
        part = slice(start, min(start + unit, SIZE))
        if old[part] == new[part] and any(new[part]):
            assert layer.clip(part.start, part.stop) == ExtentMap.uniform(part.stop - part.start, ABSENT), start
