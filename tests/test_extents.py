"""ExtentMap against a plain list of bytes' statuses, the slowest and surest model there is."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpnbd.extents import Difference, Extent, ExtentMap

Runs = list[tuple[int, int]]
runs = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=12)


def model(pairs: Runs) -> list[int]:
    return [value for length, value in pairs for _ in range(length)]


def flat(extents: ExtentMap) -> list[int]:
    return [extent.value for extent in extents for _ in range(extent.length)]


@given(runs)
def test_a_map_says_what_its_runs_said(pairs: Runs) -> None:
    extents = ExtentMap.of_extents(pairs)
    assert flat(extents) == model(pairs)
    assert extents.size == len(model(pairs))


@given(runs)
def test_the_form_is_canonical(pairs: Runs) -> None:
    extents = list(ExtentMap.of_extents(pairs))
    assert all(extent.offset < extent.end for extent in extents)
    assert all(a.end == b.offset and a.value != b.value for a, b in pairwise(extents))


@given(runs, st.lists(st.booleans(), max_size=12))
def test_equality_means_the_same_disk_however_it_was_cut(pairs: Runs, cuts: list[bool]) -> None:
    cut: Runs = []
    for index, (length, value) in enumerate(pairs):
        if index < len(cuts) and cuts[index] and length > 1:
            cut += [(1, value), (0, value + 1), (length - 1, value)]
        else:
            cut.append((length, value))
    assert ExtentMap.of_extents(cut) == ExtentMap.of_extents(pairs)
    assert hash(ExtentMap.of_extents(cut)) == hash(ExtentMap.of_extents(pairs))


@given(runs, runs)
def test_combine_overlay_and_differences(first: Runs, second: Runs) -> None:
    size = min(len(model(first)), len(model(second)))
    a, b = ExtentMap.of_extents(first).resized(size, 0), ExtentMap.of_extents(second).resized(size, 0)
    below, above = model(first)[:size], model(second)[:size]
    assert flat(a.combine(b, lambda x, y: x * 10 + y)) == [x * 10 + y for x, y in zip(below, above, strict=True)]
    assert flat(a.overlay(b)) == [y or x for x, y in zip(below, above, strict=True)]
    told = [(d.left, d.right) for d in a.differences(b) for _ in range(d.end - d.offset)]
    assert told == [(x, y) for x, y in zip(below, above, strict=True) if x != y]


@given(runs, st.integers(0, 70), st.integers(0, 3))
def test_resized(pairs: Runs, size: int, fill: int) -> None:
    wanted = (model(pairs) + [fill] * size)[:size]
    assert flat(ExtentMap.of_extents(pairs).resized(size, fill)) == wanted


@given(runs, st.integers(0, 60), st.integers(0, 60))
def test_clip(pairs: Runs, one: int, other: int) -> None:
    offset, end = sorted(min(n, len(model(pairs))) for n in (one, other))
    assert flat(ExtentMap.of_extents(pairs).clip(offset, end)) == model(pairs)[offset:end]


@given(runs)
def test_totals_and_at(pairs: Runs) -> None:
    extents, statuses = ExtentMap.of_extents(pairs), model(pairs)
    assert extents.totals() == {value: statuses.count(value) for value in sorted(set(statuses))}
    assert [extents.at(offset) for offset in range(len(statuses))] == statuses


def test_totals_lose_no_byte_beyond_the_precision_of_floats() -> None:
    big = 2**53
    assert ExtentMap.of_extents([(big, 1), (1, 0), (1, 1)]).totals() == {0: 1, 1: big + 1}


def test_differences_name_both_sides_and_merge_where_both_go_on() -> None:
    served = ExtentMap.of_extents([(10, 1), (10, 2), (5, 2)])
    computed = ExtentMap.of_extents([(5, 1), (5, 3), (15, 3)])
    assert list(served.differences(computed)) == [Difference(5, 10, 1, 3), Difference(10, 25, 2, 3)]


def test_what_is_not_a_map_is_refused() -> None:
    with pytest.raises(ValueError, match="one length"):
        ExtentMap([1, 2], [0])
    with pytest.raises(ValueError, match="decrease"):
        ExtentMap([2, 1], [0, 0])
    with pytest.raises(ValueError, match="different sizes"):
        list(ExtentMap.uniform(1, 0).differences(ExtentMap.uniform(2, 0)))
    with pytest.raises(IndexError):
        ExtentMap.uniform(4, 1).at(4)
    with pytest.raises(ValueError, match="not inside"):
        ExtentMap.uniform(4, 1).clip(2, 5)


def test_the_columns_cannot_be_written() -> None:
    extents = ExtentMap.uniform(4, 1)
    with pytest.raises(ValueError, match="read-only"):
        extents.values[0] = np.uint64(2)


def test_an_empty_map_is_a_map() -> None:
    empty = ExtentMap([], [])
    assert (empty.size, len(empty), list(empty), empty.totals()) == (0, 0, [], {})
    assert list(empty.differences(ExtentMap.uniform(0, 7))) == []


def test_extents_know_where_they_are_and_the_text_is_short() -> None:
    assert list(ExtentMap.of_extents([(4, 1), (4, 2)])) == [Extent(0, 4, 1), Extent(4, 8, 2)]
    assert "… 92 more" in repr(ExtentMap.of_extents([(1, n % 2) for n in range(100)]))
