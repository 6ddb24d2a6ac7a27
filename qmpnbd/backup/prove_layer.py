"""The proof of a layer before its backup is published: the file is held against what was meant to be written.

The hashes were computed of what came from the disk, before it was written. Here the bytes come from the file, and from
the medium as far as the kernel lets go of what it keeps in memory.
"""

from __future__ import annotations

import os
from pathlib import Path

from qmpnbd.backup.hashes import Hashes
from qmpnbd.backup.layers import StoredLayer
from qmpnbd.deadline import Deadline
from qmpnbd.errors import NotProvedError, RepositoryDamagedError, TargetError
from qmpnbd.printable import printable

_REMEDY = "Nothing was published. See the kernel's log for what is wrong with the medium, and make the backup again."


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
    _let_go(path)
    try:
        with StoredLayer.open(path, hashes, deadline) as layer:
            layer.require_map()
            if read_data:
                layer.require_hashes(deadline)
    except RepositoryDamagedError as error:
        raise NotProvedError(error.what, where=error.where, remedy=_REMEDY) from error


def _let_go(path: Path) -> None:
    """Has the kernel forget what it keeps of a file that is on the medium already."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)
    except OSError as error:
        what = f"it cannot be read again: {error.strerror}"
        raise TargetError(what, where=printable(str(path)), remedy=_REMEDY) from error
