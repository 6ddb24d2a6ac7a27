"""The template that a shallow backup stands on: an image, perhaps with images below it, that is not in the repository.

It is known by its identity: the size of its disk and of its file, when that was written last, and the SHA-256 of the
disk that a guest reads from it, images below included, if that was computed. Only with the last is it proved that it
still holds what it held; with it the time does not matter, and it may have been copied to another place.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack

from qmpnbd.backup.fingerprint import sha256_of_disk
from qmpnbd.backup.manifest import TemplateEntry
from qmpnbd.backup.sources import ImageSource
from qmpnbd.deadline import Deadline
from qmpnbd.errors import ImageError, RepositoryDamagedError
from qmpnbd.printable import printable

_REMEDY = "Name the image that the machine was made from, as it was then."


def open_template(entry: TemplateEntry, path: str, deadline: Deadline, *, read: bool = True) -> ImageSource:
    """Opens the template of a shallow backup; the caller closes it.

    Args:
        entry: what the backup recorded.
        path: where it is now.
        deadline: for all that is read from it.
        read: whether to hold all of it against its SHA-256, if that is known; else the time of its file is looked at.

    Raises:
        RepositoryDamagedError: it is missing, or is another one.
        DeadlineError: the time is over.
    """
    where = printable(path)
    try:
        status = os.stat(path)  # noqa: PTH116 (a name as its user has it is text, not a tidied path)
        if stat.S_ISREG(status.st_mode) and status.st_size != entry.file_bytes:
            raise _another(f"it has {status.st_size} bytes, and had {entry.file_bytes}", where)
        if status.st_mtime_ns != entry.mtime_ns and not (read and entry.sha256):
            raise _another("it was written to since", where)
        with ExitStack() as stack:
            source = stack.enter_context(ImageSource.open(path, format=entry.format, deadline=deadline))
            if source.size != entry.size:
                raise _another(f"its disk has {source.size} bytes, and had {entry.size}", where)
            if read and entry.sha256 and sha256_of_disk(source, deadline) != entry.sha256:
                raise _another("it holds something else: its SHA-256 is another one", where)
            stack.pop_all()
            return source
    except (OSError, ValueError) as error:
        raise RepositoryDamagedError(f"the template cannot be read: {error}", where=where) from error
    except ImageError as error:
        raise RepositoryDamagedError(f"the template cannot be read: {error.args[0]}", where=where) from error


def with_sha256(entry: TemplateEntry, known: Iterable[TemplateEntry | None], deadline: Deadline) -> TemplateEntry:
    """Returns what is recorded of a template with its SHA-256.

    Args:
        entry: what is known of it now.
        known: what earlier backups recorded; the same file, not written to since, is not read again.
        deadline: for reading all of it.

    Raises:
        DeadlineError: the time is over.

    Returns:
        The entry; without SHA-256 if the image is none that is read here.
    """
    for other in known:
        if other is not None and other.sha256 and other.model_copy(update={"sha256": ""}) == entry:
            return other
    try:
        with ImageSource.open(entry.path, format=entry.format, deadline=deadline) as source:
            return entry.model_copy(update={"sha256": sha256_of_disk(source, deadline)})
    except ImageError:
        return entry


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
