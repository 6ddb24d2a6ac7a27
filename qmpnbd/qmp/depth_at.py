"""The allocation depth of a disk's own chain at an instant, composed of what can be read before and after it; pure.

An overlay laid over a running disk (recipes ``backup`` and ``copy-before-write``) shows the disk as it was at the
instant, but not its allocation depth: where the guest has written since, QEMU has copied the old data into the overlay
(depth 1) and what lay below has changed. So three things are read::

      before   depth of the disk itself, read while the bitmap `touched` was recording already
      touched  what was written from then until the instant (recording ends in the same transaction)
      since    depth of the overlay, read twice

      at a byte                                          it had, at the instant
      both readings of `since` say 0                     0
      both readings say d >= 2                           d - 1: nothing was written there since
      else, not touched                                  what `before` says
      else, touched                                      1: written before the instant, and again since, so that no
                                                         reading is left to confirm it ("presumed")

Why twice: QEMU looks into the overlay first and into the disk below afterwards. A first write that falls in between
shows a new depth through an overlay that seemed empty. By the second reading it is in the overlay.

What is presumed is right unless the guest discarded there what had never been written (a discard marks the bitmap, but
allocates nothing), or QEMU failed to write. `InstantDepth.presumed` tells where.
"""

from __future__ import annotations

from dataclasses import dataclass

from qmpnbd.extents import ExtentMap


@dataclass(frozen=True, slots=True)
class InstantDepth:
    """Allocation depth at an instant.

    Attributes:
        depth: of every byte, counted from the disk's own active layer.
        presumed: 1 where `depth` stands on the bitmap alone, else 0.
    """

    depth: ExtentMap
    presumed: ExtentMap


def exact(depth: ExtentMap) -> InstantDepth:
    """Returns a depth that was read from the very chain of the instant: nothing is presumed."""
    return InstantDepth(depth, ExtentMap.uniform(depth.size, 0))


def compose(before: ExtentMap, touched: ExtentMap, since: ExtentMap, again: ExtentMap) -> InstantDepth:
    """Composes the depth at an instant; see the module.

    Args:
        before: depth of the disk's format node, read while `touched` recorded.
        touched: not 0 where the disk was written from before that reading until the instant. The bitmap's granularity
            must be the smallest unit in which the disk's active layer allocates, so that a bit says a whole unit.
        since: depth of the overlay, read after the instant.
        again: the same, read after `since`.

    Raises:
        ValueError: the maps differ in size.
    """
    # Depths are held one higher, so that 0 can mean 'not known from here'.
    known = since.combine(again, lambda first, second: ((first != 1) & (second != 1)) * (first + (first == 0)))
    written = touched.mapped(lambda values: values != 0)
    otherwise = before.overlay(written).mapped(lambda depths: depths + 1)
    depth = otherwise.overlay(known).mapped(lambda depths: depths - 1)
    return InstantDepth(depth, written.combine(known, lambda touch, value: touch * (value == 0)))
