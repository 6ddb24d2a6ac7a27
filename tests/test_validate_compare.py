"""The judgement over rounds, against the same rules written for single bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpnbd.extents import ExtentMap
from qmpnbd.validate.compare import Comparison, Discrepancy

SIZE = 6
maps = st.lists(st.integers(0, 2), min_size=SIZE, max_size=SIZE)
watches = st.one_of(st.none(), st.lists(st.integers(0, 1), min_size=SIZE, max_size=SIZE))
rounds = st.lists(st.tuples(maps, maps, maps, watches), min_size=1, max_size=5)


def as_map(statuses: list[int]) -> ExtentMap:
    return ExtentMap.of_extents([(1, status) for status in statuses])


def judge_byte(history: list[tuple[int, int, int, int | None]]) -> str:
    for before, computed, after, touched in history:
        if computed in (before, after):
            return "agreed"
        if before == after and touched == 0:
            return "discrepancy"
    return "open"


@given(rounds)
def test_every_byte_is_judged_by_the_rules(
    history: list[tuple[list[int], list[int], list[int], list[int] | None]],
) -> None:
    comparison = Comparison(SIZE)
    for before, computed, after, touched in history:
        comparison.add(as_map(before), as_map(computed), as_map(after), None if touched is None else as_map(touched))
    found = {offset for each in comparison.discrepancies() for offset in range(each.offset, each.end)}
    aside = {offset for run in comparison.set_aside() if run.value for offset in range(run.offset, run.end)}
    wanted = [
        judge_byte([(b[n], c[n], a[n], None if t is None else t[n]) for b, c, a, t in history]) for n in range(SIZE)
    ]
    assert found == {n for n in range(SIZE) if wanted[n] == "discrepancy"}
    assert aside == {n for n in range(SIZE) if wanted[n] == "open"}
    assert comparison.settled == (not aside)


def test_equal_maps_settle_in_one_round_without_a_second_look() -> None:
    comparison = Comparison(SIZE)
    comparison.add(as_map([1, 1, 2, 2, 0, 0]), as_map([1, 1, 2, 2, 0, 0]))
    assert comparison.settled
    assert comparison.discrepancy_totals() == (0, 0)


def test_nothing_is_settled_before_a_round() -> None:
    assert not Comparison(SIZE).settled
    assert not Comparison(0).settled


CALM = ExtentMap.uniform(SIZE, 0)


def test_a_discrepancy_names_both_values_and_is_none_unless_somebody_watched() -> None:
    served, computed = as_map([2, 2, 2, 1, 1, 1]), as_map([2, 3, 3, 1, 0, 1])
    comparison = Comparison(SIZE)
    for _ in range(3):
        comparison.add(served, computed, served)
        assert list(comparison.discrepancies()) == []
    comparison.add(served, computed, served, CALM)
    assert list(comparison.discrepancies()) == [Discrepancy(1, 3, 2, 3), Discrepancy(4, 5, 1, 0)]
    assert comparison.discrepancy_totals() == (2, 3)
    assert comparison.settled


def test_a_discrepancy_once_found_stays_found() -> None:
    served, computed = as_map([1] * 6), as_map([1, 1, 1, 1, 1, 2])
    comparison = Comparison(SIZE)
    comparison.add(served, computed, served, CALM)
    comparison.add(served, served)
    assert list(comparison.discrepancies()) == [Discrepancy(5, 6, 1, 2)]


def test_served_zero_is_a_discrepancy_too() -> None:
    comparison = Comparison(1)
    zero, deep = ExtentMap.uniform(1, 0), ExtentMap.uniform(1, 2**32 - 1)
    comparison.add(zero, deep, zero, zero)
    assert list(comparison.discrepancies()) == [Discrepancy(0, 1, 0, 2**32 - 1)]


def test_differing_maps_need_the_second_look() -> None:
    with pytest.raises(ValueError, match="needed"):
        Comparison(1).add(ExtentMap.uniform(1, 0), ExtentMap.uniform(1, 1))
