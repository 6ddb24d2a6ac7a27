"""From what is in a repository to the document of ``qmpnbd repository``, and to text; pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from qmpnbd.backup.chain_order import Found
from qmpnbd.backup.check import Checked
from qmpnbd.backup.check_rules import Finding, Rule
from qmpnbd.backup.manifest import ManifestDisk
from qmpnbd.backup.prune import Choice
from qmpnbd.backup.repository import Repository
from qmpnbd.printable import printable as shown
from qmpnbd.report.columns import table
from qmpnbd.report.model import (
    PruneMergeEntry,
    RepositoryDocument,
    RepositoryFindingEntry,
    RepositoryOperation,
    RepositoryVerdict,
    StoredBackupEntry,
    StoredChainEntry,
    StoredDiskEntry,
)
from qmpnbd.report.sizes import human_size

_HEADLINES: Mapping[RepositoryVerdict, str] = {"clean": "CLEAN", "leftovers": "LEFTOVERS", "damaged": "DAMAGED"}


def listed_document(
    repository: Repository, chains: Mapping[str, Sequence[Found]], operation: RepositoryOperation
) -> RepositoryDocument:
    """Describes backups.

    Args:
        repository: that they are in.
        chains: the backups of each chain.
        operation: what was asked for.
    """
    return RepositoryDocument(
        operation=operation,
        repository=str(repository.path),
        id=repository.id,
        chains=tuple(
            StoredChainEntry(chain=chain, backups=tuple(map(_backup, found))) for chain, found in chains.items()
        ),
    )


def checked_document(repository: Repository, checked: Checked, *, content: bool) -> RepositoryDocument:
    """Describes what a check found."""
    chains = tuple(
        StoredChainEntry(chain=chain, backups=tuple(_backup(each, broken=checked.broken) for each in found))
        for chain, found in checked.found.items()
    )
    return RepositoryDocument(
        operation="check",
        repository=str(repository.path),
        id=repository.id,
        chains=chains,
        verdict=_verdict(checked.findings),
        content=content,
        findings=tuple(map(_finding, checked.findings)),
    )


def pruned_document(repository: Repository, chain: str, choice: Choice, *, dry_run: bool) -> RepositoryDocument:
    """Describes what pruning removed, or would remove."""
    found = [Found(each.name, each.path, each, None) for each in choice.backups]
    backups = tuple(
        _backup(each).model_copy(
            update={"kept_by": choice.rules.get(each.name.id, ()), "removed": each.name.id not in choice.rules}
        )
        for each in sorted([*found, *choice.dropped], key=lambda each: each.name)
    )
    merges = tuple(
        PruneMergeEntry(backup=step.backup or "", disk=each.disk, over=each.over, base=each.base)
        for step in choice.steps
        for each in step.merges
    )
    return RepositoryDocument(
        operation="prune",
        repository=str(repository.path),
        id=repository.id,
        chains=(StoredChainEntry(chain=chain, backups=backups),),
        merges=merges,
        dry_run=dry_run,
    )


def recovered_document(repository: Repository, done: Iterable[str]) -> RepositoryDocument:
    """Describes what recovering did."""
    return RepositoryDocument(operation="recover", repository=str(repository.path), id=repository.id, done=tuple(done))


def _verdict(findings: Sequence[Finding]) -> RepositoryVerdict:
    if any(finding.rule is not Rule.UNFINISHED for finding in findings):
        return "damaged"
    return "leftovers" if findings else "clean"


def _finding(finding: Finding) -> RepositoryFindingEntry:
    return RepositoryFindingEntry(
        rule=finding.rule.value,
        chain=finding.chain,
        backup=finding.backup,
        disk=finding.disk,
        where=finding.where,
        what=finding.what,
        offset=finding.offset,
        end=finding.end,
    )


def _backup(found: Found, *, broken: Collection[tuple[str, str, str]] | None = None) -> StoredBackupEntry:
    manifest = found.backup.manifest if found.backup is not None else None
    return StoredBackupEntry(
        number=found.name.number,
        id=found.name.id,
        folder=str(found.path),
        fault=str(found.fault) if found.fault is not None else "",
        created=manifest.created if manifest else "",
        qemu=manifest.qemu if manifest else "",
        consistency=manifest.statement.consistency if manifest and manifest.statement else "",
        disks=tuple(
            _disk(disk, None if broken is None else (manifest.chain, manifest.id, disk.name) not in broken)
            for disk in manifest.disks
        )
        if manifest
        else (),
        extras=tuple(extra.name for extra in manifest.extras) if manifest else (),
        kept_by=(),
        removed=False,
    )


def _disk(disk: ManifestDisk, restorable: bool | None) -> StoredDiskEntry:
    return StoredDiskEntry(
        name=disk.name,
        size=disk.size,
        kind=disk.kind,
        reason=disk.reason,
        base=disk.base,
        template=disk.template.path if disk.template else "",
        file=disk.file,
        file_bytes=disk.file_bytes,
        data_bytes=disk.data_bytes,
        zero_bytes=disk.zero_bytes,
        compression=disk.compression,
        root=disk.root,
        merged=disk.merged,
        restorable=restorable,
    )


def repository_text(document: RepositoryDocument) -> str:
    """Returns a document as text for people."""
    return "".join(f"{shown(line)}\n" for line in _lines(document))


def _lines(document: RepositoryDocument) -> Iterator[str]:
    headline = _HEADLINES[document.verdict] if document.verdict else f"repository {document.id}"
    yield f"{document.repository}: {headline}"
    for chain in document.chains:
        yield f"chain {chain.chain}:" + ("" if chain.backups else " no backups")
        yield from _backups_text(document, chain)
    for finding in document.findings:
        yield f"{finding.rule}: {finding.where}: {finding.what}"
    for merge in document.merges:
        which = "would be merged" if document.dry_run else "merged"
        yield f"{', '.join(merge.over)} {which} into {merge.backup}, disk {merge.disk}"
    yield from document.done
    if document.operation == "recover" and not document.done:
        yield "nothing to recover"


def _backups_text(document: RepositoryDocument, chain: StoredChainEntry) -> Iterator[str]:
    rows = [("number", "id", "instant", "disk", "size", "kind", "base", "in the file", "")]
    for backup in chain.backups:
        state = _state(document, backup)
        for disk in backup.disks:
            words = [state, *(["not restorable"] if disk.restorable is False else []), disk.reason]
            rows.append(
                (
                    str(backup.number),
                    backup.id,
                    backup.created,
                    disk.name,
                    human_size(disk.size),
                    disk.kind,
                    disk.base or shown(disk.template) or "-",
                    human_size(disk.file_bytes),
                    "; ".join(filter(None, words)),
                )
            )
        if not backup.disks:
            rows.append((str(backup.number), backup.id, backup.created or "?", "-", "-", "-", "-", "-", state))
    if chain.backups:
        yield from (f"  {line}" for line in table(rows, right=(0, 4, 7)))


def _state(document: RepositoryDocument, backup: StoredBackupEntry) -> str:
    if document.operation == "prune":
        verb = "would be removed" if document.dry_run else "removed"
        return verb if backup.removed else f"kept: {', '.join(backup.kept_by) or 'not chosen'}"
    return "damaged" if backup.fault else ""
