"""From checkpoints to the document of ``qmpnbd checkpoint``, and to text; pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from qmpnbd.printable import printable as shown
from qmpnbd.qmp.checkpoint_plan import CheckpointPlan
from qmpnbd.qmp.checkpoint_state import REASONS, Checkpoint, DiskCheckpoints
from qmpnbd.qmp.checkpoints import Changed, Listed
from qmpnbd.report.columns import table
from qmpnbd.report.model import (
    CheckpointChangeEntry,
    CheckpointEntry,
    CheckpointsDocument,
    DiskCheckpointsEntry,
)
from qmpnbd.report.sizes import human_size


def listed_document(listed: Listed, chain: str) -> CheckpointsDocument:
    """Describes the checkpoints of a QEMU.

    Args:
        listed: what there is.
        chain: the chain that was asked for; empty for all.
    """
    return CheckpointsDocument(
        monitor=listed.where,
        qemu=listed.qemu,
        operation="list",
        chain=chain,
        number=None,
        backup="",
        dry_run=False,
        commands=(),
        changes=(),
        disks=tuple(map(_disk, listed.disks)),
    )


def changed_document(changed: Changed) -> CheckpointsDocument:
    """Describes what a change did, or would do."""
    plan = changed.plan
    return CheckpointsDocument(
        monitor=changed.where,
        qemu=changed.qemu,
        operation=plan.operation,
        chain=plan.chain,
        number=plan.number or None,
        backup=plan.backup,
        dry_run=changed.dry_run,
        commands=changed.commands,
        changes=tuple(_changes(plan)),
        disks=tuple(map(_disk, changed.after)),
    )


def _changes(plan: CheckpointPlan) -> Iterator[CheckpointChangeEntry]:
    for disk in plan.disks:
        yield CheckpointChangeEntry(
            disk=disk.before.disk,
            actions=len(disk.actions),
            base=disk.base,
            increment=plan.bitmaps(disk.before.disk),
            reason=disk.reason,
            remedy=disk.remedy,
        )


def _disk(disk: DiskCheckpoints) -> DiskCheckpointsEntry:
    reason, remedy = REASONS[disk.state]
    usable = frozenset(each.number for each in disk.usable)
    return DiskCheckpointsEntry(
        disk=disk.disk,
        chain=disk.chain,
        node_name=disk.node_name,
        state=disk.state,
        reason=reason,
        remedy=remedy,
        transient_because=disk.transient_because,
        checkpoints=tuple(_entry(each, usable=each.number in usable) for each in disk.checkpoints),
        displaced=tuple(_entry(each, usable=False) for each in disk.displaced),
    )


def _entry(checkpoint: Checkpoint, *, usable: bool) -> CheckpointEntry:
    return CheckpointEntry(
        number=checkpoint.number,
        backup=checkpoint.backup,
        bitmap=checkpoint.bitmap,
        node_name=checkpoint.node_name,
        granularity=checkpoint.granularity,
        dirty_bytes=None if checkpoint.inconsistent else checkpoint.dirty_bytes,
        recording=checkpoint.recording,
        persistent=checkpoint.persistent,
        busy=checkpoint.busy,
        inconsistent=checkpoint.inconsistent,
        usable=usable,
    )


def checkpoints_text(document: CheckpointsDocument) -> str:
    """Returns what was done, and the checkpoints afterwards; in a dry run, the commands instead."""
    lines = [f"QEMU {document.qemu}, monitor {document.monitor}", *_changes_text(document)]
    if document.dry_run:
        lines += ["would send:" if document.commands else "would send nothing"]
        lines += [json.dumps(command) for command in document.commands]
        return _shown(lines)
    for disk in document.disks:
        lines += ["", f"disk {disk.disk}, chain {disk.chain}: {disk.state}"]
        if disk.reason:
            lines.append(f"  {disk.reason}. {disk.remedy}")
        if disk.transient_because:
            lines.append(f"  transient: {disk.transient_because}")
        if disk.checkpoints or disk.displaced:
            lines += [f"  {line}" for line in table(list(_rows(disk)), right=(0, 1, 2))]
    if not document.disks:
        lines += ["", "no checkpoints"]
    return _shown(lines)


def _shown(lines: Iterable[str]) -> str:
    return "".join(f"{shown(line)}\n" for line in lines)


def _changes_text(document: CheckpointsDocument) -> Iterator[str]:
    which = f"checkpoint {document.number}" if document.number else "all checkpoints"
    if document.operation != "list":
        yield f"{document.operation} {which} of chain {document.chain}"
    for change in document.changes:
        told = f"{change.reason}. {change.remedy}" if change.reason else ""
        if document.operation == "create":
            kind = f"increment since {change.base}" if change.base is not None else "full"
            told = f"{kind}: {told or 'in ' + ', '.join(change.increment)}"
        elif not change.actions:
            told = f"nothing to do{': ' + told if told else ''}"
        yield f"  disk {change.disk}: {told or 'done'}"


def _rows(disk: DiskCheckpointsEntry) -> Iterator[tuple[str, ...]]:
    yield "number", "granularity", "dirty", "state", "bitmap"
    for each in (*disk.checkpoints, *disk.displaced):
        words = [
            "inconsistent" if each.inconsistent else "recording" if each.recording else "disabled",
            "persistent" if each.persistent else "transient",
            *(["in use"] if each.busy else []),
            *([f"on {each.node_name}"] if each in disk.displaced else []),
        ]
        dirty = "-" if each.dirty_bytes is None else human_size(each.dirty_bytes)
        yield str(each.number), human_size(each.granularity), dirty, ", ".join(words), each.bitmap
