"""A limit on bytes per second, for one copy or for all that are made at the same time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from qmpnbd.deadline import Deadline

BURST_SECONDS: Final = 0.1
"""What was not used is saved for so long: a source that stutters still gets its share."""

_LOOK: Final = 0.25  # seconds after which a wait looks whether its Deadline was told to stop


class Pace:
    """Keeps an average; for any threads, which share it.

    Args:
        bytes_per_second: more than 0.
        clock: tells seconds.
        sleep: waits so many seconds.
    """

    def __init__(
        self,
        bytes_per_second: int,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._seconds_per_byte = 1 / bytes_per_second
        self._clock = clock
        self._sleep = sleep
        self._free_at = clock()
        self._lock = threading.Lock()

    def wait(self, length: int, deadline: Deadline, where: str) -> None:
        """Waits until `length` bytes more fit into the limit, behind those of whoever waits already.

        Raises:
            DeadlineError: the time is over, or the work was told to stop.
        """
        with self._lock:
            free_at = max(self._free_at, self._clock() - BURST_SECONDS) + length * self._seconds_per_byte
            self._free_at = free_at
        while (rest := free_at - self._clock()) > 0:
            left = deadline.remaining("its share of the bandwidth limit", where)
            self._sleep(min(rest, _LOOK) if left is None else min(rest, left, _LOOK))


def paced(bytes_per_second: int | None) -> Pace | None:
    """Returns a limit; None for none."""
    return None if bytes_per_second is None else Pace(bytes_per_second)
