"""What a copy is written to: how the copy engine sees a file, a block device, a qcow2 image or an NBD export.

::

    write, zero     any order, each byte at most once, from as many threads as `lanes` says are of use
    settle          all of it durable, still under a temporary name: it can be read back and proved
    finish          it has its name, durably           discard   nothing of ours is left
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable


class Target(Protocol):
    """Where the bytes of a copy go."""

    @property
    def where(self) -> str:
        """The file, device or export; printable."""
        ...

    @property
    def lanes(self) -> int:
        """How many threads can usefully write at once; more may, too."""
        ...

    @property
    def read_from(self) -> str:
        """Path or URI where what was settled can be read back."""
        ...

    def write(self, offset: int, data: memoryview) -> None:
        """Writes bytes of the disk; they are the caller's again afterwards.

        Raises:
            TargetError: the target is full, gone, or broken.
        """
        ...

    def zero(self, offset: int, length: int) -> None:
        """Has bytes of the disk read as zeroes, without writing any where that can be done.

        Raises:
            TargetError: the target is full, gone, or broken.
        """
        ...

    def settle(self) -> None:
        """Makes durable what was written; may be called twice. Nothing can be written afterwards.

        Raises:
            TargetError: it does not get there.
        """
        ...

    def finish(self) -> None:
        """Settles, and gives the target its name, durably.

        Raises:
            TargetInUseError: the name was taken meanwhile.
            TargetError: it does not get there.
        """
        ...

    def discard(self) -> None:
        """Removes what was made of the target, after a failure. Never fails; does nothing after `finish`."""
        ...


@runtime_checkable
class BatchTarget(Protocol):
    """A target that writes many small pieces at less than the price of each."""

    def write_batch(self, batch: Sequence[tuple[int, memoryview]]) -> None:
        """Writes pieces, each with its offset, as `Target.write` does each.

        Raises:
            TargetError: the target is full, gone, or broken.
        """
        ...
