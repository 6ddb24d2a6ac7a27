"""What the numbers of a metadata context mean, in the words that nbdinfo made common."""

from __future__ import annotations

UNREADABLE = 1 << 32
"""An allocation depth that no server sends: of what QEMU cannot read in the image files."""

ALLOCATION_DEPTH = "qemu:allocation-depth"
BASE_ALLOCATION = "base:allocation"
DIRTY_BITMAP = "qemu:dirty-bitmap:"
CONTENT = "content"
"""No metadata context: the bytes themselves, where they are compared."""

_BASE = {0: "data", 1: "hole", 2: "zero", 3: "hole,zero"}
_DEPTH = {0: "absent", 1: "local"}
_DIRTY = {0: "clean", 1: "dirty"}


def describe(context: str, value: int) -> str | None:
    """Returns the meaning of a status, or None for contexts and values that have no agreed name."""
    if context == ALLOCATION_DEPTH:
        if value == UNREADABLE:
            return "unreadable"
        return _DEPTH.get(value, f"backing depth {value}")
    if context == BASE_ALLOCATION:
        return _BASE.get(value)
    if context.startswith(DIRTY_BITMAP):
        return _DIRTY.get(value)
    return None
