"""Which layer holds what, and proof by reading back: pure, or on files that a test has made itself."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpnbd.backup.content import ABSENT, DATA, PIECE, ZERO, pieces
from qmpnbd.backup.hashes import Hashes
from qmpnbd.backup.layers import owners_of, runs
from qmpnbd.backup.proof import cut, prove, ranges_of
from qmpnbd.backup.reads import Buffers
from qmpnbd.deadline import Deadline
from qmpnbd.errors import NotProvedError
from qmpnbd.extents import ExtentMap

KINDS = st.sampled_from([ABSENT, DATA, ZERO])
CONTENTS = st.lists(st.lists(st.tuples(st.integers(1, 5), KINDS), min_size=1, max_size=6), min_size=1, max_size=4)


@given(CONTENTS, st.booleans())
def test_the_topmost_layer_that_has_a_byte_owns_it(layers: list[list[tuple[int, int]]], has_template: bool) -> None:
    """Against a walk byte by byte: a short layer hides what lies below with zeroes."""
    contents = [ExtentMap.of_extents(layer) for layer in layers]
    below = contents.pop().mapped(lambda values: np.maximum(values, 1)) if has_template and len(contents) > 1 else None
    found = owners_of(contents, below)
    assert found.size == contents[0].size
    for at in range(found.size):
        owner = 0
        for number, content in enumerate([*contents, *([below] if below is not None else [])], 1):
            if at >= content.size:
                break
            if content.at(at) != ABSENT:
                owner = number if content.at(at) == DATA else 0
                break
        assert found.at(at) == owner, at


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3)), min_size=1), st.data())
def test_the_runs_of_a_window_are_those_of_the_map(extents: list[tuple[int, int]], data: st.DataObject) -> None:
    whole = ExtentMap.of_extents(extents)
    offset = data.draw(st.integers(0, whole.size - 1))
    end = data.draw(st.integers(offset + 1, whole.size))
    expected = [(each.offset + offset, each.end + offset, each.value) for each in whole.clip(offset, end)]
    assert list(runs(whole, offset, end)) == expected


def test_ranges_are_cut_at_multiples_of_a_piece() -> None:
    assert list(cut(5, PIECE)) == [(5, PIECE - 5)]
    assert list(cut(PIECE - 1, 2 * PIECE + 1)) == [(PIECE - 1, 1), (PIECE, PIECE), (2 * PIECE, 1)]
    content = ExtentMap.of_extents([(7, ZERO), (2, DATA), (1, ZERO), (3, DATA)])
    assert list(ranges_of(content, DATA)) == [(7, 2), (10, 3)]


class Written:
    """What was written, as a source that tells what a test has it tell."""

    where = "written"

    def __init__(self, data: bytes, told: ExtentMap) -> None:
        self.data = data
        self.told = told
        self.size = len(data)
        self.read: list[tuple[int, int]] = []

    def content(self, deadline: Deadline) -> ExtentMap:
        return self.told

    def chunks(
        self, ranges: Iterable[tuple[int, int]], deadline: Deadline, buffers: Buffers | None = None
    ) -> Iterator[tuple[int, memoryview]]:
        for offset, length in reversed(list(ranges)):  # any order is right
            self.read.append((offset, length))
            yield offset, memoryview(self.data)[offset : offset + length]

    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


CONTENT = ExtentMap.of_extents([(512, DATA), (1024, ZERO), (PIECE, DATA), (512, ABSENT), (512, DATA)])
BYTES = b"a" * 512 + bytes(1024) + b"b" * PIECE + b"x" * 512 + b"c" * 512


def hashes_of(data: bytes, content: ExtentMap) -> Hashes:
    offsets, lengths = (column.tolist() for column in pieces(content))
    digests = [hashlib.sha256(data[at : at + length]).digest() for at, length in zip(offsets, lengths, strict=True)]
    return Hashes(content, b"".join(digests))


def test_what_was_written_is_proved_and_zeroes_that_are_told_are_not_read() -> None:
    told = ExtentMap.of_extents([(512, DATA), (512, ZERO), (len(BYTES) - 1024, DATA)])
    written = Written(BYTES, told)
    assert prove(written, hashes_of(BYTES, CONTENT), Deadline(10)) == 512 + PIECE + 512 + 512
    assert (512, 512) not in written.read
    assert (1024, 512) in written.read


@pytest.mark.parametrize("at", [0, 511, 512, 1535, 1536, 1536 + PIECE - 1, len(BYTES) - 1])
def test_a_flipped_bit_is_found_wherever_it_is(at: int) -> None:
    """In data and where zeroes belong; bytes that were never written are not looked at."""
    flipped = bytearray(BYTES)
    flipped[at] ^= 0x10
    written = Written(bytes(flipped), ExtentMap.uniform(len(BYTES), DATA))
    with pytest.raises(NotProvedError) as told:
        prove(written, hashes_of(BYTES, CONTENT), Deadline(10))
    bounds = [int(word.strip("[),")) for word in told.value.what.split() if word.strip("[),").isdigit()]
    assert bounds[0] <= at < bounds[1]


def test_what_is_not_part_of_the_content_is_not_looked_at() -> None:
    other = BYTES.replace(b"x", b"y")
    assert prove(Written(other, ExtentMap.uniform(len(other), DATA)), hashes_of(BYTES, CONTENT), Deadline(10))


def test_what_is_too_short_is_not_what_was_written() -> None:
    with pytest.raises(NotProvedError, match="it has 3 bytes"):
        prove(Written(b"abc", ExtentMap.uniform(3, DATA)), hashes_of(BYTES, CONTENT), Deadline(10))
