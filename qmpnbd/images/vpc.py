"""VHD, which QEMU calls vpc: fixed, or with one table of blocks. Bytes to values.

::

    fixed      | data ............................ | footer |      known by its last 512 bytes only: never probed
    dynamic    | footer | header | table | [sectors|block] [sectors|block] | footer |

    footer  0 conectix  16 data_offset  28 creator  48 current_size  56 cylinders heads sectors  60 type  64 checksum
    header  0 cxsparse  16 table_offset  28 max_table_entries  32 block_size

    entry   0xffffffff: zeroes      else the sector where the block's bitmap of sectors starts; its data follows

The bitmap of sectors is of no account, as QEMU has it: without it a sector would read as zeroes, and so it does.
Source: Microsoft's "Virtual Hard Disk Image Format Specification"; how large a disk is, as QEMU has it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from qmpnbd.extents import U64
from qmpnbd.images.blocks import MAX_BLOCK, Blocks
from qmpnbd.images.headerfaults import corrupt, need, not_like, unsupported
from qmpnbd.images.qcow2 import U8
from qmpnbd.images.status import Status

FOOTER = 512
HEADER = 1024
_MAGIC = b"conectix"
_HEADER_MAGIC = b"cxsparse"
_FIXED, _DYNAMIC = 2, 3
_ABSENT = 0xFFFF_FFFF
_SECTOR = 512
_MAX_SECTORS = 0xFF00_0000  # QEMU's limit, 2040 GiB
_MAX_GEOMETRY = 65535 * 16 * 255  # a disk larger than this cannot say so by its geometry
_BY_SIZE = (b"win ", b"qem2", b"d2v ", b"tap\0", b"CTXS")
"""Creators whose disks are as large as current_size says; all others go by the geometry."""


@dataclass(frozen=True, slots=True)
class VpcFooter:
    """What a footer says.

    Attributes:
        size: bytes of the disk.
        header_offset: where a dynamic disk's header lies; None for a fixed one.
    """

    size: int
    header_offset: int | None


def unpack_footer(data: bytes, at: int, where: str) -> VpcFooter:
    """Reads a footer: the first 512 bytes of a dynamic disk, the last ones of a fixed one.

    Args:
        data: those bytes.
        at: where they lie.
        where: the file, for messages.

    Raises:
        ImageTruncatedError: the file has fewer bytes.
        ImageUnsupportedError: no footer, or of a disk that is not read here.
        ImageCorruptError: a field contradicts the format.
    """
    need(data, FOOTER, where)
    if data[:8] != _MAGIC:
        raise not_like("vpc", where)
    (recorded,) = struct.unpack_from(">I", data, 64)
    if recorded != _checksum(data, 64):
        raise corrupt(
            "checksum", at + 64, recorded, where, what="not the sum of the footer's bytes", structure="footer"
        )
    (header_offset,), (kind,) = struct.unpack_from(">Q", data, 16), struct.unpack_from(">I", data, 60)
    if kind != (_DYNAMIC if at == 0 else _FIXED):
        raise unsupported(f"vpc disks of type {kind} are not read here", where)
    (size,) = struct.unpack_from(">Q", data, 48)
    cylinders, heads, sectors = struct.unpack_from(">HBB", data, 56)
    by_geometry = cylinders * heads * sectors
    if data[28:32] in _BY_SIZE or by_geometry == _MAX_GEOMETRY:
        by_geometry = size // _SECTOR
    if by_geometry > _MAX_SECTORS:
        raise corrupt("current_size", at + 48, size, where, what="larger than 2040 GiB", structure="footer")
    return VpcFooter(by_geometry * _SECTOR, header_offset if kind == _DYNAMIC else None)


def unpack_dynamic(data: bytes, footer: VpcFooter, where: str) -> Blocks:
    """Reads a dynamic disk's header.

    Args:
        data: the bytes at `VpcFooter.header_offset`.
        footer: the footer.
        where: the file, for messages.

    Raises:
        ImageTruncatedError: the file ends inside the header.
        ImageCorruptError: a field contradicts the format.
    """
    need(data, HEADER, where)
    at = footer.header_offset or 0
    if data[:8] != _HEADER_MAGIC:
        raise corrupt("cookie", at, int.from_bytes(data[:8], "big"), where, what="no header of a dynamic disk")
    (table,) = struct.unpack_from(">Q", data, 16)
    entries, block = struct.unpack_from(">II", data, 28)
    if not _SECTOR <= block <= MAX_BLOCK or block & (block - 1):
        raise corrupt("block_size", at + 32, block, where)
    if entries * block < footer.size or entries > 1 << 29:
        raise corrupt("max_table_entries", at + 28, entries, where)
    bitmap = -(-block // (8 * _SECTOR) // _SECTOR) * _SECTOR

    def places(found: U64) -> tuple[U8, U64]:
        codes = np.where(found != _ABSENT, np.uint8(Status.DATA), np.uint8(Status.ZERO))
        return codes, found * np.uint64(_SECTOR) + np.uint64(bitmap)

    return Blocks(footer.size, block, table, entries, ">u4", places)


def _checksum(data: bytes, at: int) -> int:
    """Returns the ones' complement of the sum of all bytes but the checksum at `at`."""
    return ~(sum(data) - sum(data[at : at + 4])) & 0xFFFF_FFFF
