"""Allocation depth against the pseudo-code, byte by byte."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpnbd.extents import ExtentMap
from qmpnbd.images.depth import allocation_depth, layer_index, plain_numbers, visible_sizes

Bits = list[bool]
chains = st.lists(st.tuples(st.lists(st.booleans(), max_size=10), st.integers(1, 3)), min_size=1, max_size=5)


def model(layers: list[tuple[Bits, int]], size: int) -> list[int]:
    """One byte at a time, from the active layer down."""
    depths = []
    for offset in range(size):
        answer = 0
        for index, (allocated, number) in enumerate(layers):
            if (index and offset >= len(allocated)) or allocated[offset]:
                answer = number
                break
        depths.append(answer)
    return depths


@given(chains, st.integers(0, 10))
def test_against_the_pseudo_code(chain: list[tuple[Bits, int]], size: int) -> None:
    number, layers = 0, []
    for allocated, filters_and_itself in chain:
        number += filters_and_itself
        layers.append((allocated, number))
    size = min(size, len(layers[0][0]))
    wanted = ExtentMap.of_extents([(1, value) for value in model(layers, size)])
    maps = [ExtentMap.of_extents([(1, int(bit)) for bit in allocated]) for allocated, _ in layers]
    columns = zip(layers, maps, strict=True)
    whole = [(len(allocated), extents, number) for (allocated, number), extents in columns]
    assert allocation_depth(whole, size) == wanted
    visible = visible_sizes([own for own, _, _ in whole], size)
    seen = [(own, extents.clip(0, end), n) for (own, extents, n), end in zip(whole, visible, strict=True)]
    assert allocation_depth(seen, size) == wanted, "what cannot be seen is not needed"


def test_a_short_backing_file_decides_what_lies_past_its_end() -> None:
    top = ExtentMap.of_extents([(4, 1), (16, 0)])
    short = ExtentMap.of_extents([(8, 0)])
    base = ExtentMap.uniform(20, 1)
    depth = allocation_depth([(20, top, 1), (8, short, 2), (20, base, 3)], 20)
    assert depth == ExtentMap.of_extents([(4, 1), (4, 3), (12, 2)])


def test_a_filter_shifts_what_lies_below_it() -> None:
    layers = [(2, ExtentMap.of_extents([(1, 1), (1, 0)]), 1), (2, ExtentMap.uniform(2, 1), 3)]
    assert allocation_depth(layers, 2) == ExtentMap.of_extents([(1, 1), (1, 3)])


def test_what_cannot_be_a_chain() -> None:
    with pytest.raises(ValueError, match="0 layers"):
        allocation_depth([], 0)
    with pytest.raises(ValueError, match="cannot make a disk of 3"):
        allocation_depth([(2, ExtentMap.uniform(2, 1), 1)], 3)
    with pytest.raises(ValueError, match="layer 1: a map of 1 bytes, 2"):
        allocation_depth([(2, ExtentMap.uniform(2, 0), 1), (2, ExtentMap.uniform(1, 1), 2)], 2)


def test_the_two_numberings() -> None:
    assert list(plain_numbers(3)) == [1, 2, 3]
    assert [layer_index(depth, plain_numbers(3)) for depth in (0, 1, 3)] == [None, 0, 2]
    assert layer_index(4, [1, 4]) == 1
    with pytest.raises(ValueError, match="no layer has the allocation depth 2"):
        layer_index(2, [1, 4])
