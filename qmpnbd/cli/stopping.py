"""Ctrl-C, SIGTERM and SIGHUP for work that blocks: it is told to stop by its Deadline, and takes away what it made.

What runs in an event loop has `qmpnbd.cli.signals`, which would take longer to load than some copies last.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from qmpnbd.cli import output
from qmpnbd.cli.exit_codes import StoppedBySignal
from qmpnbd.deadline import Deadline
from qmpnbd.errors import DeadlineError

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def stopped_by_signals(deadline: Deadline) -> Iterator[None]:
    """Has the first signal stop the work, and later ones change nothing.

    Raises:
        StoppedBySignal: a signal came, and the work has ended before it was done.
    """
    received: list[signal.Signals] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        if received:
            output.tell("still ending")
        else:
            deadline.stop()
        received.append(signal.Signals(number))

    before = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        yield
    except DeadlineError as error:
        if not received:
            raise
        raise StoppedBySignal(received[0], []) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
