"""What a qcow2 file records beside the disk: features, internal snapshots, persistent bitmaps. Read on demand."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, TypeAlias

import numpy as np

from qmpnbd.errors import ImageUnsupportedError, UsageError
from qmpnbd.extents import ExtentMap
from qmpnbd.images import qcow2_bitmaps, qcow2_snapshots
from qmpnbd.images.qcow2 import ENTRY, HOST_MASK
from qmpnbd.images.qcow2_bitmaps import BitmapInfo
from qmpnbd.images.qcow2_file import Qcow2File
from qmpnbd.images.qcow2_format import (
    CORRUPT_BIT,
    DATA_FILE_RAW_BIT,
    DIRTY_BIT,
    LAZY_REFCOUNTS_BIT,
)
from qmpnbd.images.qcow2_snapshots import Snapshot

Encryption: TypeAlias = Literal["none", "aes", "luks"]
_ENCRYPTIONS: tuple[Encryption, ...] = ("none", "aes", "luks")
REFCOUNT_BLOCK_MASK = (1 << 64) - 512
_MAX_REFCOUNT_TABLE = 8 << 20  # QEMU's limit
_TABLE_SLICE = 1 << 16  # entries of a bitmap table read together


@dataclass(frozen=True, slots=True)
class Qcow2Facts:
    """What the header and the tables beside the disk say.

    Attributes:
        version: 2 or 3.
        cluster_size: bytes in a cluster.
        extended_l2: clusters have 32 subclusters.
        compression_type: of compressed clusters.
        lazy_refcounts: refcounts may lag behind while the image is open.
        dirty: it was not closed; with lazy refcounts they may be wrong.
        corrupt: QEMU found it corrupt and refuses to write.
        refcount_bits: width of a refcount.
        encryption: of the data; tables are always in the clear.
        data_file: the name recorded for the external data file; None without one.
        data_file_raw: the external data file is also a raw image of the disk.
        snapshots: internal snapshots.
        bitmaps: persistent bitmaps.
    """

    version: int
    cluster_size: int
    extended_l2: bool
    compression_type: Literal["zlib", "zstd"]
    lazy_refcounts: bool
    dirty: bool
    corrupt: bool
    refcount_bits: int
    encryption: Encryption
    data_file: str | None
    data_file_raw: bool
    snapshots: tuple[Snapshot, ...]
    bitmaps: tuple[BitmapInfo, ...]


def facts(file: Qcow2File) -> Qcow2Facts:
    """Reads everything a qcow2 file records beside the disk.

    Raises:
        ImageError: the branch says what is wrong with the file.
    """
    header = file.header
    data_file = file.extensions.data_file
    return Qcow2Facts(
        version=header.version,
        cluster_size=header.cluster_size,
        extended_l2=header.extended_l2,
        compression_type="zstd" if header.compression_type else "zlib",
        lazy_refcounts=bool(header.compatible & LAZY_REFCOUNTS_BIT),
        dirty=bool(header.incompatible & DIRTY_BIT),
        corrupt=bool(header.incompatible & CORRUPT_BIT),
        refcount_bits=1 << header.refcount_order,
        encryption=_ENCRYPTIONS[header.crypt_method],
        data_file=None if data_file is None else os.fsdecode(data_file),
        data_file_raw=header.has_data_file and bool(header.autoclear & DATA_FILE_RAW_BIT),
        snapshots=snapshots(file),
        bitmaps=bitmaps(file),
    )


def snapshots(file: Qcow2File) -> tuple[Snapshot, ...]:
    """Reads the internal snapshots, without their tables.

    Raises:
        ImageError: the branch says what is wrong with the file.
    """
    return qcow2_snapshots.unpack_snapshots(
        lambda at, length: file.file.exactly(at, length, "its snapshot table"), file.header, file.file.where
    )


def select_snapshot(file: Qcow2File, name: str) -> None:
    """Makes the disk of an internal snapshot the one that `file` reads.

    Raises:
        UsageError: there is none of that id or name.
        ImageError: the branch says what is wrong with the file.
    """
    # Bitmaps belong to the active disk.
    changed = qcow2_snapshots.header_of_snapshot(file.header, snapshots(file), name, file.file.where)
    file.file.exactly(changed.l1_offset, 8 * changed.l1_entries, f"the L1 table of snapshot {name}")
    file.header = changed
    file.extensions = replace(file.extensions, bitmaps=None)


def bitmaps(file: Qcow2File) -> tuple[BitmapInfo, ...]:
    """Reads which persistent bitmaps there are, without their bits.

    Raises:
        ImageError: the branch says what is wrong with the file.
    """
    header, where = file.header, file.file.where
    count, offset, size = qcow2_bitmaps.unpack_extension(file.extensions.bitmaps, header, where)
    directory = file.file.exactly(offset, size, "its bitmap directory") if size else b""
    return qcow2_bitmaps.unpack_directory(directory, count, offset, header, where)


def bitmap(file: Qcow2File, name: str, *, inconsistent: bool, check: Callable[[], None]) -> ExtentMap:
    """Reads a persistent bitmap.

    Args:
        file: the image.
        name: the bitmap.
        inconsistent: whether one that was in use when the image was last closed will do.
        check: called now and then; ends the work by raising.

    Raises:
        UsageError: there is none of that name.
        ImageUnsupportedError: it is inconsistent, or has extra data that is not known.
        ImageError: the branch says what is wrong with the file.
    """
    where, known = file.file.where, bitmaps(file)
    info = next((each for each in known if each.name == name), None)
    if info is None:
        there = ", ".join(repr(each.name) for each in known[:20]) or "none"
        raise UsageError(f"no bitmap {name!r}; there are: {there}", where=where)
    if info.inconsistent and not inconsistent:
        what = f"the bitmap {name!r} is inconsistent: it was in use when the image was last closed, or still is"
        raise ImageUnsupportedError(what, where=where, remedy="Start a new bitmap with a full backup.")
    qcow2_bitmaps.check_usable(info, where)
    return qcow2_bitmaps.bitmap_map(_pieces(file, info, check), info.granularity, file.header.disk_size)


def looks_preallocated(file: Qcow2File) -> bool:
    """Tells whether QEMU takes an image for one whose metadata was preallocated.

    It does if more clusters of the file are counted as in use than the file system holds: a ninth more, and at least
    two. It then looks for holes under the data.

    Raises:
        ImageUnreadableError: an I/O error.
    """
    header = file.header
    held = file.file.allocated_bytes() // header.cluster_size
    threshold = max(held * 10 // 9, held + 2)
    left, in_use = -(-file.file.size() // header.cluster_size), 0
    per_block = header.cluster_size * 8 >> header.refcount_order
    table_size = min(header.refcount_table_clusters * header.cluster_size, _MAX_REFCOUNT_TABLE)
    for at in range(header.refcount_table_offset, header.refcount_table_offset + table_size, header.cluster_size):
        table = file.file.read(at, header.cluster_size)
        blocks = np.frombuffer(table[: len(table) // 8 * 8], ENTRY)
        for block in blocks.tolist():
            if in_use >= threshold or left <= 0:
                return in_use >= threshold
            if block & REFCOUNT_BLOCK_MASK:
                data = file.file.read(block & REFCOUNT_BLOCK_MASK, header.cluster_size)
                in_use += _in_use(data, 1 << header.refcount_order, min(left, per_block))
            left -= per_block
    return in_use >= threshold


def _in_use(block: bytes, bits: int, count: int) -> int:
    """Counts the refcounts of a block that are not 0."""
    if bits >= 8:
        whole = len(block) // (bits // 8) * (bits // 8)
        return int(np.count_nonzero(np.frombuffer(block[:whole], dtype=f"u{bits // 8}")[:count]))
    single = np.unpackbits(np.frombuffer(block, np.uint8), bitorder="little").reshape(-1, bits)
    return int(np.count_nonzero(np.count_nonzero(single, axis=1)[:count]))


def _pieces(file: Qcow2File, info: BitmapInfo, check: Callable[[], None]) -> Iterator[tuple[int, bytes | bool]]:
    """Yields the bits of a bitmap cluster by cluster; of those that are all alike many at once."""
    cluster_size = file.header.cluster_size
    per_cluster = 8 * cluster_size
    left = -(-file.header.disk_size // info.granularity)
    for first in range(0, info.table_entries, _TABLE_SLICE):
        count = min(_TABLE_SLICE, info.table_entries - first)
        table = file.file.exactly(info.table_offset + 8 * first, 8 * count, f"the table of bitmap {info.name!r}")
        here = np.frombuffer(table, ENTRY)
        entries = qcow2_bitmaps.table_offsets(here, info, file.header, file.file.where)
        cuts = np.flatnonzero((entries[1:] != entries[:-1]) | ((entries[1:] & np.uint64(HOST_MASK)) != 0)) + 1
        bounds = [0, *cuts.tolist(), count]
        for start, end in pairwise(bounds):
            check()
            entry, bits = int(entries[start]), min((end - start) * per_cluster, left)
            left -= bits
            if entry & HOST_MASK:
                yield bits, file.file.exactly(entry & HOST_MASK, -(-bits // 8), f"bits of bitmap {info.name!r}")
            else:
                yield bits, bool(entry)
