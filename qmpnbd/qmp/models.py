"""What QEMU says over QMP, as far as it is read here.

Models are named after the types in QEMU's ``qapi/block-core.json``, ``block-export.json`` and ``run-state.json``.
Fields that are not read are not modelled, and unknown ones are ignored, so a newer QEMU is no surprise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from qmpnbd.errors import NotAMonitorError

T = TypeVar("T")


class QmpModel(BaseModel):
    """Base of all models: frozen, tolerant of unknown fields, QMP's dashed names as aliases."""

    model_config = ConfigDict(frozen=True, extra="ignore", alias_generator=lambda name: name.replace("_", "-"))


class VersionTriple(QmpModel):
    """QEMU's release number."""

    major: int
    minor: int
    micro: int


class VersionInfo(QmpModel):
    """Reply of ``query-version``."""

    qemu: VersionTriple
    package: str

    def __str__(self) -> str:
        number = f"{self.qemu.major}.{self.qemu.minor}.{self.qemu.micro}"
        return f"{number} ({self.package})" if self.package else number


class StatusInfo(QmpModel):
    """Reply of ``query-status``: the state of the guest."""

    status: str
    running: bool


class MigrationInfo(QmpModel):
    """Reply of ``query-migrate``; no status if there never was a migration."""

    status: str | None = None


class FormatData(QmpModel):
    """What a format tells of itself: qcow2 its version, ``0.10`` or ``1.1``, and whether it has subclusters."""

    compat: str | None = None
    extended_l2: bool = False


class FormatInfo(QmpModel):
    """QMP's ``ImageInfoSpecific``."""

    data: FormatData = FormatData()


class ImageInfo(QmpModel):
    """What a node says about its image; of `filename` only a protocol node's is a plain file name."""

    filename: str
    virtual_size: int
    cluster_size: int | None = None
    format_specific: FormatInfo | None = None


class BlockDirtyInfo(QmpModel):
    """A dirty bitmap of a node; job-internal ones have no name. `count` is in bytes."""

    name: str | None = None
    count: int
    granularity: int
    recording: bool
    busy: bool
    persistent: bool
    inconsistent: bool = False


class BlockDeviceInfo(QmpModel):
    """A node, as ``query-named-block-nodes`` lists it and as ``query-block`` shows what a disk holds."""

    node_name: str | None = None
    drv: str
    ro: bool
    image: ImageInfo
    write_threshold: int = Field(alias="write_threshold")
    dirty_bitmaps: list[BlockDirtyInfo] = Field(default_factory=list)


class BlockInfo(QmpModel):
    """Member of the reply of ``query-block``: a drive, with the device it is attached to."""

    device: str
    qdev: str | None = None
    inserted: BlockDeviceInfo | None = None


class GraphNode(QmpModel):
    """A vertex of the block graph: a node, a block backend or a job."""

    id: int
    type: str
    name: str


class GraphEdge(QmpModel):
    """An edge of the block graph; `name` is the child's role: ``file``, ``backing``, ``root`` and others."""

    parent: int
    child: int
    name: str


class GraphReply(QmpModel):
    """Reply of ``x-debug-query-block-graph``."""

    nodes: list[GraphNode]
    edges: list[GraphEdge]


class BlockExportInfo(QmpModel):
    """Member of the reply of ``query-block-exports``."""

    id: str
    type: str
    node_name: str


class JobInfo(QmpModel):
    """Member of the reply of ``query-jobs``; `error` is told once the job has failed."""

    id: str
    type: str
    status: str
    current_progress: int
    error: str | None = None


class BlockExportDeleted(QmpModel):
    """Data of ``BLOCK_EXPORT_DELETED``."""

    id: str


class JobStatusChange(QmpModel):
    """Data of ``JOB_STATUS_CHANGE``; the last status is ``null``."""

    id: str
    status: str


class BlockWriteThreshold(QmpModel):
    """Data of ``BLOCK_WRITE_THRESHOLD``."""

    node_name: str
    amount_exceeded: int
    write_threshold: int


EVENTS: Mapping[str, type[QmpModel]] = {
    "BLOCK_EXPORT_DELETED": BlockExportDeleted,
    "BLOCK_WRITE_THRESHOLD": BlockWriteThreshold,
    "JOB_STATUS_CHANGE": JobStatusChange,
}
"""The events whose data is read."""


class SchemaMember(QmpModel):
    """A member of an object type, of an alternate (without a name), or of an enumeration (without a type).

    `default` is there, and null, for a member that may be left out: whether it is there is all that it says.
    """

    name: str | None = None
    type: str = ""
    default: object = None

    @property
    def optional(self) -> bool:
        """Whether it may be left out."""
        return "default" in self.model_fields_set


class SchemaVariant(QmpModel):
    """What an object has beside its own members when its tag has the value `case`."""

    case: str
    type: str


class SchemaInfo(QmpModel):
    """Member of the reply of ``query-qmp-schema``; which fields there are depends on `meta_type`."""

    name: str
    meta_type: str
    arg_type: str | None = None
    ret_type: str | None = None
    element_type: str | None = None
    members: list[SchemaMember] = Field(default_factory=list)
    variants: list[SchemaVariant] = Field(default_factory=list)
    values: list[str] = Field(default_factory=list)


class ErrorDetail(QmpModel):
    """What QEMU says of a command that it refused."""

    error_class: str = Field(alias="class")
    desc: str


class ErrorReply(QmpModel):
    """The reply to a command that QEMU refused, whole; read here only where qemu.qmp does not."""

    error: ErrorDetail


class Reply(QmpModel):
    """The reply to a command that was carried out, whole."""

    value: object = Field(alias="return")


class ObjectPropertyInfo(QmpModel):
    """Member of the reply of ``qom-list``: a property, or a child (of ``/objects``, a user's object)."""

    name: str
    type: str


def parse_reply(kind: type[T], reply: object, *, command: str, where: str) -> T:
    """Reads the reply of a command.

    Args:
        kind: a model, or a list of models.
        reply: the decoded JSON.
        command: the QMP command, for the message.
        where: the monitor, for the message.

    Raises:
        NotAMonitorError: the reply does not have the shape the QMP reference gives it.
    """
    return _parsed(kind, reply, f"unexpected reply to {command}", where)


def parse_event(kind: type[T], data: object, *, event: str, where: str) -> T:
    """Reads the data of an event; arguments and errors as for `parse_reply`."""
    return _parsed(kind, data, f"unexpected data of {event}", where)


def _parsed(kind: type[T], value: object, complaint: str, where: str) -> T:
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise NotAMonitorError(
            f"{complaint}: {place}: {first['msg']}",
            where=where,
            remedy="This is not a QEMU monitor, or of a release that is not known here.",
        ) from error
