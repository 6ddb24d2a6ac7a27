"""Where a disk is written to: what a user named, opened as a target, and opened again to be read back."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from qmpnbd.backup.nbd_target import CONNECTIONS, NbdTarget
from qmpnbd.backup.qcow2_target import Compression, Qcow2Target
from qmpnbd.backup.raw_target import RawTarget
from qmpnbd.backup.sources import ImageSource, NbdSource, Source
from qmpnbd.backup.targets import Target
from qmpnbd.deadline import Deadline
from qmpnbd.errors import UsageError
from qmpnbd.extents import ExtentMap
from qmpnbd.nbd.tls import Tls
from qmpnbd.nbd.uri import is_nbd_uri
from qmpnbd.printable import printable

T = TypeVar("T", bound=Target)

Form = Literal["raw", "qcow2", "chain", "device", "nbd"]

_ENDINGS: dict[str, Form] = {".raw": "raw", ".img": "raw", ".qcow2": "qcow2"}


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a disk is restored to.

    Attributes:
        target: a path or an NBD URI.
        form: what it is, or shall be (`destination`).
    """

    target: str
    form: Form


@dataclass(frozen=True, slots=True)
class TargetTerms:
    """How to open a target.

    Attributes:
        force: whether what is there may be overwritten.
        compression: of a qcow2 file's clusters.
        cluster_size: of a qcow2 file, in bytes.
        connections: to an NBD server, at most.
        tls: how to encrypt to an NBD server.
    """

    force: bool = False
    compression: Compression = ""
    cluster_size: int = 1 << 16
    connections: int = CONNECTIONS
    tls: Tls | None = None


def destination(target: str, named: Literal["", "raw", "qcow2", "chain"]) -> Destination:
    """Returns a target with what it is.

    Args:
        target: a path or an NBD URI.
        named: what a file shall be; empty to go by the ending of its name.

    Raises:
        UsageError: it cannot be told, or is something else than what was named.
    """
    found: Form | None = None
    if is_nbd_uri(target):
        found = "nbd"
    else:
        with contextlib.suppress(OSError):
            found = "device" if stat.S_ISBLK(Path(target).stat().st_mode) else None
    if found is not None:
        if named not in ("", "raw"):
            remedy = "Leave the format out; a qcow2 image can be a file only."
            raise UsageError(f"it is no place for {named}: it gets the bytes of the disk", where=target, remedy=remedy)
        return Destination(target, found)
    found = named or _ENDINGS.get(Path(target).suffix)
    if found is None:
        remedy = "Say it with --format (of qmpnbd copy: --target-format), or choose a name ending in .raw or .qcow2; "
        remedy += "qmpnbd restore makes a folder of all disks with --machine."
        raise UsageError("its name does not tell what it shall be", where=printable(target), remedy=remedy)
    return Destination(target, found)


@contextlib.contextmanager
def discarding(target: T) -> Iterator[T]:
    """Has a target discarded unless all goes well."""
    try:
        yield target
    except BaseException:
        target.discard()
        raise


def open_target(destination: Destination, content: ExtentMap, terms: TargetTerms, deadline: Deadline) -> Target:
    """Makes a target for a content that stands on nothing.

    Args:
        destination: where; not a chain.
        content: as long as the disk; for a compressed image made of whole clusters.
        terms: how.
        deadline: for all that is done with an NBD server.

    Raises:
        TargetInUseError: it exists, or somebody uses it.
        TargetError: it cannot be made, or is too small.
        NbdError: the NBD server cannot be reached.
        UsageError: the content does not fit.
        DeadlineError: the time is over.
    """
    target, size = destination.target, content.size
    if destination.form == "nbd":
        force, connections = terms.force, terms.connections
        return NbdTarget.connect(target, size, deadline=deadline, tls=terms.tls, force=force, connections=connections)
    if destination.form == "qcow2":
        return Qcow2Target.create(
            target, content, cluster_size=terms.cluster_size, compression=terms.compression, force=terms.force
        )
    return RawTarget.create(target, size, force=terms.force)


def written(target: Target, form: Form, deadline: Deadline, tls: Tls | None) -> Source:
    """Opens what was settled, to be read back from the medium.

    Raises:
        ImageError: the branch says what is wrong with the file.
        NbdError: the NBD server cannot be reached.
        DeadlineError: the time is over.
    """
    if form == "nbd":
        return NbdSource.connect(target.read_from, deadline=deadline, tls=tls)
    forget(target.read_from)
    return ImageSource.open(target.read_from, format="qcow2" if form == "qcow2" else "raw", deadline=deadline)


def forget(path: str) -> None:
    """Has the kernel forget what it keeps of a file in memory, so that reading it reads the medium."""
    with contextlib.suppress(OSError):  # it is only more of a proof with it
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
