"""The document of ``qmpnbd checkpoint``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qmpnbd.report.model.parts import Document, Part

CheckpointState = Literal["missing", "displaced", "recording", "pending", "stopped", "inconsistent"]


class CheckpointEntry(Part):
    """A checkpoint's bitmap on one disk.

    Attributes:
        number: of the checkpoint.
        backup: id of the backup that was begun with it.
        bitmap: the bitmap's name.
        node_name: the node it belongs to.
        granularity: bytes of the disk a bit stands for.
        dirty_bytes: bytes of the disk that it marks; null where its content is lost.
        recording: whether it records.
        persistent: whether it survives the end of QEMU.
        busy: whether an export or a job uses it.
        inconsistent: QEMU did not end well and its content is lost.
        usable: whether everything written since is recorded, in this bitmap and the newer ones together.
    """

    number: int
    backup: str
    bitmap: str
    node_name: str
    granularity: int
    dirty_bytes: int | None
    recording: bool
    persistent: bool
    busy: bool
    inconsistent: bool
    usable: bool


class DiskCheckpointsEntry(Part):
    """One chain of checkpoints on one disk.

    Attributes:
        disk: the disk as it is addressed.
        chain: chain id.
        node_name: the node whose bitmaps record the guest's writes.
        state: ``recording`` (an increment is possible); ``pending`` (it is, and an older checkpoint is kept or
            undecided); ``missing``, ``displaced``, ``stopped``, ``inconsistent`` (only a full backup is possible).
        reason: why it is so; empty for ``recording``.
        remedy: what to do about it.
        transient_because: why new bitmaps vanish with QEMU; empty if they persist.
        checkpoints: of the active layer, oldest first.
        displaced: those of lower layers.
    """

    disk: str
    chain: str
    node_name: str
    state: CheckpointState
    reason: str
    remedy: str
    transient_because: str
    checkpoints: tuple[CheckpointEntry, ...]
    displaced: tuple[CheckpointEntry, ...]


class CheckpointChangeEntry(Part):
    """What a change does on one disk.

    Attributes:
        disk: the disk as it is addressed.
        actions: how many actions of the transaction are this disk's; 0 if nothing is done.
        base: create: the checkpoint since which an increment can be made; null where only a full backup can be.
        increment: create: the bitmaps that together hold the increment.
        reason: why full, or why nothing is done.
        remedy: what to do about it.
    """

    disk: str
    actions: int
    base: int | None
    increment: tuple[str, ...]
    reason: str
    remedy: str


class CheckpointsDocument(Document):
    """The result of ``qmpnbd checkpoint``.

    Attributes:
        monitor: the QMP address.
        qemu: QEMU's version.
        operation: the subcommand.
        chain: chain id; empty for a list of all chains.
        number: the checkpoint that was changed; null where none, or all.
        backup: create: id of the backup that begins; empty otherwise.
        dry_run: whether nothing was sent.
        commands: the QMP commands that changed something (would, in a dry run), as they are sent.
        changes: what was done on each disk; empty for a list.
        disks: the checkpoints afterwards.
    """

    schema_: Literal["qmpnbd.checkpoints/1"] = Field(default="qmpnbd.checkpoints/1", alias="schema")
    monitor: str
    qemu: str
    operation: Literal["create", "list", "commit", "abort", "merge", "remove"]
    chain: str
    number: int | None
    backup: str
    dry_run: bool
    commands: tuple[dict[str, object], ...]
    changes: tuple[CheckpointChangeEntry, ...]
    disks: tuple[DiskCheckpointsEntry, ...]
