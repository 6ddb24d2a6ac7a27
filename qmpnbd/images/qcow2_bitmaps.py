"""Persistent bitmaps of qcow2: directory, tables and bits. Bytes to values.

::

    bitmaps extension          0  number of bitmaps   8  bytes of the directory   16  its offset
    directory entry            0  table offset   8  table entries   12  flags   16  type   17  granularity bits
                               18 length of name   20  length of extra data   24  extra data, name, padding
    bitmap table entry         0 = all zeroes, 1 = all ones, else the offset of a cluster of bits
    bits                       of granularity bytes each; the first one is bit 0 of byte 0

The extension counts only while bit 0 of the autoclear features is set: software that knows no bitmaps clears it when it
writes. Source: "Bitmaps extension" and "Bitmaps" in the qcow2 specification.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from qmpnbd.errors import ImageCorruptError, ImageUnsupportedError
from qmpnbd.extents import U64, ExtentMap
from qmpnbd.images.qcow2 import HOST_MASK, Entries
from qmpnbd.images.qcow2_format import BITMAPS_BIT, CHECK, Qcow2Header

MAX_BITMAPS = 65535  # QEMU's limit
MAX_DIRECTORY = 64 << 20  # bytes; 65535 bitmaps with names of 1000 bytes
_EXTENSION = struct.Struct(">IIQQ")
_ENTRY = struct.Struct(">QIIBBHI")
_IN_USE, _AUTO, _EXTRA_COMPATIBLE = 1 << 0, 1 << 1, 1 << 2
_DIRTY_TRACKING = 1
_GRANULARITIES = range(9, 32)  # QEMU's limits
_MAX_NAME = 1023  # the format's limit
_ALL_ONES = 1
_RESERVED = 0xFF00_0000_0000_01FE


@dataclass(frozen=True, slots=True)
class BitmapInfo:
    """A persistent bitmap, without its bits.

    Attributes:
        name: unique in the image.
        granularity: bytes of the disk a bit stands for.
        inconsistent: it was in use when the image was last closed, or still is: the bits cannot be relied on.
        auto: QEMU goes on recording in it when the image is opened.
        extra_data: bytes of extra data, which nothing known uses.
        extra_compatible: whether the bits mean the same to software that does not know the extra data.
        table_offset: where its table lies.
        table_entries: entries of the table.
    """

    name: str
    granularity: int
    inconsistent: bool
    auto: bool
    extra_data: int
    extra_compatible: bool
    table_offset: int
    table_entries: int


def unpack_extension(data: bytes | None, header: Qcow2Header, where: str) -> tuple[int, int, int]:
    """Returns number of bitmaps, and offset and bytes of their directory; zeroes where no bitmaps count.

    Raises:
        ImageCorruptError: the extension contradicts the format.
    """
    if data is None or not header.autoclear & BITMAPS_BIT:
        return 0, 0, 0
    if len(data) != _EXTENSION.size:
        raise _corrupt("bitmaps extension", header.header_length, f"not {_EXTENSION.size} bytes long", len(data), where)
    count, _, size, offset = _EXTENSION.unpack(data)
    if not 0 < count <= MAX_BITMAPS:
        raise _corrupt("bitmaps extension", header.header_length, f"not 1 to {MAX_BITMAPS} bitmaps", count, where)
    if offset == 0 or offset % header.cluster_size:
        raise _corrupt("bitmaps extension", header.header_length, "no cluster's offset", offset, where)
    if not count * _ENTRY.size <= size <= MAX_DIRECTORY:
        raise _corrupt("bitmaps extension", header.header_length, "an absurd size of the directory", size, where)
    return count, offset, size


def unpack_directory(data: bytes, count: int, offset: int, header: Qcow2Header, where: str) -> tuple[BitmapInfo, ...]:
    """Reads the bitmap directory.

    Args:
        data: its bytes.
        count: how many bitmaps there should be.
        offset: where it lies, for messages.
        header: the image's header.
        where: the file, for messages.

    Raises:
        ImageCorruptError: it contradicts the format.
    """
    found: list[BitmapInfo] = []
    at = 0
    while at < len(data) and len(found) < count:
        place, fixed = offset + at, data[at : at + _ENTRY.size]
        if len(fixed) < _ENTRY.size:
            raise _corrupt("bitmap directory entry", place, "cut short", None, where)
        table, entries, flags, kind, bits, name_length, extra = _ENTRY.unpack(fixed)
        end = at + _ENTRY.size + extra + name_length
        if not 0 < name_length <= _MAX_NAME or end > len(data):
            raise _corrupt("bitmap directory entry", place, "longer than its room", name_length, where)
        if table == 0 or table % header.cluster_size:
            raise _corrupt("bitmap directory entry", place, "no cluster's offset", table, where)
        if kind != _DIRTY_TRACKING or bits not in _GRANULARITIES:
            raise _corrupt("bitmap directory entry", place, "unknown type or granularity", kind << 8 | bits, where)
        name = data[end - name_length : end].decode(errors="surrogateescape")
        info = BitmapInfo(
            name,
            1 << bits,
            bool(flags & _IN_USE),
            bool(flags & _AUTO),
            extra,
            bool(flags & _EXTRA_COMPATIBLE),
            table,
            entries,
        )
        if info.table_entries != _table_entries(info, header):
            what = f"its table should have {_table_entries(info, header)} entries"
            raise _corrupt("bitmap directory entry", place, what, entries, where)
        if any(other.name == name for other in found):
            raise _corrupt("bitmap directory entry", place, "a second bitmap of that name", None, where)
        found.append(info)
        at = -(-end // 8) * 8
    if len(found) != count or at < len(data):
        raise _corrupt("bitmap directory", offset, f"not {count} entries long", len(found), where)
    return tuple(found)


def _table_entries(info: BitmapInfo, header: Qcow2Header) -> int:
    bits = -(-header.disk_size // info.granularity)
    return -(-bits // (8 * header.cluster_size))


def check_usable(info: BitmapInfo, where: str) -> None:
    """Refuses bitmaps whose bits mean something only to other software.

    Raises:
        ImageUnsupportedError: extra data that is not known, and not said to be harmless.
    """
    if info.extra_data and not info.extra_compatible:
        what = f"the bitmap {info.name!r} has extra data that is not known here"
        raise ImageUnsupportedError(what, where=where, remedy="A newer version of qmpnbd may know it.")


def table_offsets(table: Entries, info: BitmapInfo, header: Qcow2Header, where: str) -> U64:
    """Returns of each entry of a bitmap table where its bits lie; 0 for all zeroes, 1 for all ones.

    Raises:
        ImageCorruptError: an entry contradicts the format.
    """
    entries = table.astype(np.uint64)
    hosts = entries & np.uint64(HOST_MASK)
    bad = (entries & np.uint64(_RESERVED)) != 0
    bad |= (hosts & np.uint64(header.cluster_size - 1)) != 0
    bad |= ((entries & np.uint64(_ALL_ONES)) != 0) & (hosts != 0)
    if bad.any():
        index = int(np.flatnonzero(bad)[0])
        what = f"of the bitmap {info.name!r}: neither a cluster's offset nor all zeroes or ones"
        raise _corrupt("bitmap table entry", info.table_offset + 8 * index, what, int(entries[index]), where)
    return entries


def bitmap_map(pieces: Iterable[tuple[int, bytes | bool]], granularity: int, size: int) -> ExtentMap:
    """Makes the map of a bitmap: 1 where dirty, 0 where clean.

    Args:
        pieces: consecutive parts of the bitmap: how many bits, and the bits, or what all of them are.
        granularity: bytes of the disk a bit stands for.
        size: bytes of the disk.
    """
    ends, values, first = [np.empty(0, np.uint64)], [np.empty(0, np.uint8)], 0
    for count, bits in pieces:
        if isinstance(bits, bool):
            flags, places = np.array([bits], dtype=np.uint8), np.array([count - 1])
            values.append(flags)
        else:
            flags = np.unpackbits(np.frombuffer(bits, dtype=np.uint8), bitorder="little")[:count]
            places = np.flatnonzero(np.append(flags[1:] != flags[:-1], True))
            values.append(flags[places])
        ends.append((places.astype(np.uint64) + np.uint64(first + 1)) * np.uint64(granularity))
        first += count
    return ExtentMap(np.minimum(np.concatenate(ends), np.uint64(size)), np.concatenate(values))


def _corrupt(structure: str, offset: int, what: str, value: int | None, where: str) -> ImageCorruptError:
    return ImageCorruptError(what, where=where, structure=structure, offset=offset, value=value, remedy=CHECK)
