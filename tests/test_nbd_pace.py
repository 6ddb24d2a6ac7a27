"""How many requests for block status are in flight: as many as a server is quickest with, on a clock of the test's."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpnbd.extents import ExtentMap
from qmpnbd.nbd.client import Client
from qmpnbd.nbd.pace import SHORTEST, Pace
from tests.hostile_nbd import BASE
from tests.nbd_servers import nbdkit


@dataclass
class Server:
    """Works on one request after the other, at the far end of a line.

    Attributes:
        work: seconds that it works on one, by how many are in flight.
        way: seconds that a request and its reply are on their way.
        extents: that reply number N tells.
        now: the time.
        seen: for how many replies so many were in flight.
    """

    work: Callable[[int], float]
    way: float = 0.0
    extents: Callable[[int], int] = lambda _: 1000
    now: float = 0.0
    seen: Counter[int] = field(default_factory=Counter)
    _told: int = 0

    def clock(self) -> float:
        return self.now

    def serve(self, pace: Pace, replies: int) -> float:
        """Answers so many requests; returns how many seconds that took."""
        began, free = self.now, self.now
        due: deque[float] = deque()
        for left in range(replies, 0, -1):
            while len(due) < min(pace.in_flight, left):
                pace.asked()
                free = max(free, self.now + self.way / 2) + self.work(pace.in_flight)
                due.append(free + self.way / 2)
            self.now = due.popleft()
            self.seen[pace.in_flight] += 1
            self._told += 1
            pace.answered(self.extents(self._told))
        assert not due
        return self.now - began


def quick(_: int) -> float:
    return 0.001


def locked(in_flight: int) -> float:
    """What QEMU 7.2 does with a chain of several layers, in seconds a reply."""
    return 0.027 if in_flight == 1 else 0.130


def test_a_server_far_away_is_asked_as_much_as_may_be_at_once() -> None:
    server = Server(quick, way=0.1)
    pace = Pace(16, server.clock)
    taken = server.serve(pace, 2000)
    assert server.seen[16] > 1800
    assert taken < 1.2 * 2000 / 16 * 0.1


def test_requests_that_get_into_each_others_way_are_made_one_at_a_time() -> None:
    server = Server(locked)
    taken = server.serve(Pace(16, server.clock), 1000)
    assert server.seen[1] > 970
    assert taken < 1.1 * 1000 * locked(1)


@pytest.mark.parametrize("best", [2, 4, 8])
def test_what_is_best_lies_in_between(best: int) -> None:
    server = Server(lambda now: 0.02 / now if now <= best else 0.05)
    server.serve(Pace(16, server.clock), 4000)
    assert server.seen.most_common(1)[0][0] == best
    assert server.seen[best] > 3000


def test_what_brings_nothing_is_left_alone() -> None:
    server = Server(quick)
    server.serve(Pace(16, server.clock), 20_000)
    assert server.seen[1] > 18_000


def test_a_server_that_changes_is_followed() -> None:
    server = Server(quick, way=0.1)
    pace = Pace(16, server.clock)
    server.serve(pace, 500)
    assert pace.in_flight > 4
    server.work, server.way = locked, 0.0
    server.serve(pace, 80)
    assert pace.in_flight == 1, "where it has become so slow, one at a time is what is tried first"
    server.work, server.way = quick, 0.1
    server.seen.clear()
    server.serve(pace, 2000)
    assert server.seen[16] > 1000


def test_a_disk_that_changes_its_character_says_nothing_of_the_server() -> None:
    """Replies of ten thousand extents and of one alternate, as the disk does; each takes its time of the server."""
    dense = [n % 97 < 48 for n in range(4000)]
    server = Server(locked, extents=lambda n: 10_000 if dense[n - 1] else 1)
    server.serve(Pace(16, server.clock), 2000)
    assert server.seen[1] > 1500
    server = Server(quick, way=0.1, extents=lambda n: 10_000 if dense[n - 1] else 1)
    server.serve(Pace(16, server.clock), 4000)
    assert server.seen[16] > 3000


@pytest.mark.parametrize("most", [1, 2, 3, 5, 16])
def test_never_more_than_is_allowed(most: int) -> None:
    server = Server(quick, way=0.1)
    server.serve(Pace(most, server.clock), 500)
    assert max(server.seen) == most


def test_a_clock_that_stands_still_concludes_nothing() -> None:
    pace = Pace(16, lambda: 0.0)
    for _ in range(100):
        pace.asked()
        pace.answered(1)
    assert pace.in_flight == 1


def test_what_was_begun_on_another_connection_is_not_measured() -> None:
    server = Server(quick, way=0.1)
    pace = Pace(16, server.clock)
    server.serve(pace, 200)
    before = pace.in_flight
    for _ in range(3):
        pace.asked()  # never answered
    server.now += 3600  # while nobody could connect
    pace.restart()
    server.serve(pace, 2 * before)
    assert pace.in_flight >= before / 2


def test_late_answers_to_what_was_asked_before_do_no_harm() -> None:
    server = Server(quick, way=0.1)
    pace = Pace(16, server.clock)
    for _ in range(40):
        pace.asked()
    pace.restart()
    for _ in range(40):
        pace.answered(1)
    server.serve(pace, 1000)
    assert pace.in_flight > 4
    server.work, server.way = locked, 0.0
    server.serve(pace, 150)
    assert pace.in_flight == 1


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(1, 1 << 20)), max_size=400), st.integers(1, 32))
def test_whatever_the_clock_says_there_is_always_something_in_flight(ticks: list[tuple[float, int]], most: int) -> None:
    times = [0.0, *accumulate(tick for tick, _ in ticks)]
    now = iter(times)
    pace = Pace(most, lambda: next(now, times[-1]))
    for _, extents in ticks:
        pace.asked()
        pace.answered(extents)
        assert 1 <= pace.in_flight <= most


def test_a_slow_server_is_asked_several_things_at_once(folder: Path) -> None:
    """Of the extents that nbdkit's plugin was asked for, some began while others had not ended."""
    log = folder / "log"
    filters = ["--filter=log", "--filter=delay", "null", "400G", "delay-extents=50ms", f"logfile={log}"]
    assert SHORTEST < 0.050, "each reply is measured"
    with nbdkit(folder, *filters) as uri, Client.connect(uri, contexts=[BASE]) as client:
        assert client.maps() == {BASE: ExtentMap.uniform(400 << 30, 3)}
    begun: set[str] = set()
    most = 0
    for line in log.read_text().splitlines():
        if found := re.search(r"(\.\.\.)?Extents id=(\d+)", line):
            (begun.discard if found[1] else begun.add)(found[2])
            most = max(most, len(begun))
    assert not begun
    assert most > 1
