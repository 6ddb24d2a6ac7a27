"""Choices: what is compared, which bytes a sample holds, and how the comparison of bytes judges."""

from __future__ import annotations

import asyncio
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpnbd.errors import UsageError
from qmpnbd.extents import ExtentMap
from qmpnbd.validate.choice import MAPS, MODES, Choice
from qmpnbd.validate.content import differences
from qmpnbd.validate.live_content import LiveContent
from qmpnbd.validate.progress import Progress
from qmpnbd.validate.sample import MAX_BOUNDARIES, sample, whole

lengths = st.one_of(st.integers(1, 1 << 20), st.integers(1, 64).map(lambda blocks: blocks * 4096))
depths = st.lists(st.tuples(lengths, st.integers(0, 4)), min_size=1, max_size=20)
choices = st.builds(Choice, st.booleans(), st.booleans(), st.booleans(), st.sampled_from(MODES), st.integers(0, 3))


@given(depths, st.integers(0, 5))
def test_a_sample_holds_every_boundary_and_every_depth(runs: list[tuple[int, int]], seed: int) -> None:
    extents = ExtentMap.of_extents(runs)
    chosen = sample(extents, seed)
    assert chosen == sample(extents, seed)
    end = 0
    for offset, length in chosen.ranges:
        assert offset == 0 or offset > end
        assert (offset % 4096, length > 0) == (0, True)
        end = offset + length
        assert end <= extents.size
        assert end % 4096 == 0 or end == extents.size
    inside = {byte for offset, length in chosen.ranges for byte in (offset, offset + length - 1)}
    for edge in extents.ends[:-1].tolist():
        for byte in (edge - 1, edge):
            assert any(offset <= byte < offset + length for offset, length in chosen.ranges)
    assert {extents.at(byte) for byte in inside} <= set(extents.values.tolist())
    for value in set(extents.values.tolist()):
        assert any(value in extents.clip(o, o + n).values.tolist() for o, n in chosen.ranges)


def test_a_sample_of_a_disk_in_many_pieces_is_bounded_and_says_so() -> None:
    extents = ExtentMap.of_extents([(65536, number % 2) for number in range(100_000)])
    chosen = sample(extents, 0)
    assert chosen.bytes < 4 << 20
    assert f"{MAX_BOUNDARIES} of 99,999 boundaries" in chosen.note
    assert chosen.ranges != sample(extents, 1).ranges


def test_an_empty_disk_has_nothing_to_be_sampled_and_nothing_to_be_said_of_that() -> None:
    assert sample(ExtentMap.uniform(0, 0), 0) == whole(0)


def test_the_whole_of_a_disk() -> None:
    assert whole(5000).ranges == ((0, 5000),)
    assert whole(0).ranges == ()


@given(choices, choices)
def test_choices_as_text_and_which_covers_which(one: Choice, other: Choice) -> None:
    read = Choice.parse(str(one))
    assert read is not None
    assert str(read) == str(one)
    assert one.covers(one)
    if one.covers(other):
        assert all(getattr(one, name) or not getattr(other, name) for name in MAPS)
        assert MODES.index(one.content) >= MODES.index(other.content)
    if one.content == other.content == "sample" and one.seed != other.seed:
        assert not one.covers(other)


@pytest.mark.parametrize("text", ["", "depth", "content=some", "depth,content=sample,seed=x", "width,content=none"])
def test_what_is_no_choice(text: str) -> None:
    assert Choice.parse(text) is None


def test_nothing_at_all_cannot_be_chosen() -> None:
    with pytest.raises(UsageError):
        Choice.of([], "none")
    with pytest.raises(UsageError, match="width"):
        Choice.of(["depth", "width"])


@given(st.integers(0, 3), st.lists(st.integers(0, 5 * 4096 - 1), min_size=1, max_size=6))
def test_differences_are_whole_blocks_with_the_hashes_of_both_sides(first: int, places: list[int]) -> None:
    offset, own = first * 4096, bytes(5 * 4096)
    served = bytearray(own)
    for place in places:
        served[place] = 7
    found = list(differences(offset, memoryview(served), own))
    blocks = {place // 4096 for place in places}
    assert {
        block for each in found for block in range((each.offset - offset) // 4096, (each.end - offset) // 4096)
    } == blocks
    for each in found:
        here = slice(each.offset - offset, each.end - offset)
        assert (each.served, each.computed) == (7, 0)
        assert each.served_sha256 == hashlib.sha256(served[here]).hexdigest()
        assert each.computed_sha256 == hashlib.sha256(own[here]).hexdigest()


def content_rounds(rounds: list[tuple[bytes, bytes, bytes, int | None]]) -> LiveContent:
    """Judges one block over rounds: served, computed, served again, touched (None: nobody watched)."""
    content = LiveContent(Choice(content="whole"))
    for before, own, after, touched in rounds:
        answers = iter((before, after))

        async def served(offset: int, length: int, answers: object = answers) -> bytes:
            return next(answers) * length  # type: ignore[call-overload, no-any-return]

        async def computed(offset: int, length: int, own: bytes = own) -> bytes:
            return own * length

        asyncio.run(content.read(ExtentMap.uniform(4096, 1), 512, served, computed))
        content.judge(None if touched is None else ExtentMap.uniform(4096, touched))
    return content


@pytest.mark.parametrize(
    ("rounds", "settled", "found"),
    [
        ([(b"a", b"a", b"a", None)], True, 0),
        ([(b"a", b"b", b"b", None)], True, 0),  # written in between
        ([(b"a", b"b", b"a", None)], False, 0),  # nobody watched
        ([(b"a", b"b", b"a", 1)], False, 0),  # written meanwhile
        ([(b"a", b"b", b"c", 0)], False, 0),  # the server said two things
        ([(b"a", b"b", b"a", 0)], True, 1),
        ([(b"a", b"b", b"a", None), (b"a", b"b", b"a", 0)], True, 1),
        ([(b"a", b"b", b"a", 1), (b"b", b"b", b"b", 0)], True, 0),
    ],
)
def test_bytes_of_a_running_disk_are_judged_by_the_rules(
    rounds: list[tuple[bytes, bytes, bytes, int | None]], settled: bool, found: int
) -> None:
    content = content_rounds(rounds)
    assert (content.settled, len(content.found)) == (settled, found)
    assert content.set_aside == (0 if settled else 4096)


@pytest.mark.parametrize("touched", [0, 1], ids=["at rest", "written"])
def test_bytes_that_were_judged_stay_so_in_rounds_that_maps_need(touched: int) -> None:
    """Nothing is read in those, so what a round before has found is neither found again nor open again."""
    content = content_rounds([(b"a", b"b", b"a", 0)])
    content.judge(ExtentMap.uniform(4096, touched))
    assert (content.settled, len(content.found), content.set_aside) == (True, 1, 0)


def test_progress_tells_rate_and_time_left() -> None:
    time = 100.0
    progress = Progress(4, now=lambda: time)
    assert progress.seconds_left is None
    assert "time left unknown" in progress.line()
    time = 110.0
    progress.disk(0, discrepancy=True)
    progress.content(1, 32 << 20, 64 << 20)
    assert progress.fraction == 0.375
    assert progress.seconds_left == pytest.approx(10 * 0.625 / 0.375)
    assert progress.line() == ("1/4 disks, 1 with discrepancies, 0:10 so far, 32 MiB of content at 3 MiB/s, 0:17 left")
    for number in range(1, 4):
        progress.disk(number, discrepancy=False)
    assert progress.fraction == 1.0
    assert progress.seconds_left == 0.0
