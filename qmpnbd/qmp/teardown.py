"""Taking things down: every step tried, each for a bounded time, and what failed told."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from qmpnbd.deadline import Deadline
from qmpnbd.errors import DeadlineError, MonitorLostError, QmpnbdError

TEARDOWN_SECONDS = 10.0
"""For a step; not part of the caller's time."""

RETRY_SECONDS = 1.0
"""For a step after one in which QEMU proved silent: it is tried all the same, but not waited for."""


class TakeDown:
    """Takes down what a run made, step by step.

    Args:
        has_gone: tells whether QEMU has ended, or is about to: then nothing is left in it.

    Attributes:
        left: what could not be taken down, in words.
    """

    def __init__(self, has_gone: Callable[[], Awaitable[bool]]) -> None:
        self.left: list[str] = []
        self._has_gone = has_gone
        self._silent = False

    async def step(
        self, what: str, work: Callable[[Deadline], Awaitable[object]], seconds: float = TEARDOWN_SECONDS
    ) -> None:
        """Does one step; a failure is noted in `left`, not raised.

        Args:
            what: what is taken down.
            work: does it, within the deadline it is given.
            seconds: time for it.
        """
        try:
            await work(Deadline(RETRY_SECONDS if self._silent else seconds))
            self._silent = False
        except QmpnbdError as error:
            self._silent = isinstance(error, DeadlineError)
            if not (isinstance(error, MonitorLostError) and await self._has_gone()):
                self.left.append(f"left behind in QEMU: {what} ({error.what})")
