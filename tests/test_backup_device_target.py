"""A block device as a target; on a loop device, which only root can make."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmpnbd.backup.content import DATA, PIECE, ZERO
from qmpnbd.backup.copy import CopyOptions, copy
from qmpnbd.backup.device_target import BlockDeviceTarget
from qmpnbd.backup.raw_target import RawTarget
from qmpnbd.deadline import Deadline
from qmpnbd.errors import TargetError, TargetInUseError
from qmpnbd.extents import ExtentMap
from tests.drawn_disks import MemorySource

SIZE = 4 * PIECE

pytestmark = pytest.mark.real


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """A loop device over a file full of something."""
    file = tmp_path / "medium"
    file.write_bytes(b"\xaa" * SIZE)
    made = subprocess.run(["losetup", "-f", "--show", file], check=False, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no loop device can be made here: {made.stderr.strip()}")
    yield Path(made.stdout.strip())
    subprocess.run(["losetup", "-d", made.stdout.strip()], check=True)


def test_data_and_zeroes_overwrite_what_was_there_and_the_rest_stays(device: Path) -> None:
    disk = random.Random(4).randbytes(PIECE + 512) + bytes(PIECE + 100)
    content = ExtentMap.of_extents([(PIECE + 512, DATA), (PIECE + 100, ZERO)])
    target = RawTarget.create(device, len(disk), force=True)
    assert isinstance(target, BlockDeviceTarget)
    copy(MemorySource(disk, content), target, content, CopyOptions(), Deadline(60))
    target.finish()
    assert device.read_bytes() == disk.ljust(SIZE, b"\xaa")


def test_it_is_not_overwritten_unless_that_was_asked_for(device: Path) -> None:
    with pytest.raises(TargetInUseError, match="all that is on it would be lost"):
        RawTarget.create(device, SIZE)
    assert device.read_bytes() == b"\xaa" * SIZE


def test_one_that_is_in_use_is_refused_even_with_force(device: Path) -> None:
    first = RawTarget.create(device, SIZE, force=True)  # which claims it, as a mount does
    with pytest.raises(TargetInUseError, match="it is mounted or in use"):
        RawTarget.create(device, SIZE, force=True)
    first.discard()
    RawTarget.create(device, SIZE, force=True).discard()


def test_one_that_is_too_small_is_refused(device: Path) -> None:
    with pytest.raises(TargetError, match=f"it has {SIZE} bytes, and the disk {SIZE + 512}"):
        RawTarget.create(device, SIZE + 512, force=True)
