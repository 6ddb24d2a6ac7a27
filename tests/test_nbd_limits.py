"""The budget that a caller sets: kept to in the handshake and in maps, over both doors, and with what it names."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

from qmpnbd.errors import NbdProtocolError, NbdUnsupportedError, UsageError
from qmpnbd.extents import ExtentMap
from qmpnbd.nbd import survey, survey_reply
from qmpnbd.nbd.aio_stepwise import Negotiation as AwaitedNegotiation
from qmpnbd.nbd.constants import Option
from qmpnbd.nbd.limits import EXTENT_BYTES, Limits
from qmpnbd.nbd.messages import RequestHeader
from qmpnbd.nbd.stepwise import Negotiation
from tests.hostile_nbd import BASE, DEPTH, Script, To, serving
from tests.nbd_doors import Door, both_doors
from tests.option_bytes import ack, info, listed, meta
from tests.test_nbd_survey import connected, converse

EIGHT = [(512, n % 2) for n in range(8)]


def eight(request: RequestHeader, count: int) -> Iterator[bytes]:
    """Tells eight extents for each context."""
    to = To(request)
    yield to.status(7, EIGHT)
    yield to.status(4, EIGHT, done=True)


ENOUGH = [Limits(extents=16), Limits(memory=16 * EXTENT_BYTES), Limits()]
TOO_LITTLE = [Limits(extents=15), Limits(memory=16 * EXTENT_BYTES - 1), Limits(extents=0)]


@both_doors
def test_extents_and_their_memory(door: Door, folder: Path) -> None:
    with serving(folder, Script(size=4096, answer=eight)) as uri:
        for limits in ENOUGH:
            (maps,) = door(uri, "maps", limits=limits)
            assert maps == {name: ExtentMap.of_extents(EIGHT) for name in (DEPTH, BASE)}
        for limits in TOO_LITTLE:
            tight, flushed, again, wide = door(
                uri, "maps", "flush", ("block_status", 0, 4096), ("maps", {"limits": Limits()}), limits=limits
            )
            for outcome in (tight, again):
                assert isinstance(outcome, NbdUnsupportedError)
                assert "extents" in str(outcome)
            assert flushed is None, "the connection stays usable"
            assert wide == maps, "a call may have a budget of its own"


def test_many_replies_that_tell_little_cost_little() -> None:
    """A thousand at a time are kept as they came, at a kilobyte each; of the others only the extents are."""
    replies = 5000
    held: list[int] = []
    modules = [
        tracemalloc.Filter(True, f"*/{module.__name__.rpartition('.')[2]}.py") for module in (survey, survey_reply)
    ]

    def tell(request: RequestHeader) -> list[bytes]:
        asked = next(requests)
        if asked == replies:
            taken = tracemalloc.take_snapshot().filter_traces(modules)
            held.append(sum(trace.size for trace in taken.traces))
        return [To(request).status(7, [(65536, 1), (request.length - 65536, asked % 2)], done=True)]

    requests = count()
    tracemalloc.start()
    try:
        maps, _ = converse(connected(replies << 32, 65536, {DEPTH: 7}), tell)
    finally:
        tracemalloc.stop()
    assert len(maps[DEPTH]) > replies
    assert 0 < held[0] < replies * 2 * EXTENT_BYTES + (1 << 20)


@both_doors
def test_replies_that_stop_early(door: Door, folder: Path) -> None:
    def half(request: RequestHeader, count: int) -> Iterator[bytes]:
        yield To(request).status(7, [(max(request.length // 2, 512), 0)], done=True)

    with serving(folder, Script(size=4096, answer=half)) as uri:
        assert isinstance(door(uri, "maps", contexts=[DEPTH], limits=Limits(short_replies=2))[0], NbdProtocolError)
        assert isinstance(door(uri, "maps", contexts=[DEPTH], limits=Limits(short_replies=3))[0], dict)


@both_doors
def test_chunks_of_one_reply(door: Door, folder: Path) -> None:
    def crumbs(request: RequestHeader, count: int) -> Iterator[bytes]:
        to = To(request)
        yield from (to.data(request.offset + n, b"x") for n in range(request.length))
        yield to.none()

    with serving(folder, Script(read=crumbs)) as uri:
        assert door(uri, ("read", 0, 12), limits=Limits(extra_chunks=11)) == [b"x" * 12]
        (refused,) = door(uri, ("read", 0, 12), limits=Limits(extra_chunks=10))
        assert isinstance(refused, NbdProtocolError)
        assert "more than 12 chunks" in str(refused)


@both_doors
def test_a_chunk_is_not_received_that_there_is_no_room_for(door: Door, folder: Path) -> None:
    with serving(folder, Script(size=4096, answer=eight)) as uri:
        (refused,) = door(uri, "maps", limits=Limits(memory=63))
        assert isinstance(refused, NbdProtocolError)
        assert "with 68 bytes" in str(refused)


MANY = b"".join(meta(n, f"qemu:dirty-bitmap:{n}") for n in range(10)) + ack(Option.SET_META_CONTEXT)
WORDY = info(b"\0\2" + b"x" * 1000) * 5


@both_doors
def test_replies_to_one_option_and_their_memory(door: Door, folder: Path) -> None:
    wanted = ["qemu:dirty-bitmap:"]
    with serving(folder, Script(options={Option.SET_META_CONTEXT: MANY})) as uri:
        for limits in (Limits(option_replies=10), Limits(memory=500)):
            assert door(uri, contexts=wanted, limits=limits) == []
        with pytest.raises(NbdProtocolError, match="more than 9 replies to NBD_OPT_SET_META_CONTEXT"):
            door(uri, contexts=wanted, limits=Limits(option_replies=9))
        with pytest.raises(NbdProtocolError, match=r"NBD_OPT_SET_META_CONTEXT have .* and 100 are allowed"):
            door(uri, contexts=wanted, limits=Limits(memory=100))
    script = Script()
    script.options[Option.GO] = WORDY + script.option(Option.GO, b"")
    with serving(folder, script) as uri:
        assert door(uri, contexts=(), limits=Limits(memory=6000)) == []
        with pytest.raises(NbdProtocolError, match="NBD_OPT_GO have 5010 bytes or more, and 5000 are allowed"):
            door(uri, contexts=(), limits=Limits(memory=5000))


LIST = b"".join(listed(f"e{n}".encode()) for n in range(20)) + ack(Option.LIST)


def test_a_list_of_exports(folder: Path) -> None:
    with serving(folder, Script(options={Option.LIST: LIST})) as uri:
        with Negotiation.connect(uri, limits=Limits(option_replies=20)) as negotiation:
            assert len(negotiation.list_exports()) == 20
        with (
            Negotiation.connect(uri, limits=Limits(option_replies=19)) as negotiation,
            pytest.raises(NbdProtocolError, match="more than 19 replies to NBD_OPT_LIST"),
        ):
            negotiation.list_exports()


def chosen(uri: str, limits: Limits) -> int:
    with Negotiation.connect(uri, limits=limits) as negotiation:
        negotiation.set_contexts("disk", [DEPTH])
        with negotiation.go("disk") as client:
            return len(client.maps()[DEPTH])


def chosen_awaited(uri: str, limits: Limits) -> int:
    async def main() -> int:
        async with await AwaitedNegotiation.connect(uri, limits=limits) as negotiation:
            await negotiation.set_contexts("disk", [DEPTH])
            async with await negotiation.go("disk") as client:
                return len((await client.maps())[DEPTH])

    return asyncio.run(main())


@pytest.mark.parametrize("extents_of", [chosen, chosen_awaited])
def test_the_client_that_was_chosen_step_by_step_has_the_same_budget(
    extents_of: Callable[[str, Limits], int], folder: Path
) -> None:
    def tell(request: RequestHeader, count: int) -> Iterator[bytes]:
        yield To(request).status(7, EIGHT, done=True)

    with serving(folder, Script(size=4096, answer=tell)) as uri:
        assert extents_of(uri, Limits(extents=8)) == 8
        with pytest.raises(NbdUnsupportedError, match="more than 7 extents"):
            extents_of(uri, Limits(extents=7))


@pytest.mark.parametrize("name", ["extents", "short_replies", "extra_chunks", "option_replies", "memory", "in_flight"])
def test_less_than_nothing_is_no_limit(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name}=-1"):
        Limits(**{name: -1})


def test_who_may_ask_nothing_learns_nothing() -> None:
    with pytest.raises(UsageError, match="in_flight=0"):
        Limits(in_flight=0)
