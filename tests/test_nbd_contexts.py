"""The meaning of context values, by both encodings of the depth, one by one and as maps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpnbd.errors import NbdProtocolError, NbdUnsupportedError
from qmpnbd.extents import ExtentMap
from qmpnbd.nbd.contexts import (
    Allocation,
    AllocationDepth,
    BaseAllocation,
    DepthEncoding,
    DirtyBitmap,
    allocations,
    decode_depth,
    depths,
)

V4 = DepthEncoding.PROPOSAL_V4
UNALLOCATED, LOCAL, BACKING = Allocation


@pytest.mark.parametrize(
    ("value", "allocation"), [(0, UNALLOCATED), (1, LOCAL), (2, BACKING), (3, BACKING), (2**32 - 1, BACKING)]
)
def test_the_released_depth_is_the_value(value: int, allocation: Allocation) -> None:
    assert decode_depth(value) == AllocationDepth(allocation, value)
    assert decode_depth(value, DepthEncoding.RELEASED).depth == value


@pytest.mark.parametrize(
    ("value", "allocation", "depth"),
    [
        (0, UNALLOCATED, 0),
        (1, LOCAL, 1),
        (2, BACKING, None),
        (0x11, LOCAL, 1),
        (0x22, BACKING, 2),
        (0xFFFF_FFF2, BACKING, 2**28 - 1),
        (0x4 | 2, BACKING, None),  # bits 2 and 3 mean nothing
        (0xC | 0x32, BACKING, 3),
    ],
)
def test_the_proposed_depth_has_two_fields(value: int, allocation: Allocation, depth: int | None) -> None:
    assert decode_depth(value, V4) == AllocationDepth(allocation, depth)


@pytest.mark.parametrize("value", [3, 0x33, 0x10, 0x21, 0x12, 0xFFFF_FFFF])
def test_what_the_proposal_does_not_have(value: int) -> None:
    with pytest.raises(NbdProtocolError, match=f"here: an allocation depth of {value:#x}"):
        decode_depth(value, V4, where="here")
    served = ExtentMap.of_extents([(512, 1), (512, value)])
    for decode in (allocations, depths):
        with pytest.raises(NbdProtocolError, match="here"):
            decode(served, V4, where="here")


def test_a_depth_that_is_not_told_is_not_made_up() -> None:
    served = ExtentMap.of_extents([(512, 1), (512, 2)])
    assert allocations(served, V4) == served
    with pytest.raises(NbdUnsupportedError, match="which backing layer"):
        depths(served, V4)


@given(st.lists(st.tuples(st.integers(1, 1 << 20), st.integers(0, 2**28 - 1), st.booleans()), max_size=20))
def test_maps_say_what_single_values_say(runs: list[tuple[int, int, bool]]) -> None:
    released = ExtentMap.of_extents([(length, depth) for length, depth, _ in runs])
    proposed = ExtentMap.of_extents(
        # A depth of 0 or 1 may be told or not.
        [(length, min(depth, 2) | (depth << 4 if told or depth > 1 else 0)) for length, depth, told in runs]
    )
    assert depths(released) == depths(proposed, V4) == released
    assert allocations(released) == allocations(proposed, V4)
    for decoded, served, encoding in ((released, released, DepthEncoding.RELEASED), (released, proposed, V4)):
        for extent in served:
            found = decode_depth(extent.value, encoding)
            assert found.depth == decoded.at(extent.offset)
            assert found.allocation == allocations(served, encoding).at(extent.offset)


def test_flags_keep_unknown_bits() -> None:
    assert BaseAllocation(3) == BaseAllocation.HOLE | BaseAllocation.ZERO
    assert BaseAllocation(0x12) & BaseAllocation.ZERO
    assert DirtyBitmap(1) is DirtyBitmap.DIRTY
