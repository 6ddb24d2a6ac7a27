"""From findings to a disk's report; pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

from qmpnbd.errors import QmpnbdError
from qmpnbd.qmp.disks import Disk
from qmpnbd.report.layers import layer_entries
from qmpnbd.report.model import (
    DepthTotal,
    DiscrepancyEntry,
    DiskReport,
    ErrorEntry,
    RangeEntry,
    StepEntry,
    Verdict,
)
from qmpnbd.report.picture import picture_of
from qmpnbd.report.strip import STRIP_CELLS, dominant
from qmpnbd.validate.findings import Findings
from qmpnbd.validate.reading import Explained

_ORDER: tuple[Verdict, ...] = ("discrepancy", "error", "incomplete")


def disk_report(
    disk: Disk, findings: Findings, explained: Sequence[Explained], listed: int, seconds: float
) -> DiskReport:
    """Makes the report of a disk.

    Args:
        disk: the disk.
        findings: after the last round.
        explained: the discrepancies to list.
        listed: how many runs that were set aside to list.
        seconds: time taken.
    """
    reading, served = findings.reading, findings.served
    count, bytes_found = findings.discrepancy_totals()
    aside = findings.set_aside()
    aside_bytes = aside.totals().get(1, 0)
    return DiskReport(
        name=disk.name,
        qom_path=disk.qom_path,
        node_name=disk.node_name,
        verdict=_verdict(findings, count),
        size=findings.size,
        computed_size=findings.size if reading is None else reading.depth.size,
        layers=() if reading is None else layer_entries(reading.layers),
        totals=()
        if served is None
        else tuple(DepthTotal(allocation_depth=depth, bytes=total) for depth, total in served.totals().items()),
        extents=0 if served is None else len(served),
        strip=() if served is None else dominant(served, STRIP_CELLS),
        picture=None if served is None else picture_of(served, findings.discrepancy_map(), aside),
        rounds=findings.rounds,
        discrepancies=tuple(_entry(each) for each in explained),
        discrepancy_count=count,
        discrepancy_bytes=bytes_found,
        set_aside=tuple(
            RangeEntry(offset=run.offset, end=run.end) for run in islice((run for run in aside if run.value), listed)
        ),
        set_aside_bytes=aside_bytes,
        unfinished=findings.unfinished,
        files_verified=findings.verified and findings.rounds > 0,
        seconds=round(seconds, 3),
    )


def failed_disk_report(disk: Disk, error: QmpnbdError) -> DiskReport:
    """Makes the report of a disk that could not be validated."""
    return DiskReport(
        name=disk.name,
        qom_path=disk.qom_path,
        node_name=disk.node_name,
        verdict="error",
        error=ErrorEntry.of(error),
    )


def worst(reports: Iterable[DiskReport]) -> Verdict:
    """Returns the verdict over several disks: a discrepancy outweighs an error, and that what was left undone."""
    found = {report.verdict for report in reports}
    return next((verdict for verdict in _ORDER if verdict in found), "agreed")


def _verdict(findings: Findings, count: int) -> Verdict:
    if findings.sizes_differ or count:
        return "discrepancy"
    return "incomplete" if findings.unfinished else "agreed"


def _entry(each: Explained) -> DiscrepancyEntry:
    explanation = each.explanation
    return DiscrepancyEntry(
        offset=each.discrepancy.offset,
        end=each.discrepancy.end,
        served=each.discrepancy.served,
        computed=each.discrepancy.computed,
        file=None if explanation is None else explanation.path,
        why=()
        if explanation is None
        else tuple(StepEntry(layer_index=step.layer, file=step.path, read=step.text) for step in explanation.steps),
    )
