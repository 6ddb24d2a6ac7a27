"""What is written about a backup: the manifest, and the file that makes a folder a repository.

::

    manifest 11                      manifest 12                       manifest 13
      core: what was backed up         core                              core
      layers: how it is stored         layers: base 11                   layers: base 12
      before: none            <------- before: 11, digest of its core <- before: 12, digest of its core
      digest of all of it              digest of all of it               digest of all of it

The **core** is what was true at the instant of the backup; nothing may change it. The **layers** say how it is stored,
and pruning changes them: a layer that others stand on is merged into those. So the link to the backup before holds the
digest of the core alone, and a chain that was reordered, edited or mixed with another one is noticed although pruned
chains stay whole. The digest over everything notices a manifest that rots or was edited on its own.

Whoever can write to the repository can compute digests, too: they guard against accidents, not against an intruder.
Nothing in a manifest is believed: sizes, numbers and names are bounded, and a file name is never a path.
"""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from typing import Annotated, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from qmpnbd.backup.layout import FILE_NAME, MANIFEST
from qmpnbd.errors import RepositoryDamagedError
from qmpnbd.qmp.naming import CHAIN_ID

MAX_MANIFEST = 16 << 20
"""Bytes of a manifest that is read: 1024 disks with 16 KiB each."""

MAX_SIZE = (1 << 63) - 1
"""Bytes of the largest disk; a file's offsets have 63 bits."""

MAX_DISKS = 1024
MAX_EXTRAS = 64
MAX_NUMBER = 10**18 - 1
"""Of a backup in its chain: as long as a number in the name of a bitmap may be (`qmpnbd.qmp.naming`)."""

Model = TypeVar("Model", bound=BaseModel)

_REMEDY = "Fetch the file from a copy of the repository, or have the chain begun anew with a full backup."

Kind = Literal["full", "increment", "differential", "compared", "shallow"]
"""How a disk was backed up: all of it; what was written since the last or an earlier backup; what differs from one
where the bitmap was lost; only what lies over a template that is not in the repository."""

BackupId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{8}$")]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
ChainId = Annotated[str, StringConstraints(pattern=f"^{CHAIN_ID.pattern}$")]
FileName = Annotated[str, StringConstraints(pattern=f"^{FILE_NAME.pattern}$")]
FolderName = Annotated[str, StringConstraints(pattern=r"^[0-9]{4,18}-[0-9a-f]{8}$")]
Text = Annotated[str, StringConstraints(max_length=4096)]
Word = Annotated[str, StringConstraints(max_length=256)]
Size = Annotated[int, Field(ge=0, le=MAX_SIZE)]
Number = Annotated[int, Field(ge=1, le=MAX_NUMBER)]
Granularity = Annotated[int, Field(ge=512, le=1 << 31)]
Milliseconds = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]


class _Stored(BaseModel):
    """Base of all of it: nothing is converted, nothing unknown is passed over."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, serialize_by_alias=True, validate_by_name=True, validate_by_alias=True
    )


class StatementEntry(_Stored):
    """What can be said of the instant; as `qmpnbd.qmp.pointintime.Statement`."""

    recipe: Word
    why: Text
    consistency: Word
    window_ms: Milliseconds
    paused_ms: Milliseconds


class TemplateEntry(_Stored):
    """The image below a shallow layer, which is not in the repository.

    Attributes:
        path: where it was.
        format: its format.
        size: bytes of its disk.
        file_bytes: bytes of its file.
        mtime_ns: when it was written last, in nanoseconds since 1970; a template does not change.
        sha256: of the disk that it holds with all below it (`qmpnbd.backup.fingerprint`); empty if that was not read.
    """

    path: Text
    format: Word
    size: Size
    file_bytes: Size
    mtime_ns: Annotated[int, Field(ge=-MAX_SIZE, le=MAX_SIZE)]
    sha256: Digest | Literal[""] = ""


class ExtraFile(_Stored):
    """Something that is kept beside the disks: facts on the machine, its NVRAM.

    Attributes:
        name: what it is.
        file: its file in the backup's folder.
        bytes: bytes in it.
        sha256: of them.
    """

    name: Word
    file: FileName
    bytes: Size
    sha256: Digest


class ManifestDisk(_Stored):
    """A disk in a backup. The first seven are of the core.

    Attributes:
        name: what the disk is called by its users: qdev id, QOM path or node-name.
        qom_path: of its device.
        node_name: of the node that was read.
        size: bytes of the disk.
        bitmap: the bitmap that records what is written since this backup; empty if there is none.
        granularity: bytes that a bit of it stands for.
        checkpoint: its number; None if there is no bitmap.
        kind: how it was backed up.
        reason: why not as was asked for; empty if it was.
        base: id of the backup whose layer this one stands on; None for a full or a shallow one.
        file: the image.
        file_bytes: bytes in it.
        data_bytes: bytes of data that this layer holds.
        zero_bytes: bytes that read as zeroes in this layer.
        cluster_size: of the image, in bytes.
        compression: of its clusters; empty for none.
        hashes: the file of hashes.
        algorithm: of the hashes.
        root: Merkle root over them (`qmpnbd.backup.hashes`).
        template: what a shallow layer stands on.
        identity: what told the disk's image from those of the other disks at that time (`qmpnbd.backup.plan`).
        merged: how many backups' layers were merged into this one when they were pruned.
    """

    CORE: ClassVar = frozenset({"name", "qom_path", "node_name", "size", "bitmap", "granularity", "checkpoint"})

    name: Annotated[str, StringConstraints(min_length=1, max_length=1024)]
    qom_path: Text
    node_name: Word
    size: Size
    bitmap: Text = ""
    granularity: Granularity | None = None
    checkpoint: Number | None = None
    kind: Kind
    reason: Text = ""
    base: BackupId | None = None
    file: FileName
    file_bytes: Size
    data_bytes: Size
    zero_bytes: Size
    cluster_size: Annotated[int, Field(ge=512, le=2 << 20)]
    compression: Literal["", "zlib", "zstd"] = ""
    hashes: FileName
    algorithm: Literal["sha256"] = "sha256"
    root: Digest
    template: TemplateEntry | None = None
    identity: Text = ""
    merged: Annotated[int, Field(ge=0, le=MAX_NUMBER)] = 0

    @model_validator(mode="after")
    def _stands_on_what_its_kind_says(self) -> Self:
        if (self.base is None) != (self.kind in ("full", "shallow")):
            raise ValueError(f"{self.kind}, and its base is {self.base}")
        if (self.template is None) != (self.kind != "shallow"):
            raise ValueError(f"{self.kind}, and its template is {self.template and self.template.path}")
        return self


class Link(_Stored):
    """The backup before this one in the repository.

    Attributes:
        id: its id.
        core: digest of its core.
    """

    id: BackupId
    core: Digest


class Manifest(_Stored):
    """What a backup is. A run fills in what it knows; `before` and `digest` are filled in when it is published.

    Attributes:
        id: eight hexadecimal digits.
        chain: the chain it belongs to.
        number: in the chain; orders the backups, whatever the clock says.
        parent: id of the newest backup of the chain at that time, be it pruned since or not.
        created: the instant, in UTC: ``2026-11-24T12:00:00Z``, or with microseconds.
        qmpnbd: version of qmpnbd.
        qemu: version of QEMU.
        statement: what can be said of the instant; None if nothing.
        disks: the disks.
        extras: what is kept beside them.
        before: the backup before this one in the repository; None if it is the first.
        digest: SHA-256 of everything else.
    """

    schema_: Literal["qmpnbd.manifest/1"] = Field(default="qmpnbd.manifest/1", alias="schema")
    id: BackupId
    chain: ChainId
    number: Number
    parent: BackupId | None
    created: Annotated[str, StringConstraints(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:]{8}(\.[0-9]{6})?Z$")]
    qmpnbd: Word
    qemu: Word
    statement: StatementEntry | None
    disks: Annotated[tuple[ManifestDisk, ...], Field(max_length=MAX_DISKS)]
    extras: Annotated[tuple[ExtraFile, ...], Field(max_length=MAX_EXTRAS)] = ()
    before: Link | None = None
    digest: Digest | Literal[""] = ""

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        datetime.fromisoformat(self.created)
        if len({disk.name for disk in self.disks}) < len(self.disks):
            raise ValueError("two disks have the same name")
        if len({name.casefold() for name in self.files}) < len(self.files) or MANIFEST in self.files:
            raise ValueError("two files have the same name")
        if self.id in {self.parent, self.before and self.before.id, *(disk.base for disk in self.disks)}:
            raise ValueError("it stands on itself")
        return self

    @property
    def instant(self) -> datetime:
        """The instant that `created` tells."""
        return datetime.fromisoformat(self.created)

    @property
    def files(self) -> tuple[str, ...]:
        """The files of the backup beside the manifest."""
        disks = [name for disk in self.disks for name in (disk.file, disk.hashes)]
        return (*disks, *(extra.file for extra in self.extras))

    @property
    def core_digest(self) -> str:
        """Digest of what nothing may change: SHA-256 of it as JSON with sorted keys and without spaces."""
        core = self.model_dump(mode="json", exclude={"disks", "before", "digest"})
        core["disks"] = [disk.model_dump(mode="json", include=set(ManifestDisk.CORE)) for disk in self.disks]
        return _digest(core)

    def sealed(self) -> Manifest:
        """Returns the manifest with its digest."""
        return self.model_copy(update={"digest": self._own_digest()})

    def _own_digest(self) -> str:
        return _digest(self.model_dump(mode="json", exclude={"digest"}))

    def to_json(self) -> bytes:
        """Returns what is written to the file."""
        return _file_of(self)

    @classmethod
    def of_json(cls, content: bytes, where: str) -> Manifest:
        """Reads a manifest.

        Args:
            content: the bytes of the file.
            where: the file, for messages.

        Raises:
            RepositoryDamagedError: it is none, or not what was written.
        """
        found = _validated(cls, content, where)
        if found.digest != found._own_digest():
            what = "the manifest is not what was written: its digest is another one"
            raise RepositoryDamagedError(what, where=where, remedy=_REMEDY)
        return found


class Marker(_Stored):
    """What makes a folder a repository.

    Attributes:
        id: of the repository: 32 hexadecimal digits.
        created: when it was made, in UTC.
    """

    schema_: Literal["qmpnbd.repository-marker/1"] = Field(default="qmpnbd.repository-marker/1", alias="schema")
    id: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
    created: Word

    def to_json(self) -> bytes:
        """Returns what is written to the file."""
        return _file_of(self)

    @classmethod
    def of_json(cls, content: bytes, where: str) -> Marker:
        """Reads the file; as `Manifest.of_json`."""
        return _validated(cls, content, where)


class Replaced(_Stored):
    """New files of a backup.

    Attributes:
        folder: of the backup.
        files: in the order in which they take the place of the old ones.
    """

    folder: FolderName
    files: Annotated[tuple[FileName, ...], Field(max_length=2 * MAX_DISKS + 1)]


class Journal(_Stored):
    """A change of a chain that was decided on (`qmpnbd.backup.journal`).

    Attributes:
        replaced: backups that get new files.
        removed: folders of backups that go.
    """

    schema_: Literal["qmpnbd.journal/1"] = Field(default="qmpnbd.journal/1", alias="schema")
    replaced: tuple[Replaced, ...]
    removed: tuple[FolderName, ...]

    def to_json(self) -> bytes:
        """Returns what is written to the file."""
        return _file_of(self)

    @classmethod
    def of_json(cls, content: bytes, where: str) -> Journal:
        """Reads the file; as `Manifest.of_json`."""
        return _validated(cls, content, where)


def now() -> str:
    """Returns the time in UTC as manifests have it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _file_of(model: BaseModel) -> bytes:
    return (json.dumps(model.model_dump(mode="json"), indent=1) + "\n").encode("ascii")


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()


def _validated(model: type[Model], content: bytes, where: str) -> Model:
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        what = f"it cannot be understood: {place + ': ' if place else ''}{first['msg']}"
        raise RepositoryDamagedError(what, where=where, remedy=_REMEDY) from error
