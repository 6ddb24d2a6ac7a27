"""The copy engine: reads, hashes and writes at the same time, and touches no byte in Python.

::

    caller's thread                       threads of the copy
    source.chunks ----> batches, at most ----> sha256, target.write
         ^               `_QUEUED` of them           |
         |                                           |
         +----------- buffers, given back -----------+

A copy goes by its content: `ABSENT` is not touched, `ZERO` is told to the target, the pieces of `DATA` are read and
written, in whatever order the source gives them. Receiving, hashing and writing let go of Python's lock, so that they
run at the same time. Small pieces are handed over together, because handing over is what costs.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Final, TypeAlias

import numpy as np

from qmpnbd.backup.content import PIECE, ZERO, pieces
from qmpnbd.backup.pace import Pace
from qmpnbd.backup.reads import Buffers
from qmpnbd.backup.sources import Source
from qmpnbd.backup.targets import BatchTarget, Target
from qmpnbd.deadline import Deadline
from qmpnbd.errors import UsageError
from qmpnbd.extents import U64, ExtentMap

DIGEST: Final = 32
"""Bytes of the digest of a piece: SHA-256."""

_QUEUED: Final = 4
_BATCH: Final = PIECE
_LOOK: Final = 0.25  # seconds after which a wait looks whether its Deadline was told to stop
_SLICE: Final = 1 << 14  # pieces turned into Python objects at a time

Batch: TypeAlias = list[tuple[int, memoryview]]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a copy is.

    Attributes:
        data_bytes: data read and handed to the target.
        of_bytes: data there is.
        seconds: since it began.
    """

    data_bytes: int
    of_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class CopyOptions:
    """How to copy.

    Attributes:
        hashes: whether to compute the digest of each piece.
        pace: limits the data that is read, together with whatever else has the same one; None for no limit.
        progress: told how far the copy is, in the caller's thread, often; None to tell nobody.
        done: not 0 where the target has it already; None for nowhere. What is done of a piece is told by its first
            byte, so it is to be made of whole pieces.
    """

    hashes: bool = False
    pace: Pace | None = None
    progress: Callable[[Progress], None] | None = None
    done: ExtentMap | None = None


@dataclass(frozen=True, slots=True)
class Copied:
    """What was copied.

    Attributes:
        data_bytes: bytes that were read and written.
        zero_bytes: bytes that the target was told to have read as zeroes.
        seconds: it took.
        digests: of each piece in the order of `pieces`, `DIGEST` bytes each; None if there are none.
    """

    data_bytes: int
    zero_bytes: int
    seconds: float
    digests: bytes | None


def copy(source: Source, target: Target, content: ExtentMap, options: CopyOptions, deadline: Deadline) -> Copied:
    """Copies what a content says from a source to a target, which is neither finished nor discarded here.

    Args:
        source: what to read.
        target: what to write.
        content: which bytes are data, which are zeroes, and which are not to be touched.
        options: how.
        deadline: how long it may take; telling it to stop ends the copy.

    Raises:
        UsageError: the content is longer than the source.
        QmpnbdError: of the source (NbdError, ImageError) or of the target (TargetError).
        DeadlineError: the time is over.
    """
    if content.size > source.size:
        raise UsageError(f"{content.size} bytes of a disk that has {source.size}", where=source.where)
    began = time.monotonic()
    if options.done is not None:
        content = options.done.combine(content, lambda done, wanted: np.where(done != 0, 0, wanted))
    offsets, lengths = pieces(content)
    zero_bytes = _zero(target, content, deadline)
    total = int(lengths.sum())
    workers = _Workers(target, offsets if options.hashes else None, threads=target.lanes + options.hashes)
    done = 0
    with workers:
        for batch, length in _batches(source.chunks(_ranges(offsets, lengths), deadline, workers.buffers)):
            workers.hand_over(batch, deadline, source.where)
            done += length
            if options.progress is not None:
                options.progress(Progress(done, total, time.monotonic() - began))
            if options.pace is not None:
                options.pace.wait(length, deadline, source.where)
        workers.drain(deadline, target.where)
    return Copied(done, zero_bytes, time.monotonic() - began, workers.digests)


def _zero(target: Target, content: ExtentMap, deadline: Deadline) -> int:
    """Tells the target where zeroes are, and returns how many."""
    zeroes = content.values == np.uint64(ZERO)
    starts, lengths = content.starts[zeroes], (content.ends - content.starts)[zeroes]
    for offset, length in _ranges(starts, lengths):
        deadline.check("the target to be zeroed", target.where)
        target.zero(offset, length)
    return int(lengths.sum())


def _ranges(offsets: U64, lengths: U64) -> Iterator[tuple[int, int]]:
    """Yields two columns as pairs of plain ints, some thousand at a time: all at once would take 100 bytes each."""
    for first in range(0, offsets.size, _SLICE):
        part = slice(first, first + _SLICE)
        yield from zip(offsets[part].tolist(), lengths[part].tolist(), strict=True)


def _batches(chunks: Iterator[tuple[int, memoryview]]) -> Iterator[tuple[Batch, int]]:
    """Collects small chunks into batches worth handing over, each with its bytes."""
    batch: Batch = []
    length = 0
    for chunk in chunks:
        batch.append(chunk)
        length += len(chunk[1])
        if length >= _BATCH:
            yield batch, length
            batch, length = [], 0
    if batch:
        yield batch, length


class _Workers:
    """The threads that hash and write; a context manager that ends them, whatever happened.

    Args:
        target: where they write.
        offsets: of the pieces, if each is to have its digest.
        threads: how many.

    Attributes:
        buffers: where they give back what they have written.
    """

    def __init__(self, target: Target, offsets: U64 | None, *, threads: int) -> None:
        self.buffers = Buffers()
        self._target = target
        self._offsets = offsets
        self._digests = None if offsets is None else bytearray(DIGEST * offsets.size)
        self._queue: SimpleQueue[Batch | None] = SimpleQueue()
        self._room = threading.Semaphore(threads + _QUEUED)
        self._limit = threads + _QUEUED
        self._failure: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._work, name=f"qmpnbd-copy-{number}", daemon=True) for number in range(threads)
        ]

    @property
    def digests(self) -> bytes | None:
        """The digests of all pieces that were handed over."""
        return None if self._digests is None else bytes(self._digests)

    def __enter__(self) -> _Workers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self._failure is None:
            self._failure = InterruptedError()  # what is queued still need not be written
        for _thread in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def hand_over(self, batch: Batch, deadline: Deadline, where: str) -> None:
        """Has a batch hashed and written; waits while too many are under way.

        Raises:
            QmpnbdError: a batch before could not be written.
            DeadlineError: the time is over.
        """
        self._wait_for_room(deadline, where)
        self._queue.put(batch)

    def drain(self, deadline: Deadline, where: str) -> None:
        """Returns when all is written; raises as `hand_over`."""
        for _ in range(self._limit):
            self._wait_for_room(deadline, where)
        self._raise_failure()

    def _wait_for_room(self, deadline: Deadline, where: str) -> None:
        while not self._room.acquire(blocking=False):
            left = deadline.remaining("the target to take what was read", where)
            if self._room.acquire(timeout=_LOOK if left is None else min(left, _LOOK)):
                break
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        while (batch := self._queue.get()) is not None:
            try:
                if self._failure is None:
                    self._store(batch)
            except BaseException as error:
                self._failure = self._failure or error
            self._room.release()

    def _store(self, batch: Batch) -> None:
        if self._offsets is not None and self._digests is not None:
            places = np.searchsorted(self._offsets, np.array([offset for offset, _ in batch], dtype=np.uint64))
            for place, (_, view) in zip(places.tolist(), batch, strict=True):
                self._digests[DIGEST * place : DIGEST * (place + 1)] = hashlib.sha256(view).digest()
        if len(batch) > 1 and isinstance(self._target, BatchTarget):
            self._target.write_batch(batch)
        else:
            for offset, view in batch:
                self._target.write(offset, view)
        for _, view in batch:
            self.buffers.give_back(view)
