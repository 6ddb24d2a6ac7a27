"""Pieces of data: every byte of it is in exactly one, none crosses a multiple of its size."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qmpnbd.backup.content import ABSENT, DATA, PIECE, ZERO, pieces
from qmpnbd.extents import ExtentMap

LENGTHS = st.one_of(st.integers(1, 9), st.integers(PIECE - 3, PIECE + 3), st.integers(1, 5 * PIECE))


def test_a_disk_without_data_has_no_piece() -> None:
    for content in (ExtentMap([], []), ExtentMap.uniform(3 * PIECE, ZERO), ExtentMap.uniform(5, ABSENT)):
        offsets, lengths = pieces(content)
        assert (offsets.size, lengths.size) == (0, 0)


def test_runs_are_cut_at_multiples_of_a_piece() -> None:
    content = ExtentMap.of_extents([(512, ZERO), (2 * PIECE, DATA), (512, ABSENT), (7, DATA)])
    offsets, lengths = pieces(content)
    assert offsets.tolist() == [512, PIECE, 2 * PIECE, 2 * PIECE + 1024]
    assert lengths.tolist() == [PIECE - 512, PIECE, 512, 7]


@given(st.lists(st.tuples(LENGTHS, st.sampled_from([ABSENT, DATA, ZERO])), max_size=20))
def test_every_byte_of_data_is_in_one_piece(runs: list[tuple[int, int]]) -> None:
    content = ExtentMap.of_extents(runs)
    offsets, lengths = (column.tolist() for column in pieces(content))
    end = 0
    for offset, length in zip(offsets, lengths, strict=True):
        assert offset >= end
        assert 0 < length <= PIECE
        assert offset // PIECE == (offset + length - 1) // PIECE
        assert set(content.clip(offset, offset + length).totals()) == {DATA}
        end = offset + length
    assert sum(lengths) == content.totals().get(DATA, 0)
