"""Large images for benchmarks, written table by table in a second; ``qemu-img check`` finds them clean.

Layout, in clusters of 64 KiB: header, refcount table, refcount blocks, L1 table, L2 tables, data. Data clusters are
holes of the host's file system: a benchmark of maps reads none of them.
"""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

CLUSTER = 65536
_ENTRIES = CLUSTER // 8
_REFCOUNTS = CLUSTER // 2
_COPIED = np.uint64(1 << 63)
_INCOMPATIBLE_NONE = 0


def write_qcow2(path: Path, allocated: npt.NDArray[np.bool_], backing: str | None = None) -> None:
    """Writes a qcow2 (version 3) whose clusters are allocated or not.

    Args:
        path: the file to make.
        allocated: one flag a cluster of the disk.
        backing: name of a qcow2 backing file.
    """
    tables = -(-allocated.size // _ENTRIES)
    l1_clusters = -(-tables * 8 // CLUSTER)
    data = int(allocated.sum())
    blocks = 1
    while True:
        root = -(-blocks * 8 // CLUSTER)
        total = 1 + root + blocks + l1_clusters + tables + data
        if blocks * _REFCOUNTS >= total:
            break
        blocks = -(-total // _REFCOUNTS)
    first_block = 1 + root
    first_l1 = first_block + blocks
    first_l2 = first_l1 + l1_clusters
    first_data = first_l2 + tables
    with path.open("wb") as file:
        file.write(_header(allocated.size * CLUSTER, tables, first_l1, root, backing))
        _write_at(file.fileno(), CLUSTER, _offsets(first_block, blocks))
        counts = np.zeros(blocks * _REFCOUNTS, dtype=">u2")
        counts[:total] = 1
        _write_at(file.fileno(), first_block * CLUSTER, counts)
        _write_at(file.fileno(), first_l1 * CLUSTER, _offsets(first_l2, tables, _COPIED))
        entries = np.zeros(tables * _ENTRIES, dtype=">u8")
        entries[: allocated.size][allocated] = _offsets(first_data, data, _COPIED)
        _write_at(file.fileno(), first_l2 * CLUSTER, entries)
        file.truncate(total * CLUSTER)


def _header(size: int, tables: int, first_l1: int, root: int, backing: str | None) -> bytes:
    name = backing.encode() if backing else b""
    fields = struct.pack(
        ">4sIQIIQIIQQIIQ",
        b"QFI\xfb",
        3,
        0 if backing is None else 512,
        len(name),
        CLUSTER.bit_length() - 1,
        size,
        0,
        tables,
        first_l1 * CLUSTER,
        CLUSTER,
        root,
        0,
        0,
    )
    features = struct.pack(">QQQII", _INCOMPATIBLE_NONE, 0, 0, 4, 104)
    formats = struct.pack(">II8s", 0xE2792ACA, 5, b"qcow2") if backing else b""
    return ((fields + features + formats).ljust(512, b"\0") + name).ljust(CLUSTER, b"\0")


def _offsets(first: int, count: int, flags: np.uint64 | int = 0) -> npt.NDArray[np.uint64]:
    return np.arange(first, first + count, dtype=np.uint64) * np.uint64(CLUSTER) | np.uint64(flags)


def _write_at(descriptor: int, offset: int, values: npt.NDArray[np.generic]) -> None:
    wire = values.dtype.newbyteorder(">")
    rest = memoryview(values.astype(wire).tobytes())
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written


def main() -> None:
    """Writes ``alternating CLUSTERS FILE``: every other cluster allocated.

    A process of its own: what a benchmark itself has in memory would count as its children's peak (they begin as its
    copies).
    """
    kind, clusters, path = sys.argv[1:]
    if kind != "alternating":
        raise SystemExit(f"unknown kind of image: {kind}")
    allocated = np.zeros(int(clusters), dtype=bool)
    allocated[::2] = True
    write_qcow2(Path(path), allocated)


if __name__ == "__main__":
    main()
