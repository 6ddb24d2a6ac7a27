"""Pieces of work at the same time, so many at most; the first that fails ends the others.

::

    work      0 1 2 3 4 5          in threads of their own
    jobs = 2  |0   |2     |4 fails
              |1 |3    |5 stopped  -> the error of 4; nothing runs any more

The threads are not asyncio's: work that waits in one of those for a coroutine that needs another one would wait for
ever once all of them are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from qmpnbd.deadline import Deadline

T = TypeVar("T")


def several(work: Sequence[Callable[[], T]], jobs: int, deadline: Deadline) -> list[T]:
    """Does all of the work; blocking.

    Args:
        work: what is to be done, begun in this order.
        jobs: pieces of work at a time, 1 or more.
        deadline: that all of them look at. It is told to stop when one fails.

    Returns:
        What each returned, in the order of `work`.

    Raises:
        DeadlineError: the time was over before all was begun.
        BaseException: whatever the first that failed has raised; what the others raised because of that is dropped.
    """
    failures: list[BaseException] = []

    def attempt(each: Callable[[], T]) -> T:
        try:
            deadline.check("a job that is free", "disks that are worked on")
            return each()
        except BaseException as error:
            failures.append(error)
            deadline.stop()
            raise

    with ThreadPoolExecutor(jobs, thread_name_prefix="qmpnbd-job") as pool:
        futures = [pool.submit(attempt, each) for each in work]
    if failures:
        raise failures[0]
    return [each.result() for each in futures]
