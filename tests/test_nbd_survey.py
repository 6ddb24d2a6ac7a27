"""Whole maps: however the server cuts its replies the map is the same, and what cannot be true is not believed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import accumulate, count
from random import Random
from types import MappingProxyType
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpnbd.errors import NbdDisconnectedError, NbdProtocolError, NbdRequestError, NbdUnsupportedError, UsageError
from qmpnbd.extents import ExtentMap
from qmpnbd.nbd import survey as survey_module
from qmpnbd.nbd.connection import Connection, State
from qmpnbd.nbd.constants import CommandFlag, TransmissionFlag
from qmpnbd.nbd.export import Export
from qmpnbd.nbd.limits import DEFAULT_LIMITS, Limits
from qmpnbd.nbd.limits import STATUS_IN_FLIGHT as IN_FLIGHT
from qmpnbd.nbd.messages import RequestHeader
from qmpnbd.nbd.quirks import Quirk
from qmpnbd.nbd.survey import FIRST_SPAN, Survey
from tests.hostile_nbd import BASE, DEPTH, Extents, To, chunk, failure, honest, status
from tests.nbd_line import Line, hurried, stopped

Tell = Callable[[RequestHeader], Sequence[bytes]]
FLAGS = TransmissionFlag(0x058F)
IDS = {DEPTH: 7, BASE: 4}


def connected(size: int, block: int = 1, contexts: dict[str, int] | None = None) -> Connection:
    ids = MappingProxyType(IDS if contexts is None else contexts)
    return Connection(Export("disk", size, FLAGS, minimum_block=block, contexts=ids), "here")


def converse(
    connection: Connection,
    tell: Tell,
    limits: Limits = DEFAULT_LIMITS,
    offset: int = 0,
    length: int | None = None,
    clock: Callable[[], float] = stopped,
) -> tuple[dict[str, ExtentMap], int]:
    """Answers a survey's requests; returns the maps and the number of requests."""
    export = connection.export

    def checked(request: RequestHeader) -> Sequence[bytes]:
        block = export.minimum_block
        assert 0 < request.length <= 2**32 - max(512, block)
        assert request.offset % block == request.length % block == 0
        assert request.offset + request.length <= export.size
        return tell(request)

    line = Line(connection, checked)
    maps = line.run(Survey(export, "here", offset, length, limits=limits, clock=clock).run(connection))
    assert not line.incoming, "bytes were left over"
    return maps, len(line.requests)


def joined_after(replies: int) -> AbstractContextManager[Any]:
    """Has surveys put together what they know after so many replies, as they do after many."""
    return mock.patch.object(survey_module, "_LOOSE", replies)


def emptiness(request: RequestHeader) -> list[bytes]:
    """Tells the one extent asked for."""
    return [status(request.cookie, 7, [(request.length, 0)], done=True)]


class Unordered(Line):
    """A server that answers in the order of its choice."""

    def __init__(self, connection: Connection, tell: Tell, chance: Random) -> None:
        super().__init__(connection, self._hold)
        self._answer = tell
        self._chance = chance
        self._held: list[bytes] = []
        self.most_held = 0

    def _hold(self, request: RequestHeader) -> list[bytes]:
        self._held.append(b"".join(self._answer(request)))
        self.most_held = max(self.most_held, len(self._held))
        return []

    def receive(self) -> None:
        if self._held and not self.incoming:
            self.incoming += self._held.pop(self._chance.randrange(len(self._held)))
        super().receive()


def depth_only(size: int, told: Extents) -> Tell:
    return lambda request: [status(request.cookie, 7, told, done=True)]


@st.composite
def disks(draw: st.DrawFn) -> tuple[dict[str, list[int]], int]:
    """A status for each of a few blocks, for two contexts."""
    count = draw(st.integers(1, 24))
    cells = st.lists(st.integers(0, 3), min_size=count, max_size=count)
    return {DEPTH: draw(cells), BASE: draw(cells)}, draw(st.sampled_from([1, 512, 4096]))


@pytest.mark.parametrize("loose", [1, 1024])
@given(disks(), st.data())
def test_the_map_is_the_same_however_the_replies_are_cut(
    loose: int, disk: tuple[dict[str, list[int]], int], data: st.DataObject
) -> None:
    cells, block = disk
    size = len(cells[DEPTH]) * block

    def tell(request: RequestHeader) -> list[bytes]:
        """Tells as many extents as it likes, split as it likes, unequal for the contexts, the last one too long."""
        chunks = []
        for name in data.draw(st.permutations([DEPTH, BASE])):
            first = request.offset // block
            end = data.draw(st.integers(first + 1, len(cells[name])))
            extents = [(block, value) for value in cells[name][first:end]]
            while len(extents) > 1 and extents[-1][1] == extents[-2][1] and data.draw(st.booleans()):
                (one, value), (other, _) = extents[-2:]
                extents[-2:] = [(one + other, value)]
            chunks.append(status(request.cookie, IDS[name], extents))
        return [*chunks, chunk(request.cookie, 0, done=True)]

    with joined_after(loose):
        maps, _ = converse(connected(size, block), tell)
    assert list(maps) == [DEPTH, BASE]
    for name, values in cells.items():
        assert maps[name] == ExtentMap.of_extents([(block, value) for value in values])


def test_extents_that_end_inside_a_block_are_kept_and_requests_stay_aligned() -> None:
    asked: list[int] = []

    def tell(request: RequestHeader) -> list[bytes]:
        asked.append(request.offset)
        start = request.offset
        told = [(1000 - start, 1)] if start == 0 else [(1000 - start, 1), (request.length - 1000 + start, 2)]
        return [status(request.cookie, 7, told, done=True)]

    maps, _ = converse(connected(4096, 512, {DEPTH: 7}), tell)
    assert asked == [0, 512]
    assert maps == {DEPTH: ExtentMap.of_extents([(1000, 1), (3096, 2)])}


def test_a_large_export_is_asked_for_in_pieces_that_grow_and_merged() -> None:
    asked: list[int] = []

    def tell(request: RequestHeader) -> list[bytes]:
        asked.append(request.length)
        return [status(request.cookie, 7, [(request.length, 3)], done=True)]

    maps, _ = converse(connected(1 << 40, 65536, {DEPTH: 7}), tell)
    assert maps == {DEPTH: ExtentMap.uniform(1 << 40, 3)}
    assert asked[:3] == [FIRST_SPAN, 8 * FIRST_SPAN, 2**32 - 65536]
    assert max(asked) == 2**32 - 65536
    assert len(asked) < 260


def test_a_dense_disk_is_asked_for_in_spans_that_one_reply_can_tell() -> None:
    asked: list[int] = []

    def tell(request: RequestHeader) -> list[bytes]:
        asked.append(request.length)
        return [status(request.cookie, 7, [(4096, n % 2) for n in range(request.length // 4096)][:32768], done=True)]

    maps, _ = converse(connected(8 << 30, 512, {DEPTH: 7}), tell)
    assert len(maps[DEPTH]) == (8 << 30) // 4096
    assert set(asked[:-1]) <= {256 << 20, 128 << 20}


@pytest.mark.parametrize("most", [1, 3, IN_FLIGHT])
def test_no_more_requests_are_in_flight_than_the_limits_allow(most: int) -> None:
    line = Unordered(connected(200 << 32, 65536, {DEPTH: 7}), emptiness, Random(1))
    limits = Limits(in_flight=most)
    line.run(Survey(line.connection.export, "here", limits=limits, clock=hurried()).run(line.connection))
    assert line.most_held == most


@pytest.mark.parametrize("loose", [1, 1024])
@given(st.integers(0, 2**32), st.integers(1, 20))
@settings(max_examples=30, deadline=None)
def test_the_map_is_the_same_however_many_requests_are_in_flight(loose: int, seed: int, most: int) -> None:
    """On a clock of chance, with answers in any order, some of which are short."""
    chance = Random(seed)

    def tell(request: RequestHeader) -> list[bytes]:
        told: list[tuple[int, int]] = []
        block, at = 1 << 27, request.offset
        while at < request.offset + request.length and (not told or chance.random() < 0.999):
            end = min(at - at % block + block, request.offset + request.length)
            told.append((end - at, at // block % 7 % 3))
            at = end
        return [status(request.cookie, 7, told, done=True)]

    size = 100 << 32
    line = Unordered(connected(size, 65536, {DEPTH: 7}), tell, chance)
    times = accumulate(chance.expovariate(10) for _ in count())
    survey = Survey(line.connection.export, "here", limits=Limits(in_flight=most), clock=times.__next__)
    expected = ExtentMap.of_extents([(1 << 27, at % 7 % 3) for at in range(size >> 27)])
    with joined_after(loose):
        assert line.run(survey.run(line.connection)) == {DEPTH: expected}


def test_the_map_of_a_range_need_not_be_aligned() -> None:
    def tell(request: RequestHeader) -> list[bytes]:
        cells = range(request.offset // 512, (request.offset + request.length) // 512)
        return [status(request.cookie, 7, [(512, n) for n in cells], done=True)]

    maps, _ = converse(connected(1 << 20, 512, {DEPTH: 7}), tell, offset=1000, length=1000)
    assert maps == {DEPTH: ExtentMap.of_extents([(24, 1), (512, 2), (464, 3)])}
    assert converse(connected(1 << 20, 512, {DEPTH: 7}), tell, offset=512, length=0)[0][DEPTH].size == 0


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, 4097), (4096, 1), (4097, 0), (2, -1)])
def test_a_range_outside_the_export(offset: int, length: int) -> None:
    with pytest.raises(UsageError, match="not inside"):
        converse(connected(4096), lambda request: [], offset=offset, length=length)


def test_a_last_extent_past_the_request_is_cut_there() -> None:
    size = 5 << 30

    def tell(request: RequestHeader) -> list[bytes]:
        """Tells one byte less than 4 GiB, as nbdkit does, where it was asked for less."""
        value = request.offset
        told = 2**32 - 1 if request.offset + 2**32 <= size else request.length
        return [status(request.cookie, 7, [(told, value)], done=True)]

    maps, _ = converse(connected(size, 1, {DEPTH: 7}), tell)
    assert maps[DEPTH].size == size
    assert maps[DEPTH].at(FIRST_SPAN - 1) == 0
    assert maps[DEPTH].at(FIRST_SPAN) == FIRST_SPAN


def test_an_empty_export_has_empty_maps() -> None:
    assert converse(connected(0), lambda request: []) == ({DEPTH: ExtentMap([], []), BASE: ExtentMap([], [])}, 0)


def test_the_whole_of_32_bits_is_kept() -> None:
    maps, _ = converse(connected(512, 1, {DEPTH: 7}), depth_only(512, [(512, 2**32 - 1)]))
    assert maps[DEPTH].at(0) == 2**32 - 1


def both(depth: Extents, base: Extents) -> Tell:
    return lambda request: [
        status(request.cookie, 7, depth),
        status(request.cookie, 4, base, done=True),
    ]


@pytest.mark.parametrize(
    ("tell", "match"),
    [
        (both([(0, 1)], [(4096, 0)]), f"length 0 at 0x0 for {DEPTH}, expected at least 1"),
        (both([(512, 1), (0, 2), (512, 1)], [(4096, 0)]), "length 0 at 0x200"),
        (both([(4096, 1)], [(4097, 0)]), f"for {BASE} up to 0x1001, expected none past the export's end at 0x1000"),
        (both([(2**32 - 1, 1)] * 3, [(4096, 0)]), "expected none from 0x1000 on"),
        (both([(4096, 1), (1, 1)], [(4096, 0)]), "begin at 0x1000, expected none"),
        (lambda r: [status(r.cookie, 9, [(4096, 1)], done=True)], "got context id 9, expected none but qemu:.*id 7"),
        (lambda r: [status(r.cookie, 7, [(4096, 1)], done=True)], f"no chunk for {BASE}, expected one for each"),
        (lambda r: [status(r.cookie, 7, [(4096, 1)])] * 2, f"two chunks for {DEPTH}, expected one"),
        (lambda r: [chunk(r.cookie, 0, done=True)], f"no chunk for {DEPTH}, {BASE}"),
    ],
)
def test_what_cannot_be_true_is_not_believed(tell: Tell, match: str) -> None:
    connection = connected(4096)
    with pytest.raises(NbdProtocolError, match=match) as caught:
        converse(connection, tell)
    assert connection.state is State.DEAD
    assert "block status of [0x0, 0x1000)" in str(caught.value)


def test_a_reply_that_gets_nowhere_is_an_error_not_a_loop() -> None:
    def tell(request: RequestHeader) -> list[bytes]:
        return [status(request.cookie, 7, [(100, 1)], done=True)]

    with pytest.raises(NbdProtocolError, match="got nothing beyond 0x64"):
        converse(connected(4096, 512, {DEPTH: 7}), tell)


def test_extents_of_one_byte_are_not_followed_to_the_end() -> None:
    asked = 0

    def tell(request: RequestHeader) -> list[bytes]:
        nonlocal asked
        asked += 1
        return [status(request.cookie, 7, [(1, request.offset % 2)], done=True)]

    with pytest.raises(NbdProtocolError, match="short reply number 1153, expected at most 1152"):
        converse(connected(65536, 1, {DEPTH: 7}), tell)
    assert asked == 1153


def test_one_extent_a_reply_is_slow_but_right() -> None:
    def tell(request: RequestHeader) -> list[bytes]:
        return [status(request.cookie, 7, [(512, request.offset // 512 % 2)], done=True)]

    maps, count = converse(connected(1 << 20, 512, {DEPTH: 7}), tell)
    assert (len(maps[DEPTH]), count) == (2048, 2048)


def test_limits() -> None:
    tell = depth_only(4096, [(512, n % 2) for n in range(8)])
    connection = connected(4096, 1, {DEPTH: 7})
    with pytest.raises(NbdUnsupportedError, match="more than 7 extents"):
        converse(connection, tell, Limits(extents=7))
    assert connection.live
    assert len(converse(connected(4096, 1, {DEPTH: 7}), tell, Limits(extents=8))[0][DEPTH]) == 8
    with pytest.raises(NbdProtocolError, match="at most 0"):
        converse(connected(4096, 1, {DEPTH: 7}), depth_only(4096, [(512, 1)]), Limits(short_replies=0))


def test_a_request_that_fails_leaves_the_connection_for_the_next_survey() -> None:
    connection = connected(4096)
    with pytest.raises(NbdRequestError, match="EIO"):
        converse(connection, lambda request: [failure(request.cookie, 5)])
    maps, _ = converse(connection, both([(4096, 1)], [(4096, 0)]))
    assert maps[DEPTH] == ExtentMap.uniform(4096, 1)


def test_without_contexts_there_is_nothing_to_read() -> None:
    with pytest.raises(UsageError, match="no metadata context"):
        converse(connected(4096, 1, {}), lambda request: [])


# Extended headers.


def extended(size: int, flags: int = 0x158F, contexts: dict[str, int] | None = None) -> Connection:
    ids = MappingProxyType(IDS if contexts is None else contexts)
    return Connection(Export("disk", size, TransmissionFlag(flags), contexts=ids, replies="extended"), "here")


def asked(
    connection: Connection, tell: Tell, contexts: Sequence[str] | None = None
) -> tuple[dict[str, ExtentMap], Line]:
    line = Line(connection, tell)
    maps = line.run(Survey(connection.export, "here", contexts=contexts).run(connection))
    assert not line.incoming
    return maps, line


def everything(request: RequestHeader) -> list[bytes]:
    to = To(request)
    return [to.status(7, [(request.length, 1)]), to.status(4, [(request.length, 3)], done=True)]


def test_an_empty_disk_of_8_eib_needs_few_requests() -> None:
    size = 2**63 - 1
    maps, line = asked(extended(size), everything)
    assert maps == {DEPTH: ExtentMap.uniform(size, 1), BASE: ExtentMap.uniform(size, 3)}
    assert len(line.requests) < 64
    assert max(request.length for request in line.requests) > 2**60


def test_only_the_contexts_wanted_are_asked_for_where_that_can_be_said() -> None:
    def tell(request: RequestHeader) -> list[bytes]:
        return [To(request).status(4, [(4096, 3)], done=True)]

    maps, line = asked(extended(4096), tell, [BASE])
    assert maps == {BASE: ExtentMap.uniform(4096, 3)}
    assert line.payloads == [(4096).to_bytes(8, "big") + (4).to_bytes(4, "big")]
    assert (line.requests[0].flags, line.requests[0].length) == (CommandFlag.PAYLOAD_LEN, 12)
    with pytest.raises(NbdProtocolError, match=f"none but {BASE}"):
        asked(extended(4096), lambda request: [To(request).status(7, [(4096, 3)], done=True)], [BASE])


def test_contexts_not_wanted_are_ignored_where_that_cannot_be_said() -> None:
    maps, line = asked(extended(4096, 0x058F), everything, [BASE])
    assert (list(maps), line.payloads) == ([BASE], [b""])
    maps, _ = asked(connected(4096), everything, [DEPTH])
    assert maps == {DEPTH: ExtentMap.uniform(4096, 1)}
    for wrong in (["x:y"], [], "base:allocation"):
        with pytest.raises(UsageError):
            asked(connected(4096), everything, wrong)


@pytest.mark.parametrize(
    ("tell", "match"),
    [
        (lambda to: [to.status(7, [(4096, 2**32)])], "the status 0x100000000 for .*, expected 32 bits"),
        (lambda to: [to.status(7, [(4097, 1)])], "past the export's end"),
        (lambda to: [to.status(7, [(2**64 - 1, 1)])], "past the export's end"),
        (lambda to: [to.status(7, [(2**63, 1), (2**63, 1)])], "begin at 0x8000000000000000"),
        (lambda to: [to.status(7, [(512, 1), (2**64 - 512, 1), (512, 1)])], "begin at 0x200"),
        (lambda to: [to.status(7, [(512, 1), (2**64 - 256, 1)])], "begin at 0x200"),
        (lambda to: [to.status(7, [(0, 1)])], "length 0"),
        (lambda to: [to.status(7, [(4096, 1)], count=2)], "of 1 extents that tells of 2"),
        (lambda to: [to.status(7, [])], "with 8 bytes"),
        (lambda to: [to.chunk(6, bytes(23))], "with 23 bytes"),
        (lambda to: [to.chunk(6, length=2**40)], "bytes in reply"),
        (lambda to: [to.chunk(5, bytes(12))], "answers nothing that was asked"),
    ],
)
def test_what_cannot_be_true_of_64_bits_is_not_believed(tell: Callable[[To], list[bytes]], match: str) -> None:
    connection = extended(4096, contexts={DEPTH: 7})
    with pytest.raises(NbdProtocolError, match=match):
        asked(connection, lambda request: tell(To(request)))
    assert not connection.live


def test_a_context_of_somebody_else_may_have_64_bits() -> None:
    tell: Tell = lambda request: [To(request).status(7, [(512, 2**64 - 1), (3584, 0)], done=True)]  # noqa: E731
    maps, _ = asked(extended(4096, contexts={"x:y": 7}), tell)
    assert maps["x:y"].at(0) == 2**64 - 1


# A single request.


def once(connection: Connection, tell: Tell, offset: int, length: int, *, one: bool = False) -> dict[str, ExtentMap]:
    return Line(connection, tell).run(Survey(connection.export, "here", offset, length).once(connection, one=one))


def test_a_single_request_tells_what_the_server_chose_to_tell() -> None:
    def tell(request: RequestHeader) -> list[bytes]:
        assert (request.offset, request.length, request.flags) == (512, 2048, 0)
        return list(both([(512, 1), (512, 2)], [(4096, 0)])(request))

    maps = once(connected(1 << 20), tell, 512, 2048)
    assert maps == {DEPTH: ExtentMap.of_extents([(512, 1), (512, 2)]), BASE: ExtentMap.uniform(2048, 0)}


def test_a_single_request_for_one_extent() -> None:
    connection = connected(1 << 20)
    maps = once(connection, both([(512, 1)], [(1024, 0)]), 0, 2048, one=True)
    assert maps == {DEPTH: ExtentMap.uniform(512, 1), BASE: ExtentMap.uniform(1024, 0)}
    with pytest.raises(NbdProtocolError, match=r"2 extents for .*REQ_ONE"):
        once(connection, both([(512, 1), (512, 0)], [(1024, 0)]), 0, 2048, one=True)


@pytest.mark.parametrize(("offset", "length"), [(1, 512), (512, 1), (0, 0), (0, 2**32)])
def test_a_single_request_that_cannot_be_made(offset: int, length: int) -> None:
    with pytest.raises(UsageError, match="cannot be asked about at once"):
        once(connected(1 << 40, 512), lambda request: [], offset, length)


# Losses, and what is borne.


def test_after_a_loss_only_what_is_missing_is_asked_for_and_ids_may_change() -> None:
    size = 16 * FIRST_SPAN
    first = connected(size)
    second = connected(size, contexts={BASE: 1, DEPTH: 2})
    survey = Survey(first.export, "here", clock=hurried())
    with pytest.raises(NbdDisconnectedError):
        Line(first, lambda request: [] if request.offset == FIRST_SPAN else honest(request, 0)).run(survey.run(first))

    def tell(request: RequestHeader) -> list[bytes]:
        to = To(request)
        return [to.status(1, [(request.length, 0)]), to.status(2, [(request.length, 1)], done=True)]

    line = Line(second, tell)
    assert line.run(survey.run(second)) == {DEPTH: ExtentMap.uniform(size, 1), BASE: ExtentMap.uniform(size, 0)}
    assert [(request.offset, request.length) for request in line.requests] == [(FIRST_SPAN, 8 * FIRST_SPAN)]


LENIENT: dict[Quirk, tuple[Tell, list[tuple[int, int]]]] = {
    Quirk.UNKNOWN_CONTEXT: (
        lambda r: [status(r.cookie, 99, [(1, 1)]), status(r.cookie, 7, [(r.length, 1)], done=True)],
        [(4096, 1)],
    ),
    Quirk.EXTENT_PAST_EXPORT: (
        lambda r: [status(r.cookie, 7, [(512, 2), (1 << 30, 1)], done=True)],
        [(512, 2), (3584, 1)],
    ),
    Quirk.ZERO_LENGTH_EXTENT: (
        lambda r: [status(r.cookie, 7, [(min(512, r.length), r.offset), (0, 5), (512, 6)], done=True)],
        [(512, n * 512) for n in range(8)],
    ),
    Quirk.EXTRA_EXTENT: (
        lambda r: [status(r.cookie, 7, [(512, 2), (3584, 1), (512, 9)], done=True)],
        [(512, 2), (3584, 1)],
    ),
}


@pytest.mark.parametrize("quirk", Quirk)
def test_faults_are_borne_one_by_one(quirk: Quirk) -> None:
    tell, expected = LENIENT[quirk]
    for lenient in (frozenset[Quirk](), frozenset(Quirk) - {quirk}):
        connection = connected(4096, 1, {DEPTH: 7})
        with pytest.raises(NbdProtocolError):
            Line(connection, tell).run(Survey(connection.export, "here", lenient=lenient).run(connection))
    connection = connected(4096, 1, {DEPTH: 7})
    survey = Survey(connection.export, "here", lenient=frozenset({quirk}))
    assert Line(connection, tell).run(survey.run(connection)) == {DEPTH: ExtentMap.of_extents(expected)}


def test_zero_length_extents_only_are_never_borne() -> None:
    connection = connected(4096, 1, {DEPTH: 7})
    survey = Survey(connection.export, "here", lenient=frozenset(Quirk))
    with pytest.raises(NbdProtocolError, match="length 0"):
        Line(connection, depth_only(4096, [(0, 1)])).run(survey.run(connection))
