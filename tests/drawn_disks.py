"""Disks in memory for copies: what a content says, the bytes behind it, and a source that gives them out of order."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from hypothesis import strategies as st

from qmpnbd.backup.content import ABSENT, DATA, ZERO
from qmpnbd.backup.reads import Buffers
from qmpnbd.deadline import Deadline
from qmpnbd.extents import ExtentMap


@dataclass(frozen=True)
class Drawn:
    """A disk over a base, and the content of the layer between them."""

    content: ExtentMap
    base: bytes
    disk: bytes


def drawn(runs: list[tuple[int, int]], base_size: int, seed: int) -> Drawn:
    """Makes a disk of lengths and kinds; where the layer is silent, the base shows, and zeroes past its end."""
    content = ExtentMap.of_extents(runs)
    rng = random.Random(seed)
    base = rng.randbytes(base_size)
    disk = bytearray()
    for each in content:
        if each.value == DATA:
            disk += rng.randbytes(each.length)
        elif each.value == ZERO:
            disk += bytes(each.length)
        else:
            disk += base[each.offset : each.end].ljust(each.length, b"\0")
    return Drawn(content, base, bytes(disk))


LENGTHS = st.one_of(st.integers(1, 8).map(lambda n: n * 512), st.integers(1, 6).map(lambda n: n << 16))
RUNS = st.lists(st.tuples(LENGTHS, st.sampled_from([ABSENT, DATA, ZERO])), min_size=1, max_size=12)
DISKS = st.builds(drawn, RUNS, st.integers(0, 20).map(lambda n: n * 24 * 512), st.integers(0, 99))


class MemorySource:
    """Bytes as a source; the order of its chunks is drawn from a seed."""

    where = "memory"

    def __init__(self, disk: bytes, content: ExtentMap, seed: int = 0) -> None:
        self.size = len(disk)
        self._disk = disk
        self._content = content
        self._rng = random.Random(seed)

    def content(self, deadline: Deadline) -> ExtentMap:
        return self._content

    def chunks(
        self, ranges: Iterable[tuple[int, int]], deadline: Deadline, buffers: Buffers | None = None
    ) -> Iterator[tuple[int, memoryview]]:
        pool = buffers or Buffers()
        wanted = list(ranges)
        self._rng.shuffle(wanted)
        for offset, length in wanted:
            deadline.check("memory", self.where)
            view = pool.take(length)
            view[:] = self._disk[offset : offset + length]
            yield offset, view

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
