"""Parallels' format: one table of clusters. Bytes to values.

::

    0      16       28      32       36          44      48
    magic  version  tracks  entries  nb_sectors  in use  data_off

    entry  0 nothing      WithoutFreeSpace: the sector      WithouFreSpacExt: the number of a cluster, from byte 0

Sources: "Parallels Expandable Image File Format" of QEMU's interoperability documents, and images made by QEMU.
"""

from __future__ import annotations

import struct

import numpy as np

from qmpnbd.extents import U64
from qmpnbd.images.blocks import MAX_BLOCK, Blocks
from qmpnbd.images.headerfaults import corrupt, need, not_like, unsupported
from qmpnbd.images.qcow2 import U8
from qmpnbd.images.status import Status

_HEADER = struct.Struct("<16sIIIIIQ")
_HEADER_LENGTH = 64
_OLD, _EXTENDED = b"WithoutFreeSpace", b"WithouFreSpacExt"
_MAX_ENTRIES = 0x7FFF_FFFF // 4  # QEMU's limit
_SECTOR = 512


def unpack_parallels(data: bytes, where: str) -> Blocks:
    """Reads a header.

    Args:
        data: the first bytes of the file, 64 of them if it has so many.
        where: the file, for messages.

    Raises:
        ImageTruncatedError: the file ends inside the header.
        ImageUnsupportedError: another version, or clusters of a size that is not read here.
        ImageCorruptError: a field contradicts the format.
    """
    need(data, _HEADER_LENGTH, where)
    magic, version, _, _, tracks, entries, sectors = _HEADER.unpack_from(data)
    if magic not in (_OLD, _EXTENDED):
        raise not_like("parallels", where)
    if version != 2:
        raise unsupported(f"parallels version {version} is not read here", where)
    if not 1 <= tracks <= 0x7FFF_FFFF // 513:  # QEMU's limit
        raise corrupt("tracks", 28, tracks, where)
    if tracks & (tracks - 1) or tracks * _SECTOR > MAX_BLOCK:
        raise unsupported(f"parallels clusters of {tracks} sectors are not read here", where)
    if entries > _MAX_ENTRIES:
        raise corrupt("bat_entries", 32, entries, where)
    if magic == _OLD:
        sectors &= 0xFFFF_FFFF
    if sectors > 1 << 54:
        raise corrupt("nb_sectors", 36, sectors, where)
    scale = _SECTOR if magic == _OLD else tracks * _SECTOR

    def places(found: U64) -> tuple[U8, U64]:
        codes = np.where(found != 0, np.uint8(Status.DATA), np.uint8(Status.UNALLOCATED))
        return codes, found * np.uint64(scale)

    return Blocks(sectors * _SECTOR, tracks * _SECTOR, _HEADER_LENGTH, entries, "<u4", places)
