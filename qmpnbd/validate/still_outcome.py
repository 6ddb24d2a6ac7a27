"""From the findings of a disk that stands still to its report; pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from qmpnbd.errors import QmpnbdError
from qmpnbd.extents import ExtentMap
from qmpnbd.nbd.constants import ALLOCATION_DEPTH
from qmpnbd.report.layers import layer_entries
from qmpnbd.report.model import (
    ComparedEntry,
    DepthTotal,
    DiscrepancyEntry,
    DiskReport,
    ErrorEntry,
    NotJudgedBecause,
    Verdict,
)
from qmpnbd.report.picture import picture_of
from qmpnbd.report.strip import STRIP_CELLS, dominant
from qmpnbd.validate.choice import Choice
from qmpnbd.validate.outcome import (
    content_discrepancy,
    content_entry,
    discrepancy_entry,
    falls_short,
    map_discrepancies,
    map_entry,
)
from qmpnbd.validate.reading import Explained
from qmpnbd.validate.still import StillFindings, Terms
from qmpnbd.validate.target import Target


def still_report(target: Target, findings: StillFindings, terms: Terms, qemu: str) -> DiskReport:
    """Makes the report of a disk that stands still.

    Args:
        target: the disk.
        findings: what was found.
        terms: how it was judged.
        qemu: version of the QEMU that served it; empty if that is not known.
    """
    compared = tuple(_compared(findings))
    served = findings.served_depth if findings.served_depth is not None else findings.depth
    count = sum(entry.discrepancy_count for entry in compared)
    return DiskReport(
        name=target.name,
        qom_path="",
        node_name="",
        verdict=_verdict(findings, compared),
        size=findings.size,
        computed_size=findings.computed_size,
        layers=layer_entries(findings.layers),
        totals=tuple(DepthTotal(allocation_depth=depth, bytes=total) for depth, total in served.totals().items()),
        extents=len(served),
        strip=dominant(served, STRIP_CELLS),
        picture=picture_of(served, findings.discrepancy_map(), ExtentMap.uniform(served.size, 0)),
        rounds=1,
        discrepancies=tuple(_discrepancies(findings, terms.listed)),
        discrepancy_count=count,
        discrepancy_bytes=sum(entry.discrepancy_bytes for entry in compared),
        files_verified=True,
        source=target.source,
        qemu=qemu,
        compared=compared,
        content_hashes=() if findings.content is None else findings.content.hashes,
        choice=str(terms.choice),
        files=tuple(stamp.entry() for stamp in findings.stamps),
    )


def failed_report(target: Target, error: QmpnbdError, choice: Choice, qemu: str = "") -> DiskReport:
    """Makes the report of a target that could not be validated."""
    return DiskReport(
        name=target.name,
        qom_path="",
        node_name="",
        verdict="error",
        error=ErrorEntry.of(error),
        source=target.source,
        qemu=qemu,
        choice=str(choice),
    )


def not_judged_report(target: Target, choice: Choice, because: NotJudgedBecause = "") -> DiskReport:
    """Makes the report of a target whose turn did not come, or that was stopped."""
    return DiskReport(
        name=target.name,
        qom_path="",
        node_name="",
        verdict="not-judged",
        source=target.source,
        choice=str(choice),
        not_judged_because=because,
    )


def _verdict(findings: StillFindings, compared: Sequence[ComparedEntry]) -> Verdict:
    if findings.size != findings.computed_size or any(entry.discrepancy_count for entry in compared):
        return "discrepancy"
    return "incomplete" if any(map(falls_short, compared)) else "agreed"


def _compared(findings: StillFindings) -> Iterator[ComparedEntry]:
    for found in findings.maps:
        yield map_entry(found)
    if findings.content is not None:
        content = findings.content
        yield content_entry(content.differences, content.sample.bytes, content.note or content.sample.note)


def _discrepancies(findings: StillFindings, listed: int) -> Iterator[DiscrepancyEntry]:
    for discrepancy, explanation in findings.explained:
        yield discrepancy_entry(Explained(discrepancy, explanation))
    for found in findings.maps:
        if found.context != ALLOCATION_DEPTH:
            yield from map_discrepancies(found, listed)
    for differing in islice(() if findings.content is None else findings.content.differences, listed):
        yield content_discrepancy(differing)
