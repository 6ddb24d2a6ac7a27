"""A copy of a whole disk, from what somebody named to what somebody named, proved if that is wanted.

::

    source ── content, pieces ──> target, under a temporary name ── settled ──> read back, hashed ──> its name
                                                                    if it is to be proved
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from qmpnbd.backup.content import aligned
from qmpnbd.backup.copy import Copied, CopyOptions, Progress, copy
from qmpnbd.backup.destination import Destination, TargetTerms, discarding, open_target, written
from qmpnbd.backup.hashes import Hashes
from qmpnbd.backup.pace import paced
from qmpnbd.backup.proof import prove
from qmpnbd.backup.resumable import ResumableTarget, key_of
from qmpnbd.backup.sources import ImageSource, Source, open_source
from qmpnbd.backup.targets import Target
from qmpnbd.deadline import Deadline
from qmpnbd.errors import ImageChangedError, UsageError
from qmpnbd.extents import ExtentMap
from qmpnbd.nbd.tls import Tls
from qmpnbd.printable import printable


@dataclass(frozen=True, slots=True)
class Origin:
    """What to copy.

    Attributes:
        source: an NBD URI, or the path of an image.
        format: of an image; None to guess it from the content.
        connections: to an NBD server, at most.
        tls: how to encrypt to an NBD server.
        unchanged: of a source that does not tell it itself (an export, a block device), for a copy that is resumed:
            whether it holds what it held when the copy was begun.
    """

    source: str
    format: str | None = None
    connections: int = 1
    tls: Tls | None = None
    unchanged: bool = False


@dataclass(frozen=True, slots=True)
class WholeCopyOptions:
    """How to copy a disk.

    Attributes:
        target: how to open what is written.
        prove: whether to read back what was written, before it gets its name.
        bytes_per_second: of data, at most; None for no limit.
        progress: told how far it is; None to tell nobody.
        resume: whether to go on where an earlier run was ended, and to leave what is copied if this one is; for raw
            files (`qmpnbd.backup.resumable`).
    """

    target: TargetTerms = field(default_factory=TargetTerms)
    prove: bool = False
    bytes_per_second: int | None = None
    progress: Callable[[Progress], None] | None = None
    resume: bool = False


@dataclass(frozen=True, slots=True)
class WholeCopy:
    """What was copied.

    Attributes:
        size: bytes of the disk.
        copied: its data and zeroes.
        read_back_bytes: bytes that were read back; None if nothing was.
        resumed_bytes: bytes of data that an earlier run had copied; None if that was not asked for.
    """

    size: int
    copied: Copied
    read_back_bytes: int | None
    resumed_bytes: int | None = None


def copy_disk(origin: Origin, destination: Destination, options: WholeCopyOptions, deadline: Deadline) -> WholeCopy:
    """Copies a disk; blocking.

    Args:
        origin: what to read.
        destination: what to write; not a chain.
        options: how.
        deadline: how long it may take; telling it to stop ends it.

    Raises:
        UsageError: what is asked for does not fit together.
        NbdError: an NBD server failed.
        ImageError: an image cannot be read, or a copy that can be resumed was of more than one moment.
        TargetInUseError: the target exists, or somebody uses it.
        TargetError: the target is too small, full, or gone.
        NotProvedError: what was read back is something else; the target was discarded.
        DeadlineError: the time is over.
    """
    with open_source(
        origin.source, format=origin.format, deadline=deadline, tls=origin.tls, connections=origin.connections
    ) as source:
        if options.resume:
            return _resumed(origin, source, destination, options, deadline)
        content = source.content(deadline)
        if options.target.compression:
            content = aligned(content, options.target.cluster_size)
        return copy_content(source, content, destination, options, deadline)


def copy_content(
    source: Source, content: ExtentMap, destination: Destination, options: WholeCopyOptions, deadline: Deadline
) -> WholeCopy:
    """Copies a disk that is open; blocking.

    Args:
        source: what to read.
        content: what it holds.
        destination: what to write; not a chain.
        options: how.
        deadline: how long it may take.

    Raises:
        QmpnbdError: of the source; the target was discarded.
        TargetInUseError: the target exists, or somebody uses it.
        TargetError: the target is too small, full, or gone.
        NotProvedError: what was read back is something else; the target was discarded.
        DeadlineError: the time is over.
    """
    choice = CopyOptions(options.prove, paced(options.bytes_per_second), options.progress)
    with discarding(open_target(destination, content, options.target, deadline)) as target:
        copied = copy(source, target, content, choice, deadline)
        digests, read_back = copied.digests, None
        if digests is not None:
            read_back = _read_back(target, destination, Hashes(content, digests), options, deadline)
        target.finish()
    return WholeCopy(content.size, copied, read_back)


def _read_back(
    target: Target, destination: Destination, hashes: Hashes, options: WholeCopyOptions, deadline: Deadline
) -> int:
    """Proves what was written; returns how many bytes were read."""
    target.settle()
    with written(target, destination.form, deadline, options.target.tls) as there:
        return prove(there, hashes, deadline)


def _resumed(
    origin: Origin, source: Source, destination: Destination, options: WholeCopyOptions, deadline: Deadline
) -> WholeCopy:
    """Copies to a file what is not there yet."""
    if destination.form != "raw":
        remedy = "Leave --resume out, or copy to a raw file."
        raise UsageError("only a copy to a raw file can be resumed", where=printable(destination.target), remedy=remedy)
    before, content = _identity(origin, source), source.content(deadline)
    key, force = key_of(before, content), options.target.force
    with discarding(ResumableTarget(destination.target, content, key, force=force, deadline=deadline)) as target:
        choice = CopyOptions(pace=paced(options.bytes_per_second), progress=options.progress, done=target.done)
        copied, read_back = copy(source, target, content, choice, deadline), None
        if _identity(origin, source) != before:
            what, remedy = "it was written to while it was copied", "Begin anew when nobody writes to it."
            raise ImageChangedError(what, where=source.where, remedy=remedy)
        if options.prove:
            read_back = _read_back(target, destination, Hashes(content, target.digests), options, deadline)
        target.finish()
    return WholeCopy(content.size, copied, read_back, target.done_bytes)


def _identity(origin: Origin, source: Source) -> str:
    """Returns what tells a source from others and from what it was; of one that does not tell it, its name."""
    found = source.identity() if isinstance(source, ImageSource) else ""
    if found or origin.unchanged:
        return found or origin.source
    what = "whether it holds what it held when the copy was begun cannot be told of an export or a device"
    remedy = "Say so (--source-unchanged) if it is read-only or a point in time that is still held."
    raise UsageError(what, where=source.where, remedy=remedy)
