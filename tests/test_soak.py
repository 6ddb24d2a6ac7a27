"""The soak itself: what it injects is found, and it fails where a validation finds nothing, or too much."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from qmpnbd.report.model import DiscrepancyEntry, DiskReport, ValidationReport
from qmpnbd.validate.run import Options, validate_disks
from tests import soak
from tests.qemu_versions import QemuBinaries, each_qemu
from tests.soak import Counts, Terms, soaked

pytestmark = pytest.mark.real

ONCE = Terms(minutes=0, size=64)
"""A turn of each kind."""

NOTHING = {"verdict": "agreed", "discrepancies": (), "discrepancy_count": 0}
MORE = DiscrepancyEntry(compared="base:allocation", offset=0, end=65536, served=0, computed=1, file=None, why=())


@each_qemu
def test_a_round_of_all_that_can_happen_has_no_false_alarm_and_misses_nothing(binaries: QemuBinaries) -> None:
    counts = soaked(binaries, ONCE)
    assert (counts.alarms, counts.missed) == ([], [])
    assert counts.faults > 0
    assert counts.instants == 1
    assert counts.written > 0


def told(monkeypatch: pytest.MonkeyPatch, changed: Callable[[DiskReport], DiskReport]) -> None:
    """Changes what the validations of a soak say."""

    async def validated(address: str, disks: Sequence[str], options: Options) -> ValidationReport:
        report = await validate_disks(address, disks, options)
        return report.model_copy(update={"disks": tuple(map(changed, report.disks))})

    monkeypatch.setattr(soak, "validate_disks", validated)


def test_a_validation_that_finds_nothing_misses_every_fault(
    binaries: QemuBinaries, monkeypatch: pytest.MonkeyPatch
) -> None:
    told(monkeypatch, lambda disk: disk.model_copy(update=NOTHING))
    counts = soaked(binaries, ONCE)
    assert (counts.verdict, counts.alarms) == ("failed", [])
    assert len(counts.missed) == counts.faults > 0


def test_a_validation_that_finds_too_much_is_a_false_alarm(
    binaries: QemuBinaries, monkeypatch: pytest.MonkeyPatch
) -> None:
    def more(disk: DiskReport) -> DiskReport:
        found = (*disk.discrepancies, MORE)
        return disk.model_copy(update={"discrepancies": found, "discrepancy_count": len(found)})

    told(monkeypatch, more)
    counts = soaked(binaries, ONCE)
    assert counts.verdict == "failed"
    assert len(counts.alarms) >= 5  # four of the disk as it is, one at a point in time or beside a fault, or both
    assert counts.missed == []


def test_what_never_happened_is_not_passed() -> None:
    everything = {"validations": 9, "incomplete": 1, "instants": 1, "snapshots": 1, "commits": 1, "faults": 1}
    assert Counts(**everything).verdict == "passed"  # type: ignore[arg-type]
    assert Counts(**everything, worst_share=0.98).verdict == "failed"  # type: ignore[arg-type]
    for name in ("instants", "snapshots", "commits", "faults"):
        assert Counts(**{**everything, name: 0}).verdict == "too short to say anything"  # type: ignore[arg-type]
    assert Counts(**{**everything, "incomplete": 9}).verdict == "too short to say anything"  # type: ignore[arg-type]
