"""The documents this package gives out: one versioned schema each, the same in the library and in ``--json``.

A document names its schema (``qmpnbd.validate/1``). Within a number, fields are only added; anything else is a new
number. The JSON schemas under ``docs/schema`` are generated from here. Offsets, ends, lengths and sizes are bytes;
extents are half-open.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from qmpnbd import __version__
from qmpnbd.errors import QmpnbdError

Verdict = Literal["agreed", "discrepancy", "incomplete", "error", "not-judged"]
CheckVerdict = Literal["clean", "leaks", "corrupt"]


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


class DepthTotal(Part):
    """How many bytes have one allocation depth."""

    allocation_depth: int
    bytes: int


class StepEntry(Part):
    """What one layer said about a byte while the depth was computed.

    Attributes:
        layer_index: 0 = active layer.
        file: the image file.
        read: the table entries that were read, and what they mean.
    """

    layer_index: int
    file: str
    read: str


class DiscrepancyEntry(Part):
    """A run of bytes for which the server and the image files say different things.

    Attributes:
        offset: first byte.
        end: the byte after the last one.
        served: the status as QEMU serves it; of content the first byte that differs.
        computed: the status computed from the files; of content that byte in them.
        file: the layer that decided what was computed; null if no explanation was asked for.
        why: what was read for the first byte, from the active layer down to the one that decided.
        compared: what was compared: a metadata context, or ``content``.
        served_sha256: of content, the SHA-256 of the bytes served for the whole run, in hexadecimal; else null.
        computed_sha256: of content, that of the bytes in the files; else null.
    """

    offset: int
    end: int
    served: int
    computed: int
    file: str | None
    why: tuple[StepEntry, ...]
    compared: str = "qemu:allocation-depth"
    served_sha256: str | None = None
    computed_sha256: str | None = None


class RangeEntry(Part):
    """A run of bytes."""

    offset: int
    end: int


class ComparedEntry(Part):
    """One of the things that were compared.

    Attributes:
        what: a metadata context (``qemu:allocation-depth``, ``base:allocation``, ``qemu:dirty-bitmap:NAME``), or
            ``content``.
        verdict: on this alone.
        bytes: bytes compared: the disk's size for a context.
        discrepancy_count: differing runs.
        discrepancy_bytes: bytes in them.
        set_aside_bytes: bytes that could not be judged.
        note: what a reader should know: why it was left out, or how a sample was chosen; may be empty.
    """

    what: str
    verdict: Verdict
    bytes: int
    discrepancy_count: int = 0
    discrepancy_bytes: int = 0
    set_aside_bytes: int = 0
    note: str = ""


class FileEntry(Part):
    """A file as it was when it was read: by this, a later run knows whether it is still the same.

    Attributes:
        path: its name.
        device: number of the device it lies on.
        inode: its number there.
        size: bytes.
        mtime_ns: when its content was changed last, in nanoseconds.
        ctime_ns: when anything of it was changed last; unlike `mtime_ns` nobody can set it back.
        settled: whether that was so long before it was read that a later change cannot bear the same times.
    """

    path: str
    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int
    settled: bool


class DiskReport(Part):
    """The validation of one disk.

    Attributes:
        name: the disk as it was addressed.
        qom_path: the device; empty for a node without one.
        node_name: the node that was exported.
        verdict: ``agreed``; ``discrepancy`` (at least one); ``incomplete`` (none found, but not everything could be
            judged because the guest was writing there or the graph changed); ``error``; ``not-judged`` (the run ended
            before it was its turn).
        size: bytes of the disk as served.
        computed_size: bytes of the disk according to its files; differing from `size` is a discrepancy.
        layers: the backing chain, active layer first.
        totals: bytes at each served allocation depth.
        extents: runs of equal allocation depth in the served map.
        strip: the served map in small: the depth that most bytes have in each of 64 equal parts of the disk.
        rounds: how often served and computed were read.
        discrepancies: the first ones, in order.
        discrepancy_count: all of them.
        discrepancy_bytes: bytes in all of them.
        set_aside: the first runs that could not be judged.
        set_aside_bytes: bytes in all of them.
        unfinished: why not everything was judged: ``written`` (the guest wrote there in every round), ``graph`` (the
            block graph or the size of the disk never stood still), or empty.
        files_verified: whether the files read were seen to be those that QEMU has open; false where the kernel does
            not tell, as for a monitor on TCP.
        seconds: time taken.
        error: what went wrong; null unless the verdict is ``error``.
        source: where it was found: the monitor, the URI, or the image file.
        qemu: version of the QEMU that served it; empty if that is not known.
        compared: what was compared, with a verdict on each.
        choice: what was asked to be compared (`qmpnbd.validate.choice.Choice`), as text.
        files: the image files as they were read; none for a running guest's, which change all the time.
        agreed_in: when the former report was made from which the verdict was taken, because nothing has changed since;
            empty if the disk was judged in this run.
    """

    name: str
    qom_path: str
    node_name: str
    verdict: Verdict
    size: int = 0
    computed_size: int = 0
    layers: tuple[LayerEntry, ...] = ()
    totals: tuple[DepthTotal, ...] = ()
    extents: int = 0
    strip: tuple[int, ...] = ()
    rounds: int = 0
    discrepancies: tuple[DiscrepancyEntry, ...] = ()
    discrepancy_count: int = 0
    discrepancy_bytes: int = 0
    set_aside: tuple[RangeEntry, ...] = ()
    set_aside_bytes: int = 0
    unfinished: Literal["", "written", "graph"] = ""
    files_verified: bool = False
    seconds: float = 0.0
    error: ErrorEntry | None = None
    source: str = ""
    qemu: str = ""
    compared: tuple[ComparedEntry, ...] = ()
    choice: str = ""
    files: tuple[FileEntry, ...] = ()
    agreed_in: str = ""


class Document(Part):
    """Base of all documents.

    Attributes:
        generator: what made it.
    """

    generator: str = f"qmpnbd {__version__}"


class ValidationReport(Document):
    """The result of ``qmpnbd validate``.

    Attributes:
        monitor: the QMP address; empty unless exactly one running QEMU was validated.
        qemu: QEMU's version; likewise.
        guest: the guest's status, or ``storage daemon``; likewise.
        started: when the validation began (UTC, ISO 8601).
        verdict: the worst of the disks': discrepancy, then error, then incomplete, then not-judged, then agreed.
        disks: one report a disk.
        left_behind: what could not be taken down in QEMU, in words.
        stopped: what ended the run before all disks were validated; null if nothing did.
    """

    schema_: Literal["qmpnbd.validate/1"] = Field(default="qmpnbd.validate/1", alias="schema")
    monitor: str
    qemu: str
    guest: str
    started: str
    verdict: Verdict
    disks: tuple[DiskReport, ...]
    left_behind: tuple[str, ...] = ()
    stopped: ErrorEntry | None = None


class DiskEntry(Part):
    """A disk of the guest, or a node without a device.

    Attributes:
        name: the shortest address that means it.
        attached: whether a guest device stands on it.
        qdev: the device's id; may be empty.
        qom_path: the device's QOM path; may be empty.
        node_name: the node.
        driver: the node's block driver.
        size: bytes.
        read_only: whether the node was opened read-only.
        layers: the chain that an export of the node counts.
        problem: why the chain cannot be read here; null if it can.
    """

    name: str
    attached: bool
    qdev: str
    qom_path: str
    node_name: str
    driver: str
    size: int
    read_only: bool
    layers: tuple[NodeEntry, ...]
    problem: ErrorEntry | None


class NodeEntry(Part):
    """A layer as QEMU's block graph shows it."""

    allocation_depth: int
    node_name: str
    format: str
    file: str


class DisksDocument(Document):
    """The result of ``qmpnbd disks``."""

    schema_: Literal["qmpnbd.disks/1"] = Field(default="qmpnbd.disks/1", alias="schema")
    monitor: str
    qemu: str
    guest: str
    disks: tuple[DiskEntry, ...]


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


class ContextMap(Part):
    """What an export says in one metadata context."""

    context: str
    extents: tuple[ExtentEntry, ...]


class MapDocument(Document):
    """The result of ``qmpnbd map``.

    Attributes:
        uri: the export.
        size: bytes of the export.
        offset: where the maps begin.
        maps: one for each context.
    """

    schema_: Literal["qmpnbd.map/1"] = Field(default="qmpnbd.map/1", alias="schema")
    uri: str
    size: int
    offset: int = 0
    maps: tuple[ContextMap, ...]


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


class ChainDocument(Document):
    """The result of ``qmpnbd chain``: what an NBD export of the image would serve in a metadata context.

    Attributes:
        image: the active layer.
        size: bytes of the disk.
        context: what the extents are; ``qemu:allocation-depth`` unless another was asked for.
        layers: the backing chain, active layer first.
        unreadable: the first ranges QEMU cannot read; their allocation depth is 4294967296.
        extents: the map.
    """

    schema_: Literal["qmpnbd.chain/1"] = Field(default="qmpnbd.chain/1", alias="schema")
    image: str
    size: int
    context: str = "qemu:allocation-depth"
    layers: tuple[LayerEntry, ...]
    unreadable: tuple[UnreadableEntry, ...] = ()
    extents: tuple[ExtentEntry, ...]


class ExportEntry(Part):
    """An export as its server describes it.

    Attributes:
        name: the export name.
        canonical: the name the server itself gives it; empty if it does not tell.
        description: the server's words, with control characters as escapes; may be empty.
        uri: where it is.
        size: bytes.
        contexts: the metadata contexts on offer; null if the server has none to offer.
        is_rotational: whether seeking costs.
        is_read_only: whether it refuses to be written.
        can_cache: NBD_CMD_CACHE; likewise the following, named as nbdinfo names them.
        can_df: reads that must come in one piece.
        can_fast_zero: zeroes that fail rather than take long.
        can_flush: NBD_CMD_FLUSH.
        can_fua: writes that are durable when they are acknowledged.
        can_multi_conn: several connections see the same bytes.
        can_trim: NBD_CMD_TRIM.
        can_zero: NBD_CMD_WRITE_ZEROES.
        can_block_status_payload: block status for some of the contexts.
        block_size_minimum: bytes; null if the server does not tell, likewise the following.
        block_size_preferred: bytes.
        block_size_maximum: bytes of payload.
    """

    name: str
    canonical: str
    description: str
    uri: str
    size: int
    contexts: tuple[str, ...] | None
    is_rotational: bool
    is_read_only: bool
    can_cache: bool
    can_df: bool
    can_fast_zero: bool
    can_flush: bool
    can_fua: bool
    can_multi_conn: bool
    can_trim: bool
    can_zero: bool
    can_block_status_payload: bool
    block_size_minimum: int | None
    block_size_preferred: int | None
    block_size_maximum: int | None


class InfoDocument(Document):
    """The result of ``qmpnbd info``.

    Attributes:
        protocol: ``newstyle-fixed``, ``newstyle`` or ``oldstyle``.
        tls: whether the connection was encrypted.
        replies: ``simple``, ``structured`` or ``extended``.
        exports: the export asked for, or all that the server lists.
    """

    schema_: Literal["qmpnbd.info/1"] = Field(default="qmpnbd.info/1", alias="schema")
    protocol: str
    tls: bool
    replies: str
    exports: tuple[ExportEntry, ...]


class BitmapEntry(Part):
    """A persistent bitmap.

    Attributes:
        layer_index: the layer it is stored in.
        file: that layer's file.
        name: unique in the file.
        granularity: bytes of the disk a bit stands for.
        recording: QEMU goes on recording in it when the image is opened.
        inconsistent: it was in use when the image was last closed, or still is: it cannot be relied on.
        dirty_bytes: bytes of the disk that it marks; null where it cannot be relied on.
    """

    layer_index: int
    file: str
    name: str
    granularity: int
    recording: bool
    inconsistent: bool
    dirty_bytes: int | None


class BitmapsDocument(Document):
    """The result of ``qmpnbd chain --bitmaps``: the persistent bitmaps of every layer."""

    schema_: Literal["qmpnbd.bitmaps/1"] = Field(default="qmpnbd.bitmaps/1", alias="schema")
    image: str
    bitmaps: tuple[BitmapEntry, ...]


class PlaceEntry(Part):
    """A place in an image file, and what is there.

    Attributes:
        offset: byte of the file.
        found: what is there.
    """

    offset: int
    found: str


class FindingEntry(Part):
    """A rule of the format that an image breaks.

    Attributes:
        severity: ``corruption``; ``overlap`` (of structures that exclude each other); ``leak``; ``error`` (could not
            be judged).
        rule: what is wrong, in words.
        count: how often.
        places: the first ones.
    """

    severity: Literal["corruption", "overlap", "leak", "error"]
    rule: str
    count: int
    places: tuple[PlaceEntry, ...]


class CheckDocument(Document):
    """The result of ``qmpnbd check``; the numbers are those of ``qemu-img check``, overlaps are our own.

    Attributes:
        image: the file.
        verdict: ``clean``; ``leaks`` (nothing worse); ``corrupt``.
        corruptions: contradictions that can lose data.
        leaks: clusters that count as used, and are not.
        check_errors: clusters that could not be judged.
        overlaps: clusters that structures claim which exclude each other.
        cluster_size: bytes in a cluster.
        file_size: bytes in the file.
        image_end_offset: where the last cluster in use ends.
        total_clusters: guest clusters of the disk.
        allocated_clusters: of those, with data of their own.
        fragmented_clusters: of those, whose data does not follow that of the one before; all compressed ones.
        compressed_clusters: of those, compressed.
        dirty: the image was not closed; with lazy refcounts, refcounts may be behind.
        marked_corrupt: QEMU has marked the image as corrupt.
        findings: what is wrong.
    """

    schema_: Literal["qmpnbd.check/1"] = Field(default="qmpnbd.check/1", alias="schema")
    image: str
    verdict: CheckVerdict
    corruptions: int
    leaks: int
    check_errors: int
    overlaps: int
    cluster_size: int
    file_size: int
    image_end_offset: int
    total_clusters: int
    allocated_clusters: int
    fragmented_clusters: int
    compressed_clusters: int
    dirty: bool
    marked_corrupt: bool
    findings: tuple[FindingEntry, ...]


class ErrorDocument(Document):
    """What is on stdout instead of a result when ``--json`` was asked for and the command failed."""

    schema_: Literal["qmpnbd.error/1"] = Field(default="qmpnbd.error/1", alias="schema")
    error: ErrorEntry


DOCUMENTS: tuple[type[Document], ...] = (
    ValidationReport,
    DisksDocument,
    MapDocument,
    ChainDocument,
    InfoDocument,
    CheckDocument,
    BitmapsDocument,
    ErrorDocument,
)
"""Every document there is; their schemas are committed under ``docs/schema``."""
