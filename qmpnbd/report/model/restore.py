"""The document of ``qmpnbd restore``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qmpnbd.report.model.parts import Document, Part

RestoreForm = Literal["raw", "qcow2", "chain", "device", "nbd", "overlay", "served"]


class RestoredLayerEntry(Part):
    """A layer that a restored disk was read from.

    Attributes:
        backup: id of the backup that made it.
        number: its number in the chain.
        kind: how the disk was backed up then: ``full``, ``increment``, ….
        file: the image.
    """

    backup: str
    number: int
    kind: str
    file: str


class RestoreDocument(Document):
    """The result of ``qmpnbd restore``.

    Attributes:
        repository: the repository.
        chain: the chain.
        backup: id of the backup.
        number: its number in the chain.
        created: its instant, in UTC.
        disk: the disk.
        target: what was restored to.
        form: ``raw``, ``qcow2`` (one file), ``chain`` (a folder with a file for each layer), ``device``, ``nbd``; or of
            an instant restore ``overlay`` (a file that stands on the repository) or ``served`` (that file, over NBD).
        size: bytes of the disk.
        data_bytes: bytes of data; null of an instant restore, for which the numbers are not known when it begins.
        zero_bytes: bytes that read as zeroes; null likewise.
        unproved_bytes: of the data, what came from a template, which has no hashes of its pieces; null likewise.
        read_back_bytes: bytes that were read back and proved; null likewise.
        seconds: how long it took; null likewise.
        uri: where an instant restore is served; empty else.
        layers: what it was read from, the backup's own layer first.
    """

    schema_: Literal["qmpnbd.restore/1"] = Field(default="qmpnbd.restore/1", alias="schema")
    repository: str
    chain: str
    backup: str
    number: int
    created: str
    disk: str
    target: str
    form: RestoreForm
    size: int
    data_bytes: int | None = None
    zero_bytes: int | None = None
    unproved_bytes: int | None = None
    read_back_bytes: int | None = None
    seconds: float | None = None
    uri: str = ""
    layers: tuple[RestoredLayerEntry, ...]


class RestoredFileEntry(Part):
    """A file that is kept beside the disks.

    Attributes:
        name: what it is: ``machine``, or the device whose content it holds.
        file: its name in the folder.
        bytes: bytes in it.
    """

    name: str
    file: str
    bytes: int


class RestoreMachineDocument(Document):
    """The result of ``qmpnbd restore --machine``.

    Attributes:
        repository: the repository.
        chain: the chain.
        backup: id of the backup.
        number: its number in the chain.
        created: its instant, in UTC.
        target: the folder that was made.
        seconds: how long it took.
        disks: the disks, each as ``qmpnbd restore`` describes it.
        files: what was kept beside them.
    """

    schema_: Literal["qmpnbd.restore-machine/1"] = Field(default="qmpnbd.restore-machine/1", alias="schema")
    repository: str
    chain: str
    backup: str
    number: int
    created: str
    target: str
    seconds: float
    disks: tuple[RestoreDocument, ...]
    files: tuple[RestoredFileEntry, ...]
