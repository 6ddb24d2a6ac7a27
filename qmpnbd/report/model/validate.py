"""The document of ``qmpnbd validate``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qmpnbd.report.model.export import InstantEntry
from qmpnbd.report.model.parts import Document, ErrorEntry, LayerEntry, Part, RangeEntry

Verdict = Literal["agreed", "discrepancy", "incomplete", "error", "not-judged"]
NotJudgedBecause = Literal["", "fail-fast"]
Finding = Literal["differs", "bitmap-misses-change"]


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
        finding: ``differs``, or ``bitmap-misses-change``: these bytes changed between two points in time, and the
            bitmap that recorded all the while calls them clean.
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
    finding: Finding = "differs"


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


class RangeHashEntry(Part):
    """A range whose bytes were compared, and what they were.

    Attributes:
        offset: its first byte.
        length: bytes.
        sha256: SHA-256 of its bytes, in hexadecimal, as ``dd | sha256sum`` tells it of a copy of the disk. Null where
            the two sides differ (the discrepancies have both hashes), and on a running disk where something was written
            while it was compared, so that its bytes are not those of one moment.
    """

    offset: int
    length: int
    sha256: str | None


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


class Picture(Part):
    """A disk in small, to be drawn: as it was served, in a bounded number of runs.

    Attributes:
        part: 0 where the runs are the extents; else the bytes of a part of the disk, of which is drawn what most of
            its bytes have.
        ends: where each run ends.
        depths: the allocation depth of each run.
        discrepancies: runs with a discrepancy, all of them; parts of the disk if there are too many.
        set_aside: runs that could not be judged, likewise.
    """

    part: int
    ends: tuple[int, ...]
    depths: tuple[int, ...]
    discrepancies: tuple[tuple[int, int], ...]
    set_aside: tuple[tuple[int, int], ...]


class DiskReport(Part):
    """The validation of one disk.

    Attributes:
        name: the disk as it was addressed.
        qom_path: the device; empty for a node without one.
        node_name: the node that was exported.
        verdict: ``agreed``; ``discrepancy`` (at least one); ``incomplete`` (none found, but not everything could be
            judged because the guest was writing there or the graph changed); ``error``; ``not-judged`` (the run ended
            before it was its turn, or before it was done with it).
        not_judged_because: ``fail-fast`` if another disk had a fault and the run was to end with it; empty otherwise.
        size: bytes of the disk as served.
        computed_size: bytes of the disk according to its files; differing from `size` is a discrepancy.
        layers: the backing chain, active layer first.
        totals: bytes at each served allocation depth.
        extents: runs of equal allocation depth in the served map.
        strip: the served map in small: the depth that most bytes have in each of 64 equal parts of the disk.
        picture: the same in more detail, to be drawn; not part of the JSON document, `qmpnbd map` has the whole map.
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
        content_hashes: the ranges whose bytes were compared: those of the sample, or the whole disk in ranges of a
            power of two, of 1 MiB at least and so large that there are 4096 at most; empty if no bytes were compared.
        choice: what was asked to be compared (`qmpnbd.validate.choice.Choice`), as text.
        files: the image files as they were read; none for a running guest's, which change all the time.
        agreed_in: when the former report was made from which the verdict was taken, because nothing has changed since;
            empty if the disk was judged in this run.
        instant: the point in time at which it was judged; null if it was judged as it went on.
    """

    name: str
    qom_path: str
    node_name: str
    verdict: Verdict
    not_judged_because: NotJudgedBecause = ""
    size: int = 0
    computed_size: int = 0
    layers: tuple[LayerEntry, ...] = ()
    totals: tuple[DepthTotal, ...] = ()
    extents: int = 0
    strip: tuple[int, ...] = ()
    source: str = ""
    qemu: str = ""
    compared: tuple[ComparedEntry, ...] = ()
    content_hashes: tuple[RangeHashEntry, ...] = ()
    choice: str = ""
    files: tuple[FileEntry, ...] = ()
    agreed_in: str = ""
    picture: Picture | None = Field(default=None, exclude=True)
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
    instant: InstantEntry | None = None


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


class DiskLine(Document):
    """A line of ``qmpnbd validate --ndjson``: a disk, as soon as it has been validated."""

    schema_: Literal["qmpnbd.validate-disk/1"] = Field(default="qmpnbd.validate-disk/1", alias="schema")
    disk: DiskReport


class SummaryLine(Document):
    """The last line of ``qmpnbd validate --ndjson``; without it the run was killed.

    Attributes:
        monitor: the QMP address; likewise the following, see `ValidationReport`.
        qemu: QEMU's version; empty if it was not heard.
        guest: the guest's status.
        started: when the validation began (UTC, ISO 8601).
        verdict: over all disks.
        disks: how many have each verdict.
        left_behind: what could not be taken down in QEMU, in words.
        stopped: what ended the run early; null if nothing did.
    """

    schema_: Literal["qmpnbd.validate-summary/1"] = Field(default="qmpnbd.validate-summary/1", alias="schema")
    monitor: str
    qemu: str
    guest: str
    started: str
    verdict: Verdict
    disks: dict[Verdict, int]
    left_behind: tuple[str, ...]
    stopped: ErrorEntry | None
