"""Bytes over NBD against bytes from our own chain reader; blocking work, run in a thread.

Both sides are read piece by piece, and a piece is compared as a whole first. In one that differs, the runs of differing
blocks are told, with the SHA-256 of both sides: with that and the offset anybody can see for himself who is right.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from qmpnbd.deadline import Deadline
from qmpnbd.extents import ExtentMap
from qmpnbd.images.layers import Chain
from qmpnbd.nbd.client import Client
from qmpnbd.report.model import RangeHashEntry
from qmpnbd.validate.hashes import Hashes

_BLOCK = 4096


@dataclass(frozen=True, slots=True)
class ContentDifference:
    """A run of blocks for which a server and the files have different bytes.

    Attributes:
        offset: first byte of the first block.
        end: the byte after the last block.
        served: the first byte that differs, as served.
        computed: that byte in the files.
        served_sha256: SHA-256 of the run as served, in hexadecimal.
        computed_sha256: that of the run in the files.
    """

    offset: int
    end: int
    served: int
    computed: int
    served_sha256: str
    computed_sha256: str


def compare_content(
    client: Client,
    chain: Chain,
    ranges: Sequence[tuple[int, int]],
    deadline: Deadline,
    on_bytes: Callable[[int], None],
) -> tuple[list[ContentDifference], tuple[RangeHashEntry, ...]]:
    """Compares ranges of a disk.

    Args:
        client: of the export.
        chain: of the files.
        ranges: offset and length of each, in order.
        deadline: for all of it.
        on_bytes: told how many bytes have been compared, piece by piece.

    Returns:
        The differences, in order, and each range with its hash.

    Raises:
        NbdError: the server failed.
        ImageError: the files cannot be read.
        DeadlineError: the time is over.
    """
    found: list[ContentDifference] = []
    hashes = Hashes(ranges)
    for offset, served in client.chunks(ranges, deadline=deadline):
        computed = chain.read(offset, len(served))
        if served != computed:
            found += differences(offset, served, computed)
            hashes.lose(offset)
        else:
            hashes.add(offset, served)
        on_bytes(len(served))
    hashes.settle(ExtentMap.uniform(client.export.size, 0))
    return sorted(found, key=lambda each: each.offset), hashes.told()


def differences(offset: int, served: memoryview, computed: bytes | bytearray) -> Iterator[ContentDifference]:
    """Yields the runs of differing blocks of a piece that begins at `offset`."""
    left, right = np.frombuffer(served, np.uint8), np.frombuffer(computed, np.uint8)
    unequal = np.flatnonzero(left != right)
    if not unequal.size:
        return
    blocks = np.unique((unequal + offset) // _BLOCK)
    firsts = np.append(True, blocks[1:] != blocks[:-1] + 1)
    lasts = np.append(firsts[1:], True)
    for first, last in zip(blocks[firsts].tolist(), blocks[lasts].tolist(), strict=True):
        start = max(first * _BLOCK - offset, 0)
        end = min((last + 1) * _BLOCK - offset, len(served))
        place = int(unequal[np.searchsorted(unequal, start)])
        yield ContentDifference(
            offset=offset + start,
            end=offset + end,
            served=int(left[place]),
            computed=int(right[place]),
            served_sha256=hashlib.sha256(served[start:end]).hexdigest(),
            computed_sha256=hashlib.sha256(computed[start:end]).hexdigest(),
        )
