"""A raw file that is made in several runs: what one has copied is not copied again by the next.

::

    .disk.raw.resume.part       as long as the disk; locked by the run that writes it
    .disk.raw.resume.journal    which pieces are on the medium, each with its hash
              | all of it there: a name, and no journal any more
              v
    disk.raw

Whatever ends a run, both stay. The next one holds every piece that was noted against its hash, and copies what is not
there, or is something else, again. What is copied is told by a **key**: what the source is, and where it holds data. A
copy of something else, or of the same thing after it was written to, has another one and is never mixed with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Mapping
from typing import Final

import numpy as np

from qmpnbd.backup import parts
from qmpnbd.backup.content import PIECE, pieces
from qmpnbd.backup.copy_journal import CopyJournal, Written, read_journal
from qmpnbd.backup.destination import forget
from qmpnbd.backup.newfile import NewFile, told
from qmpnbd.deadline import Deadline
from qmpnbd.errors import TargetError, TargetInUseError
from qmpnbd.extents import ExtentMap
from qmpnbd.printable import printable

_SECONDS: Final = 1.0  # of copying that a kill can cost, and what is brought to the medium at a time
_ZEROES: Final = memoryview(bytes(PIECE))


def key_of(identity: str, content: ExtentMap) -> bytes:
    """Returns the key of a copy.

    Args:
        identity: what the source is, and that it was not written to (`Source.identity`).
        content: what is copied of it.
    """
    columns = content.ends.astype("<u8").tobytes() + content.values.astype("<u8").tobytes()
    return hashlib.sha256(hashlib.sha256(identity.encode("utf-8", "surrogateescape")).digest() + columns).digest()


class ResumableTarget:
    """A raw file of which a part may be there already: a `Target`, whose `discard` keeps what was written.

    Args:
        path: the name it is to have.
        content: what is copied to it.
        key: of the copy (`key_of`).
        force: whether a file of that name may be replaced, in the end.
        deadline: for looking at what is there.

    Attributes:
        done: not 0 where pieces are there already.
        done_bytes: bytes of them.

    Raises:
        TargetInUseError: the name is taken, another run copies there, or what was begun there is something else.
        TargetError: it cannot be made or read.
        DeadlineError: the time is over.
    """

    lanes = 1

    def __init__(self, path: str, content: ExtentMap, key: bytes, *, force: bool, deadline: Deadline) -> None:
        self._force = force
        self._file = NewFile(path, force=force, resumable=True)
        self.where = self._file.where
        self.read_from = os.fspath(self._file.beside)
        self._offsets, self._lengths = pieces(content)
        self._lock = threading.Lock()
        self._fresh: list[Written] = []
        self._journal: CopyJournal | None = None
        try:
            self._digests = self._found(content, key, deadline)
            self.done, self.done_bytes = self._map(content.size)
            self._journal = CopyJournal(
                parts.journal_of(self._file.beside), key, [self._piece(at) for at in sorted(self._digests)]
            )
        except BaseException:
            self._leave()
            raise
        self._synced = time.monotonic()

    def _found(self, content: ExtentMap, key: bytes, deadline: Deadline) -> dict[int, bytes]:
        """Returns the digests of the pieces that are there, by their offsets, and gives the file its size."""
        length = os.fstat(self._file.fd).st_size
        noted = read_journal(parts.journal_of(self._file.beside), 2 * self._offsets.size)
        if noted is not None and length and noted[0] != key:
            what = "what was begun there is a copy of something else, or its source was written to since"
            remedy = f"Name its source; or leave --resume out, or remove {printable(self.read_from)}, to begin anew."
            raise TargetInUseError(what, where=self.where, remedy=remedy)
        self._is_new = noted is None or not length
        if self._is_new:
            self._file.resize(0)
        self._file.resize(content.size)
        return {} if noted is None or self._is_new else dict(self._proved(noted[1], deadline))

    def _proved(self, noted: Mapping[int, Written], deadline: Deadline) -> list[tuple[int, bytes]]:
        """Reads every piece that was noted, from the medium, and returns those that are what they were."""
        forget(self.read_from)
        room = memoryview(bytearray(PIECE))
        found = []
        for offset, length in zip(self._offsets.tolist(), self._lengths.tolist(), strict=True):
            deadline.check("what was copied before to be proved", self.where)
            piece = noted.get(offset)
            if piece is None or piece.length != length:
                continue
            try:
                read = os.preadv(self._file.fd, [room[:length]], offset)
            except OSError:  # a part of the medium that cannot be read: it is written anew
                continue
            if read == length and hashlib.sha256(room[:length]).digest() == piece.digest:
                found.append((offset, piece.digest))
        return found

    def _map(self, size: int) -> tuple[ExtentMap, int]:
        there = np.isin(self._offsets, np.array(sorted(self._digests), np.uint64))
        starts, lengths = self._offsets[there], self._lengths[there]
        edges = np.empty(2 * starts.size + 1, np.uint64)
        edges[0:-1:2], edges[1:-1:2], edges[-1] = starts, starts + lengths, size
        marks = np.zeros(edges.size, np.uint64)
        marks[1:-1:2] = 1
        return ExtentMap(edges, marks), int(lengths.sum())

    def _piece(self, offset: int) -> Written:
        length = int(self._lengths[np.searchsorted(self._offsets, np.uint64(offset))])
        return Written(offset, length, self._digests[offset])

    @property
    def digests(self) -> bytes:
        """The digests of all pieces, whichever run has copied them; all must have been."""
        return b"".join(self._digests[offset] for offset in self._offsets.tolist())

    def write(self, offset: int, data: memoryview) -> None:
        """Writes a piece of the content, as a whole; see `Target.write`."""
        self._file.write(offset, data)
        piece = Written(offset, len(data), hashlib.sha256(data).digest())
        with self._lock:
            self._digests[offset] = piece.digest
            self._fresh.append(piece)
            if time.monotonic() - self._synced >= _SECONDS:
                self._sync()

    def _sync(self) -> None:
        """Brings what was written to the medium, and then notes that it is there."""
        self._file.settle()
        if self._fresh and self._journal is not None:
            self._journal.append(self._fresh)
            self._fresh = []
        self._synced = time.monotonic()

    def zero(self, offset: int, length: int) -> None:
        """Writes zeroes where an earlier run, or a file system after a power cut, left anything; see `Target.zero`."""
        end = offset + length
        with told("cannot be zeroed", self.where):
            while not self._is_new and (offset := _next_data(self._file.fd, offset)) < end:
                stop = min(end, os.lseek(self._file.fd, offset, os.SEEK_HOLE), offset + PIECE)
                self._file.write(offset, _ZEROES[: stop - offset])
                offset = stop

    def settle(self) -> None:
        """Brings the file to the disk, and notes it; see `Target.settle`."""
        with self._lock:
            self._sync()

    def finish(self) -> None:
        """Settles the file and gives it its name; see `Target.finish`."""
        self.settle()
        self._file.publish(force=self._force)
        self._leave()

    def discard(self) -> None:
        """Keeps what was written, for the next run; never fails, does nothing after `finish`."""
        if self._journal is not None:
            with contextlib.suppress(TargetError):
                self.settle()
        self._leave()

    def _leave(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        self._file.keep()


def _next_data(fd: int, offset: int) -> int:
    """Returns where the next byte is that the file system holds; past the end if there is none."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError:
        return os.fstat(fd).st_size
