"""Whether somebody uses a file: the locks that QEMU takes on images, and those of others.

::

    bytes 100 … 107   QEMU holds byte 100 + n if it uses permission n: 101 is writing
    bytes 200 … 207   … if it forbids permission n to others

QEMU's locks are open-file-description locks, which the kernel tells of without taking any.
Source: ``block/file-posix.c`` for the places (they are part of what QEMU releases agree on), fcntl(2) for the locks.
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path
from typing import Final

from qmpnbd.errors import TargetInUseError

_FLOCK: Final = struct.Struct("hhqqixxxx")  # struct flock of 64-bit Linux: type, whence, start, length, pid
_WRITING: Final = 101
_LOOK: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK


def is_locked(fd: int, start: int = 0, length: int = 0) -> bool:
    """Returns whether somebody else holds a lock on some of the bytes; a length of 0 is all to the end."""
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
    kind, *_ = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))
    return bool(kind != fcntl.F_UNLCK)


def take(fd: int) -> bool:
    """Locks a whole file, which must be open for writing, until it is closed; returns whether that could be done.

    Unlike flock's, such a lock can be asked for (`is_locked`) without taking it, so that who asks is in nobody's way.
    """
    wanted = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, wanted)
    except (BlockingIOError, PermissionError):  # EAGAIN or EACCES: fcntl(2) allows either
        return False
    return True


def is_written_to(path: str | os.PathLike[str]) -> bool:
    """Returns whether a QEMU has an image open for writing.

    Raises:
        OSError: the file cannot be looked at.
    """
    fd = os.open(path, _LOOK)
    try:
        return is_locked(fd, _WRITING, 1)
    finally:
        os.close(fd)


def require_unused(path: Path, where: str) -> None:
    """Returns if nobody holds a lock on a file.

    Raises:
        TargetInUseError: somebody does.
        OSError: the file cannot be looked at.
    """
    fd = os.open(path, _LOOK)
    try:
        if is_locked(fd):
            what = "another process uses it (a QEMU holds its locks, or a tool its own)"
            raise TargetInUseError(what, where=where, remedy="End what uses it, or choose another name.")
    finally:
        os.close(fd)
