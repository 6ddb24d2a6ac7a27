"""What is written beside its place until it is whole: its name, and the lock that tells whether its maker lives.

::

    .disk.qcow2.3f9a01c7.part    locked (flock) by the run that writes it
                                 unlocked: that run was killed, and the next one for the same place removes it
    .disk.qcow2.resume.part      the same of a copy that can be resumed, with .disk.qcow2.resume.journal; it stays until
                                 something else has got the name

A lock that a file system does not have is never free, so that nothing is removed there.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import Final

SUFFIX: Final = ".part"

_RESUME: Final = "resume"
_RANDOM_BYTES: Final = 4
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE: Final = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def new_part(place: Path) -> Path:
    """Returns a name beside a place, for what is to be there."""
    return place.with_name(f".{place.name}.{secrets.token_hex(_RANDOM_BYTES)}{SUFFIX}")


def make_file(place: Path) -> tuple[int, Path]:
    """Makes an empty file beside a place, for its owner alone, and locks it.

    Returns:
        Its descriptor, which holds the lock while it is open, and its name.

    Raises:
        OSError: it cannot be made.
    """
    while True:
        part = new_part(place)
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        if is_claimed(fd, part):
            return fd, part
        os.close(fd)


def resume_file(place: Path) -> tuple[int, Path] | None:
    """Opens what a copy that can be resumed has made beside a place, or makes it; otherwise as `make_file`.

    Returns:
        As `make_file`; None if another run works on it.
    """
    part = _resumed(place)
    while True:
        fd = os.open(part, os.O_CREAT | _FILE, 0o600)
        claimed = is_claimed(fd, part)
        if claimed and os.fstat(fd).st_nlink == 1:
            return fd, part
        if claimed:  # a run was killed when the file had its name already, and under that nobody writes to it any more
            part.unlink()
        os.close(fd)
        if not claimed and part.exists():
            return None


def journal_of(part: Path) -> Path:
    """Returns the name of the journal that goes with a part that can be resumed."""
    return part.with_suffix(".journal")


def _resumed(place: Path) -> Path:
    return place.with_name(f".{place.name}.{_RESUME}{SUFFIX}")


def clear_resumable(place: Path) -> None:
    """Removes what a copy that could have been resumed has left beside a place, and does not work on; never fails."""
    part = _resumed(place)
    with contextlib.suppress(OSError):
        with contextlib.suppress(FileNotFoundError):
            _remove_unlocked(part)
        journal_of(part).unlink(missing_ok=True)


def make_folder(place: Path) -> tuple[int, Path]:
    """Makes an empty folder beside a place; otherwise as `make_file`."""
    while True:
        part = new_part(place)
        part.mkdir()
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(part, _FOLDER)
            if is_claimed(fd, part):
                return fd, part
            os.close(fd)


def is_claimed(fd: int, part: Path) -> bool:
    """Locks what was opened; returns whether that is what still has the name, and nobody else works on it.

    What was opened may have been removed, or been given its name, between the opening and the lock.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # no locks here; then nobody removes anything either
    try:
        return os.path.samestat(os.fstat(fd), part.lstat())
    except FileNotFoundError:
        return False


def clear(place: Path) -> None:
    """Removes what killed runs left beside a place; never fails."""
    name = re.compile(rf"\.{re.escape(place.name)}\.[0-9a-f]{{{2 * _RANDOM_BYTES}}}{re.escape(SUFFIX)}", re.ASCII)
    with contextlib.suppress(OSError):
        for each in place.parent.iterdir():
            if name.fullmatch(each.name):
                with contextlib.suppress(OSError):
                    _remove_unlocked(each)


def _remove_unlocked(part: Path) -> None:
    is_folder = part.is_dir() and not part.is_symlink()
    fd = os.open(part, _FOLDER if is_folder else _FILE)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if is_folder:
            shutil.rmtree(part)
        else:
            part.unlink()
    finally:
        os.close(fd)
