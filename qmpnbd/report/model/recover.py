"""The document of ``qmpnbd recover``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qmpnbd.report.model.parts import Document, Part


class TakenDownEntry(Part):
    """Something that was taken down.

    Attributes:
        run: the run that had made it.
        what: what it was, in words.
        commands: the QMP commands for it; empty where QEMU was not told anything (files).
    """

    run: str
    what: str
    commands: tuple[dict[str, object], ...]


class RecoverDocument(Document):
    """The result of ``qmpnbd recover``.

    Attributes:
        monitor: the QMP address.
        dry_run: nothing was done: `taken_down` is what would be.
        taken_down: what was taken down, in order.
        thawed: guest agents whose guests a killed run had left frozen, and are thawed; in a dry run, may be frozen.
        left_behind: what could not be, with the reason.
        unknown: runs that were left alone because it is not known whether they live.
        alive: runs that were left alone because they live.
    """

    schema_: Literal["qmpnbd.recover/1"] = Field(default="qmpnbd.recover/1", alias="schema")
    monitor: str
    dry_run: bool
    taken_down: tuple[TakenDownEntry, ...]
    thawed: tuple[str, ...]
    left_behind: tuple[str, ...]
    unknown: tuple[str, ...]
    alive: tuple[str, ...]
