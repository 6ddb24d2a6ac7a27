"""The document of ``qmpnbd repository``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qmpnbd.report.model.parts import Document, Part

RepositoryOperation = Literal["create", "list", "show", "check", "prune", "recover"]
RepositoryVerdict = Literal["clean", "leftovers", "damaged"]


class StoredDiskEntry(Part):
    """A disk in a backup.

    Attributes:
        name: the disk as it is addressed.
        size: bytes of the disk.
        kind: ``full``; ``increment`` (what was written since the last backup); ``differential`` (since an earlier one);
            ``compared`` (what differs from one, because the bitmap was lost); ``shallow`` (what lies over a template).
        reason: why not as was asked for; empty if it was.
        base: id of the backup that it stands on; null for a full or a shallow one.
        template: the image that a shallow one stands on; empty for others.
        file: the image.
        file_bytes: bytes in it.
        data_bytes: bytes of data that this layer holds.
        zero_bytes: bytes that read as zeroes in this layer.
        compression: of its clusters; empty for none.
        root: Merkle root of its hashes.
        merged: how many backups' layers were merged into this one.
        restorable: whether it was found whole with all that it stands on; null if that was not looked at.
    """

    name: str
    size: int
    kind: str
    reason: str
    base: str | None
    template: str
    file: str
    file_bytes: int
    data_bytes: int
    zero_bytes: int
    compression: str
    root: str
    merged: int
    restorable: bool | None


class StoredBackupEntry(Part):
    """A backup.

    Attributes:
        number: in its chain.
        id: eight hexadecimal digits.
        folder: where it is.
        fault: what is wrong with its manifest or its place in the chain; empty if nothing is, and what follows is
            empty, too, if the manifest cannot be read.
        created: the instant, in UTC; empty if the manifest cannot be read.
        qemu: version of QEMU.
        consistency: what can be said of the content; empty if nothing.
        disks: the disks.
        extras: what is kept beside them.
        kept_by: the rules that keep it; pruning only.
        removed: whether it was removed, or would be.
    """

    number: int
    id: str
    folder: str
    fault: str
    created: str
    qemu: str
    consistency: str
    disks: tuple[StoredDiskEntry, ...]
    extras: tuple[str, ...]
    kept_by: tuple[str, ...]
    removed: bool


class StoredChainEntry(Part):
    """A chain of backups.

    Attributes:
        chain: its id.
        backups: in order; those that were asked for.
    """

    chain: str
    backups: tuple[StoredBackupEntry, ...]


class RepositoryFindingEntry(Part):
    """Something that is wrong.

    Attributes:
        rule: what it is about: ``manifest``, ``order``, ``foreign``, ``unfinished``, ``file``, ``hashes``, ``image``,
            ``content``, ``base`` or ``template``.
        chain: the chain; empty if it is in none.
        backup: id of the backup; empty if it is in none.
        disk: the disk; empty if it concerns none.
        where: the file or folder.
        what: what is wrong.
        offset: first byte of the disk that it concerns; null if it concerns all of it, or none.
        end: the byte after the last one; null likewise.
    """

    rule: str
    chain: str
    backup: str
    disk: str
    where: str
    what: str
    offset: int | None
    end: int | None


class PruneMergeEntry(Part):
    """Layers that were merged, or would be, into the one of a backup that stays.

    Attributes:
        backup: id of the backup that stays.
        disk: the disk.
        over: ids of the backups whose layers go into it, nearest first.
        base: id of the backup on which it stands afterwards; null if on none.
    """

    backup: str
    disk: str
    over: tuple[str, ...]
    base: str | None


class RepositoryDocument(Document):
    """The result of ``qmpnbd repository``.

    Attributes:
        operation: what was asked for.
        repository: the folder.
        id: of the repository, 32 hexadecimal digits.
        chains: the chains and backups that were looked at; when pruning, as they were before.
        verdict: of a check: ``clean``; ``leftovers`` (only what killed runs left); ``damaged``; null for others.
        content: whether all data was read for it.
        findings: what is wrong; in the order of chains and backups.
        merges: what pruning merged, or would merge.
        done: what recovering did, a sentence each.
        dry_run: nothing was done.
    """

    schema_: Literal["qmpnbd.repository/1"] = Field(default="qmpnbd.repository/1", alias="schema")
    operation: RepositoryOperation
    repository: str
    id: str
    chains: tuple[StoredChainEntry, ...] = ()
    verdict: RepositoryVerdict | None = None
    content: bool = False
    findings: tuple[RepositoryFindingEntry, ...] = ()
    merges: tuple[PruneMergeEntry, ...] = ()
    done: tuple[str, ...] = ()
    dry_run: bool = False
