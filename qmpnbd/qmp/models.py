"""What QEMU says over QMP, as far as it is read here.

Models are named after the types in QEMU's ``qapi/block-core.json``, ``block-export.json`` and ``run-state.json``.
Fields that are not read are not modelled, and unknown ones are ignored, so a newer QEMU is no surprise.
"""

from __future__ import annotations

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


class MigrationInfo(QmpModel):
    """Reply of ``query-migrate``; no status if there never was a migration."""

    status: str | None = None


class FormatData(QmpModel):
    """What a format says of itself, as far as it is asked: a qcow2 image's subclusters."""

    extended_l2: bool = False


class FormatInfo(QmpModel):
    """Member of `ImageInfo`: a format's own words."""

    data: FormatData = FormatData()


class ImageInfo(QmpModel):
    """What a node says about its image; of `filename` only a protocol node's is a plain file name."""

    filename: str
    virtual_size: int
    cluster_size: int | None = None
    format_specific: FormatInfo | None = None


class BlockDirtyInfo(QmpModel):
    """A dirty bitmap of a node; job-internal ones have no name."""

    name: str | None = None


class BlockDeviceInfo(QmpModel):
    """A node, as ``query-named-block-nodes`` lists it and as ``query-block`` shows what a disk holds."""

    node_name: str | None = None
    drv: str
    ro: bool
    image: ImageInfo
    dirty_bitmaps: list[BlockDirtyInfo] = Field(default_factory=list)


class BlockInfo(QmpModel):
    """Member of the reply of ``query-block``: a drive, with the device it is attached to."""

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


class ObjectProperty(QmpModel):
    """Member of the reply of ``qom-list``: of ``/objects``, a user's object."""

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
    try:
        return TypeAdapter(kind).validate_python(reply)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise NotAMonitorError(
            f"unexpected reply to {command}: {place}: {first['msg']}",
            where=where,
            remedy="This is not a QEMU monitor, or of a release that is not known here.",
        ) from error
