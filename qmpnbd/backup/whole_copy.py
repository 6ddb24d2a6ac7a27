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
from qmpnbd.backup.proof import prove
from qmpnbd.backup.sources import Source, open_source
from qmpnbd.deadline import Deadline
from qmpnbd.extents import ExtentMap
from qmpnbd.nbd.tls import Tls


@dataclass(frozen=True, slots=True)
class Origin:
    """What to copy.

    Attributes:
        source: an NBD URI, or the path of an image.
        format: of an image; None to guess it from the content.
        connections: to an NBD server, at most.
        tls: how to encrypt to an NBD server.
    """

    source: str
    format: str | None = None
    connections: int = 1
    tls: Tls | None = None


@dataclass(frozen=True, slots=True)
class WholeCopyOptions:
    """How to copy a disk.

    Attributes:
        target: how to open what is written.
        prove: whether to read back what was written, before it gets its name.
        bytes_per_second: of data, at most; None for no limit.
        progress: told how far it is; None to tell nobody.
    """

    target: TargetTerms = field(default_factory=TargetTerms)
    prove: bool = False
    bytes_per_second: int | None = None
    progress: Callable[[Progress], None] | None = None


@dataclass(frozen=True, slots=True)
class WholeCopy:
    """What was copied.

    Attributes:
        size: bytes of the disk.
        copied: its data and zeroes.
        read_back_bytes: bytes that were read back; None if nothing was.
    """

    size: int
    copied: Copied
    read_back_bytes: int | None


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
        ImageError: an image cannot be read.
        TargetInUseError: the target exists, or somebody uses it.
        TargetError: the target is too small, full, or gone.
        NotProvedError: what was read back is something else; the target was discarded.
        DeadlineError: the time is over.
    """
    with open_source(
        origin.source, format=origin.format, deadline=deadline, tls=origin.tls, connections=origin.connections
    ) as source:
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
    terms, read_back = options.target, None
    choice = CopyOptions(options.prove, options.bytes_per_second, options.progress)
    with discarding(open_target(destination, content, terms, deadline)) as target:
        copied = copy(source, target, content, choice, deadline)
        if options.prove:
            target.settle()
            with written(target, destination.form, deadline, terms.tls) as there:
                read_back = prove(there, Hashes(content, copied.digests or b""), deadline)
        target.finish()
    return WholeCopy(content.size, copied, read_back)
