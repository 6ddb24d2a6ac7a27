"""The template that a shallow backup stands on: an image that is not in the repository.

It is known by its identity: the size of its disk and of its file, when it was written last, and its SHA-256 if that was
computed. Only with the last is it proved that it still holds what it held.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Sequence

from qmpnbd.backup.fingerprint import sha256_of
from qmpnbd.backup.manifest import TemplateEntry
from qmpnbd.backup.sources import ImageSource
from qmpnbd.deadline import Deadline
from qmpnbd.errors import ImageError, RepositoryDamagedError
from qmpnbd.printable import printable

_REMEDY = "Name the image that the machine was made from, as it was then."


def open_template(entry: TemplateEntry, path: str, deadline: Deadline) -> ImageSource:
    """Opens the template of a shallow backup; the caller closes it.

    Args:
        entry: what the backup recorded.
        path: where it is now.
        deadline: for all that is read from it.

    Raises:
        RepositoryDamagedError: it is missing, or is another one.
        DeadlineError: the time is over.
    """
    where = printable(path)
    try:
        status = os.stat(path)  # noqa: PTH116 (a name as its user has it is text, not a tidied path)
        if stat.S_ISREG(status.st_mode) and status.st_size != entry.file_bytes:
            raise _another(f"it has {status.st_size} bytes, and had {entry.file_bytes}", where)
        if entry.sha256:
            if sha256_of(path, deadline) != entry.sha256:
                raise _another("its SHA-256 is another one", where)
        elif status.st_mtime_ns != entry.mtime_ns:
            raise _another("it was written to since", where)
        source = ImageSource.open(path, format=entry.format, deadline=deadline)
    except OSError as error:
        raise RepositoryDamagedError(f"the template cannot be read: {error.strerror}", where=where) from error
    except ImageError as error:
        raise RepositoryDamagedError(f"the template cannot be read: {error.args[0]}", where=where) from error
    if source.size != entry.size:
        source.close()
        raise _another(f"its disk has {source.size} bytes, and had {entry.size}", where)
    return source


def template_for(disk: str, templates: Sequence[str], disks: Collection[str]) -> str:
    """Returns the template of a disk; empty if none was named.

    Args:
        disk: the disk.
        templates: as they were named: ``DISK=FILE`` for one disk, or ``FILE`` for all others.
        disks: all disks of the backup. What does not begin with the name of one is a file whose name has a ``=``.
    """
    others = ""
    for text in templates:
        name, equals, file = text.partition("=")
        if not equals or name not in disks:
            others = text
        elif name == disk:
            return file
    return others


def _another(what: str, where: str) -> RepositoryDamagedError:
    return RepositoryDamagedError(f"it is not the template of the backup: {what}", where=where, remedy=_REMEDY)
