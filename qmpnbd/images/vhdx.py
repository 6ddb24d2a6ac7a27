"""VHDX: two headers, a table of regions, a table of metadata, a table of blocks. Bytes to values.

::

    0          64 KiB   128 KiB  192 KiB   256 KiB   regions
    vhdxfile | head   | head   | regi    | regi    | ... metadata ... table of blocks ... blocks

    entry  63 ............ 20  19 .. 3  2-0          after every 2**32 / block size entries (512-byte sectors)
           MiB in the file     -        state        comes one for a bitmap, which only a differencing disk has

Of the two headers the one with the larger sequence number counts. If it names a log, the tables may be torn until that
was replayed: the file is refused, by QEMU only if it finds something in the log. A differencing disk is refused too.
Source: Microsoft's [MS-VHDX] "Virtual Hard Disk v2 (VHDX) File Format".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from uuid import UUID

import numpy as np

from qmpnbd.extents import U64
from qmpnbd.images.blocks import MAX_BLOCK, Blocks
from qmpnbd.images.headerfaults import corrupt, need, not_like, unsupported
from qmpnbd.images.qcow2 import U8
from qmpnbd.images.status import Status

START = 256 << 10
"""Bytes from the start of the file that `unpack_regions` reads."""
METADATA_LENGTH = 64 << 10
"""Bytes of the metadata table; items lie behind it in the same region."""
MAX_METADATA = 1 << 20  # the format's limit of a region of metadata

_HEADERS, _HEADER_LENGTH = (64 << 10, 128 << 10), 4096
_REGIONS, _REGIONS_LENGTH = 192 << 10, 64 << 10
_MAX_REGIONS = _MAX_ITEMS = 2047  # the format's limit
_BAT = UUID("2dc27766-f623-4200-9d64-115e9bfd4a08").bytes_le
_METADATA = UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e").bytes_le
_PARAMETERS = UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b").bytes_le
_DISK_SIZE = UUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8").bytes_le
_LOGICAL_SECTOR = UUID("8141bf1d-a96f-4709-ba47-f233a8faab5f").bytes_le
_IGNORED = {
    UUID("beca12ab-b2e6-4523-93ef-c309e000c746").bytes_le,  # the disk's identity
    UUID("cda348c7-445d-4471-9cc9-e9885251c556").bytes_le,  # the physical sector
}
_REQUIRED_REGION, _REQUIRED_ITEM = 1, 4
_HAS_PARENT = 2
_MIN_BLOCK = 1 << 20
_MAX_SIZE = 64 << 40  # the format's limit
_SECTOR = 512
_STATES_OF_ZERO = (0, 1, 2, 3, 5)  # not present, undefined, zero, unmapped, unmapped in version 0.95
_PRESENT = 6
_CASTAGNOLI = 0x82F63B78


@dataclass(frozen=True, slots=True)
class Regions:
    """Where the structures of a file lie: ``(offset, length)`` in bytes."""

    table: tuple[int, int]
    metadata: tuple[int, int]


def unpack_regions(data: bytes, where: str) -> Regions:
    """Reads the headers and the table of regions.

    Args:
        data: the first `START` bytes of the file.
        where: the file, for messages.

    Raises:
        ImageTruncatedError: the file is shorter.
        ImageUnsupportedError: another format, a log that was not replayed, or a region that is not known.
        ImageCorruptError: a field contradicts the format.
    """
    if data[:8] != b"vhdxfile"[: len(data)]:
        raise not_like("vhdx", where)
    need(data, START, where)
    headers = [data[at : at + _HEADER_LENGTH] for at in _HEADERS]
    sound = [header for header in headers if header[:4] == b"head" and _is_sound(header) and header[66:68] == b"\1\0"]
    if not sound:
        raise corrupt("signature", _HEADERS[0], int.from_bytes(headers[0][:4], "big"), where, what="no header is sound")
    header = max(sound, key=lambda header: int.from_bytes(header[8:16], "little"))
    log = int.from_bytes(header[72:80], "little")
    if log < 1 << 20 or log % (1 << 20):
        raise corrupt("LogOffset", data.find(header) + 72, log, where)
    if any(header[48:64]) and any(header[68:72]):  # its identity and its length
        raise unsupported("its log was not replayed (QEMU does that when it opens the image for writing)", where)
    area = data[_REGIONS:START]
    count = int.from_bytes(area[8:12], "little")
    if area[:4] != b"regi" or count > _MAX_REGIONS or not _is_sound(area):
        raise corrupt("EntryCount", _REGIONS + 8, count, where, what="no sound table", structure="region table")
    found: dict[bytes, tuple[int, int]] = {}
    for at in range(16, 16 + 32 * count, 32):
        kind, offset, length, flags = struct.unpack_from("<16sQII", area, at)
        if kind not in (_BAT, _METADATA):
            if flags & _REQUIRED_REGION:
                raise unsupported(f"the region {UUID(bytes_le=kind)} is not known here", where)
            continue
        if kind in found or offset < 1 << 20 or offset % (1 << 20) or offset > 1 << 60:
            raise corrupt("FileOffset", _REGIONS + at + 16, offset, where, structure="region table")
        found[kind] = (offset, length)
    if len(found) < 2:
        raise corrupt("EntryCount", _REGIONS + 8, count, where, what="a region is missing", structure="region table")
    (low, first), (high, _) = sorted(found.values())
    if low + first > high:
        raise corrupt("FileOffset", _REGIONS + 32, high, where, what="the regions overlap", structure="region table")
    return Regions(found[_BAT], found[_METADATA])


def unpack_metadata(data: bytes, regions: Regions, where: str) -> Blocks:
    """Reads the metadata.

    Args:
        data: the region of metadata, or its first `MAX_METADATA` bytes.
        regions: where it lies, and the table of blocks.
        where: the file, for messages.

    Raises:
        ImageTruncatedError: the file ends inside the metadata table.
        ImageUnsupportedError: a differencing disk, sectors that are not of 512 bytes, or an item that is not known.
        ImageCorruptError: a field contradicts the format.
    """
    need(data, METADATA_LENGTH, where)
    place, count = regions.metadata[0], int.from_bytes(data[10:12], "little")
    if data[:8] != b"metadata" or count > _MAX_ITEMS:
        raise corrupt("EntryCount", place + 10, count, where, what="no metadata table", structure="metadata table")
    items: dict[bytes, tuple[int, bytes]] = {}
    for at in range(32, 32 + 32 * count, 32):
        kind, offset, length, flags = struct.unpack_from("<16sIII", data, at)
        if kind in (_PARAMETERS, _DISK_SIZE, _LOGICAL_SECTOR):
            wanted = 4 if kind == _LOGICAL_SECTOR else 8
            if kind in items or offset < METADATA_LENGTH or length < wanted or offset + wanted > len(data):
                raise corrupt("Offset", place + at + 16, offset, where, structure="metadata table")
            items[kind] = (place + offset, data[offset : offset + wanted])
        elif flags & _REQUIRED_ITEM and kind not in _IGNORED:
            raise unsupported(f"the metadata item {UUID(bytes_le=kind)} is not known here", where)
    if len(items) < 3:
        raise corrupt("EntryCount", place + 10, count, where, what="an item is missing", structure="metadata table")
    block, flags = struct.unpack("<II", items[_PARAMETERS][1])
    sector = int.from_bytes(items[_LOGICAL_SECTOR][1], "little")
    if flags & _HAS_PARENT or sector != _SECTOR:
        what = "a differencing disk" if flags & _HAS_PARENT else f"a disk with sectors of {sector} bytes"
        raise unsupported(f"{what} is not read here", where)
    if not _MIN_BLOCK <= block <= MAX_BLOCK or block & (block - 1):
        raise corrupt("BlockSize", items[_PARAMETERS][0], block, where, structure="metadata")
    size = int.from_bytes(items[_DISK_SIZE][1], "little")
    if size % _SECTOR or size > _MAX_SIZE:
        raise corrupt("VirtualDiskSize", items[_DISK_SIZE][0], size, where, structure="metadata")
    return _blocks(size, block, regions.table, where)


def _blocks(size: int, block: int, table: tuple[int, int], where: str) -> Blocks:
    count, stride = -(-size // block), (_SECTOR << 23) // block
    if (count + max(count - 1, 0) // stride) * 8 > table[1]:
        raise corrupt(
            "Length", _REGIONS, table[1], where, what=f"too short for {count} blocks", structure="region table"
        )

    def places(found: U64) -> tuple[U8, U64]:
        state = found & np.uint64(7)
        codes = np.full(found.size, Status.UNREADABLE, dtype=np.uint8)
        codes[np.isin(state, _STATES_OF_ZERO)] = Status.ZERO
        codes[state == _PRESENT] = Status.DATA
        return codes, found & np.uint64((1 << 64) - (1 << 20))

    return Blocks(size, block, table[0], count, "<u8", places, stride)


def _is_sound(area: bytes) -> bool:
    """Whether a structure has the CRC-32C that stands at its byte 4."""
    return _crc32c(area[:4] + bytes(4) + area[8:]) == int.from_bytes(area[4:8], "little")


def _crc32c(data: bytes) -> int:
    crc = 0xFFFF_FFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFF_FFFF


def _row(number: int) -> int:
    for _ in range(8):
        number = number >> 1 ^ (_CASTAGNOLI if number & 1 else 0)
    return number


_TABLE = [_row(number) for number in range(256)]
