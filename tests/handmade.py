"""qcow2 files made by hand, for entries that QEMU would never write.

::

    cluster 0   header, extensions, backing name
    cluster 1.. L1 table, then the L2 tables that are needed
    DATA..END   room for data; the file ends at END, or where it is told to
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qmpnbd.extents import ExtentMap
from qmpnbd.images.files import open_chain
from qmpnbd.images.qcow2_format import DATA_FILE_BIT, EXTENDED_L2_BIT, Qcow2Header, pack_extensions

BACKING_FORMAT = 0xE2792ACA
DATA_FILE = 0x44415441
NAME_AT = 0x100
DATA = 0x10000
END = 0x20000
COPIED = 1 << 63
ZERO = 1
SIZE = 128 * 512  # two L2 tables of 64 clusters of 512 bytes


def qcow2_bytes(
    entries: Mapping[int, int] | Mapping[int, tuple[int, int]],
    *,
    size: int = SIZE,
    backing: str = "",
    backing_format: str = "",
    data_file: str = "",
    length: int = END,
    **fields: Any,
) -> bytes:
    """Makes an image.

    Args:
        entries: L2 entries by guest cluster; an L2 table exists where one is not left out. With the bitmap beside
            the entry where the header says that L2 entries are extended.
        size: bytes of the disk.
        backing: the backing name.
        backing_format: recorded beside it if not empty.
        data_file: the name recorded for an external data file, whose feature bit is set then.
        length: bytes in the file; larger ones are cut, smaller ones padded.
        fields: of `Qcow2Header`; 512-byte clusters unless told otherwise.
    """
    bits = fields.setdefault("cluster_bits", 9)
    if data_file:
        fields["incompatible"] = fields.get("incompatible", 0) | DATA_FILE_BIT
    words = 2 if fields.get("incompatible", 0) & EXTENDED_L2_BIT else 1
    cluster, per_table = 1 << bits, (1 << bits) // (8 * words)
    needed = -(-size // (cluster * per_table))
    if backing:
        fields.setdefault("backing_offset", NAME_AT)
        fields.setdefault("backing_length", len(backing))
    if fields.get("version") == 2:
        fields.setdefault("header_length", 72)
    fields.setdefault("l1_entries", needed)
    fields.setdefault("l1_offset", cluster if needed else 0)
    header = Qcow2Header(size=size, **fields)
    extensions = [(BACKING_FORMAT, backing_format.encode())] if backing_format else []
    extensions += [(DATA_FILE, data_file.encode())] if data_file else []
    image = bytearray(header.pack() + pack_extensions(*extensions))
    put(image, NAME_AT, backing.encode())
    table_at = cluster + -(-needed * 8 // cluster) * cluster
    for table in sorted({guest // per_table for guest in entries}):
        put(image, cluster + 8 * table, (table_at | COPIED).to_bytes(8, "big"))
        row = np.zeros((per_table, words), dtype=">u8")
        for guest, entry in entries.items():
            if guest // per_table == table:
                row[guest % per_table] = entry
        put(image, table_at, row.tobytes())
        table_at += cluster
    put(image, length, b"")
    return bytes(image[:length])


def put(image: bytearray, offset: int, data: bytes) -> None:
    """Writes into an image, which grows if it must."""
    image.extend(bytes(max(0, offset + len(data) - len(image))))
    image[offset : offset + len(data)] = data


def write(name: str, data: bytes) -> str:
    Path(name).write_bytes(data)
    return name


def depths(path: str) -> ExtentMap:
    with open_chain(path) as chain:
        return chain.allocation_depth()


def runs(*pairs: tuple[int, int]) -> ExtentMap:
    """A map of pairs of clusters and value."""
    return ExtentMap.of_extents((clusters * 512, value) for clusters, value in pairs)
