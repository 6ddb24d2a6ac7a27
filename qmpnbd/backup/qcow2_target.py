"""A qcow2 image written in one go: data in any order as it comes, then the tables, then the header.

::

    write, write, …    settle: L2, L1, refcounts | fsync | header | fsync     finish: the name
    no header: no image                                      an image, unproved         an image

What is below a layer is a name in its header and nothing else: nobody opens it here.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import numpy as np

from qmpnbd.backup import qcow2_layout
from qmpnbd.backup.content import DATA, PIECE, ZERO, aligned
from qmpnbd.backup.newfile import NewFile
from qmpnbd.backup.qcow2_data import PackedData, PlainData
from qmpnbd.backup.qcow2_layout import Layout
from qmpnbd.backup.zstd import compressor
from qmpnbd.errors import UsageError
from qmpnbd.extents import ExtentMap
from qmpnbd.images.qcow2_format import (
    BACKING_FORMAT,
    COMPRESSION_TYPE_BIT,
    HEADER_MAX,
    MAX_BACKING_NAME,
    MAX_CLUSTER_BITS,
    MAX_L1_BYTES,
    MIN_CLUSTER_BITS,
    Qcow2Header,
    pack_extensions,
)
from qmpnbd.images.refcounts import pack_refcounts
from qmpnbd.printable import printable

Compression: TypeAlias = Literal["", "zstd"]

_HEADER_LENGTH: Final = 104
_ZSTD: Final = 1
_SECTOR: Final = 512
_LARGER: Final = "Choose larger clusters."


@dataclass(frozen=True, slots=True)
class Backing:
    """What a layer stands on.

    Attributes:
        name: as written into the header; relative to the folder of the layer if it is relative.
        format: its format.
        size: bytes of its disk.
    """

    name: str
    format: str
    size: int


class Qcow2Target:
    """A qcow2 image (version 3) in the making. Make it with `create`.

    Attributes:
        where: the name that it is to have, printable.
        lanes: see `Target`.
        read_from: where it is until it is finished.
    """

    def __init__(
        self, file: NewFile, layout: Layout, data: PlainData | PackedData, header: _Head, *, expected: int, force: bool
    ) -> None:
        self._file = file
        self._layout = layout
        self._data = data
        self._header = header
        self._expected = expected
        self._force = force
        self._written = 0
        self._count = threading.Lock()
        self._settled = False
        self.where = file.where
        self.lanes = data.lanes
        self.read_from = os.fspath(file.beside)

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        content: ExtentMap,
        *,
        backing: Backing | None = None,
        cluster_size: int = 1 << 16,
        compression: Compression = "",
        force: bool = False,
    ) -> Qcow2Target:
        """Makes an image for a content; all of its `DATA` is to be written, and nothing else.

        Args:
            path: the name it is to have in the end.
            content: which bytes are data, zeroes, or left to what is below; as long as the disk. Over something else
                or compressed it is to be made of whole clusters (`content.aligned`).
            backing: what it stands on; None for nothing.
            cluster_size: bytes of a cluster, a power of two from 512 to 2 MiB; compressed ones up to 1 MiB.
            compression: "zstd" to compress.
            force: whether an image of that name may be replaced.

        Raises:
            UsageError: the arguments do not fit together, or qcow2 cannot have it.
            TargetInUseError: the name is taken, or its file is in use.
            TargetError: it cannot be made.
        """
        where = printable(os.fspath(path))
        bits = _cluster_bits(cluster_size, compression, where)
        # What is absent reads as zeroes where nothing is below.
        wanted = content if backing is not None else content.mapped(lambda each: np.where(each == DATA, DATA, ZERO))
        clusters = aligned(wanted, cluster_size)
        if clusters != wanted and (backing is not None or compression):
            raise UsageError(f"a content that is not made of clusters of {cluster_size} bytes", where=where)
        if 8 * -(-content.size // (cluster_size * (cluster_size // 8))) > MAX_L1_BYTES:
            raise UsageError(f"{content.size} bytes are too many for such clusters", where=where, remedy=_LARGER)
        layout = Layout(clusters, bits, writes_zeroes=backing is not None)
        header = _Head(content.size, bits, backing, compression, where)
        make = compressor(where) if compression else None
        file = NewFile(path, force=force)
        data = PlainData(file, layout) if make is None else PackedData(file, layout, make, content.size)
        return cls(file, layout, data, header, expected=content.totals().get(DATA, 0), force=force)

    def write(self, offset: int, data: memoryview) -> None:
        """Writes bytes of the disk; see `Target.write`.

        Raises:
            UsageError: the content has no data there.
            TargetError: the target is full or broken.
        """
        self._data.write(offset, data)
        with self._count:
            self._written += len(data)

    def write_batch(self, batch: Sequence[tuple[int, memoryview]]) -> None:
        """Writes many pieces; see `BatchTarget.write_batch`, and `write` for what is raised."""
        self._data.write_batch(batch)
        with self._count:
            self._written += sum(len(data) for _, data in batch)

    def zero(self, offset: int, length: int) -> None:
        """Does nothing: the content has told where zeroes are."""

    def settle(self) -> None:
        """Writes the tables and the header, and brings all to the disk; see `Target.settle`.

        Raises:
            UsageError: data is missing.
            TargetError: it does not get there.
        """
        if self._settled:
            return
        if self._written != self._expected:
            what = f"{self._written} bytes of data were written, and {self._expected} announced"
            raise UsageError(what, where=self.where)
        header = self._tables()
        self._file.settle()  # the header must not be there before what it leads to
        self._file.write(0, memoryview(header))
        self._file.settle()
        self._settled = True

    def _tables(self) -> bytes:
        """Writes everything but the header, which is returned."""
        layout, size = self._layout, self._layout.cluster_size
        l2 = self._data.end
        l1 = l2 + layout.tables.size
        counts = l1 + -(-8 * layout.l1_entries // size)
        table, blocks = qcow2_layout.refcount_clusters(counts, size)
        total = counts + table + blocks
        self._file.resize(total * size)
        at = l2 * size
        for part in layout.l2_tables(self._data.places):
            self._file.write(at, memoryview(part))
            at += len(part)
        self._file.write(l1 * size, memoryview(layout.l1_table(l2)))
        places = np.arange(counts + table, total, dtype=np.uint64) << np.uint64(layout.cluster_bits)
        self._file.write(counts * size, memoryview(places.astype(">u8").tobytes()))
        numbers = qcow2_layout.refcounts(total, self._data.end, self._data.places, layout.cluster_bits)
        at, step = (counts + table) * size, PIECE
        for first in range(0, total, step):
            part = pack_refcounts(numbers[first : first + step], qcow2_layout.REFCOUNT_ORDER)
            self._file.write(at, memoryview(part))
            at += len(part)
        return self._header.pack(l1 * size if layout.l1_entries else 0, layout.l1_entries, counts * size, table)

    def finish(self) -> None:
        """Settles the image and gives it its name; see `Target.finish`."""
        self.settle()
        self._file.publish(force=self._force)

    def discard(self) -> None:
        """Removes the image unless it was finished."""
        self._file.discard()


class _Head:
    """Cluster 0: what is known of the header from the beginning.

    Raises:
        UsageError: the name of the backing file is too long.
    """

    def __init__(self, size: int, cluster_bits: int, backing: Backing | None, compression: str, where: str) -> None:
        length = HEADER_MAX if compression else _HEADER_LENGTH
        named = () if backing is None else ((BACKING_FORMAT, backing.format.encode()),)
        self._extensions = pack_extensions(*named)
        self._name = b"" if backing is None else os.fsencode(backing.name)
        self._fields = {
            "size": size,
            "cluster_bits": cluster_bits,
            "backing_offset": length + len(self._extensions) if backing is not None else 0,
            "backing_length": len(self._name),
            "header_length": length,
            "incompatible": COMPRESSION_TYPE_BIT if compression else 0,
            "compression_type": _ZSTD if compression else 0,
        }
        room = min(MAX_BACKING_NAME, (1 << cluster_bits) - length - len(self._extensions))
        if len(self._name) > room:
            what = f"the name of the backing file has {len(self._name)} bytes, with room for {room}"
            raise UsageError(what, where=where)

    def pack(self, l1_offset: int, l1_entries: int, refcount_offset: int, refcount_clusters: int) -> bytes:
        """Returns what lies at the beginning of the file."""
        header = Qcow2Header(
            l1_entries=l1_entries,
            l1_offset=l1_offset,
            refcount_table_offset=refcount_offset,
            refcount_table_clusters=refcount_clusters,
            refcount_order=qcow2_layout.REFCOUNT_ORDER,
            **self._fields,
        )
        return header.pack() + self._extensions + self._name


def _cluster_bits(cluster_size: int, compression: str, where: str) -> int:
    bits = cluster_size.bit_length() - 1
    if cluster_size != 1 << bits or not MIN_CLUSTER_BITS <= bits <= MAX_CLUSTER_BITS:
        what = f"clusters of {cluster_size} bytes"
        raise UsageError(what, where=where, remedy="They are powers of two from 512 to 2097152.")
    if compression and cluster_size > PIECE:
        what = f"compressed clusters of {cluster_size} bytes"
        raise UsageError(what, where=where, remedy=f"Choose at most {PIECE}.")
    return bits
