"""Restore: a disk at a point in time, written to where it is wanted, proved, and only then given its name.

::

    layers ── each piece hashed as it is read ──> copy ──> target ── settled ──> read back, hashed ──> its name
                 RepositoryDamagedError                                            NotProvedError

A file has its name only when it was proved; a block device and an export of an NBD server cannot be hidden while they
are written, so there a restore that failed is told and what is there is of no use.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from qmpnbd.backup.content import DATA, ZERO, aligned
from qmpnbd.backup.copy import CopyOptions, Progress
from qmpnbd.backup.destination import Destination, TargetTerms
from qmpnbd.backup.pace import paced
from qmpnbd.backup.point import Point, Wanted, open_point
from qmpnbd.backup.qcow2_target import Compression
from qmpnbd.backup.restore_chain import ChainCopy
from qmpnbd.backup.whole_copy import WholeCopyOptions, copy_content
from qmpnbd.deadline import Deadline
from qmpnbd.nbd.tls import Tls


@dataclass(frozen=True, slots=True)
class RestoreOptions:
    """How to restore.

    Attributes:
        force: whether what is there may be overwritten.
        compression: of a qcow2 file's clusters.
        bytes_per_second: of data, at most; None for no limit.
        progress: told how far it is; None to tell nobody.
        tls: how to encrypt to an NBD server.
    """

    force: bool = False
    compression: Compression = ""
    bytes_per_second: int | None = None
    progress: Callable[[Progress], None] | None = None
    tls: Tls | None = None


@dataclass(frozen=True, slots=True)
class Restored:
    """What was restored.

    Attributes:
        point: from what.
        destination: to where.
        data_bytes: bytes of data.
        zero_bytes: bytes that read as zeroes.
        unproved_bytes: of the data, what came from a template without hashes.
        read_back_bytes: bytes that were read back.
        seconds: it took.
    """

    point: Point
    destination: Destination
    data_bytes: int
    zero_bytes: int
    unproved_bytes: int
    read_back_bytes: int
    seconds: float


def restore(wanted: Wanted, destination: Destination, options: RestoreOptions, deadline: Deadline) -> Restored:
    """Restores a disk; blocking.

    Args:
        wanted: which disk, at which point in time.
        destination: where to.
        options: how.
        deadline: how long it may take; telling it to stop ends it.

    Raises:
        NoSuchBackupError: there is no such backup.
        RepositoryDamagedError: what it depends on is missing, foreign, cut or rotten; the target was discarded.
        TargetInUseError: the target exists, or somebody uses it.
        TargetError: the target is too small, full, or gone.
        NotProvedError: what was read back is something else; the target was discarded.
        NbdError: the NBD server failed.
        UsageError: what is wanted is not clear.
        DeadlineError: the time is over.
    """
    began = time.monotonic()
    point, source = open_point(wanted, deadline)
    with source:
        content = source.content(deadline)
        if destination.form == "chain":
            copying = CopyOptions(True, paced(options.bytes_per_second), options.progress)
            read_back = ChainCopy(point, options.compression, copying, deadline).restore(destination.target)
        else:
            terms = TargetTerms(force=options.force, compression=options.compression, tls=options.tls)
            if destination.form == "qcow2":
                content = aligned(content, terms.cluster_size)
            choice = WholeCopyOptions(terms, True, options.bytes_per_second, options.progress)
            read_back = copy_content(source, content, destination, choice, deadline).read_back_bytes or 0
        totals, unproved = content.totals(), source.unproved_bytes(deadline)
    data_bytes, zero_bytes, seconds = totals.get(DATA, 0), totals.get(ZERO, 0), time.monotonic() - began
    return Restored(point, destination, data_bytes, zero_bytes, unproved, read_back, seconds)
