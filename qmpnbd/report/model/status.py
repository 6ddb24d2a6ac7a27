"""The document of ``qmpnbd status``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qmpnbd.report.model.parts import Document, Part


class ThingEntry(Part):
    """Something that a run of qmpnbd made in a QEMU.

    Attributes:
        kind: ``export``, ``job``, ``node``, ``bitmap`` or ``object``.
        name: its name.
        detail: more, for people.
    """

    kind: Literal["export", "job", "node", "bitmap", "object"]
    name: str
    detail: str


class RunEntry(Part):
    """A run of qmpnbd, and what of it is in a QEMU.

    Attributes:
        run: its id; every name is made of it.
        state: ``alive``; ``dead``; ``unknown`` (its private directory is not here).
        things: what is there.
    """

    run: str
    state: Literal["alive", "dead", "unknown"]
    things: tuple[ThingEntry, ...]


class StatusDocument(Document):
    """The result of ``qmpnbd status``: what of ours is in a QEMU.

    Attributes:
        monitor: the QMP address.
        qemu: QEMU's version.
        guest: the guest's status in QEMU's words; ``storage daemon`` if there is none.
        nbd_server: whether QEMU's NBD server runs, anyone's.
        runs: the runs of which something is there.
    """

    schema_: Literal["qmpnbd.status/1"] = Field(default="qmpnbd.status/1", alias="schema")
    monitor: str
    qemu: str
    guest: str
    nbd_server: bool
    runs: tuple[RunEntry, ...]
