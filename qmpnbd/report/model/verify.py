"""The document of ``qmpnbd verify``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qmpnbd.report.model.parts import Document, Part

VerifyVerdict = Literal["proved", "incomplete", "damaged"]


class VerifyFindingEntry(Part):
    """Something that is wrong.

    Attributes:
        rule: what it is about; ``docs/backup.md`` lists them. Beside those of ``qmpnbd repository check`` there are
            ``second-reader`` and ``boot``.
        chain: the chain; empty if it is in none.
        backup: id of the backup; empty if it is in none.
        disk: the disk; empty if it concerns none.
        where: the file or folder; empty if it concerns none.
        offset: first byte of the disk; null if it concerns all of it, or none.
        end: the byte after the last one; null likewise.
        what: what is wrong, in words.
    """

    rule: str
    chain: str
    backup: str
    disk: str
    where: str
    offset: int | None
    end: int | None
    what: str


class SecondReadingEntry(Part):
    """A disk of a backup that QEMU read, too.

    Attributes:
        chain: the chain.
        backup: id of the backup.
        number: its number in the chain.
        disk: the disk.
        bytes: bytes that were compared.
    """

    chain: str
    backup: str
    number: int
    disk: str
    bytes: int


class BootEntry(Part):
    """A boot test.

    Attributes:
        chain: the chain.
        backup: id of the backup.
        number: its number in the chain.
        reached: the guest said the marker.
        why: why not; empty if it did.
        console: the end of what it said on its serial line.
    """

    chain: str
    backup: str
    number: int
    reached: bool
    why: str
    console: str


class SkippedEntry(Part):
    """Something that could not be judged.

    Attributes:
        chain: the chain.
        backup: id of the backup.
        what: what was left out, and why.
    """

    chain: str
    backup: str
    what: str


class VerifyDocument(Document):
    """The result of ``qmpnbd verify``.

    Attributes:
        repository: the repository.
        verdict: ``proved`` (everything is what was backed up); ``incomplete`` (nothing is wrong, but not everything
            could be judged, or a killed run left something); ``damaged``.
        backups: how many were looked at.
        data_bytes: bytes of data in them, all of which were hashed unless there are findings.
        qemu: version of the QEMU that was the second reader; empty if there was none.
        second_readings: what QEMU read, too.
        boots: the boot tests.
        skipped: what could not be judged.
        finding_count: how much is wrong.
        findings: the first of it.
        seconds: how long it took.
    """

    schema_: Literal["qmpnbd.verify/1"] = Field(default="qmpnbd.verify/1", alias="schema")
    repository: str
    verdict: VerifyVerdict
    backups: int
    data_bytes: int
    qemu: str
    second_readings: tuple[SecondReadingEntry, ...]
    boots: tuple[BootEntry, ...]
    skipped: tuple[SkippedEntry, ...]
    finding_count: int
    findings: tuple[VerifyFindingEntry, ...]
    seconds: float
