"""What goes into a layer: judged byte by byte, on maps that hypothesis makes up."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpnbd.backup.content import ABSENT, DATA, ZERO
from qmpnbd.backup.selection import at_most, held, rounded_out, selected, touched, whole, zeroed_since
from qmpnbd.extents import ExtentMap

SIZE = 40


def bytewise(found: ExtentMap) -> list[int]:
    return [found.at(offset) for offset in range(found.size)]


def maps(values: st.SearchStrategy[int]) -> st.SearchStrategy[ExtentMap]:
    return st.lists(values, min_size=SIZE, max_size=SIZE).map(lambda each: ExtentMap(np.arange(1, SIZE + 1), each))


@settings(deadline=None)
@given(maps(st.integers(0, 3)))
def test_what_reads_as_zeroes_is_zero_and_all_else_is_data(allocation: ExtentMap) -> None:
    """A hole that does not say that it reads as zeroes is read."""
    assert bytewise(whole(allocation)) == [ZERO if value & 2 else DATA for value in bytewise(allocation)]


@settings(deadline=None)
@given(st.lists(maps(st.integers(0, 2)), max_size=3))
def test_touched_is_the_union(each: list[ExtentMap]) -> None:
    assert bytewise(touched(SIZE, each)) == [int(any(one.at(i) for one in each)) for i in range(SIZE)]


def test_what_a_map_does_not_reach_counts_as_touched() -> None:
    assert bytewise(touched(4, [ExtentMap.uniform(2, 0)])) == [0, 0, 1, 1]
    assert bytewise(touched(2, [ExtentMap.uniform(4, 0)])) == [0, 0]


@settings(deadline=None)
@given(maps(st.integers(0, 1)), st.integers(1, SIZE + 3))
def test_units_are_touched_as_a_whole(mask: ExtentMap, unit: int) -> None:
    flat = bytewise(mask)
    assert bytewise(rounded_out(mask, unit)) == [int(any(flat[i // unit * unit :][:unit])) for i in range(SIZE)]


@settings(deadline=None)
@given(maps(st.integers(0, 1)), maps(st.integers(DATA, ZERO)))
def test_touched_zeroes_are_stored_as_zeroes_and_never_dropped(mask: ExtentMap, disk: ExtentMap) -> None:
    assert bytewise(selected(mask, disk)) == [disk.at(i) if mask.at(i) else ABSENT for i in range(SIZE)]


def test_depths_tell_which_layer_holds_something() -> None:
    depth = ExtentMap.of_extents([(1, 0), (1, 1), (1, 2), (1, 3)])
    assert bytewise(at_most(depth, 2)) == [0, 1, 1, 0]
    assert bytewise(held(ExtentMap.of_extents([(1, ABSENT), (1, DATA), (1, ZERO)]))) == [0, 1, 1]


@settings(deadline=None)
@given(maps(st.integers(DATA, ZERO)), maps(st.integers(ABSENT, ZERO)), st.integers(1, 7))
def test_whole_units_of_zeroes_over_data_are_stored_whatever_bitmaps_say(
    disk: ExtentMap, below: ExtentMap, unit: int
) -> None:
    now, then = bytewise(disk), bytewise(below)
    units = [range(start, min(start + unit, SIZE)) for start in range(0, SIZE, unit)]
    gone = [all(now[i] == ZERO for i in each) and any(then[i] == DATA for i in each) for each in units]
    assert bytewise(zeroed_since(disk, below, unit)) == [int(gone[i // unit]) for i in range(SIZE)]
