"""How far a validation is, how fast it goes and how long it will take; pure."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(slots=True)
class Progress:
    """Counts what is done.

    Attributes:
        total: disks to be validated, as far as they are known: those of a running QEMU count as one until they are
            done.
        done: disks that are done, whichever way.
        found: disks with a discrepancy among them.
        bytes: bytes of content compared.
        now: tells the time, in seconds.
    """

    total: int
    done: int = 0
    found: int = 0
    bytes: int = 0
    now: Callable[[], float] = time.monotonic
    _shares: dict[int, tuple[int, int]] = field(default_factory=dict)
    _began: float = field(init=False)

    def __post_init__(self) -> None:
        self._began = self.now()

    def content(self, number: int, count: int, total: int) -> None:
        """Notes that `count` more bytes of the `total` of disk `number` have been compared."""
        self.bytes += count
        self._shares[number] = (self._shares.get(number, (0, 0))[0] + count, total)

    def disk(self, number: int, *, discrepancy: bool) -> None:
        """Notes that disk `number` is done."""
        self._shares.pop(number, None)
        self.done += 1
        self.found += discrepancy

    @property
    def seconds(self) -> float:
        """Time since the beginning."""
        return self.now() - self._began

    @property
    def fraction(self) -> float:
        """How much is done, from 0 to 1."""
        started = sum(min(count / total, 1.0) for count, total in list(self._shares.values()) if total)
        return min((self.done + started) / self.total, 1.0) if self.total else 1.0

    @property
    def seconds_left(self) -> float | None:
        """How long it will take at the pace so far; None while that cannot be told."""
        return self.seconds * (1 - self.fraction) / self.fraction if self.fraction else None

    def line(self) -> str:
        """Returns all of it in one line."""
        seconds = max(self.seconds, 1e-9)
        words = [f"{self.done}/{self.total} disks"]
        if self.found:
            words.append(f"{self.found} with discrepancies")
        words.append(f"{self.done / seconds:.1f}/s" if self.done >= seconds else f"{_clock(seconds)} so far")
        if self.bytes:
            mebibytes = self.bytes / (1 << 20)
            words.append(f"{mebibytes:,.0f} MiB of content at {mebibytes / seconds:,.0f} MiB/s")
        left = self.seconds_left
        words.append("time left unknown" if left is None else f"{_clock(left)} left")
        return ", ".join(words)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
