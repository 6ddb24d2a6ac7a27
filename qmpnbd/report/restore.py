"""From what was restored to the document of ``qmpnbd restore``, and to text; pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qmpnbd.backup.point import Point
from qmpnbd.backup.restore import Restored
from qmpnbd.backup.restore_machine import RestoredMachine
from qmpnbd.printable import printable as shown
from qmpnbd.report.model import RestoredFileEntry, RestoredLayerEntry, RestoreDocument, RestoreMachineDocument
from qmpnbd.report.sizes import human_size


def restore_document(repository: str, restored: Restored) -> RestoreDocument:
    """Describes a restore."""
    return _document(
        repository,
        restored.point,
        target=restored.destination.target,
        form=restored.destination.form,
        data_bytes=restored.data_bytes,
        zero_bytes=restored.zero_bytes,
        unproved_bytes=restored.unproved_bytes,
        read_back_bytes=restored.read_back_bytes,
        seconds=restored.seconds,
    )


def instant_document(repository: str, point: Point, target: str, uri: str) -> RestoreDocument:
    """Describes an instant restore that has begun.

    Args:
        repository: as it was asked for.
        point: from what.
        target: the overlay.
        uri: where it is served; empty if it is not.
    """
    return _document(repository, point, target=target, form="served" if uri else "overlay", uri=uri)


def _document(repository: str, point: Point, **more: object) -> RestoreDocument:
    manifest = point.backup.manifest
    facts: dict[str, Any] = {
        "repository": repository,
        "chain": manifest.chain,
        "backup": manifest.id,
        "number": manifest.number,
        "created": manifest.created,
        "disk": point.disk.name,
        "size": point.disk.size,
        "layers": tuple(_layers(point)),
    }
    return RestoreDocument(**facts, **more)


def _layers(point: Point) -> Iterator[RestoredLayerEntry]:
    for backup in point.layers:
        disk = backup.disk(point.disk.name)
        yield RestoredLayerEntry(
            backup=backup.manifest.id, number=backup.manifest.number, kind=disk.kind, file=str(backup.path / disk.file)
        )


def machine_document(repository: str, restored: RestoredMachine) -> RestoreMachineDocument:
    """Describes the restore of a whole machine."""
    manifest = restored.backup.manifest
    return RestoreMachineDocument(
        repository=repository,
        chain=manifest.chain,
        backup=manifest.id,
        number=manifest.number,
        created=manifest.created,
        target=restored.target,
        seconds=restored.seconds,
        disks=tuple(restore_document(repository, each) for each in restored.disks),
        files=tuple(RestoredFileEntry(name=each.name, file=each.file, bytes=each.bytes) for each in restored.files),
    )


def machine_text(document: RestoreMachineDocument) -> str:
    """Returns the result of the restore of a whole machine."""
    lines = [line for disk in document.disks for line in _lines(disk)]
    lines += [
        shown(f"{file.name}: {human_size(file.bytes)} in {document.target}/{file.file}, proved")
        for file in document.files
    ]
    return "".join(f"{line}\n" for line in lines)


def restore_text(document: RestoreDocument) -> str:
    """Returns the result of a restore."""
    return "".join(f"{line}\n" for line in _lines(document))


def _lines(document: RestoreDocument) -> Iterator[str]:
    what = f"disk {document.disk} of backup {document.number} ({document.backup}) of {document.created}"
    if document.form in ("overlay", "served"):
        yield shown(f"{what}: {document.uri or document.target}")
        yield shown(f"  {human_size(document.size)}, stands on the repository until it is filled: {document.target}")
        return
    yield shown(f"{what}: restored to {document.target} ({document.form})")
    yield (
        f"  {human_size(document.data_bytes or 0)} of data, {human_size(document.zero_bytes or 0)} of zeroes, "
        f"in {document.seconds or 0:.1f} s; {human_size(document.read_back_bytes or 0)} read back and proved"
    )
    if document.unproved_bytes:
        yield f"  {human_size(document.unproved_bytes)} came from the template, which has no hashes"
