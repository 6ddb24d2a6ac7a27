"""From a verification to the document of ``qmpnbd verify``, and to text; pure."""

from __future__ import annotations

from collections.abc import Iterator

from qmpnbd.backup.verify import Verified
from qmpnbd.printable import printable as shown
from qmpnbd.report.model import (
    BootEntry,
    SecondReadingEntry,
    SkippedEntry,
    VerifyDocument,
    VerifyFindingEntry,
    VerifyVerdict,
)
from qmpnbd.report.sizes import human_size

MAX_FINDINGS = 1000
"""Findings that are listed: what is rotten as a whole has one for each piece."""

_HEADLINES: dict[VerifyVerdict, str] = {
    "proved": "PROVED",
    "incomplete": "NOT EVERYTHING COULD BE JUDGED",
    "damaged": "DAMAGED",
}


def verify_document(repository: str, verified: Verified) -> VerifyDocument:
    """Describes the result of a verification."""
    wrong = list(_findings(verified))
    found = [each.backup for backups in verified.checked.found.values() for each in backups if each.backup is not None]
    is_whole = not verified.skipped and not verified.checked.findings
    verdict: VerifyVerdict = "proved" if is_whole else "incomplete"
    return VerifyDocument(
        repository=repository,
        verdict=verdict if verified.is_sound else "damaged",
        backups=sum(map(len, verified.checked.found.values())),
        data_bytes=sum(disk.data_bytes for backup in found for disk in backup.manifest.disks),
        qemu=verified.qemu,
        second_readings=tuple(_readings(verified)),
        boots=tuple(_boots(verified)),
        skipped=tuple(SkippedEntry(chain=each.chain, backup=each.backup, what=each.what) for each in verified.skipped),
        finding_count=len(wrong),
        findings=tuple(wrong[:MAX_FINDINGS]),
        seconds=verified.seconds,
    )


def _readings(verified: Verified) -> Iterator[SecondReadingEntry]:
    for each in verified.readings:
        manifest = each.point.backup.manifest
        yield SecondReadingEntry(
            chain=manifest.chain,
            backup=manifest.id,
            number=manifest.number,
            disk=each.point.disk.name,
            bytes=each.bytes,
        )


def _boots(verified: Verified) -> Iterator[BootEntry]:
    for each in verified.boots:
        manifest, result = each.backup.manifest, each.result
        yield BootEntry(
            chain=manifest.chain,
            backup=manifest.id,
            number=manifest.number,
            reached=result.reached,
            why=result.why,
            console=result.console,
        )


def _findings(verified: Verified) -> Iterator[VerifyFindingEntry]:
    for finding in verified.checked.findings:
        yield VerifyFindingEntry(
            rule=finding.rule.value,
            chain=finding.chain,
            backup=finding.backup,
            disk=finding.disk,
            where=finding.where,
            offset=finding.offset,
            end=finding.end,
            what=finding.what,
        )
    for reading in verified.readings:
        manifest = reading.point.backup.manifest
        for each in reading.differences:
            yield VerifyFindingEntry(
                rule="second-reader",
                chain=manifest.chain,
                backup=manifest.id,
                disk=reading.point.disk.name,
                where=str(reading.point.image),
                offset=each.offset,
                end=each.end,
                what=each.what,
            )
    for boot in verified.boots:
        if not boot.result.reached:
            manifest = boot.backup.manifest
            yield VerifyFindingEntry(
                rule="boot",
                chain=manifest.chain,
                backup=manifest.id,
                disk="",
                where=str(boot.backup.path),
                offset=None,
                end=None,
                what=boot.result.why,
            )


def verify_text(document: VerifyDocument) -> str:
    """Returns the result of a verification."""
    return "".join(f"{line}\n" for line in _lines(document))


def _lines(document: VerifyDocument) -> Iterator[str]:
    yield shown(f"{document.repository}: {_HEADLINES[document.verdict]}")
    yield (
        f"  {document.backups:,} backups with {human_size(document.data_bytes)} of data, looked at in "
        f"{document.seconds:.1f} s"
    )
    for reading in document.second_readings:
        what = f"disk {reading.disk} of backup {reading.number} ({reading.backup}) of chain {reading.chain}"
        yield shown(f"  QEMU {document.qemu} read {human_size(reading.bytes)} of {what}")
    for boot in document.boots:
        told = "booted" if boot.reached else f"did not boot: {boot.why}"
        yield shown(f"  backup {boot.number} ({boot.backup}) of chain {boot.chain} {told}")
        yield from (f"    | {shown(line)}" for line in boot.console.splitlines()[-10:] if not boot.reached)
    for skipped in document.skipped:
        yield shown(f"  not judged: backup {skipped.backup} of chain {skipped.chain}: {skipped.what}")
    for finding in document.findings:
        yield shown(f"  {finding.rule}: {_place(finding)}{finding.what}")
        if finding.where:
            yield shown(f"    {finding.where}")
    if document.finding_count > len(document.findings):
        yield f"  … {document.finding_count - len(document.findings):,} more"


def _place(finding: VerifyFindingEntry) -> str:
    names = {"chain": finding.chain, "backup": finding.backup, "disk": finding.disk}
    parts = [f"{name} {value}" for name, value in names.items() if value]
    if finding.offset is not None:
        parts.append(f"bytes [{finding.offset}, {finding.end})")
    return f"{', '.join(parts)}: " if parts else ""
