"""The maps of a disk at an instant, composed of what one side says before and after it; pure.

Through a scratch image (`qmpnbd.qmp.recipes`) the bytes of the instant are read, but what lies below has moved on. So
each side, the server and the files, is asked three times, and its answers are composed by the same rule::

    before   of the disk itself, while a bitmap was recording already what is written until the instant (touched)
    since    of the scratch image above the disk
    again    what the scratch image holds, once more

    the scratch holds nothing there     since: the disk has not been written since the instant
    else, and not touched               before
    else                                nobody knows any more: presumed, not judged

`qmpnbd.qmp.depth_at` has the rule for depth and its reasons; base:allocation follows here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qmpnbd.extents import ExtentMap
from qmpnbd.qmp.depth_at import compose
from qmpnbd.validate.findings import Served


@dataclass(frozen=True, slots=True)
class Side:
    """What the server, or the files, say around an instant.

    Attributes:
        before: of the disk itself before it.
        since: of the scratch image above the disk.
        again: allocation depth of the scratch image, read after `since`.
    """

    before: Served
    since: Served
    again: ExtentMap

    def at_instant(self, touched: ExtentMap) -> tuple[Served, ExtentMap]:
        """Composes the maps of the instant.

        Args:
            touched: not 0 where the disk was written from before `before` until the instant.

        Returns:
            The maps, and 1 for every byte of which they are presumed.
        """
        depth = compose(self.before.depth, touched, self.since.depth, self.again)
        return Served(depth.depth, self._base()), depth.presumed

    def _base(self) -> ExtentMap | None:
        if self.before.base is None or self.since.base is None:
            return None
        untouched = self.since.depth.combine(self.again, lambda first, second: (first != 1) & (second != 1))
        # Held one higher, so that 0 can mean 'not known from here'.
        since = self.since.base.combine(untouched, lambda base, still: (base + np.uint64(1)) * still)
        before = self.before.base.mapped(lambda base: base + np.uint64(1))
        return before.overlay(since).mapped(lambda base: base - np.uint64(1))
