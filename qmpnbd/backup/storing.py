"""One disk's part in a backup: its layer, or of firmware a plain copy, written into the draft; for any threads.

::

    maps over NBD, decision -> content -> qcow2 beside its place, hashed on the way -> fsync, name -> hashes, fsync

Nothing is proved here: `qmpnbd.backup.prove_layer` reads it again once the point in time has been released.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from qmpnbd.backup.backups import Backup
from qmpnbd.backup.compare_base import differing
from qmpnbd.backup.content import ABSENT, DATA, ZERO, aligned
from qmpnbd.backup.copy import CopyOptions, copy
from qmpnbd.backup.destination import forget
from qmpnbd.backup.draft import Draft
from qmpnbd.backup.fingerprint import sha256_of
from qmpnbd.backup.hashes import Hashes
from qmpnbd.backup.manifest import ExtraFile, ManifestDisk, TemplateEntry
from qmpnbd.backup.pace import Pace
from qmpnbd.backup.plan import Decision, unreadable
from qmpnbd.backup.proof import prove
from qmpnbd.backup.prove_layer import file_bytes
from qmpnbd.backup.qcow2_target import Backing, Qcow2Target
from qmpnbd.backup.raw_target import RawTarget
from qmpnbd.backup.sources import ImageSource, NbdSource, Source
from qmpnbd.backup.tally import Tally
from qmpnbd.backup.targets import Target
from qmpnbd.backup.task import DiskTask
from qmpnbd.deadline import Deadline
from qmpnbd.errors import ImageError, RepositoryDamagedError, TargetError
from qmpnbd.export.joining import Join, straight
from qmpnbd.extents import ExtentMap
from qmpnbd.images.files import open_chain
from qmpnbd.printable import printable

CLUSTER = 1 << 16
"""Bytes of a cluster of the layers: QEMU's default for images and bitmaps."""


@dataclass(frozen=True, slots=True)
class Storing:
    """How layers are written.

    Attributes:
        draft: where.
        backups: what they can stand on, by id.
        compression: of their data.
        pace: limits the data that is read of all disks together; None for no limit.
        tally: told how far each disk is; None to tell nobody.
        join: how to connect to the disks.
    """

    draft: Draft
    backups: Mapping[str, Backup]
    compression: Literal["", "zstd"] = ""
    pace: Pace | None = None
    tally: Tally | None = None
    join: Join = straight

    def disk(self, task: DiskTask, deadline: Deadline) -> StoredDisk:
        """Writes a disk's layer and its hashes.

        Raises:
            NbdError: the disk cannot be read.
            TargetError: the draft cannot be written.
            DeadlineError: the time is over.
        """
        with self.join(partial(NbdSource.connect, task.uri, deadline=deadline)) as source:
            decision, content = self._content(task, source, deadline)
            path = self.draft.disk_path(task.name)
            backing, template = self._below(task, decision)
            target = Qcow2Target.create(
                path, content, backing=backing, cluster_size=CLUSTER, compression=self.compression
            )
            digests = self._copied(task.name, source, target, content, deadline)
        hashes = Hashes(content, digests)
        hashes.save(self.draft.hashes_path(task.name))
        totals = content.totals()
        entry = ManifestDisk(
            name=task.name,
            qom_path=task.qom_path,
            node_name=task.node_name,
            size=task.size,
            bitmap=task.bitmap,
            granularity=task.granularity,
            checkpoint=task.checkpoint,
            kind=decision.kind,
            reason=decision.reason,
            base=decision.base,
            file=path.name,
            file_bytes=file_bytes(path),
            data_bytes=totals.get(DATA, 0),
            zero_bytes=totals.get(ZERO, 0),
            cluster_size=CLUSTER,
            compression=self.compression,
            hashes=self.draft.hashes_path(task.name).name,
            root=hashes.root(),
            template=template,
            identity=task.identity,
        )
        return StoredDisk(replace(task, decision=decision), entry, path, hashes)

    def flash(self, task: DiskTask, deadline: Deadline) -> ExtraFile:
        """Writes a plain copy of firmware or its variables, and proves it; raises as `disk`, and NotProvedError."""
        path = self.draft.disk_path(task.name).with_suffix(".nvram.raw")
        with self.join(partial(NbdSource.connect, task.uri, deadline=deadline)) as source:
            content = source.content(deadline)
            target = RawTarget.create(path, source.size)
            hashes = Hashes(content, self._copied(task.name, source, target, content, deadline))
        forget(str(path))
        with ImageSource.open(str(path), format="raw", deadline=deadline) as there:
            prove(there, hashes, deadline)
        digest = sha256_of(str(path), deadline)
        return ExtraFile(name=task.name, file=path.name, bytes=file_bytes(path), sha256=digest)

    def _content(self, task: DiskTask, source: Source, deadline: Deadline) -> tuple[Decision, ExtentMap]:
        """Returns what the layer holds, in whole clusters; all of the disk if what it should stand on is broken."""
        decision = task.decision
        try:
            layers = [self.backups[each].hashes(task.name).content for each in decision.layers]
            below = self._held(task.name, decision.base) if decision.by_bitmap else None
            content = task.content(layers, CLUSTER, deadline, below=below, join=self.join)
            if decision.kind == "compared" and decision.base is not None:
                content = self._differing(task.name, decision.base, source, content, deadline)
        except (RepositoryDamagedError, ImageError):
            decision = unreadable(task.decision)
            content = replace(task, decision=decision).content((), CLUSTER, deadline, join=self.join)
        return decision, aligned(content, CLUSTER)

    def _differing(self, disk: str, base: str, source: Source, content: ExtentMap, deadline: Deadline) -> ExtentMap:
        """Returns where a disk differs from a backup of it."""
        image = self.backups[base].image(disk)
        with open_chain(str(image), format="qcow2", deadline=deadline) as chain:
            if chain.size != source.size:
                what = f"its disk has {chain.size} bytes, and {source.size} were backed up"
                raise RepositoryDamagedError(what, where=printable(str(image)))
            return differing(source, content, chain, CLUSTER, deadline, pace=self.pace)

    def _held(self, disk: str, base: str | None) -> ExtentMap | None:
        """Returns what a backup holds of a disk, with all that it stands on: `ABSENT` where that is a template's."""
        found: ExtentMap | None = None
        while base is not None:
            backup = self.backups[base]
            entry = backup.disk(disk)
            content = Hashes.load(backup.path / entry.hashes).content  # its root is not computed: millions of hashes
            if content.size != entry.size:
                raise RepositoryDamagedError("the hashes are those of another disk", where=printable(str(backup.path)))
            found = content if found is None else content.overlay(found, ABSENT)
            base = entry.base
        return found

    def _below(self, task: DiskTask, decision: Decision) -> tuple[Backing | None, TemplateEntry | None]:
        if decision.base is not None:
            return Backing(self.draft.backing_name(self.backups[decision.base], task.name), "qcow2", task.size), None
        if decision.kind != "shallow" or task.template is None:
            return None, None
        known = task.template
        try:
            status = Path(known.path).stat()
        except OSError as error:
            what = f"the template cannot be seen any more: {error.strerror}"
            raise TargetError(what, where=printable(known.path), remedy="Make the backup without --shallow.") from error
        entry = TemplateEntry(
            path=known.path,
            format=known.format,
            size=known.size,
            file_bytes=status.st_size,
            mtime_ns=status.st_mtime_ns,
        )
        return Backing(known.path, known.format, known.size), entry

    def _copied(self, disk: str, source: Source, target: Target, content: ExtentMap, deadline: Deadline) -> bytes:
        """Copies, and gives the target its name; after a failure nothing of it is left."""
        if self.tally is not None:
            self.tally.begin(disk, content.totals().get(DATA, 0))
        progress = None if self.tally is None else partial(self.tally.note, disk)
        options = CopyOptions(hashes=True, pace=self.pace, progress=progress)
        try:
            copied = copy(source, target, content, options, deadline)
            target.finish()
        except BaseException:
            target.discard()
            raise
        return copied.digests or b""


@dataclass(frozen=True, slots=True)
class StoredDisk:
    """A layer that was written, and is not yet proved.

    Attributes:
        task: what it was written for, with what was decided in the end.
        entry: what the manifest will say of it.
        path: the image, in the draft.
        hashes: what it must hold.
    """

    task: DiskTask
    entry: ManifestDisk
    path: Path
    hashes: Hashes
