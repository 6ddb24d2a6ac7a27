"""How many requests for block status to have in flight: as many as the server is quickest with.

Nobody can know beforehand. Over a network each request in flight hides the way of another one. But QEMU's requests wait
for one another at the lock of each image, and once tables have to be read from the disk, two in flight cost it three
times what they cost one after the other (QEMU 7.2, four layers of 1 TiB). So one is the beginning, and more are tried::

    1 -> 2 -> 4 -> ...          as long as each is quicker than the one before
    n n n n n -> 2n -> n n n n n -> n/2 -> n n n n n -> 1 -> ...     for ever, a few replies each

What was tried and was no quicker is left again, and no trial is made before that one has been paid back. What is
quicker is counted both in replies and in extents: where the disk changes its character during a trial, the two
contradict one another and nothing is concluded. A wrong conclusion costs time, never a byte: the map is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Final, NamedTuple

SHORTEST: Final = 0.01
"""Seconds that are measured at least: what the scheduler of a busy machine does weighs less then."""

_MORE: Final = 1.3  # times as quick, to be worth the risk that requests get into each other's way
_FEWER: Final = 1.1  # times as quick: less is noise
_COLLAPSE: Final = 2  # times as slow as shortly before: something happened
_FAILED: Final = 20  # times what a trial took before the next one: failed trials are 5 % of the time at most


class Rate(NamedTuple):
    """How quick the server was: in a second."""

    replies: float
    extents: float

    def quicker(self, other: Rate, times: float) -> bool:
        """Whether this one is so many times as quick, whichever way it is counted."""
        return self.replies > times * other.replies and self.extents > times * other.extents


_TRIALS: Final[tuple[Callable[[int], int], ...]] = (lambda now: 2 * now, lambda now: now // 2, lambda _: 1)
"""What to try. One at a time is a case of its own: where requests get into each other's way, two do already."""

_ONE: Final = 2  # its index


class Pace:
    """Chooses how many requests are in flight, from when their replies come.

    Args:
        most: never more; at least one.
        clock: seconds, of a clock that does not go back.

    Attributes:
        in_flight: so many may be in flight now.
    """

    def __init__(self, most: int, clock: Callable[[], float]) -> None:
        self._most = most
        self._clock = clock
        self._choices = self._choose()
        self.in_flight = next(self._choices)
        self._pending = 0
        self._before = 0  # requests whose replies are not measured
        self._replies = self._extents = 0
        self._began = clock()

    def restart(self) -> None:
        """Begins a measurement anew, on another connection or because something else was done; nothing is in flight."""
        self._pending = self._before = 0
        self._measure()

    def asked(self) -> None:
        """Learns that a request was made."""
        self._pending += 1

    def answered(self, extents: int) -> None:
        """Learns that a reply came.

        Args:
            extents: that it told.
        """
        self._pending = max(0, self._pending - 1)  # it may have been asked before a restart
        if self._before:
            self._before -= 1
            self._measure()
            return
        self._replies += 1
        self._extents += extents
        if self._replies < self.in_flight:
            return
        took = self._clock() - self._began
        if took < SHORTEST:
            return
        previous = self.in_flight
        self.in_flight = self._choices.send(Rate(self._replies / took, self._extents / took))
        # That there are more of them shows at once, that there are fewer only when those on their way are gone.
        self._before = self._pending if self.in_flight < previous else 0
        self._measure()

    def _measure(self) -> None:
        self._replies = self._extents = 0
        self._began = self._clock()

    def _choose(self) -> Generator[int, Rate, None]:
        """Yields how many to have in flight, and is sent how quick the server was with them."""
        number = 1
        rate = yield number
        trial, climbing = 0, True
        while True:
            until = began = self._clock()
            other = max(1, min(_TRIALS[trial](number), self._most))
            if other != number:
                tried = yield other
                gain = _MORE if other > number else _FEWER
                better = tried.quicker(rate, gain)
                if better and other > number and not climbing:
                    better = tried.quicker((yield number), gain)  # or the machine has just become less busy
                if better:
                    number, rate = other, tried
                    continue  # the same way
                until = self._clock() + _FAILED * (self._clock() - began)
            climbing = False
            trial = (trial + 1) % len(_TRIALS)
            usual = rate
            while True:  # until the trial has been paid back
                rate = yield number
                if number > 1 and usual.quicker(rate, _COLLAPSE):
                    trial = _ONE
                    break
                if self._clock() >= until:
                    break
