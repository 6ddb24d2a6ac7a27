"""An empty qcow2 image, as bytes: what a point in time lets QEMU write into.

Four structures, each at the start of a cluster::

    cluster 0   header, backing format (header extension), name of the backing file
    cluster 1   refcount table, one entry
    cluster 2   refcount block: every cluster named here is used once
    cluster 3   L1 table, all zero: nothing is allocated

It is made here, and not by ``blockdev-create`` inside QEMU, because then it takes no command at all: nothing more that
a kill could leave half done, and a file that exists, with the right owner and locked by us, before QEMU hears of it.
And not by ``qemu-img``, which need not be installed where qmpnbd runs. QEMU checks the file when it opens it.

Source: QEMU's docs/interop/qcow2.txt, sections "Header", "Header extensions" and "Host cluster management".
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")
_MAGIC = b"QFI\xfb"
_VERSION = 3
_BACKING_FORMAT = 0xE2792ACA
_REFCOUNT_ORDER = 4  # 16 bits
_CLUSTER_BITS = range(9, 22)
HEAD_BYTES = _HEADER.size
"""What `holds_nothing` wants to see."""

_MOST_L1_BYTES = 32 << 20  # QEMU's limit


def empty_qcow2(size: int, cluster_size: int, backing: tuple[str, str] | None = None) -> Iterator[tuple[int, bytes]]:
    """Yields the pieces of an empty image, each with its offset in the file; what lies between them is zero.

    The last piece ends where the file must end.

    Args:
        size: virtual size in bytes.
        cluster_size: bytes in a cluster, a power of two; larger ones are used where a disk of this size needs them.
        backing: name and format of the backing file to record; None to record none.

    Raises:
        ValueError: the size is more than qcow2 can have, or the name more than a header can hold.
    """
    fitting = (bits for bits in _CLUSTER_BITS if 1 << bits >= cluster_size and _fits(size, bits))
    bits = next(fitting, None)
    if bits is None:
        raise ValueError(f"{size} bytes are more than a qcow2 image can have")
    cluster = 1 << bits
    l1_bytes = _l1_bytes(size, bits)
    clusters = _clusters(size, bits)
    name = os.fsencode(backing[0]) if backing else b""
    extension = _extension(_BACKING_FORMAT, backing[1].encode()) if backing else b""
    extension += _extension(0, b"")
    name_offset = _HEADER.size + len(extension)
    if len(name) > min(1023, cluster - name_offset):
        raise ValueError("the name of the backing file is too long for a qcow2 header")
    header = _HEADER.pack(
        *(_MAGIC, _VERSION, name_offset if name else 0, len(name), bits, size, 0),
        *(l1_bytes // 8, 3 * cluster, cluster, 1, 0, 0, 0, 0, 0, _REFCOUNT_ORDER, _HEADER.size),
    )
    yield 0, header + extension + name
    yield cluster, struct.pack(">Q", 2 * cluster)
    yield 2 * cluster, struct.pack(">H", 1) * clusters
    yield clusters * cluster - 8, bytes(8)


def holds_nothing(head: bytes, length: int) -> bool:
    """Returns whether an image made here has never been written to: whatever is written makes the file longer.

    Args:
        head: the file's first bytes, `HEAD_BYTES` of them.
        length: bytes in the file.
    """
    if len(head) < _HEADER.size:
        return length == 0  # the one who made it was killed at once
    magic, version, _, _, bits, size, *_ = _HEADER.unpack(head[: _HEADER.size])
    if magic != _MAGIC or version != _VERSION or bits not in _CLUSTER_BITS:
        return False
    return length <= _clusters(int(size), int(bits)) << int(bits)


def _fits(size: int, bits: int) -> bool:
    """Returns whether the L1 table is one that QEMU takes, and one refcount block is enough."""
    return _l1_bytes(size, bits) <= _MOST_L1_BYTES and _clusters(size, bits) <= 1 << bits >> 1


def _clusters(size: int, bits: int) -> int:
    """Returns the clusters in the file of an empty image."""
    return 3 + -(-_l1_bytes(size, bits) // (1 << bits))


def _l1_bytes(size: int, bits: int) -> int:
    """Returns the bytes of an L1 table; an entry leads to an L2 table, one cluster of 8-byte entries."""
    return 8 * max(1, -(-size // (1 << (2 * bits - 3))))


def _extension(kind: int, data: bytes) -> bytes:
    return struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8)
