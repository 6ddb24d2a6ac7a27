"""Large images for benchmarks, written table by table in a second; ``qemu-img check`` finds them clean.

Layout, in clusters of 64 KiB: header, refcount table, refcount blocks, L1 table, L2 tables, data. Without a `pool` the
data clusters are holes of the host's file system: a benchmark of maps reads none of them. QEMU takes such an image for
preallocated, though, and asks the host for holes under every extent. With a pool all data shares a few clusters that
are really there, as a snapshot shares them with the disk; runs stay runs, and the file holds what it says.
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
_MAX_REFCOUNT = 65535


def write_qcow2(path: Path, allocated: npt.NDArray[np.bool_], backing: str | None = None, *, pool: int = 0) -> None:
    """Writes a qcow2 (version 3) whose clusters are allocated or not; L2 tables without any are left out.

    Args:
        path: the file to make.
        allocated: one flag a cluster of the disk.
        backing: name of a qcow2 backing file.
        pool: data clusters that all guest clusters share, in turn; 0 to give each its own, as a hole of the file.
    """
    disk_size = allocated.size * CLUSTER
    rows = -(-allocated.size // _ENTRIES)
    allocated = np.append(allocated, np.zeros(-allocated.size % _ENTRIES, dtype=bool)).reshape(rows, _ENTRIES)
    used = np.flatnonzero(allocated.any(axis=1))
    l1_clusters = -(-rows * 8 // CLUSTER)
    guests = int(allocated.sum())
    data = min(pool, guests) if pool else guests
    blocks = 1
    while True:
        root = -(-blocks * 8 // CLUSTER)
        total = 1 + root + blocks + l1_clusters + used.size + data
        if blocks * _REFCOUNTS >= total:
            break
        blocks = -(-total // _REFCOUNTS)
    first_block = 1 + root
    first_l1 = first_block + blocks
    first_l2 = first_l1 + l1_clusters
    first_data = first_l2 + used.size
    which = np.arange(guests) % max(data, 1)
    shared = np.bincount(which, minlength=data)
    if data and shared.max() > _MAX_REFCOUNT:
        raise ValueError("the pool is too small")
    with path.open("wb") as file:
        file.write(_header(disk_size, rows, first_l1, root, backing))
        _write_at(file.fileno(), CLUSTER, _offsets(first_block, blocks))
        counts = np.zeros(blocks * _REFCOUNTS, dtype=">u2")
        counts[: total - data] = 1
        counts[total - data : total] = shared
        _write_at(file.fileno(), first_block * CLUSTER, counts)
        l1 = np.zeros(rows, dtype=np.uint64)
        l1[used] = _offsets(first_l2, used.size, _COPIED)
        _write_at(file.fileno(), first_l1 * CLUSTER, l1)
        entries = np.zeros((used.size, _ENTRIES), dtype=np.uint64)
        owned = np.where(shared == 1, _COPIED, np.uint64(0))
        entries[allocated[used]] = (_offsets(first_data, data) | owned)[which]
        _write_at(file.fileno(), first_l2 * CLUSTER, entries)
        if pool:
            _write_at(file.fileno(), first_data * CLUSTER, np.full(data * CLUSTER // 8, 1, dtype=np.uint64))
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
