"""Pieces of work at the same time: as many as are wanted, in order, and none goes on after the first has failed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import pytest

from qmpnbd.backup.several import several
from qmpnbd.deadline import Deadline
from qmpnbd.errors import DeadlineError, TargetError

SECONDS = 60.0


def test_what_is_returned_is_in_the_order_of_the_work() -> None:
    """The first ends last."""
    others = threading.Barrier(3)
    work: list[Callable[[], int]] = [lambda: (others.wait(SECONDS), 0)[1]]
    work += [lambda each=each: (others.wait(SECONDS), each)[1] for each in (1, 2)]  # type: ignore[misc]
    assert several(work, 3, Deadline(SECONDS)) == [0, 1, 2]


@pytest.mark.parametrize("jobs", [1, 2, 3])
def test_so_many_are_at_work_as_are_wanted_and_no_more(jobs: int) -> None:
    """All of a full house have to be there before one may go."""
    house, at_work, most, lock = threading.Barrier(jobs), 0, 0, threading.Lock()

    def work() -> None:
        nonlocal at_work, most
        with lock:
            at_work += 1
            most = max(most, at_work)
        house.wait(SECONDS)
        with lock:
            at_work -= 1

    several([work] * (4 * jobs), jobs, Deadline(SECONDS))
    assert most == jobs


def test_the_first_that_fails_stops_the_others_and_nothing_more_is_begun() -> None:
    deadline, begun, both = Deadline(SECONDS), list[str](), threading.Barrier(2)

    def fail() -> None:
        both.wait(SECONDS)
        raise TargetError("it is full", where="here")

    def go_on() -> None:
        both.wait(SECONDS)
        while True:
            deadline.check("the end", "there")

    work: list[Callable[[], None]] = [go_on, fail, partial(begun.append, "third")]
    with pytest.raises(TargetError, match="it is full"):
        several(work, 2, deadline)
    assert begun == []


def test_work_that_was_told_to_stop_is_not_begun() -> None:
    deadline, begun = Deadline(SECONDS), list[int]()
    deadline.stop()
    with pytest.raises(DeadlineError, match="stopped"):
        several([partial(begun.append, 1)], 1, deadline)
    assert begun == []
