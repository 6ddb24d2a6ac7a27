"""From what a check found to its document, and to text; pure."""

from __future__ import annotations

from collections.abc import Iterator

from qmpnbd.images.check import Rule
from qmpnbd.images.check_file import CheckResult
from qmpnbd.printable import printable as shown
from qmpnbd.report.model import CheckDocument, CheckVerdict, FindingEntry, PlaceEntry
from qmpnbd.report.sizes import human_size

_HEADLINES: dict[CheckVerdict, str] = {"clean": "CLEAN", "leaks": "LEAKS", "corrupt": "CORRUPT"}


def check_document(result: CheckResult) -> CheckDocument:
    """Describes the result of a check."""
    findings = result.findings
    entries = tuple(
        FindingEntry(
            severity=rule.severity.value,
            rule=rule.words,
            count=count,
            places=tuple(PlaceEntry(offset=each.offset, found=each.text) for each in findings.examples[rule]),
        )
        for rule, count in ((rule, findings.counts[rule]) for rule in Rule if rule in findings.counts)
    )
    return CheckDocument(
        image=result.path,
        verdict=_verdict(result),
        corruptions=result.corruptions,
        leaks=result.leaks,
        check_errors=result.errors,
        overlaps=result.overlaps,
        cluster_size=result.cluster_size,
        file_size=result.file_size,
        image_end_offset=result.image_end_offset,
        total_clusters=result.total_clusters,
        allocated_clusters=result.allocated_clusters,
        fragmented_clusters=result.fragmented_clusters,
        compressed_clusters=result.compressed_clusters,
        dirty=result.dirty,
        marked_corrupt=result.marked_corrupt,
        findings=entries,
    )


def _verdict(result: CheckResult) -> CheckVerdict:
    if result.corruptions or result.overlaps or result.errors:
        return "corrupt"
    return "leaks" if result.leaks else "clean"


def check_text(document: CheckDocument) -> str:
    """Returns the result of a check."""
    return "".join(f"{shown(line)}\n" for line in _lines(document))


def _lines(document: CheckDocument) -> Iterator[str]:
    yield f"{document.image}: {_HEADLINES[document.verdict]}"
    yield (
        f"  {human_size(document.file_size)} in the file, in use up to byte {document.image_end_offset}; "
        f"clusters of {human_size(document.cluster_size)}"
    )
    share = 100 * document.allocated_clusters / max(document.total_clusters, 1)
    yield (
        f"  {document.allocated_clusters:,} of {document.total_clusters:,} guest clusters allocated ({share:.1f} %), "
        f"{document.fragmented_clusters:,} fragmented, {document.compressed_clusters:,} compressed"
    )
    if document.dirty:
        yield "  not closed by the QEMU that wrote it last: refcounts may be behind (lazy refcounts)"
    if document.marked_corrupt:
        yield "  QEMU has marked it as corrupt"
    for finding in document.findings:
        yield f"  {finding.severity}: {finding.rule}: {finding.count:,}"
        yield from (f"    byte {place.offset:#x}: {place.found}" for place in finding.places)
        if finding.count > len(finding.places):
            yield f"    … {finding.count - len(finding.places):,} more"
