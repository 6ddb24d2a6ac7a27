"""From maps to a picture of a disk, and to a smaller one; pure."""

from __future__ import annotations

from collections.abc import Sequence

from qmpnbd.extents import ExtentMap
from qmpnbd.report.model import Picture
from qmpnbd.report.strip import PICTURE_RUNS, bounded, bounded_marks


def picture_of(served: ExtentMap, discrepancies: ExtentMap, set_aside: ExtentMap) -> Picture:
    """Returns the picture of a disk.

    Args:
        served: allocation depth.
        discrepancies: not 0 where there is one.
        set_aside: not 0 where it could not be judged.
    """
    small = bounded(served)
    return Picture(
        part=0 if small is served else -(-served.size // PICTURE_RUNS),
        ends=tuple(small.ends.tolist()),
        depths=tuple(small.values.tolist()),
        discrepancies=_ranges(bounded_marks(discrepancies)),
        set_aside=_ranges(bounded_marks(set_aside)),
    )


def reduced(picture: Picture, runs: int) -> Picture:
    """Returns the picture in at most `runs` runs of each kind."""
    if runs >= PICTURE_RUNS:
        return picture
    whole = ExtentMap(picture.ends, picture.depths)
    small = bounded(whole, runs)
    return Picture(
        part=picture.part if small is whole else -(-whole.size // runs),
        ends=tuple(small.ends.tolist()),
        depths=tuple(small.values.tolist()),
        discrepancies=_ranges(bounded_marks(_marks(whole.size, picture.discrepancies), runs)),
        set_aside=_ranges(bounded_marks(_marks(whole.size, picture.set_aside), runs)),
    )


def _ranges(marks: ExtentMap) -> tuple[tuple[int, int], ...]:
    return tuple((extent.offset, extent.end) for extent in marks if extent.value)


def _marks(size: int, ranges: Sequence[tuple[int, int]]) -> ExtentMap:
    ends = [edge for each in ranges for edge in each]
    return ExtentMap([*ends, size], [*[0, 1] * len(ranges), 0])
