"""What a guest's disks hold at every moment, known without reading them: numbered operations, and a replay of them.

::

    operation   1    2    3   ...   lo  ...   n  ...   hi
                |---- acknowledged ----|            |  |
                     before a backup was started    |  the last one issued when it had ended
                                                    |
                            all of 1..n and none of the others are in the backup, on every disk

Operation N follows from N alone. A writer makes one after the other, whatever the disk, so that the disks of one
instant hold the operations up to some number and no other. That number is found by comparing all the bytes.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

BLOCK: Final = 4096
CLUSTER: Final = 65536
ZONE: Final = 6 << 20
"""Bytes of a disk that are written to for a while: an increment is less than the disk."""

EACH: Final = 150
"""Operations until the zone moves on."""


@dataclass(frozen=True, slots=True)
class Operation:
    """Something that a guest does to a disk.

    Attributes:
        number: from 1.
        disk: which one, from 0.
        kind: what; after the last two the range reads as zeroes, stored as such or not at all. A plain discard is none
            of them: QEMU may drop it, and does so while a backup job's filter lies on the disk.
        offset: first byte.
        length: bytes.
    """

    number: int
    disk: int
    kind: Literal["write", "zero", "unmap"]
    offset: int
    length: int

    @property
    def end(self) -> int:
        """The first byte after it."""
        return self.offset + self.length

    def data(self) -> bytes:
        """Returns what is written; each block says which operation wrote it, and where."""
        if self.kind != "write":
            return bytes(self.length)
        lines = (b"qmpnbd record %d at %d" % (self.number, place) for place in range(self.offset, self.end, BLOCK))
        return b"".join(line.ljust(BLOCK - 1) + b"\n" for line in lines)


def operation(number: int, sizes: Sequence[int]) -> Operation:
    """Returns an operation of a guest.

    Args:
        number: which.
        sizes: bytes of its disks.
    """
    dice = random.Random(number)
    disk = dice.randrange(len(sizes))
    kind: Literal["write", "zero", "unmap"] = dice.choice(("write", "write", "write", "write", "zero", "unmap"))
    unit = CLUSTER if kind == "unmap" else BLOCK
    length = unit * dice.choice((1, 1, 1, 2, 5))
    zone = number // EACH * (ZONE - CLUSTER) % (sizes[disk] - ZONE)
    offset = (zone + dice.randrange(ZONE - length)) // unit * unit
    return Operation(number, disk, kind, offset, length)


class Replay:
    """The disks after some number of operations.

    Attributes:
        number: of the last operation that is in them.
        nearest: what came nearest to what was looked for last, in words.
    """

    def __init__(self, contents: Sequence[bytes], number: int) -> None:
        self.number = number
        self.nearest = ""
        self.contents = [bytearray(each) for each in contents]

    @property
    def sizes(self) -> list[int]:
        """Bytes of the disks."""
        return [len(each) for each in self.contents]

    def go_on(self) -> Operation:
        """Does the next operation."""
        self.number += 1
        done = operation(self.number, self.sizes)
        self.contents[done.disk][done.offset : done.end] = done.data()
        return done

    def reach(self, number: int) -> None:
        """Does all operations up to one."""
        while self.number < number:
            self.go_on()

    def find(self, found: Sequence[bytes], last: int) -> int | None:
        """Goes on until the disks hold what was found, byte for byte.

        Args:
            found: the content of the disks in a backup.
            last: the last operation that may be in it.

        Returns:
            The number of the last operation in it; None if no number explains what was found.
        """
        if [len(each) for each in found] != self.sizes:
            self.nearest = f"sizes {[len(each) for each in found]}, not {self.sizes}"
            return None
        wrong = [set(_differing(one, other)) for one, other in zip(self.contents, found, strict=True)]
        least = sys.maxsize
        while any(wrong):
            if sum(map(len, wrong)) < least:
                least = sum(map(len, wrong))
                self.nearest = self.explain(found, wrong)
            if self.number == last:
                return None
            done = self.go_on()
            here, there = self.contents[done.disk], found[done.disk]
            for offset in range(done.offset, done.end, BLOCK):
                same = here[offset : offset + BLOCK] == there[offset : offset + BLOCK]
                (wrong[done.disk].discard if same else wrong[done.disk].add)(offset)
        return self.number

    def explain(self, found: Sequence[bytes], wrong: Sequence[Collection[int]] | None = None) -> str:
        """Returns where what was found differs from the disks as they are now, and what is there.

        Args:
            found: the content of the disks.
            wrong: the offsets of the blocks of each that differ; None to look for them.
        """
        words = [f"after operation {self.number}:"]
        for number, (here, there) in enumerate(zip(self.contents, found, strict=True)):
            if len(here) != len(there):
                words.append(f"disk {number}: {len(there)} bytes, not {len(here)}")
                continue
            offsets = _differing(here, there) if wrong is None else wrong[number]
            words += [
                f"disk {number} at {offset}: {_told(there, offset)}, not {_told(here, offset)}"
                for offset in itertools.islice(offsets, 4)
            ]
            words.append(f"disk {number}: {len(offsets)} blocks differ")
        return "\n".join(words)


def _differing(one: bytes | bytearray, other: bytes | bytearray) -> list[int]:
    size = max(len(one), len(other))
    rows = [np.frombuffer(bytes(each).ljust(-(-size // BLOCK) * BLOCK), np.uint64) for each in (one, other)]
    unequal = (rows[0] != rows[1]).reshape(-1, BLOCK // 8).any(axis=1)
    return [int(index) * BLOCK for index in np.flatnonzero(unequal)]


def _told(content: bytes | bytearray, offset: int) -> str:
    block = bytes(content[offset : offset + BLOCK])
    return "zeroes" if not any(block) else repr(block[:40].rstrip())
