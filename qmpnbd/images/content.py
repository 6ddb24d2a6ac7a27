"""What the guest reads from a chain: bytes, straight from the files that hold them.

::

    decided      | data in layer 0 | nobody | zero | data in layer 2     | compressed |
    buffer       | preadv          | 0 0 0  | 0 0  | preadv              | one cluster at a time

Which layer holds what, and where in its file, comes from a pass over the chain; here the bytes follow. Data is read to
where it belongs, without a copy in between; a stretch of a file that ends too early reads as zeroes, as QEMU has it.
Memory is the caller's buffer, the tables of some thousand clusters, and one cluster.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from qmpnbd.errors import ImageCorruptError, ImageUnsupportedError
from qmpnbd.images.check_tables import compressed_places
from qmpnbd.images.compressed import GRAIN_MARKER, Decompress, decompressor, inflate_grain
from qmpnbd.images.hostfile import HostFile
from qmpnbd.images.passes import NOBODY, Window
from qmpnbd.images.qcow2_file import Qcow2File
from qmpnbd.images.qcow2_format import CHECK
from qmpnbd.images.sources import Solid, Source
from qmpnbd.images.status import Status
from qmpnbd.images.tabled_source import TabledSource

_ZEROES = memoryview(bytes(1 << 20))


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the bytes of a layer come from.

    Attributes:
        format: the layer's format.
        data: the file that holds its data.
        is_placed: host offsets are known.
        source: what it is read through.
        qcow2: its tables; None for other formats.
    """

    format: str
    data: HostFile
    is_placed: bool
    source: Source | Solid
    qcow2: Qcow2File | None


class Content:
    """Fills a buffer with what a guest would read.

    Args:
        origins: of the layers, from the active one down.
        buffer: the bytes of the disk from `start` on.
        start: where that is.
        is_zeroed: the buffer holds zeroes already.
    """

    def __init__(self, origins: Sequence[Origin], buffer: memoryview, start: int, *, is_zeroed: bool) -> None:
        self._origins = origins
        self._buffer = buffer
        self._start = start
        self._is_zeroed = is_zeroed
        self._decompress: dict[int, Decompress] = {}

    def pieces(self, windows: Iterable[Window]) -> Iterator[memoryview]:
        """Reads the bytes of consecutive windows; yields the buffer whenever it is full, and what is left at the end.

        Raises:
            ImageUnsupportedError: the data is encrypted, or cannot be unpacked here.
            ImageCorruptError: a compressed cluster does not make a cluster.
            ImageError: a file cannot be read.
        """
        at = self._start
        for window in windows:
            for end, layer, code, shift in zip(*(column.tolist() for column in window.runs()), strict=True):
                while at < end:
                    stop = min(end, self._start + len(self._buffer))
                    self._put(layer, code, shift, (at, stop))
                    at = stop
                    if at == self._start + len(self._buffer):
                        yield self._buffer
                        self._start, self._is_zeroed = at, False
        if at > self._start:
            yield self._buffer[: at - self._start]

    def _put(self, layer: int, code: int, shift: int, extent: tuple[int, int]) -> None:
        if layer == NOBODY or code not in (Status.DATA, Status.COMPRESSED):
            self._zero(*extent)
        elif code == Status.DATA:
            self._data(layer, *extent, shift)
        else:
            self._unpack(layer, *extent)

    def _part(self, at: int, end: int) -> memoryview:
        return self._buffer[at - self._start : end - self._start]

    def _zero(self, at: int, end: int) -> None:
        if self._is_zeroed:
            return
        for start in range(at, end, len(_ZEROES)):
            part = self._part(start, min(start + len(_ZEROES), end))
            part[:] = _ZEROES[: len(part)]

    def _data(self, layer: int, at: int, end: int, shift: int) -> None:
        data = self._readable(layer).data
        done = data.read_into(self._part(at, end), (at + shift) % (1 << 64))
        self._zero(at + done, end)

    def _readable(self, layer: int) -> Origin:
        origin = self._origins[layer]
        if origin.qcow2 is not None and origin.qcow2.header.crypt_method:
            what, remedy = "the data is encrypted", "'qemu-img convert' makes a copy in the clear, given the key."
            raise ImageUnsupportedError(what, where=origin.data.where, remedy=remedy)
        if not origin.is_placed:
            what = f"the data of the format {origin.format} is not read here"
            raise ImageUnsupportedError(what, where=origin.data.where, remedy="'qemu-img convert' makes a qcow2 of it.")
        return origin

    def _unpack(self, layer: int, at: int, end: int) -> None:
        origin = self._readable(layer)
        for guest, size, cluster in self._clusters(layer, at, end) if origin.qcow2 else _grains(origin, at, end):
            low, high = max(at, guest), min(end, guest + size)
            self._part(low, high)[:] = cluster[low - guest : high - guest]

    def _clusters(self, layer: int, at: int, end: int) -> Iterator[tuple[int, int, bytes]]:
        """Unpacks the compressed clusters of a qcow2 layer: guest offset, size and content of each."""
        qcow2 = self._origins[layer].qcow2
        if qcow2 is None:
            return
        if layer not in self._decompress:
            self._decompress[layer] = decompressor(qcow2.header.compression_type, qcow2.file.where)
        size, file_size = qcow2.header.cluster_size, qcow2.file.size()
        first = at // size
        entries = qcow2.clusters(first, -(-end // size) - first).entries
        offsets, lengths = compressed_places(entries, qcow2.header.cluster_bits)
        for number, (host, length) in enumerate(zip(offsets.tolist(), lengths.tolist(), strict=True), first):
            # Some file systems refuse to be asked for bytes far beyond the end.
            data = qcow2.file.read(host, length) if host < file_size else b""
            cluster = self._decompress[layer](data, size)
            if cluster is None:
                raise _broken("cluster", number * size, size, host, qcow2.file.where)
            yield number * size, size, cluster


def _grains(origin: Origin, at: int, end: int) -> Iterator[tuple[int, int, bytes]]:
    """Unpacks the compressed grains of a vmdk layer: guest offset, size and content of each."""
    table = origin.source
    if not isinstance(table, TabledSource):
        return
    for guest in range(at // table.granule * table.granule, end, table.granule):
        host = table.host(guest)
        size = min(table.granule, table.tabled.size - guest)
        length = int.from_bytes(origin.data.exactly(host, GRAIN_MARKER, "a grain's marker")[8:12], "little")
        packed = origin.data.exactly(host + GRAIN_MARKER, length, "a grain") if length <= 2 * table.granule else b""
        grain = inflate_grain(packed, table.granule)
        if grain is None or len(grain) < size:
            raise _broken("grain", guest, size, host, origin.data.where)
        yield guest, size, grain


def _broken(kind: str, guest: int, size: int, host: int, where: str) -> ImageCorruptError:
    what = f"the compressed data of guest offset {guest:#x} does not make one {kind} of {size} bytes"
    return ImageCorruptError(what, where=where, structure=f"compressed {kind}", offset=host, remedy=CHECK)
