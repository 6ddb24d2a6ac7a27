"""The size of a raw layer: a file, or a window on one.

A raw layer has no structure: every byte of it is allocated, holes in the file included, because QEMU does not look
for holes when it counts layers. What is left is its size. QEMU counts whole sectors and, unlike for qcow2, rounds up::

    file, 1000 bytes          |########---|                 size 1024
    window, offset 512        |    |####--|                 size 512: the rest of the file, rounded up
    window, offset 0, size 512|####|                        size 512: as given
"""

from __future__ import annotations

from qmpnbd.errors import ImageUnsupportedError

SECTOR = 512


def rounded_up(length: int) -> int:
    """Returns the bytes QEMU sees in a file of `length` bytes."""
    return -(-length // SECTOR) * SECTOR


def raw_size(length: int, where: str, *, offset: int = 0, size: int | None = None) -> int:
    """Returns the size of a raw layer.

    Args:
        length: bytes in the file.
        where: the file, for messages.
        offset: where the window starts.
        size: bytes in the window; None for the rest of the file.

    Raises:
        ImageUnsupportedError: no window QEMU would open, or one that does not start at a sector (QEMU opens it,
            but its block status is not reliable there).
    """
    whole = rounded_up(length)
    if offset < 0 or offset % SECTOR or (size is not None and (size < 0 or size % SECTOR)):
        what = f"a raw window at offset {offset} of size {size} is not made of whole sectors"
    elif offset > whole or (size is not None and size > whole - offset):
        what = f"a raw window at offset {offset} of size {size} does not fit into a file of {whole} bytes"
    else:
        return whole - offset if size is None else size
    raise ImageUnsupportedError(what, where=where, remedy="Offset and size must be multiples of 512 inside the file.")
