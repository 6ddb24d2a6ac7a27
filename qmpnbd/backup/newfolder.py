"""A folder that appears under its name only when all in it is whole; as `qmpnbd.backup.newfile` for files."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from qmpnbd.backup import parts
from qmpnbd.backup.durable import rename, sync_folder
from qmpnbd.backup.newfile import told
from qmpnbd.errors import TargetInUseError
from qmpnbd.printable import printable


@contextlib.contextmanager
def new_folder(target: str) -> Iterator[Path]:
    """Makes a folder that gets its name at the end, and is removed if that is not reached.

    Args:
        target: its name; no folder is ever replaced.

    Yields:
        The folder under the name that it has until then.

    Raises:
        TargetInUseError: there is something of that name.
        TargetError: it cannot be made, or be given its name.
    """
    place, where = Path(target), printable(target)
    if os.path.lexists(place):
        raise TargetInUseError("it exists", where=where, remedy="Choose another name: no folder is replaced.")
    parts.clear(place)
    with told("cannot be made", where):
        lock, folder = parts.make_folder(place)
    try:
        yield folder
        with told("cannot be given its name", where):
            sync_folder(folder)
            rename(folder, place)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        os.close(lock)
