"""Maps of disks so empty that they are asked about by the hundred: the same map, and nothing believed more easily."""

from __future__ import annotations

import contextlib
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpnbd.errors import NbdDisconnectedError, NbdProtocolError, NbdRequestError
from qmpnbd.extents import ExtentMap
from qmpnbd.nbd.connection import Connection
from qmpnbd.nbd.constants import MAX_FINISHED_COOKIES, Command
from qmpnbd.nbd.limits import Limits
from qmpnbd.nbd.messages import RequestHeader
from qmpnbd.nbd.requests import Give, Wait
from qmpnbd.nbd.survey import Survey
from qmpnbd.nbd.wire import Send
from tests.hostile_nbd import DEPTH, chunk, failure, status
from tests.nbd_line import Line, hurried, stopped
from tests.test_nbd_survey import Tell, Unordered, connected, converse, emptiness, joined_after

HUGE = 1500 << 32


def test_a_huge_empty_disk_is_asked_about_by_the_hundred() -> None:
    connection = connected(HUGE, 65536, {DEPTH: 7})
    maps, count = converse(connection, emptiness)
    assert maps == {DEPTH: ExtentMap.uniform(HUGE, 0)}
    assert 1500 < count < 1530
    assert connection.messages < 300
    assert not connection.busy


def test_who_allows_few_requests_in_flight_gets_few_on_a_huge_disk_too() -> None:
    line = Unordered(connected(HUGE, 65536, {DEPTH: 7}), emptiness, Random(0))
    survey = Survey(line.connection.export, "here", limits=Limits(in_flight=3), clock=hurried())
    assert line.run(survey.run(line.connection)) == {DEPTH: ExtentMap.uniform(HUGE, 0)}
    assert line.most_held == 3


ODD_REPLIES: dict[str, Tell] = {
    "two extents": lambda r: [status(r.cookie, 7, [(65536, 1), (r.length - 65536, 0)], done=True)],
    "short": lambda r: [status(r.cookie, 7, [(2**31 + 65536, 5)], done=True)],
    "too long": lambda r: [status(r.cookie, 7, [(2**32 - 1, 0)], done=True)],
    "done later": lambda r: [status(r.cookie, 7, [(r.length, 2)]), chunk(r.cookie, 0, done=True)],
    "failure at first": lambda r: [failure(r.cookie, 5, done=False), *emptiness(r)],
}


@pytest.mark.parametrize("loose", [1, 1024])
@pytest.mark.parametrize("case", ODD_REPLIES)
@given(st.sets(st.integers(50, 1400), min_size=1, max_size=20), st.integers(0, 2**32))
@settings(max_examples=15, deadline=None)
def test_replies_that_are_not_the_expected_one_are_judged_by_themselves(
    loose: int, case: str, odd: set[int], seed: int
) -> None:
    connection = connected(HUGE, 512, {DEPTH: 7})
    held: list[bytes] = []
    chance = Random(seed)
    expected_failure = case == "failure at first"

    def tell(request: RequestHeader) -> list[bytes]:
        number = request.offset >> 32
        told = ODD_REPLIES[case](request) if number in odd and request.length > 2**31 else emptiness(request)
        if chance.random() < 0.1:
            held.append(b"".join(told))
            return []
        if held and chance.random() < 0.5:
            told = [*told, *held]
            held.clear()
        return [*told]

    line = Line(connection, tell)
    job = Survey(connection.export, "here").run(connection)
    receive = line.receive

    def receive_or_release() -> None:
        if not line.incoming:
            line.incoming += b"".join(held)
            held.clear()
        receive()

    line.receive = receive_or_release  # type: ignore[method-assign]
    if expected_failure:
        with pytest.raises(NbdRequestError, match="EIO"):
            line.run(job)
        assert connection.live
        return
    with joined_after(loose):
        (mapped,) = line.run(job).values()
    assert mapped.size == HUGE
    assert not connection.busy
    if case == "too long":
        assert mapped == ExtentMap.uniform(HUGE, 0)
    else:
        assert len(mapped) > 1


# Of the requests of a huge disk: two by themselves, then 256 at once, and 256.
PLACES = {"the first": 2, "the second": 3, "the last": 257, "the first of the next": 258}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_the_map_is_what_was_told_if_one_of_many_is_told_in_two_extents(place: int) -> None:
    connection = connected(HUGE, 65536, {DEPTH: 7})
    told: list[tuple[int, list[tuple[int, int]]]] = []

    def tell(request: RequestHeader) -> list[bytes]:
        number = len(told)
        extents = [(65536, 9), (request.length - 65536, 8)] if number == place else [(request.length, number % 3)]
        told.append((request.offset, extents))
        return [status(request.cookie, 7, extents, done=True)]

    maps, _ = converse(connection, tell)
    assert maps == {DEPTH: ExtentMap.of_extents([extent for _, extents in sorted(told) for extent in extents])}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_one_of_many_that_fails_after_all_others_were_answered_is_a_failure(place: int) -> None:
    connection = connected(HUGE, 65536, {DEPTH: 7})
    cookies: list[int] = []

    def tell(request: RequestHeader) -> list[bytes]:
        cookies.append(request.cookie)
        number = len(cookies) - 1
        told = [failure(request.cookie, 5, done=False)] if number == place else emptiness(request)
        return [*told, *([chunk(cookies[place], 0, done=True)] if number == place + 600 else [])]

    with pytest.raises(NbdRequestError, match="EIO"):
        converse(connection, tell)
    assert connection.live


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        (lambda r: [status(r.cookie, 8, [(r.length, 0)], done=True)], "context id 8"),
        (lambda r: [status(r.cookie, 7, [(0, 0)], done=True)], "length 0"),
        (lambda r: [status(r.cookie + 10**6, 7, [(r.length, 0)], done=True)], "unknown cookie"),
        (lambda r: [status(1, 7, [(r.length, 0)], done=True)], None),
        (lambda r: [b"\0" * 32], "begins with 0x00000000"),
        (lambda r: [chunk(r.cookie, 0, done=True)], "no chunk for"),
    ],
)
def test_what_cannot_be_true_is_not_believed_of_many_either(wrong: Tell, match: str | None) -> None:
    connection = connected(HUGE, 512, {DEPTH: 7})
    with contextlib.ExitStack() as stack:
        if match is not None:
            stack.enter_context(pytest.raises(NbdProtocolError, match=match))
        else:
            stack.enter_context(contextlib.suppress(NbdProtocolError, NbdDisconnectedError))
        maps, _ = converse(connection, lambda r: wrong(r) if r.offset >> 32 == 1000 else emptiness(r))
        assert maps == {DEPTH: ExtentMap.uniform(HUGE, 0)}


@pytest.mark.parametrize("number", [600, 700, 1099])
def test_chunks_that_come_late_for_one_of_many_are_dropped(number: int) -> None:
    """At once, when the next hundreds have been answered, and when all that was asked together has been."""
    connection = connected(HUGE, 512, {DEPTH: 7})
    late: list[bytes] = []

    def tell(request: RequestHeader) -> list[bytes]:
        said = emptiness(request)
        if request.offset >> 32 == 600:
            late.extend([*said, status(request.cookie, 7, [(request.length, 1)], done=True)])
        return [*said, *(late if request.offset >> 32 in {600, number} else [])]

    maps, _ = converse(connection, tell)
    assert maps == {DEPTH: ExtentMap.uniform(HUGE, 0)}
    assert connection.live


def test_nothing_is_left_out_where_the_connection_was_lost_before() -> None:
    dead, good = connected(HUGE, 512, {DEPTH: 7}), connected(HUGE, 512, {DEPTH: 7})
    dead.lose()
    survey = Survey(dead.export, "here")
    with pytest.raises(NbdDisconnectedError, match="lost before"):
        Line(dead, emptiness).run(survey.run(dead))
    assert Line(good, emptiness).run(survey.run(good)) == {DEPTH: ExtentMap.uniform(HUGE, 0)}


def test_many_requests_given_up_or_lost() -> None:
    export = connected(HUGE, 512, {DEPTH: 7}).export
    first, second = Connection(export, "here"), Connection(export, "here")
    survey = Survey(export, "here")
    answered = 0

    def tell(request: RequestHeader) -> list[bytes]:
        nonlocal answered
        answered += 1
        return emptiness(request) if answered < 700 or request.offset % 3 else []

    with pytest.raises(NbdDisconnectedError):
        Line(first, tell).run(survey.run(first))
    line = Line(second, emptiness)
    assert line.run(survey.run(second)) == {DEPTH: ExtentMap.uniform(HUGE, 0)}
    given_up = Connection(export, "here")
    job = Survey(export, "here").run(given_up)
    waits, line = 0, Line(given_up)
    operation = next(job)
    while waits < 20 or isinstance(operation, Send):
        assert not isinstance(operation, Give)
        if isinstance(operation, Send):
            line.tell = emptiness
            line._sent(operation)
        else:
            waits += 1
            while not operation.batch.finished:
                line.receive()
        operation = job.send(b"")
    assert isinstance(operation, Wait)
    job.close()
    while given_up.busy:
        line.receive()
    assert not line.incoming
    assert given_up.live


def test_late_chunks_of_many_do_not_have_all_that_follows_remembered() -> None:
    """Each is remembered by itself, and room is made for it as for any other."""
    connection = connected(HUGE, 512, {DEPTH: 7})
    late: list[bytes] = []

    def tell(request: RequestHeader) -> list[bytes]:
        if request.length > 2**31:
            late.append(status(request.cookie, 7, [(request.length, 1)]))
        return [*emptiness(request), *(late if len(late) == 700 else [])]

    maps, _ = converse(connection, tell)
    assert maps == {DEPTH: ExtentMap.uniform(HUGE, 0)}
    flushed: list[int] = []

    def flush(request: RequestHeader) -> list[bytes]:
        flushed.append(request.cookie)
        return [chunk(request.cookie, 0, done=True)]

    line = Line(connection, flush)
    for _ in range(2 * MAX_FINISHED_COOKIES):
        line.run(connection.call(Command.FLUSH))
    line.incoming += chunk(flushed[0], 0, done=True)
    with pytest.raises(NbdProtocolError, match="unknown cookie"):
        line.receive()


def test_many_requests_that_are_given_up_are_answered_before_others_are_made() -> None:
    """Until then they are made one by one."""
    connection = connected(HUGE, 512, {DEPTH: 7})
    silent = True
    made = []

    def tell(request: RequestHeader) -> list[bytes]:
        """Tells by two answers that the disk is empty, and answers nothing of what follows."""
        return [] if silent and request.length > 2**31 else emptiness(request)

    for _ in range(3):
        line = Line(connection, tell)
        job = Survey(connection.export, "here", clock=stopped).run(connection)
        operation = next(job)
        while isinstance(operation, Send) or line.incoming:
            if isinstance(operation, Send):
                line._sent(operation)
            else:
                line.receive()
            operation = job.send(b"")
        job.close()
        made.append(len(line.requests))
    assert made == [2 + 2 * 256, 3, 3]
    silent = False
    maps, count = converse(connection, tell)
    assert maps == {DEPTH: ExtentMap.uniform(HUGE, 0)}
    assert count > 1500
    assert connection.abandoned == 2 * 256 + 2
