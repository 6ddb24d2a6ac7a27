"""How far several disks are that are copied at the same time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from qmpnbd.backup.copy import Progress


@dataclass(frozen=True, slots=True)
class DisksProgress:
    """How far all disks of a backup are.

    Attributes:
        disk: the one that has just gone on.
        disks: each disk in the order of the backup; None for one that was not begun, of which nothing is known yet.
        seconds: since the first was begun.
    """

    disk: str
    disks: Mapping[str, Progress | None]
    seconds: float

    @property
    def whole(self) -> Progress:
        """The sum over the disks that were begun."""
        begun = [each for each in self.disks.values() if each is not None]
        return Progress(sum(each.data_bytes for each in begun), sum(each.of_bytes for each in begun), self.seconds)


class Tally:
    """Adds up; for any threads.

    Args:
        disks: names of all disks.
        tell: told whenever one has gone on, by one thread at a time; None to tell nobody.
    """

    def __init__(self, disks: Sequence[str], tell: Callable[[DisksProgress], None] | None) -> None:
        self._disks: dict[str, Progress | None] = dict.fromkeys(disks)
        self._tell = tell
        self._began = time.monotonic()
        self._lock = threading.Lock()

    def begin(self, disk: str, of_bytes: int) -> None:
        """Notes that a disk is begun, and how much data it has."""
        with self._lock:
            self._disks[disk] = Progress(0, of_bytes, 0.0)

    def note(self, disk: str, progress: Progress) -> None:
        """Notes how far a disk is, and tells it."""
        with self._lock:
            self._disks[disk] = progress
            if self._tell is not None:
                self._tell(DisksProgress(disk, dict(self._disks), time.monotonic() - self._began))
