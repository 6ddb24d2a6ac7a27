"""Ctrl-C, SIGTERM and SIGHUP as a cancellation, so that everything made in QEMU is taken down before the end."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

from qmpnbd.cli import output
from qmpnbd.cli.exit_codes import StoppedBySignal

T = TypeVar("T")

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run(work: Coroutine[Any, Any, T]) -> T:
    """Runs `work` in a fresh event loop.

    The first signal cancels it; later ones are told that taking down is under way, and change nothing: it is bounded.

    Raises:
        StoppedBySignal: a signal came, and `work` has ended.
    """
    return asyncio.run(_run(work))


async def _run(work: Coroutine[Any, Any, T]) -> T:
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(work)
    received: list[signal.Signals] = []

    def stop(number: signal.Signals) -> None:
        if received:
            output.tell("still taking down what was made in QEMU")
        else:
            task.cancel()
        received.append(number)

    for number in _SIGNALS:
        loop.add_signal_handler(number, stop, number)
    try:
        return await task
    except asyncio.CancelledError as error:
        if not received:
            raise
        raise StoppedBySignal(received[0], list(getattr(error, "__notes__", ()))) from None
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
