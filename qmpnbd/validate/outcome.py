"""From findings to a disk's report; pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from qmpnbd.errors import QmpnbdError
from qmpnbd.nbd.constants import ALLOCATION_DEPTH, BASE_ALLOCATION
from qmpnbd.qmp.disks import Disk
from qmpnbd.report.contexts import CONTENT, DIRTY_BITMAP
from qmpnbd.report.layers import layer_entries
from qmpnbd.report.model import (
    ComparedEntry,
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
from qmpnbd.validate.compare import MapFinding
from qmpnbd.validate.content import ContentDifference
from qmpnbd.validate.findings import Findings
from qmpnbd.validate.reading import Explained

_ORDER: tuple[Verdict, ...] = ("discrepancy", "error", "incomplete", "not-judged")


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
    compared = tuple(_compared(findings))
    count = sum(entry.discrepancy_count for entry in compared)
    aside = findings.set_aside()
    aside_bytes = aside.totals().get(1, 0)
    return DiskReport(
        name=disk.name,
        qom_path=disk.qom_path,
        node_name=disk.node_name,
        verdict=_verdict(findings, compared),
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
        discrepancies=(*(discrepancy_entry(each) for each in explained), *_others(findings, listed)),
        discrepancy_count=count,
        discrepancy_bytes=sum(entry.discrepancy_bytes for entry in compared),
        set_aside=tuple(
            RangeEntry(offset=run.offset, end=run.end) for run in islice((run for run in aside if run.value), listed)
        ),
        set_aside_bytes=aside_bytes,
        unfinished=findings.unfinished,
        files_verified=findings.verified and findings.rounds > 0,
        seconds=round(seconds, 3),
        compared=compared,
        content_hashes=findings.content.hashes.told(),
    )


def _compared(findings: Findings) -> Iterator[ComparedEntry]:
    count, bytes_found = findings.discrepancy_totals()
    aside = findings.set_aside().totals().get(1, 0)
    if findings.with_depth:
        yield _entry(ALLOCATION_DEPTH, findings.size, count, bytes_found, aside)
    if findings.base_refused:
        yield ComparedEntry(what=BASE_ALLOCATION, verdict="not-judged", bytes=0, note=findings.base_refused)
    elif findings.base is not None and findings.reading is not None and findings.reading.base is None:
        note = "the format of a layer does not tell where its data lies"
        yield ComparedEntry(what=BASE_ALLOCATION, verdict="not-judged", bytes=0, note=note)
    elif findings.base is not None:
        aside = 0 if findings.sizes_differ else findings.base.set_aside().totals().get(1, 0)
        entry = _entry(BASE_ALLOCATION, findings.size, *findings.base.discrepancy_totals(), aside)
        yield entry.model_copy(update={"note": "zeroes in data taken for data"})
    yield from map(map_entry, findings.bitmaps)
    content = findings.content
    if content.bytes or content.note:
        entry = content_entry(content.found, content.bytes, content.note)
        aside = content.set_aside
        verdict = "incomplete" if aside and entry.verdict == "agreed" else entry.verdict
        yield entry.model_copy(update={"set_aside_bytes": aside, "verdict": verdict})


def _entry(what: str, size: int, count: int, bytes_found: int, aside: int) -> ComparedEntry:
    return ComparedEntry(
        what=what,
        verdict="discrepancy" if count else "incomplete" if aside else "agreed",
        bytes=size,
        discrepancy_count=count,
        discrepancy_bytes=bytes_found,
        set_aside_bytes=aside,
    )


def map_entry(found: MapFinding) -> ComparedEntry:
    """Describes the comparison of a metadata context on a disk that stands still."""
    if found.comparison is None or found.served is None:
        return ComparedEntry(what=found.context, verdict="not-judged", bytes=0, note=found.note)
    count, bytes_found = found.comparison.discrepancy_totals()
    return ComparedEntry(
        what=found.context,
        verdict="discrepancy" if count else "agreed",
        bytes=found.served.size,
        discrepancy_count=count,
        discrepancy_bytes=bytes_found,
        note=found.note,
    )


def map_discrepancies(found: MapFinding, listed: int) -> Iterator[DiscrepancyEntry]:
    """Yields the first discrepancies of a metadata context."""
    if found.comparison is not None:
        for each in islice(found.comparison.discrepancies(), listed):
            entry = discrepancy_entry(Explained(each, None), found.context)
            yield entry.model_copy(update={"finding": found.finding})


def content_entry(differences: Sequence[ContentDifference], compared_bytes: int, note: str) -> ComparedEntry:
    """Describes the comparison of bytes.

    Args:
        differences: where they differ.
        compared_bytes: how many were compared; 0 if they could not be.
        note: how they were chosen, or why they could not be compared.
    """
    return ComparedEntry(
        what=CONTENT,
        verdict="discrepancy" if differences else "agreed" if compared_bytes or not note else "not-judged",
        bytes=compared_bytes,
        discrepancy_count=len(differences),
        discrepancy_bytes=sum(each.end - each.offset for each in differences),
        note=note,
    )


def _others(findings: Findings, listed: int) -> Iterator[DiscrepancyEntry]:
    """Yields the first discrepancies of what was compared beside the allocation depth."""
    for each in islice(() if findings.base is None else findings.base.discrepancies(), listed):
        yield discrepancy_entry(Explained(each, None), BASE_ALLOCATION)
    for found in findings.bitmaps:
        yield from map_discrepancies(found, listed)
    for differing in findings.content.found[:listed]:
        yield content_discrepancy(differing)


def content_discrepancy(differing: ContentDifference) -> DiscrepancyEntry:
    """Describes a run of bytes that differ."""
    return DiscrepancyEntry(
        offset=differing.offset,
        end=differing.end,
        served=differing.served,
        computed=differing.computed,
        file=None,
        why=(),
        compared=CONTENT,
        served_sha256=differing.served_sha256,
        computed_sha256=differing.computed_sha256,
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


def not_judged_disk_report(disk: Disk) -> DiskReport:
    """Makes the report of a disk whose turn has not come."""
    return DiskReport(name=disk.name, qom_path=disk.qom_path, node_name=disk.node_name, verdict="not-judged")


def worst(reports: Iterable[DiskReport]) -> Verdict:
    """Returns the verdict over several disks.

    A discrepancy outweighs an error, that what could not be judged in full, and that a disk whose turn did not come.
    """
    found = {report.verdict for report in reports}
    return next((verdict for verdict in _ORDER if verdict in found), "agreed")


def _verdict(findings: Findings, compared: Sequence[ComparedEntry]) -> Verdict:
    if findings.sizes_differ or any(entry.discrepancy_count for entry in compared):
        return "discrepancy"
    return "incomplete" if findings.unfinished or any(map(falls_short, compared)) else "agreed"


def falls_short(entry: ComparedEntry) -> bool:
    """Returns whether something was to be compared, and was not; a bitmap that is not served is nothing said."""
    return entry.verdict == "not-judged" and not entry.what.startswith(DIRTY_BITMAP)


def discrepancy_entry(each: Explained, compared: str = ALLOCATION_DEPTH) -> DiscrepancyEntry:
    """Describes a discrepancy.

    Args:
        each: the discrepancy and its reason.
        compared: the metadata context in which it was found.
    """
    explanation = each.explanation
    return DiscrepancyEntry(
        offset=each.discrepancy.offset,
        end=each.discrepancy.end,
        served=each.discrepancy.served,
        computed=each.discrepancy.computed,
        compared=compared,
        file=None if explanation is None else explanation.path,
        why=()
        if explanation is None
        else tuple(StepEntry(layer_index=step.layer, file=step.path, read=step.text) for step in explanation.steps),
    )
