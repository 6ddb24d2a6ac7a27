"""The document of ``qmpnbd export``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qmpnbd.report.model.parts import Document, Part


class DiskExportEntry(Part):
    """An export that was made for other tools.

    Attributes:
        disk: the disk, as it can be addressed; for an image file, its node.
        qom_path: the device's QOM path; empty for a node without a device.
        node_name: the node that was exported. An export follows the block graph, so it may stand on another later.
        export: the export's id inside QEMU, and its name for NBD clients.
        uri: where NBD clients find it. A client's own certificates or secret are not in it.
        size: bytes.
        read_only: whether clients may only read.
        contexts: the metadata contexts it offers.
        allocation_depth: file with the allocation depth that the disk's own chain had at the instant (``qmpnbd.map/1``,
            with a second map, ``presumed``: 1 where the first stands on a bitmap's word alone); null if none was made.
        variable: the environment variable that holds the URI for ``--exec``.
    """

    disk: str
    qom_path: str
    node_name: str
    export: str
    uri: str
    size: int
    read_only: bool
    contexts: tuple[str, ...]
    allocation_depth: str | None
    variable: str


class InstantEntry(Part):
    """How a point in time was taken.

    Attributes:
        recipe: ``backup``, ``copy-before-write`` or ``snapshot``.
        why: the reason for this recipe.
        consistency: ``frozen`` (the guest's filesystems were at rest), ``paused`` or ``crash-consistent``.
        reason: why not ``frozen`` although that was wished for; else empty.
        remedy: what to do about it; may be empty.
        frozen_ms: for how many milliseconds the guest's filesystems were held; 0 if they were not.
        window_ms: within how many milliseconds the instant lies.
        paused_ms: for how many milliseconds the guest was paused; 0 if it was not.
    """

    recipe: str
    why: str
    consistency: Literal["frozen", "paused", "crash-consistent"]
    reason: str
    remedy: str
    frozen_ms: float
    window_ms: float
    paused_ms: float


class IncrementEntry(Part):
    """A disk's part in the checkpoint that began.

    Attributes:
        disk: the disk.
        bitmap: the bitmap that records from the instant on; empty for a disk that is read-only.
        base: number of the checkpoint that the increment counts from; null for a full backup.
        increment: the exported bitmaps whose union is the increment.
        reason: why full; empty for an increment.
        remedy: what to do about it.
        transient_because: why `bitmap` vanishes with QEMU; empty if it persists.
    """

    disk: str
    bitmap: str
    base: int | None
    increment: tuple[str, ...]
    reason: str
    remedy: str
    transient_because: str


class BegunCheckpointEntry(Part):
    """The checkpoint that began at the instant.

    Attributes:
        chain: the chain of backups.
        number: of the checkpoint.
        backup: id of the backup that begins with it; it is in the bitmaps' names.
        disks: each disk's part.
    """

    chain: str
    number: int
    backup: str
    disks: tuple[IncrementEntry, ...]


class ExportDocument(Document):
    """What ``qmpnbd export`` tells when everything is up.

    Attributes:
        monitor: the QMP address; null for an image file.
        image: the image file; null for a running QEMU.
        qemu: QEMU's version.
        guest: the guest's status when it was exported.
        consistent: whether the exports show one instant that stays readable; if not, they move with the guest.
        exports: the exports.
        instant: the point in time that they show; null if they show none.
        checkpoint: the checkpoint that began at that instant; null if none did.
    """

    schema_: Literal["qmpnbd.export/1"] = Field(default="qmpnbd.export/1", alias="schema")
    monitor: str | None
    image: str | None
    qemu: str
    guest: str
    consistent: bool
    exports: tuple[DiskExportEntry, ...]
    instant: InstantEntry | None
    checkpoint: BegunCheckpointEntry | None
