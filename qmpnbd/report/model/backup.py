"""The document of ``qmpnbd backup``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qmpnbd.report.model.export import InstantEntry
from qmpnbd.report.model.parts import Document, Part

BackupVerdict = Literal["planned", "done", "fell-back", "not-quiesced"]


class BackupDiskEntry(Part):
    """What was made of a disk.

    Attributes:
        name: the disk, as it can be addressed.
        qom_path: the device's QOM path; empty for a node without a device.
        node_name: the node that its bitmap is on.
        size: bytes of the disk.
        kind: what the layer holds: everything (``full``), what was written since the last backup (``increment``) or an
            earlier one (``differential``), what differs from one (``compared``), or what lies above the template
            (``shallow``).
        base: id of the backup that the layer stands on; null for ``full`` and ``shallow``.
        reason: why it is no increment; empty if it is.
        remedy: what to do about it; may be empty.
        fell_back: whether something else had been asked for.
        bitmap: the bitmap that records from the instant on; empty if none does.
        granularity: of it, in bytes; null without one.
        transient_because: why it will not survive the end of QEMU; empty if it will.
        file: the layer's file in the backup's folder; empty in a dry run.
        file_bytes: bytes in it.
        data_bytes: bytes of data in the layer.
        zero_bytes: bytes that the layer says are zeroes.
        root: root of the hashes of its data; empty in a dry run.
    """

    name: str
    qom_path: str
    node_name: str
    size: int
    kind: Literal["full", "increment", "differential", "compared", "shallow"]
    base: str | None
    reason: str
    remedy: str
    fell_back: bool
    bitmap: str
    granularity: int | None
    transient_because: str
    file: str
    file_bytes: int
    data_bytes: int
    zero_bytes: int
    root: str


class LeftOutEntry(Part):
    """A disk of the guest that is not part of the backup.

    Attributes:
        disk: the disk.
        why: why not.
    """

    disk: str
    why: str


class BackupDocument(Document):
    """What ``qmpnbd backup`` tells when a backup is durable and proved.

    Attributes:
        verdict: ``planned`` in a dry run; ``fell-back`` if a disk is not what was asked for, ``not-quiesced`` if the
            guest's filesystems were not at rest although that was asked for, else ``done``.
        monitor: the QMP address.
        qemu: QEMU's version.
        guest: the guest's status.
        repository: the repository.
        chain: the chain of backups.
        id: of the backup; empty in a dry run.
        number: of the backup in its chain.
        folder: of the backup, in the repository; empty in a dry run.
        created: the instant, UTC; empty in a dry run.
        instant: how the point in time was taken; null in a dry run.
        proof: ``hashes`` if all data was read again before the backup was published, ``sizes`` if only its tables were.
        disks: the disks.
        extras: files that are kept beside them.
        left_out: the guest's other disks.
        cleared: what killed runs had left in the repository, and was removed.
        damaged: what in the chain is damaged; nothing was built on that.
        seconds: it took.
    """

    schema_: Literal["qmpnbd.backup/1"] = Field(default="qmpnbd.backup/1", alias="schema")
    verdict: BackupVerdict
    monitor: str
    qemu: str
    guest: str
    repository: str
    chain: str
    id: str
    number: int
    folder: str
    created: str
    instant: InstantEntry | None
    proof: Literal["hashes", "sizes"]
    disks: tuple[BackupDiskEntry, ...]
    extras: tuple[str, ...]
    left_out: tuple[LeftOutEntry, ...]
    cleared: tuple[str, ...]
    damaged: tuple[str, ...]
    seconds: float
