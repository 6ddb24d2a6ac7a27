"""Where two images differ, as a guest would see it.

Only what can differ is read: where both chains take a byte from the same place of the same file, or where neither
holds anything, it is equal.
"""

from __future__ import annotations

from collections.abc import Iterator

from qmpnbd.control.ranges import Range, joined
from qmpnbd.deadline import Deadline
from qmpnbd.errors import UsageError
from qmpnbd.images.files import Chain, open_chain

_PIECE = 1 << 20


def differing(first: str, second: str, granularity: int, deadline: Deadline) -> list[Range]:
    """Compares two images with everything behind them; blocks, so run it in a thread.

    Nobody may write to them meanwhile; images of a running QEMU are no input.

    Args:
        first: an image; its format, unless the header of an overlay tells it, is probed.
        second: another, of the same size.
        granularity: bytes that are compared at a time.
        deadline: for all of it.

    Returns:
        Ranges of whole granules, sorted and joined; the last may be cut by the end of the disk.

    Raises:
        UsageError: the images differ in size.
        ImageError: an image cannot be read.
        DeadlineError: the time ran out.
    """
    with open_chain(first, deadline=deadline) as old, open_chain(second, deadline=deadline) as new:
        if old.size != new.size:
            raise UsageError(
                f"the images differ in size: {old.size} and {new.size} bytes",
                where=f"{first} and {second}",
                remedy="A bitmap has one size: compare images of the disk as it is now.",
            )
        return list(joined(_differing(old, new, granularity, deadline)))


def _differing(old: Chain, new: Chain, granularity: int, deadline: Deadline) -> Iterator[Range]:
    piece = max(_PIECE, granularity)
    checked = 0
    for offset, end in _candidates(old, new):
        at = max(checked, offset - offset % granularity)
        stop = min(-(-end // granularity) * granularity, old.size)
        while at < stop:
            deadline.check("the images to be compared", f"byte {at}")
            length = min(piece, stop - at)
            yield from _unequal(memoryview(old.read(at, length)), memoryview(new.read(at, length)), at, granularity)
            at += length
        checked = max(checked, stop)


def _candidates(old: Chain, new: Chain) -> Iterator[Range]:
    """Yields where the two do not take what they show from the same place."""
    sources = [_sources(chain) for chain in (old, new)]
    many = 1 + max(each.layers[-1].allocation_depth for each in (old, new))
    both = old.allocation_depth().combine(new.allocation_depth(), lambda own, other: own * many + other)
    for extent in both:
        left, right = divmod(extent.value, many)
        if sources[0][left] != sources[1][right]:
            yield extent.offset, extent.end


def _sources(chain: Chain) -> dict[int, object]:
    """Returns, for each allocation depth, the file and where the disk begins in it; for 0, nothing."""
    found: dict[int, object] = {0: None}
    for layer, identity in zip(chain.layers, chain.identities, strict=True):
        found[layer.allocation_depth] = identity, layer.offset, layer.size
    return found


def _unequal(left: memoryview, right: memoryview, offset: int, granularity: int) -> Iterator[Range]:
    if left == right:
        return
    for at in range(0, len(left), granularity):
        if left[at : at + granularity] != right[at : at + granularity]:
            yield offset + at, offset + min(at + granularity, len(left))
