"""The document of ``qmpnbd check``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qmpnbd.report.model.parts import Document, Part

CheckVerdict = Literal["clean", "leaks", "corrupt"]


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
