"""Compressed clusters: from the bytes in the file to one cluster. No I/O.

::

    host cluster        |~~~~####|####@@@@|@@~~~~~~|        # is one compressed cluster, @ another
    entry of #               ^ offset
                             |--------> its sectors, counted in 512 bytes: the end is known only roughly

What follows the compressed stream up to the end of its last sector belongs to somebody else. A stream must make
exactly one cluster; more is never unpacked, so that a small file cannot become a large one in memory.

Type 0 is raw deflate (RFC 1951; QEMU writes with a window of 4 KiB, and reads any), type 1 zstd (RFC 8878).
A grain of a vmdk file is a marker and a zlib stream (RFC 1950).
Sources: "Qcow2 Image File Format", Compressed Clusters, of QEMU's interoperability documents;
"Virtual Disk Format 5.0", Stream-Optimized Compressed Sparse Extents.
"""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable
from typing import Any, TypeAlias

from qmpnbd.errors import ImageUnsupportedError

ZSTD = 1
"""The compression type that is not in Python before 3.14."""

Decompress: TypeAlias = Callable[[bytes, int], bytes | None]
"""From a stream, with whatever follows it, and a cluster size to a cluster; None if it does not make one."""

GRAIN_MARKER = 12
"""Bytes before the compressed data of a vmdk grain: a sector of the disk (8), and the length of what follows (4)."""
_WINDOW_BITS = -15  # negative: no header, no checksum
_ZSTD_MODULES = ("compression.zstd", "backports.zstd")  # one interface


def decompressor(compression_type: int, where: str) -> Decompress:
    """Returns what unpacks the clusters of an image.

    Args:
        compression_type: as in the header.
        where: the file, for messages.

    Raises:
        ImageUnsupportedError: it is zstd, and nothing here can unpack that.
    """
    if compression_type != ZSTD:
        return _inflate
    for name in _ZSTD_MODULES:
        module = _imported(name)
        if module is not None:
            return lambda data, size: _with_standard(module, data, size)
    module = _imported("zstandard")
    if module is not None:
        return lambda data, size: _with_zstandard(module, data, size)
    raise ImageUnsupportedError(
        "the image is compressed with zstd, which this Python does not have",
        where=where,
        remedy="Install it with: pip install 'qmpnbd[zstd]'.",
    )


def inflate_grain(data: bytes, size: int) -> bytes | None:
    """Unpacks a grain of a vmdk file to at most `size` bytes, fewer only if it has no more; None if it is broken."""
    stream = zlib.decompressobj()
    try:
        grain = stream.decompress(data, size)
    except zlib.error:
        return None
    return grain if stream.eof or len(grain) == size else None


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _inflate(data: bytes, size: int) -> bytes | None:
    try:
        cluster = zlib.decompressobj(_WINDOW_BITS).decompress(data, size)
    except zlib.error:
        return None
    return cluster if len(cluster) == size else None


def _with_standard(module: Any, data: bytes, size: int) -> bytes | None:
    stream = module.ZstdDecompressor()
    try:
        cluster: bytes = stream.decompress(data, size)
        # The frame may end with bytes that make nothing more: a checksum, an empty block.
        if not stream.eof and stream.decompress(b"", 1):
            return None
    except module.ZstdError:
        return None
    return cluster if len(cluster) == size and stream.eof else None


def _with_zstandard(module: Any, data: bytes, size: int) -> bytes | None:
    try:
        cluster: bytes = module.ZstdDecompressor().stream_reader(data).read(size + 1)
    except module.ZstdError:
        return None
    return cluster if len(cluster) == size else None
