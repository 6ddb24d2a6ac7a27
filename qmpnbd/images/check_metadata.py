"""Snapshots and bitmaps as a check sees them: where they keep what, and what is wrong with the lists themselves.

::

    snapshot table   [ 40 bytes | extra data | id | name | padding to 8 ] [ ... ]      8 + 4 bytes: its L1 table
    bitmap directory [ 24 bytes | extra data | name | padding to 8 ] [ ... ]           8 + 4 bytes: its table
    bitmap table     [ e e e e ]                 bits 9-55: host offset of a cluster of bits; 0 = all clear or all set

Unlike a reader, a check goes on past what is wrong as long as QEMU's does.
Source: "Qcow2 Image File Format", Snapshots and Bitmaps, of QEMU's interoperability documents.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from qmpnbd.errors import ImageCorruptError
from qmpnbd.extents import U64
from qmpnbd.images.check import I64, Findings, Rule
from qmpnbd.images.qcow2_format import CHECK, MAX_L1_BYTES, Qcow2Header

_SNAPSHOT = struct.Struct(">QIHHIIQII")
_DIRECTORY = struct.Struct(">II QQ")
_BITMAP = struct.Struct(">QIIBBHI")
_HOST_MASK = 0x00FF_FFFF_FFFF_FE00
_BITMAP_RESERVED = 0xFF00_0000_0000_01FE
_ALL_ONES = 1 << 0
_EXTRA_MAX = 1024  # QEMU's limit
_EXTRA_OF_3 = 16  # version 3 requires so much
MAX_SNAPSHOTS = 65536  # QEMU's limit
MAX_DIRECTORY = 64 << 20  # QEMU's limit for bitmap directories and snapshot tables
MAX_BITMAP_ENTRIES = 0x8000000 // 8  # QEMU's limit for a bitmap table


class Source(Protocol):
    """A file that can be read; behind its end are zeroes, as QEMU has it."""

    def read(self, offset: int, length: int) -> bytes:
        """Returns `length` bytes from `offset` on."""


@dataclass(frozen=True, slots=True)
class SnapshotTable:
    """What the snapshot table leads to.

    Attributes:
        size: bytes of the table.
        l1_tables: offset and entries of each snapshot's L1 table.
    """

    size: int = 0
    l1_tables: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class BitmapTable:
    """Where the table of a bitmap lies."""

    offset: int
    entries: int


def read_snapshots(file: Source, header: Qcow2Header, where: str, findings: Findings) -> SnapshotTable:
    """Reads the snapshot table.

    Raises:
        ImageCorruptError: it makes so little sense that QEMU does not go on either.
    """
    start = at = header.snapshots_offset
    tables = []
    for number in range(min(header.snapshot_count, MAX_SNAPSHOTS)):
        at = -(-at // 8) * 8
        l1_offset, l1_entries, id_size, name_size, *_, extra = _SNAPSHOT.unpack(file.read(at, _SNAPSHOT.size))
        end = at + _SNAPSHOT.size + extra + id_size + name_size
        if extra > _EXTRA_MAX or end - start > MAX_DIRECTORY:
            what = f"snapshot {number} has {extra} bytes of extra data"
            raise _refused(what, where, "snapshot table entry", at)
        if header.version >= 3 and extra < _EXTRA_OF_3:
            findings.add(Rule.SNAPSHOT, at, f"snapshot {number} at {at:#x} lacks its size")
        if l1_offset % header.cluster_size:
            findings.add(
                Rule.SNAPSHOT, at, f"snapshot {number} at {at:#x}: its L1 table at {l1_offset:#x} is unaligned"
            )
        elif 8 * l1_entries > MAX_L1_BYTES:
            findings.add(Rule.SNAPSHOT, at, f"snapshot {number} at {at:#x}: its L1 table has {l1_entries} entries")
        else:
            tables.append((l1_offset, l1_entries))
        at = end
    return SnapshotTable(at - start, tuple(tables))


def read_bitmaps(file: Source, extension: bytes, where: str) -> tuple[int, int, list[BitmapTable]]:
    """Reads the bitmap directory.

    Args:
        file: the image.
        extension: the bitmaps header extension.
        where: the file, for messages.

    Returns:
        Where the directory lies, its bytes, and the bitmaps' tables.

    Raises:
        ImageCorruptError: it contradicts the format; QEMU does not open such an image, not even for a check.
    """
    count, _, size, start = _DIRECTORY.unpack(extension[: _DIRECTORY.size].ljust(_DIRECTORY.size, b"\0"))
    tables: list[BitmapTable] = []
    if size > MAX_DIRECTORY:
        raise _refused(f"{size} bytes long", where, "bitmap directory", start)
    data, at = file.read(start, size), 0
    while at + _BITMAP.size <= size and len(tables) < count:
        offset, entries, _, _, _, name_size, extra = _BITMAP.unpack_from(data, at)
        end = at + -(-(_BITMAP.size + extra + name_size) // 8) * 8
        if end > size or entries > MAX_BITMAP_ENTRIES or not name_size:
            break
        tables.append(BitmapTable(offset, entries))
        at = end
    if at != size or len(tables) != count:
        what = f"bitmap {len(tables)} of {count} makes no sense, or is not the last"
        raise _refused(what, where, "bitmap directory entry", start + at)
    return start, size, tables


def _refused(what: str, where: str, structure: str, offset: int) -> ImageCorruptError:
    return ImageCorruptError(what, where=where, structure=structure, offset=offset, remedy=CHECK)


def bitmap_clusters(entries: U64, place: int, cluster_size: int, findings: Findings) -> I64:
    """Returns where the clusters of a bitmap lie.

    Args:
        entries: of a bitmap table, in this machine's byte order.
        place: where the first of them lies in the file.
        cluster_size: bytes in a cluster.
        findings: where corruptions go.
    """
    offsets = (entries & np.uint64(_HOST_MASK)).astype(np.int64)
    wrong = (entries & np.uint64(_BITMAP_RESERVED)) != 0
    wrong |= (offsets != 0) & (((entries & np.uint64(_ALL_ONES)) != 0) | (offsets & (cluster_size - 1) != 0))
    findings.add_many(
        Rule.BITMAP,
        wrong,
        lambda index: (
            place + 8 * index,
            f"bitmap table entry at {place + 8 * index:#x} is {int(entries[index]):#018x}",
        ),
    )
    used: I64 = offsets[~wrong & (offsets != 0)]
    return used
