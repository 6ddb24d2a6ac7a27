"""From a backup that was made, or looked ahead at, to the document of ``qmpnbd backup``, and to text; pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from qmpnbd.backup.outlook import Outlook
from qmpnbd.backup.plan import Decision, Wish, fell_back
from qmpnbd.backup.run import BackedUp
from qmpnbd.backup.scout import Scouted
from qmpnbd.backup.storing import StoredDisk
from qmpnbd.printable import printable as shown
from qmpnbd.report.instant import instant_entry
from qmpnbd.report.model import BackupDiskEntry, BackupDocument, BackupVerdict, InstantEntry, LeftOutEntry
from qmpnbd.report.sizes import human_size


def backup_document(
    done: BackedUp, repository: str, wish: Wish, *, proof: Literal["hashes", "sizes"], quiesce: bool
) -> BackupDocument:
    """Describes a backup that was made.

    Args:
        done: the backup.
        repository: its repository.
        wish: what was asked for.
        proof: how it was proved.
        quiesce: whether the guest's filesystems were asked to be at rest.
    """
    manifest, session = done.backup.manifest, done.begun.session
    instant = instant_entry(done.statement) if done.statement is not None else None
    disks = tuple(_stored(each, wish) for each in done.disks)
    return BackupDocument(
        verdict=_verdict(disks, instant, quiesce=quiesce),
        monitor=session.monitor.where,
        qemu=done.qemu,
        guest=session.guest,
        repository=repository,
        chain=manifest.chain,
        id=manifest.id,
        number=manifest.number,
        folder=str(done.backup.name),
        created=manifest.created,
        instant=instant,
        proof=proof,
        disks=disks,
        extras=tuple(each.file for each in manifest.extras),
        left_out=_left_out(done.begun.left_out),
        cleared=done.cleared,
        damaged=done.damaged,
        seconds=round(done.seconds, 3),
    )


def outlook_document(found: Outlook, repository: str, chain: str, wish: Wish) -> BackupDocument:
    """Describes what a backup would do; arguments as for `backup_document`."""
    return BackupDocument(
        verdict="planned",
        monitor=found.monitor,
        qemu=found.qemu,
        guest=found.guest,
        repository=repository,
        chain=chain,
        id="",
        number=found.number,
        folder="",
        created="",
        instant=None,
        proof="hashes",
        disks=tuple(_planned(disk, decision, wish) for disk, decision in found.disks),
        extras=(),
        left_out=_left_out(found.left_out),
        cleared=(),
        damaged=found.damaged,
        seconds=0.0,
    )


def backup_text(document: BackupDocument) -> str:
    """Returns a backup as text."""
    lines = [f"QEMU {document.qemu}, guest {document.guest}, monitor {document.monitor}", *_head(document)]
    for disk in document.disks:
        lines += ["", *_disk_text(disk, planned=document.verdict == "planned")]
    lines += [""] if document.extras or document.left_out else []
    if document.extras:
        lines.append(f"beside them: {', '.join(document.extras)}")
    lines += [f"left out: {each.disk}: {each.why}" for each in document.left_out]
    lines += [f"DAMAGED, not built on: {each}" for each in document.damaged]
    return "\n".join(map(shown, lines)) + "\n"


def _head(document: BackupDocument) -> Iterator[str]:
    if document.verdict == "planned":
        yield f"dry run: backup {document.number} of chain {document.chain} in {document.repository} would be"
        return
    proved = {"hashes": "all data read again", "sizes": "the tables read again"}[document.proof]
    yield f"backup {document.folder} of chain {document.chain} in {document.repository}: proved ({proved}), committed"
    if document.instant is not None:
        instant = document.instant
        yield f"one instant, {instant.consistency}, {document.created}; recipe: {instant.recipe}: {instant.why}"
        if instant.reason:
            yield f"NOT AT REST: {instant.reason}. {instant.remedy}"


def _disk_text(disk: BackupDiskEntry, *, planned: bool) -> Iterator[str]:
    stands = f" on {disk.base}" if disk.base else ""
    yield f"disk {disk.name} ({human_size(disk.size)}): {disk.kind}{stands}"
    if not planned:
        stored = f"{human_size(disk.data_bytes)} of data, {human_size(disk.zero_bytes)} of zeroes"
        yield f"  {disk.file}: {human_size(disk.file_bytes)}; {stored}"
    if disk.reason:
        yield f"  {'FELL BACK' if disk.fell_back else 'no increment'}: {disk.reason}. {disk.remedy}".rstrip()
    if disk.transient_because:
        yield f"  its bitmap ends with QEMU: {disk.transient_because}"


def _verdict(disks: tuple[BackupDiskEntry, ...], instant: InstantEntry | None, *, quiesce: bool) -> BackupVerdict:
    if any(disk.fell_back for disk in disks):
        return "fell-back"
    return "not-quiesced" if quiesce and (instant is None or instant.consistency != "frozen") else "done"


def _left_out(found: Mapping[str, str]) -> tuple[LeftOutEntry, ...]:
    return tuple(LeftOutEntry(disk=disk, why=why) for disk, why in found.items())


def _stored(stored: StoredDisk, wish: Wish) -> BackupDiskEntry:
    task, entry = stored.task, stored.entry
    return BackupDiskEntry(
        name=entry.name,
        qom_path=entry.qom_path,
        node_name=entry.node_name,
        size=entry.size,
        kind=entry.kind,
        base=entry.base,
        reason=task.decision.reason,
        remedy=task.decision.remedy,
        fell_back=fell_back(wish, task.decision),
        bitmap=entry.bitmap,
        granularity=entry.granularity,
        transient_because=task.transient_because,
        file=entry.file,
        file_bytes=entry.file_bytes,
        data_bytes=entry.data_bytes,
        zero_bytes=entry.zero_bytes,
        root=entry.root,
    )


def _planned(disk: Scouted, decision: Decision, wish: Wish) -> BackupDiskEntry:
    return BackupDiskEntry(
        name=disk.now.name,
        qom_path=disk.disk.qom_path,
        node_name=disk.node_name,
        size=disk.now.size,
        kind=decision.kind,
        base=decision.base,
        reason=decision.reason,
        remedy=decision.remedy,
        fell_back=fell_back(wish, decision),
        bitmap="",
        granularity=None,
        transient_because="",
        file="",
        file_bytes=0,
        data_bytes=0,
        zero_bytes=0,
        root="",
    )
