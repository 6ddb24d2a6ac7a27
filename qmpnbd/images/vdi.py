"""VDI, VirtualBox's format: one table of blocks of 1 MiB. Bytes to values.

::

    0    64         340          344          368    376         380          384     424   440
    text signature  offset_bmap  offset_data  size   block_size  block_extra  blocks  link  parent

    entry  0xffffffff never written, 0xfffffffe discarded: zeroes      else the number of a block behind offset_data

Sources: the VDI header as VirtualBox publishes it, and images made by QEMU, whose limits are these.
"""

from __future__ import annotations

import struct

import numpy as np

from qmpnbd.extents import U64
from qmpnbd.images.blocks import Blocks
from qmpnbd.images.headerfaults import corrupt, need, not_like, unsupported
from qmpnbd.images.qcow2 import U8
from qmpnbd.images.status import Status

_HEADER_LENGTH = 456
_SIGNATURE = 0xBEDA107F
_VERSION = 0x00010001
_DYNAMIC, _STATIC = 1, 2
_BLOCK = 1 << 20  # the only size QEMU reads
_MAX_BLOCKS = 0x3FFF_FFFF
_DISCARDED = 0xFFFF_FFFE
_SECTOR = 512


def unpack_vdi(data: bytes, where: str) -> Blocks:
    """Reads a VDI header.

    Args:
        data: the first bytes of the file, 512 of them if it has so many.
        where: the file, for messages.

    Raises:
        ImageTruncatedError: the file ends inside the header.
        ImageUnsupportedError: a version or a kind that QEMU does not read either.
        ImageCorruptError: a field contradicts the format.
    """
    need(data, _HEADER_LENGTH, where)
    signature, version, _, variant = struct.unpack_from("<IIII", data, 64)
    if signature != _SIGNATURE:
        raise not_like("vdi", where)
    if version != _VERSION or variant not in (_DYNAMIC, _STATIC):
        raise unsupported(f"vdi version {version:#x} of type {variant} is not read here", where)
    table, start = struct.unpack_from("<II", data, 340)
    (sector,) = struct.unpack_from("<I", data, 360)
    size, block, extra, blocks = struct.unpack_from("<QIII", data, 368)
    if any(data[424:456]):
        raise unsupported("a vdi image that needs another one (its link or parent is set) is not read here", where)
    if sector != _SECTOR or block != _BLOCK or extra:
        raise unsupported(f"vdi blocks of {block} + {extra} bytes, sectors of {sector}, are not read here", where)
    for field, offset, value in (("offset_bmap", 340, table), ("offset_data", 344, start)):
        if value % _SECTOR:
            raise corrupt(field, offset, value, where)
    if blocks > _MAX_BLOCKS:
        raise corrupt("blocks_in_image", 384, blocks, where)
    size = -(-size // _SECTOR) * _SECTOR
    if size > blocks * block:
        raise corrupt("disk_size", 368, size, where, what=f"more than its {blocks} blocks hold")

    def places(entries: U64) -> tuple[U8, U64]:
        codes = np.where(entries < _DISCARDED, np.uint8(Status.DATA), np.uint8(Status.ZERO))
        return codes, entries * np.uint64(_BLOCK) + np.uint64(start)

    return Blocks(size, block, table, blocks, "<u4", places, is_static=variant == _STATIC)
