"""Lists of extents from outside, and how they are rounded to granules."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpnbd.control.ranges import DepthRange, granules, joined, parse_depths, parse_ranges, ranges_of, rounded_out
from qmpnbd.errors import UsageError
from qmpnbd.extents import ExtentMap

SIZE = 1000
RANGES = st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, 60))).map(
    lambda pairs: sorted((offset, min(offset + length, SIZE)) for offset, length in pairs)
)


@given(RANGES, st.sampled_from([1, 7, 64, 512, 4096]))
def test_rounding_out_marks_every_granule_that_is_touched_and_no_other(
    ranges: list[tuple[int, int]], granularity: int
) -> None:
    touched = {byte // granularity for offset, end in ranges for byte in range(offset, end)}
    rounded = rounded_out(ranges, granularity, SIZE, "here")
    assert {byte // granularity for offset, end in rounded for byte in range(offset, end)} == touched
    assert granules(rounded, granularity) == len(touched) * granularity
    assert rounded == list(joined(rounded))
    assert all(offset % granularity == 0 and (end % granularity == 0 or end == SIZE) for offset, end in rounded)


def test_every_form_of_a_list_is_read() -> None:
    ours = {
        "schema": "qmpnbd.chain/1",
        "extents": [{"offset": 0, "length": 5, "value": 1}, {"offset": 5, "length": 5, "value": 0}],
    }
    qemu_img = [
        {"start": 0, "length": 5, "depth": 0, "present": True, "zero": False, "data": True, "offset": 327680},
        {"start": 5, "length": 5, "depth": 0, "present": False, "zero": True, "data": False},
    ]
    for document in (ours, qemu_img, [[0, 5]], [{"offset": 0, "length": 5}], [[3, 2], [0, 4], [9, 0]]):
        assert parse_ranges(json.dumps(document), "x") == [(0, 5)]


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "{",
            "7",
            "{}",
            "[7]",
            "[[1]]",
            "[[1, 2, 3]]",
            '[{"offset": 1}]',
            "[[-1, 5]]",
            "[[0, -1]]",
            "[[0, true]]",
        ),
        *("[[0, 1.5]]", f"[[0, {1 << 63}]]", '[{"offset": "0", "length": 1}]', "[" * 100_000, b"\xff"),
    ],
)
def test_what_is_no_list_is_refused(text: str | bytes) -> None:
    with pytest.raises(UsageError, match="Write"):
        parse_ranges(text, "x")


def test_an_extent_past_the_end_is_refused() -> None:
    with pytest.raises(UsageError, match="another disk"):
        rounded_out([(0, 1), (999, 1001)], 64, SIZE, "x")


def test_depths() -> None:
    assert [parse_depths(text) for text in ("1", "0..3", "2..")] == [
        DepthRange(1, 1),
        DepthRange(0, 3),
        DepthRange(2, None),
    ]
    depth = ExtentMap.of_extents([(10, 1), (5, 0), (5, 2), (5, 7)])
    assert list(ranges_of(depth, DepthRange(2, None))) == [(15, 20), (20, 25)]
    for wrong in ("", "..", "..2", "3..1", "-1", "1...2", "1,2", "٣", "9" * 10):
        with pytest.raises(UsageError, match="Write"):
            parse_depths(wrong)
