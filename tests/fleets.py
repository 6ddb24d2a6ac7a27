"""Validating still disks in tests: one target, and a tool that spoils an image behind a server's back."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from qmpnbd.report.model import DiskReport, ValidationReport
from qmpnbd.validate.choice import Choice
from qmpnbd.validate.fleet import Fleet, FleetOptions
from qmpnbd.validate.target import Target

WHOLE = Choice(content="whole")


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
