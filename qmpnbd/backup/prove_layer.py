"""The proof of files of a backup before they get their name: they are held against what was meant to be written.

The hashes were computed of what came from QEMU, or from layers that are merged, before it was written. Here the bytes
come from the file, and from the medium as far as the kernel lets go of what it keeps in memory.
"""

from __future__ import annotations

from pathlib import Path

from qmpnbd.backup.destination import forget
from qmpnbd.backup.fingerprint import sha256_of
from qmpnbd.backup.hashes import Hashes
from qmpnbd.backup.layers import StoredLayer
from qmpnbd.backup.manifest import ExtraFile
from qmpnbd.deadline import Deadline
from qmpnbd.errors import ImageError, NotProvedError, RepositoryDamagedError, TargetError
from qmpnbd.printable import printable

_REMEDY = "Nothing of it was kept. See the kernel's log for what is wrong with the medium, and run again."


def prove_layer(path: Path, hashes: Hashes, deadline: Deadline, *, read_data: bool) -> None:
    """Makes sure that a layer holds what it should.

    Args:
        path: the image; durable.
        hashes: what it should hold.
        deadline: for reading it.
        read_data: whether all its data is read and hashed; else only its tables are looked at.

    Raises:
        NotProvedError: it holds something else, or cannot be read.
        TargetError: it is not there any more.
        DeadlineError: the time is over.
    """
    file_bytes(path)
    forget(str(path))
    try:
        with StoredLayer.open(path, hashes, deadline) as layer:
            layer.require_map()
            if read_data:
                layer.require_hashes(deadline)
    except RepositoryDamagedError as error:
        raise NotProvedError(error.what, where=error.where, remedy=_REMEDY) from error


def prove_extra(path: Path, extra: ExtraFile, deadline: Deadline, *, read_data: bool) -> None:
    """Makes sure that a file beside the disks holds what it should.

    Args:
        path: the file; durable.
        extra: what the manifest will say of it.
        deadline: for reading it.
        read_data: whether it is read and hashed; else only its size is looked at.

    Raises:
        NotProvedError: it holds something else, or cannot be read.
        TargetError: it is not there any more.
        DeadlineError: the time is over.
    """
    where = printable(str(path))
    if (found := file_bytes(path)) != extra.bytes:
        raise NotProvedError(f"it has {found} bytes, and {extra.bytes} were written", where=where, remedy=_REMEDY)
    if not read_data:
        return
    forget(str(path))
    try:
        digest = sha256_of(str(path), deadline)
    except ImageError as error:
        raise NotProvedError(f"it cannot be read again: {error.what}", where=where, remedy=_REMEDY) from error
    if digest != extra.sha256:
        raise NotProvedError("it is not what was written: its hash is another one", where=where, remedy=_REMEDY)


def file_bytes(path: Path) -> int:
    """Returns the size of a file that was written.

    Raises:
        TargetError: it is not there any more.
    """
    try:
        return path.stat().st_size
    except OSError as error:
        raise TargetError(f"it is gone: {error.strerror}", where=printable(str(path)), remedy=_REMEDY) from error
