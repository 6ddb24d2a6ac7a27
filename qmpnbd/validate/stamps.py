"""What a file was when it was read: to notice that somebody else changes it meanwhile, or has since."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from qmpnbd.errors import ImageChangedError
from qmpnbd.images.hostfile import HostFile
from qmpnbd.images.layers import Chain
from qmpnbd.report.model import FileEntry

_SETTLED_NS = 2_000_000_000
"""Times of files are as fine as the kernel's clock tick, or two seconds (FAT): two changes within may bear one time."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """A file at one moment.

    Attributes:
        path: its name.
        device: number of the device it lies on.
        inode: its number there.
        size: bytes.
        mtime_ns: when its content was changed last.
        ctime_ns: when anything of it was changed last.
        settled: whether that was so long ago that a later change cannot bear the same times.
    """

    path: str
    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int
    settled: bool

    @classmethod
    def of(cls, path: str, status: os.stat_result) -> Stamp:
        """Makes the stamp of a file that was looked at just now."""
        settled = time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > _SETTLED_NS
        return cls(path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, settled)

    def same_content(self, other: Stamp) -> bool:
        """Returns whether it is the same file, not written between the two."""
        mine = (self.device, self.inode, self.size, self.mtime_ns)
        return mine == (other.device, other.inode, other.size, other.mtime_ns)

    def entry(self) -> FileEntry:
        """Describes it."""
        return FileEntry(
            path=self.path,
            device=self.device,
            inode=self.inode,
            size=self.size,
            mtime_ns=self.mtime_ns,
            ctime_ns=self.ctime_ns,
            settled=self.settled,
        )


def stamps_of(chain: Chain) -> tuple[Stamp, ...]:
    """Looks at every file of an open chain.

    Raises:
        ImageUnreadableError: an I/O error.
    """
    return tuple(Stamp.of(file.path, file.status()) for file in _files(chain))


def _files(chain: Chain) -> Iterator[HostFile]:
    for member in chain.members:
        yield member.file
        if member.qcow2 is not None and member.qcow2.data is not member.file:
            yield member.qcow2.data


def require_unchanged(chain: Chain, before: Sequence[Stamp]) -> None:
    """Refuses files that were written, or replaced under their names, since `before`.

    Raises:
        ImageChangedError: that happened.
        ImageUnreadableError: an I/O error.
    """
    remedy = "Wait until nobody writes to it; of a running guest, validate the disk with --qmp."
    for old, now in zip(before, stamps_of(chain), strict=True):
        if not old.same_content(now):
            raise ImageChangedError("somebody else changed it while it was read", where=old.path, remedy=remedy)
        named = look_at(old.path)
        if named is None or (named.device, named.inode) != (old.device, old.inode):
            raise ImageChangedError("another file took its name while it was read", where=old.path, remedy=remedy)


def look_at(path: str) -> Stamp | None:
    """Looks at a file by its name; None if that cannot be done."""
    try:
        return Stamp.of(path, os.stat(path))  # noqa: PTH116 - a name as QEMU has it is text, not a tidied path
    except (OSError, ValueError):
        return None


def unchanged(entries: Iterable[FileEntry]) -> bool:
    """Returns whether files still are what they were, for certain."""
    return all(entry.settled and _is_still(entry, look_at(entry.path)) for entry in entries)


def _is_still(entry: FileEntry, now: Stamp | None) -> bool:
    return now is not None and (entry.device, entry.inode, entry.size, entry.mtime_ns, entry.ctime_ns) == (
        now.device,
        now.inode,
        now.size,
        now.mtime_ns,
        now.ctime_ns,
    )
