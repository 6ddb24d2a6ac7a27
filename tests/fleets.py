"""Validating still disks in tests: one target, and what spoils an image behind a server's back."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from qmpnbd.report.model import DiskReport, ValidationReport
from qmpnbd.validate.choice import Choice
from qmpnbd.validate.fleet import Fleet, FleetOptions
from qmpnbd.validate.target import Target
from tests.damage import HOST_MASK

WHOLE = Choice(content="whole")
CLUSTER = 65536
_L2_REACH = CLUSTER * CLUSTER // 8


def validated(targets: Sequence[Target], options: FleetOptions | None = None) -> ValidationReport:
    """Validates targets."""
    return asyncio.run(Fleet(targets, options or FleetOptions()).run())


def judged(target: Target, choice: Choice = WHOLE, storage_daemon: str = "qemu-storage-daemon") -> DiskReport:
    """Validates one target."""
    (disk,) = validated([target], FleetOptions(choice=choice, storage_daemon=storage_daemon)).disks
    return disk


def wrong(disk: DiskReport) -> dict[str, int]:
    """What differs, and in how many bytes."""
    return {entry.what: entry.discrepancy_bytes for entry in disk.compared if entry.discrepancy_count}


def overwritten(path: Path, offset: int, data: bytes) -> None:
    """Writes to a file, whoever has it open."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def l2_place(path: Path, guest_offset: int) -> int:
    """Returns where the L2 entry of a guest cluster is, in a qcow2 image of clusters of 64 KiB."""
    with path.open("rb") as file:

        def number(offset: int) -> int:
            file.seek(offset)
            return int.from_bytes(file.read(8), "big")

        l1_entry = number(number(40) + guest_offset // _L2_REACH * 8)
    return (l1_entry & HOST_MASK) + guest_offset % _L2_REACH // CLUSTER * 8


def spoilt(path: Path, guest_offset: int, kind: str = "cleared") -> bytes:
    """Spoils the L2 entry of a guest cluster: it is ``cleared``, or gets the ``zero flag``; returns what it was."""
    place = l2_place(path, guest_offset)
    with path.open("rb") as file:
        file.seek(place)
        before = file.read(8)
    overwritten(path, place, bytes(8) if kind == "cleared" else bytes([*before[:7], before[7] | 1]))
    return before
