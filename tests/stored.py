"""Backups made with qemu-img and qemu-io, as a run would make them; no QEMU runs for it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qmpnbd.backup.backups import Backup
from qmpnbd.backup.draft import Draft
from qmpnbd.backup.hashes import Hashes
from qmpnbd.backup.layer import Layer
from qmpnbd.backup.manifest import ExtraFile, Kind, Manifest, ManifestDisk, TemplateEntry, now
from qmpnbd.backup.repository import Repository
from qmpnbd.deadline import Deadline
from qmpnbd.qmp.naming import new_backup
from tests.servers import qemu_img, qemu_io

CHAIN = "nightly"
SIZE = 8 << 20


@dataclass
class Stored:
    """A disk of a backup to be made.

    Attributes:
        writes: commands of qemu-io that make its layer.
        base: the backup that it stands on; None for a full one.
        kind: None for what goes with the base.
        size: bytes of the disk.
        cluster_size: of the image.
        template: what a shallow layer stands on.
        compression: what the manifest says.
    """

    writes: Sequence[str] = ()
    base: Backup | None = None
    kind: Kind | None = None
    size: int = SIZE
    cluster_size: int = 65536
    template: TemplateEntry | None = None
    compression: Literal["", "zstd"] = ""


def make_backup(
    repository: Repository,
    disks: Mapping[str, Stored],
    *,
    chain: str = CHAIN,
    created: str | None = None,
    extras: Mapping[str, bytes] | None = None,
) -> Backup:
    """Makes a backup and publishes it."""
    with repository.lock("test"):
        draft, manifest = make_draft(repository, disks, chain=chain, created=created, extras=extras)
        return draft.publish(manifest)


def make_draft(
    repository: Repository,
    disks: Mapping[str, Stored],
    *,
    chain: str = CHAIN,
    created: str | None = None,
    extras: Mapping[str, bytes] | None = None,
) -> tuple[Draft, Manifest]:
    """Makes a backup without publishing it; the repository is locked."""
    number = repository.newest_number(chain) + 1
    newest = repository.inspect(chain)[-1:]
    draft = repository.begin(chain, new_backup(), number)
    files = [_extra(draft, name, content) for name, content in (extras or {}).items()]
    manifest = Manifest(
        id=draft.name.id,
        chain=chain,
        number=number,
        parent=newest[0].name.id if newest else None,
        created=created or now(),
        qmpnbd="0.1.0",
        qemu="7.2.0",
        statement=None,
        disks=tuple(_disk(draft, name, disk) for name, disk in disks.items()),
        extras=tuple(files),
    )
    return draft, manifest


def _extra(draft: Draft, name: str, content: bytes) -> ExtraFile:
    (draft.path / name).write_bytes(content)
    return ExtraFile(name=name, file=name, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def _disk(draft: Draft, name: str, disk: Stored) -> ManifestDisk:
    image, hashes_file = draft.disk_path(name), draft.hashes_path(name)
    backing = ["-u", "-F", "qcow2", "-b", draft.backing_name(disk.base, name)] if disk.base else []
    if disk.template is not None:
        backing = ["-u", "-F", disk.template.format, "-b", disk.template.path]
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={disk.cluster_size}", *backing, image, str(disk.size))
    if disk.writes:
        qemu_io(image, *disk.writes)
    hashes = hashes_of(image)
    hashes.save(hashes_file)
    totals = hashes.content.totals()
    return ManifestDisk(
        name=name,
        qom_path=f"/machine/peripheral/{name}",
        node_name=f"node-{name}"[:31],
        size=disk.size,
        kind=disk.kind or ("increment" if disk.base else "shallow" if disk.template else "full"),
        template=disk.template,
        base=disk.base.manifest.id if disk.base else None,
        file=image.name,
        file_bytes=image.stat().st_size,
        data_bytes=totals.get(1, 0),
        zero_bytes=totals.get(2, 0),
        cluster_size=disk.cluster_size,
        compression=disk.compression,
        hashes=hashes_file.name,
        root=hashes.root(),
    )


def hashes_of(image: Path) -> Hashes:
    """The hashes of a layer, by reading it."""
    with Layer(image, Deadline(60)) as layer:
        content = layer.content()
        return Hashes(content, b"".join(digest for _, _, digest in layer.digests(content)))
