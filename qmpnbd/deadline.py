"""One clock for a piece of work that crosses several doors.

A timeout per call adds up to no bound at all. A `Deadline` is made once, where the work begins, and handed down:
whoever is about to wait asks how much is left. It also carries a wish to stop, so that work running in a thread
ends at its next look.
"""

from __future__ import annotations

import math
import threading
import time

from qmpnbd.errors import DeadlineError


class Deadline:
    """A moment after which nothing more is waited for.

    Args:
        seconds: from now; None for no bound.
    """

    __slots__ = ("_end", "_stop", "seconds")

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._end = math.inf if seconds is None else time.monotonic() + seconds
        self._stop = threading.Event()

    def stop(self) -> None:
        """Makes every later `check` and `remaining` fail, here and in all deadlines made `within` this one."""
        self._stop.set()

    def remaining(self, what: object, where: str) -> float | None:
        """Returns the seconds left (more than 0), or None where there is no bound.

        Args:
            what: what is about to be waited for; ends up in the message, and is made a text only then.
            where: the socket, file or disk concerned.

        Raises:
            DeadlineError: nothing is left.
        """
        if self._stop.is_set():
            raise DeadlineError(f"stopped while waiting for {what}", where=where)
        if self._end == math.inf:
            return None
        left = self._end - time.monotonic()
        if left <= 0:
            raise self.expired(what, where)
        return left

    def check(self, what: object, where: str) -> None:
        """Raises DeadlineError if nothing is left; for loops that compute rather than wait."""
        self.remaining(what, where)

    def within(self, seconds: float) -> Deadline:
        """Returns a deadline at most `seconds` from now and not after this one."""
        inner = Deadline(seconds)
        if self._end < inner._end:
            inner._end, inner.seconds = self._end, self.seconds
        inner._stop = self._stop
        return inner

    def expired(self, what: object, where: str) -> DeadlineError:
        """Makes the error that tells that the time ran out while waiting for `what`."""
        given = "" if self.seconds is None else f" after {self.seconds:g} s"
        return DeadlineError(
            f"timed out{given} waiting for {what}", where=where, remedy="Give more time with --timeout SECONDS."
        )
