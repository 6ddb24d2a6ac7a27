"""What several documents are made of."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from qmpnbd import __version__
from qmpnbd.errors import QmpnbdError


class Part(BaseModel):
    """Base of everything in a document: frozen, and tolerant of fields that a later release has added."""

    model_config = ConfigDict(frozen=True, extra="ignore", serialize_by_alias=True, validate_by_name=True)


class ErrorEntry(Part):
    """What went wrong.

    Attributes:
        type: the error's class, as in `qmpnbd.errors`.
        exit_code: the exit code of that class.
        where: the socket, file, disk or export it concerns.
        what: what went wrong.
        remedy: what to do next; may be empty.
    """

    type: str
    exit_code: int
    where: str
    what: str
    remedy: str

    @classmethod
    def of(cls, error: QmpnbdError) -> ErrorEntry:
        """Describes an error."""
        return cls(
            type=type(error).__name__,
            exit_code=error.exit_code,
            where=error.where,
            what=error.what,
            remedy=error.remedy,
        )


class LayerEntry(Part):
    """A layer of a backing chain.

    Attributes:
        layer_index: 0 = active layer, what ``qemu-img map`` calls depth.
        allocation_depth: what NBD says of data held by this layer.
        file: the image file.
        format: ``qcow2`` or ``raw``.
        format_probed: whether the format was guessed from the file's content because nothing told it.
        node_name: the node in QEMU; empty where no QEMU was asked.
        size: bytes the layer shows to the one above.
        cluster_size: bytes in a cluster; null for raw.
    """

    layer_index: int
    allocation_depth: int
    file: str
    format: str
    format_probed: bool
    node_name: str
    size: int
    cluster_size: int | None


class ExtentEntry(Part):
    """A run of bytes with one status.

    Attributes:
        offset: first byte.
        length: bytes.
        value: the status, as the context defines it.
    """

    offset: int
    length: int
    value: int


class UnreadableEntry(Part):
    """A run of bytes that QEMU would answer with an I/O error for.

    Attributes:
        layer_index: the layer whose tables are wrong there.
        file: its file.
        offset: first byte, in the disk.
        end: the byte after the last one.
        reason: which entry is wrong, and how.
    """

    layer_index: int
    file: str
    offset: int
    end: int
    reason: str


class RangeEntry(Part):
    """A run of bytes."""

    offset: int
    end: int


class Document(Part):
    """Base of all documents.

    Attributes:
        generator: what made it.
    """

    generator: str = f"qmpnbd {__version__}"
