"""Reads of ranges from an NBD server: in requests that servers answer fast, over one connection or several.

::

    ranges    |  0                     |  1   |  2              …        up to a piece (1 MiB) each
    requests  |  512 KiB  |  512 KiB   |      |          |               sixteen in flight
    buffers   |  one a range           |  …   |                          given when the last byte of it is there
"""

from __future__ import annotations

import mmap
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import Final

from qmpnbd.backup.content import PIECE
from qmpnbd.deadline import Deadline
from qmpnbd.nbd.client import Client
from qmpnbd.nbd.ranges import pieces

REQUEST: Final = 512 << 10
"""Bytes of one read. QEMU takes twice as long for 1 MiB: its buffers are no longer reused then."""

IN_FLIGHT: Final = 16
"""Reads in flight: as many as QEMU works on at a time."""

_SIZES: Final = (64 << 10, 256 << 10, PIECE)
_LOOK: Final = 0.25  # seconds after which a wait looks whether its Deadline was told to stop


class Buffers:
    """Buffers, taken by who reads and given back by who has written; for any threads.

    There are three sizes of them, so that many small ranges under way do not take the room of as many pieces.
    """

    def __init__(self) -> None:
        self._free: dict[int, deque[memoryview]] = {size: deque() for size in _SIZES}

    def take(self, length: int = PIECE) -> memoryview:
        """Returns a buffer of `length` bytes, `PIECE` at most.

        It is the one given back last, which is likely to be in the cache still, or a new one.
        """
        size = next(size for size in _SIZES if length <= size)
        try:
            return self._free[size].pop()[:length]
        except IndexError:
            # Not a bytearray: those are cleared, and so take memory, before anything is put into them.
            return memoryview(mmap.mmap(-1, size))[:length]

    def give_back(self, view: memoryview) -> None:
        """Takes back the buffer of which `view` is a part."""
        whole = memoryview(view.obj)
        self._free[len(whole)].append(whole)


class _Range:
    """A range that is being read.

    Attributes:
        missing: bytes that have not come yet.
        view: its data; empty before the first of it came.
    """

    __slots__ = ("_length", "missing", "offset", "view")

    def __init__(self, offset: int, length: int) -> None:
        self.offset = offset
        self._length = self.missing = length
        self.view = memoryview(b"")

    def part(self, buffers: Buffers, offset: int, length: int) -> memoryview:
        """Returns the room for some of it."""
        if not self.view:
            self.view = buffers.take(self._length)
        start = offset - self.offset
        return self.view[start : start + length]


def assembled(
    client: Client, ranges: Iterable[tuple[int, int]], deadline: Deadline, buffers: Buffers | None
) -> Iterator[tuple[int, memoryview]]:
    """Reads ranges over one connection; see `Source.chunks`."""
    pool = Buffers() if buffers is None else buffers
    under_way: dict[int, _Range] = {}  # by the offset of each request

    def requests() -> Iterator[tuple[int, int]]:
        for offset, length in ranges:
            whole = _Range(offset, length)
            for start, size in pieces(offset, length, REQUEST):
                under_way[start] = whole
                yield start, size

    def place(offset: int, length: int) -> memoryview:
        return under_way[offset].part(pool, offset, length)

    for offset, data in client.chunks(requests(), size=REQUEST, in_flight=IN_FLIGHT, place=place, deadline=deadline):
        whole = under_way.pop(offset)
        whole.missing -= len(data)
        if not whole.missing:
            yield whole.offset, whole.view
            if buffers is None:
                pool.give_back(whole.view)


def side_by_side(
    clients: Sequence[Client], ranges: Iterable[tuple[int, int]], deadline: Deadline, buffers: Buffers | None
) -> Iterator[tuple[int, memoryview]]:
    """Reads ranges over several connections, a thread each; see `Source.chunks`."""
    pool = Buffers() if buffers is None else buffers
    shared = _Shared(ranges)
    found: SimpleQueue[tuple[int, memoryview] | BaseException | None] = SimpleQueue()

    def read(client: Client) -> None:
        try:
            for chunk in assembled(client, shared, deadline, pool):
                found.put(chunk)
                shared.room.acquire()
            found.put(None)
        except BaseException as error:
            found.put(error)

    threads = [threading.Thread(target=read, args=(client,), daemon=True, name="qmpnbd-read") for client in clients]
    for thread in threads:
        thread.start()
    try:
        running = len(threads)
        while running:
            chunk = _next(found, deadline, clients[0].where)
            if isinstance(chunk, BaseException):
                raise chunk
            if chunk is None:
                running -= 1
                continue
            yield chunk
            shared.room.release()
            if buffers is None:
                pool.give_back(chunk[1])
    finally:
        shared.end(len(threads))
        for thread in threads:
            thread.join()


class _Shared:
    """Ranges that several threads take from, and room for what they found."""

    def __init__(self, ranges: Iterable[tuple[int, int]]) -> None:
        self.room = threading.Semaphore(0)
        self._ranges = iter(ranges)
        self._lock = threading.Lock()
        self._ended = False

    def __iter__(self) -> Iterator[tuple[int, int]]:
        while True:
            with self._lock:
                found = None if self._ended else next(self._ranges, None)
            if found is None:
                return
            yield found

    def end(self, threads: int) -> None:
        """Lets nobody take any more, nor wait for room: what is in flight still comes, and is dropped."""
        self._ended = True
        self.room.release(threads * (IN_FLIGHT + 1))


def _next(
    found: SimpleQueue[tuple[int, memoryview] | BaseException | None], deadline: Deadline, where: str
) -> tuple[int, memoryview] | BaseException | None:
    while True:
        left = deadline.remaining("what is read over several connections", where)
        try:
            return found.get(timeout=_LOOK if left is None else min(left, _LOOK))
        except Empty:
            continue
