"""What the numbers of a metadata context mean ("Metadata querying" of doc/proto.md; docs/interop/nbd.rst of QEMU).

::

    base:allocation          bit 0 hole, bit 1 zeroes; other bits are for the future
    qemu:dirty-bitmap:NAME   bit 0 dirty
    qemu:allocation-depth    0 unallocated, 1 the exported node itself, 2 the node below it, ...

The depth has a history. QEMU has had the integer above since it had the context (5.2, December 2020). The patches that
led there, up to version 4, told one of three states in bits 0 and 1 instead, and the review spoke of a depth in bits 4
to 31. Nothing on the wire tells the two apart, and nothing here guesses: the integer is meant unless somebody says
otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum, IntFlag
from typing import TYPE_CHECKING, cast

from qmpnbd.errors import NbdProtocolError, NbdUnsupportedError
from qmpnbd.nbd.constants import ALLOCATION_DEPTH

if TYPE_CHECKING:
    from qmpnbd.extents import U64, ExtentMap


class BaseAllocation(IntFlag):
    """Bits of ``base:allocation``; unknown ones are to be ignored."""

    HOLE = 1 << 0  # writing there may fail for lack of space
    ZERO = 1 << 1  # reads as zeroes


class DirtyBitmap(IntFlag):
    """Bits of ``qemu:dirty-bitmap:NAME``."""

    DIRTY = 1 << 0


class Allocation(IntEnum):
    """Where a byte is allocated, as seen from the exported node."""

    UNALLOCATED = 0
    LOCAL = 1
    BACKING = 2


class DepthEncoding(Enum):
    """How ``qemu:allocation-depth`` puts an allocation into 32 bits."""

    RELEASED = "released"  # the depth itself; every QEMU release that has the context
    PROPOSAL_V4 = "proposal-v4"  # bits 0-1 the allocation, bits 4-31 the depth, or 0 if it is not told


@dataclass(frozen=True, slots=True)
class AllocationDepth:
    """An allocation with its depth.

    Attributes:
        allocation: where.
        depth: 0 unallocated, 1 the exported node, 2 the next one; None where only `allocation` was told.
    """

    allocation: Allocation
    depth: int | None


_BACKING = int(Allocation.BACKING)  # numpy takes only a plain int for one of the column's own type
_STATE = 0x3
_DEPTH_SHIFT = 4
_INVALID = 3


def decode_depth(
    value: int, encoding: DepthEncoding = DepthEncoding.RELEASED, *, where: str = ALLOCATION_DEPTH
) -> AllocationDepth:
    """Returns what one value of ``qemu:allocation-depth`` means.

    Args:
        value: 32 bits (64 with extended headers).
        encoding: of it.
        where: the server, for messages.

    Raises:
        NbdProtocolError: the value cannot occur.
    """
    if encoding is DepthEncoding.RELEASED:
        return AllocationDepth(Allocation(min(value, Allocation.BACKING)), value)
    state, depth = value & _STATE, value >> _DEPTH_SHIFT
    if state == _INVALID or (depth and min(depth, Allocation.BACKING) != state):
        raise NbdProtocolError(f"an allocation depth of {value:#x} ({encoding.value})", where=where)
    # For these two the state is the depth.
    known = state in (Allocation.UNALLOCATED, Allocation.LOCAL)
    return AllocationDepth(Allocation(state), depth or (state if known else None))


def allocations(
    served: ExtentMap, encoding: DepthEncoding = DepthEncoding.RELEASED, *, where: str = ALLOCATION_DEPTH
) -> ExtentMap:
    """Returns the map of `Allocation` that a map of ``qemu:allocation-depth`` tells; every encoding can.

    Raises:
        NbdProtocolError: a value that cannot occur.
    """

    def states(values: U64) -> U64:
        if encoding is DepthEncoding.RELEASED:
            return cast("U64", values.clip(max=_BACKING))
        _check(values, where)
        return cast("U64", values & _STATE)

    return served.mapped(states)


def depths(
    served: ExtentMap, encoding: DepthEncoding = DepthEncoding.RELEASED, *, where: str = ALLOCATION_DEPTH
) -> ExtentMap:
    """Returns the map of allocation depths, in the released encoding.

    Raises:
        NbdProtocolError: a value that cannot occur.
        NbdUnsupportedError: somewhere is only told that a backing layer has it, not which one.
    """

    def numbers(values: U64) -> U64:
        if encoding is DepthEncoding.RELEASED:
            return values
        _check(values, where)
        state, depth = values & _STATE, values >> _DEPTH_SHIFT
        if bool(((state == _BACKING) & (depth == 0)).any()):
            raise NbdUnsupportedError("the server does not tell which backing layer holds a byte", where=where)
        return cast("U64", depth + (depth == 0) * state)  # an untold depth of 0 or 1 is the state

    return served.mapped(numbers)


def _check(values: U64, where: str) -> None:
    """Judges a column of `DepthEncoding.PROPOSAL_V4` by `decode_depth`, once for each value that occurs."""
    for value in set(values.tolist()):
        decode_depth(value, DepthEncoding.PROPOSAL_V4, where=where)
