"""Whole maps: however the server cuts its replies the map is the same, and what cannot be true is not believed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpnbd.errors import NbdProtocolError, NbdRequestError, NbdUnsupportedError, UsageError
from qmpnbd.extents import ExtentMap
from qmpnbd.nbd.connection import Connection, State
from qmpnbd.nbd.constants import TransmissionFlag
from qmpnbd.nbd.handshake import Export
from qmpnbd.nbd.survey import Limits, survey
from qmpnbd.nbd.wire import Receive, RequestHeader
from tests.hostile_nbd import BASE, DEPTH, Extents, chunk, failure, status

Tell = Callable[[RequestHeader], Sequence[bytes]]
FLAGS = TransmissionFlag(0x058F)
IDS = {DEPTH: 7, BASE: 4}


def connected(size: int, block: int = 1, contexts: dict[str, int] | None = None) -> Connection:
    ids = MappingProxyType(IDS if contexts is None else contexts)
    return Connection(Export("disk", size, FLAGS, minimum_block=block, contexts=ids), "here")


def converse(connection: Connection, tell: Tell, limits: Limits | None = None) -> tuple[dict[str, ExtentMap], int]:
    """Answers a survey's requests; returns the maps and the number of requests."""
    program = survey(connection, limits)
    pending, count = b"", 0
    try:
        operation = next(program)
        while True:
            if isinstance(operation, Receive):
                data, pending = pending[: operation.count], pending[operation.count :]
                assert len(data) == operation.count, f"the script has not enough bytes for {operation.what}"
                operation = program.send(bytearray(data))
            else:
                assert not pending, "bytes were left over"
                request = RequestHeader.unpack(operation.data)
                block = connection.export.minimum_block
                assert 0 < request.length <= 2**32 - max(512, block)
                assert request.offset % block == request.length % block == 0
                assert request.offset + request.length <= connection.export.size
                pending, count = b"".join(tell(request)), count + 1
                operation = program.send(b"")
    except StopIteration as stop:
        maps: dict[str, ExtentMap] = stop.value
        return maps, count


def depth_only(size: int, told: Extents) -> Tell:
    return lambda request: [status(request.cookie, 7, told, done=True)]


@st.composite
def disks(draw: st.DrawFn) -> tuple[dict[str, list[int]], int]:
    """A status for each of a few blocks, for two contexts."""
    count = draw(st.integers(1, 24))
    cells = st.lists(st.integers(0, 3), min_size=count, max_size=count)
    return {DEPTH: draw(cells), BASE: draw(cells)}, draw(st.sampled_from([1, 512, 4096]))


@given(disks(), st.data())
def test_the_map_is_the_same_however_the_replies_are_cut(
    disk: tuple[dict[str, list[int]], int], data: st.DataObject
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


def test_a_large_export_is_asked_for_in_pieces_and_merged() -> None:
    maps, count = converse(
        connected(10 << 30, 65536, {DEPTH: 7}),
        lambda request: [status(request.cookie, 7, [(request.length, 3)], done=True)],
    )
    assert (maps, count) == ({DEPTH: ExtentMap.uniform(10 << 30, 3)}, 3)


def test_a_last_extent_past_the_request_is_cut_there() -> None:
    size = 5 << 30

    def tell(request: RequestHeader) -> list[bytes]:
        """Tells one byte less than 4 GiB, as nbdkit does, where it was asked for 4 GiB less 512."""
        told = [(2**32 - 1, 1)] if request.offset == 0 else [(request.length, 2)]
        return [status(request.cookie, 7, told, done=True)]

    maps, _ = converse(connected(size, 1, {DEPTH: 7}), tell)
    assert maps[DEPTH] == ExtentMap.of_extents([(2**32 - 512, 1), (size - 2**32 + 512, 2)])


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
    assert connection.state is State.DEAD
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
