r"""The qcow2 header and its extensions: bytes to values.

Everything is big-endian. Cluster 0 of the file::

    0             72 or header_length        backing_offset         cluster size
    |--- header ---|--- header extensions ---|--- backing name ---|  |

    header, both versions           header, version 3           header extension
    0   magic "QFI\xfb"               72  incompatible features   0  type
    4   version                      80  compatible features     4  length, padding left out
    8   backing_offset               88  autoclear features      8  data, padded to 8 bytes
    16  backing_length               96  refcount_order
    20  cluster_bits                 100 header_length           type 0 ends the list, and may be missing
    24  size in bytes                104 compression type, if header_length > 104
    32  crypt_method
    36  l1_entries
    40  l1_offset
    48  refcount_table_offset
    56  refcount_table_clusters
    60  snapshot_count
    64  snapshots_offset

Refused is what QEMU refuses to open and what this package does not read yet. Refcounts and snapshots are not looked
at: they say nothing about what the disk holds. Source: "Qcow2 Image File Format" of QEMU's interoperability
documents, and experiments with QEMU where the document is silent.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import NoReturn

from qmpnbd.errors import ImageCorruptError, ImageTruncatedError, ImageUnsupportedError

MAGIC = b"QFI\xfb"
HEADER_MAX = 112  # bytes of the header that mean something, padded to 8

_COMMON = struct.Struct(">4sIQIIQIIQQIIQ")
_VERSION_3 = struct.Struct(">QQQII")
_END_OF_3 = _COMMON.size + _VERSION_3.size
_EXTENSION = struct.Struct(">II")
_END = 0
BACKING_FORMAT = 0xE2792ACA  # header extension
_DATA_FILE = 0x44415441
_BITMAPS = 0x23852875
_ENCRYPTION = 0x0537BE77

DIRTY_BIT = 1 << 0
CORRUPT_BIT = 1 << 1
DATA_FILE_BIT = 1 << 2
COMPRESSION_TYPE_BIT = 1 << 3
EXTENDED_L2_BIT = 1 << 4
_READ_FEATURES = DIRTY_BIT | CORRUPT_BIT | DATA_FILE_BIT | COMPRESSION_TYPE_BIT | EXTENDED_L2_BIT
LAZY_REFCOUNTS_BIT = 1 << 0  # compatible
BITMAPS_BIT = 1 << 0  # autoclear
DATA_FILE_RAW_BIT = 1 << 1  # autoclear
SUBCLUSTERS = 32  # of a cluster with an extended L2 entry
MIN_EXTENDED_CLUSTER_BITS = 14  # the format's limit: subclusters of 512 bytes

MIN_CLUSTER_BITS = 9  # the format's limit
MAX_CLUSTER_BITS = 21  # QEMU's limit
MAX_L1_BYTES = 32 << 20  # QEMU's limit
MAX_REFCOUNT_ORDER = 6  # 64 bits
MAX_BACKING_NAME = 1023  # the format's limit
MAX_CRYPT_METHOD = 2  # none, AES, LUKS; neither touches the tables
_BACKING_FORMAT_MAX = 15  # QEMU's limit

_OFFSETS = {
    "version": 4,
    "backing_offset": 8,
    "backing_length": 16,
    "cluster_bits": 20,
    "crypt_method": 32,
    "l1_entries": 36,
    "l1_offset": 40,
    "incompatible": 72,
    "autoclear": 88,
    "refcount_order": 96,
    "header_length": 100,
    "compression_type": 104,
}

_NEWER = "A newer version of qmpnbd may know it."
CHECK = "Run 'qemu-img check' on the file, or restore it."
CUT = "The file was cut or is an incomplete copy: restore it, or copy it again."


@dataclass(frozen=True, slots=True)
class Qcow2Header:
    """The header, as recorded in the file; version 2 has the version 3 fields at the values that mean 'nothing'.

    Attributes:
        size: what the header says, in bytes; the guest sees `disk_size`.
        l1_entries: number of entries of the L1 table; may be more than the disk needs.
        header_length: where the header extensions start.
    """

    version: int = 3
    backing_offset: int = 0
    backing_length: int = 0
    cluster_bits: int = 16
    size: int = 0
    crypt_method: int = 0
    l1_entries: int = 0
    l1_offset: int = 0
    refcount_table_offset: int = 0
    refcount_table_clusters: int = 0
    snapshot_count: int = 0
    snapshots_offset: int = 0
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = 4
    header_length: int = 104
    compression_type: int = 0

    @property
    def cluster_size(self) -> int:
        """Bytes in a cluster."""
        return 1 << self.cluster_bits

    @property
    def extended_l2(self) -> bool:
        """Whether L2 entries are 16 bytes long and describe 32 subclusters."""
        return bool(self.incompatible & EXTENDED_L2_BIT)

    @property
    def has_data_file(self) -> bool:
        """Whether data lies in another file, at host offset = guest offset."""
        return bool(self.incompatible & DATA_FILE_BIT)

    @property
    def entry_size(self) -> int:
        """Bytes of an L2 entry."""
        return 16 if self.extended_l2 else 8

    @property
    def subclusters(self) -> int:
        """Parts of a cluster that have a status of their own."""
        return SUBCLUSTERS if self.extended_l2 else 1

    @property
    def granule(self) -> int:
        """Bytes of the smallest part that has a status of its own: a cluster, or a subcluster."""
        return self.cluster_size // self.subclusters

    @property
    def l2_entries(self) -> int:
        """Entries in an L2 table, which fills one cluster."""
        return self.cluster_size // self.entry_size

    @property
    def disk_size(self) -> int:
        """Bytes the guest sees: QEMU counts whole sectors, and rounds down."""
        return self.size // 512 * 512

    @property
    def l1_needed(self) -> int:
        """Entries of the L1 table that describe the disk; those after them describe nothing."""
        return -(-self.size // (self.cluster_size * self.l2_entries))

    @property
    def has_backing(self) -> bool:
        """Whether a backing name is recorded."""
        return self.backing_offset > 0 and self.backing_length > 0

    @property
    def extensions_end(self) -> int:
        """Where the room for header extensions ends."""
        return self.backing_offset or self.cluster_size

    def pack(self) -> bytes:
        """Returns the header as it lies in a file."""
        common = _COMMON.pack(
            MAGIC,
            self.version,
            self.backing_offset,
            self.backing_length,
            self.cluster_bits,
            self.size,
            self.crypt_method,
            self.l1_entries,
            self.l1_offset,
            self.refcount_table_offset,
            self.refcount_table_clusters,
            self.snapshot_count,
            self.snapshots_offset,
        )
        if self.version == 2:
            return common
        features = (self.incompatible, self.compatible, self.autoclear, self.refcount_order, self.header_length)
        packed = common + _VERSION_3.pack(*features) + bytes([self.compression_type])
        return packed[: max(self.header_length, _END_OF_3)].ljust(self.header_length, b"\0")


def unpack_header(data: bytes, where: str) -> Qcow2Header:
    """Reads and checks the header.

    Args:
        data: the first `HEADER_MAX` bytes of the file, or the whole of a shorter one.
        where: the file, for messages.

    Raises:
        ImageTruncatedError: the file ends inside the header.
        ImageUnsupportedError: another format or version, or a feature that is not read here.
        ImageCorruptError: a field contradicts the format.
    """
    if data[:4] != MAGIC[: len(data)]:
        raise ImageUnsupportedError(
            "the image is said to be qcow2, but does not start like one", where=where, remedy="Name its true format."
        )
    _need(data, _COMMON.size, where)
    _, version, *_ = common = _COMMON.unpack_from(data)
    if version not in (2, 3):
        remedy = "Only versions 2 and 3 of the format are known."
        raise ImageUnsupportedError(f"qcow version {version} is not read here", where=where, remedy=remedy)
    header = replace(Qcow2Header(*common[1:]), header_length=_COMMON.size)
    if version == 3:
        _need(data, _END_OF_3, where)
        header = Qcow2Header(*common[1:], *_VERSION_3.unpack_from(data, _COMMON.size))
        if header.header_length > _END_OF_3:
            _need(data, _END_OF_3 + 1, where)
            header = replace(header, compression_type=data[_END_OF_3])
    _check_features(header, where)
    _check_geometry(header, where)
    return header


@dataclass(frozen=True, slots=True)
class Extensions:
    """What the header extensions say.

    Attributes:
        backing_format: the format recorded for the backing file, "" if none is.
        data_file: the name recorded for the external data file; None if none is.
        bitmaps: the raw data of the bitmaps extension, None without one.
        encryption: the raw data of the encryption header pointer, None without one.
    """

    backing_format: str = ""
    data_file: bytes | None = None
    bitmaps: bytes | None = None
    encryption: bytes | None = None


def unpack_extensions(area: bytes, header: Qcow2Header, where: str) -> Extensions:
    """Walks the header extensions, in whatever order they come; of a repeated one the last counts.

    Args:
        area: the bytes from `Qcow2Header.header_length` to `Qcow2Header.extensions_end`.
        header: the header they belong to.
        where: the file, for messages.

    Raises:
        ImageCorruptError: an extension is longer than its room, or a backing format than any name of one; or the
            header says that data lies in another file, and none is named.
    """
    found: dict[int, bytes] = {}
    at = 0
    # Without an end marker they fill their room to the byte: QEMU would read a torn last one into the backing name.
    while at < len(area):
        kind, length = _EXTENSION.unpack(area[at : at + _EXTENSION.size].ljust(_EXTENSION.size, b"\xff"))
        if kind == _END:
            break
        start, place = at + _EXTENSION.size, header.header_length + at
        room = max(len(area) - start, 0)
        limit = min(room, _BACKING_FORMAT_MAX) if kind == BACKING_FORMAT else room
        if length > limit:
            raise ImageCorruptError(
                f"{length} bytes long, with room for {limit}",
                where=where,
                structure="header extension",
                offset=place,
                value=kind,
                remedy=CHECK,
            )
        found[kind] = area[start : start + length]
        at = start + -(-length // 8) * 8
    data_file = found.get(_DATA_FILE, b"").split(b"\0")[0] or None if header.has_data_file else None
    if header.has_data_file and data_file is None:
        _refuse(header, "incompatible", "data lies in another file, but no header extension names it", where)
    # QEMU holds it as a C string. What is not ASCII is no format; it is refused by name where the name is looked at.
    backing_format = found.get(BACKING_FORMAT, b"").split(b"\0")[0].decode("ascii", "backslashreplace")
    return Extensions(backing_format, data_file, found.get(_BITMAPS), found.get(_ENCRYPTION))


def pack_extensions(*extensions: tuple[int, bytes]) -> bytes:
    """Returns header extensions and the end marker as they lie in a file."""
    parts = [_EXTENSION.pack(kind, len(data)) + data + bytes(-len(data) % 8) for kind, data in extensions]
    return b"".join(parts) + _EXTENSION.pack(_END, 0)


def _need(data: bytes, length: int, where: str) -> None:
    if len(data) < length:
        raise ImageTruncatedError(f"the file ends at byte {len(data)}, inside its header", where=where, remedy=CUT)


def _refuse(header: Qcow2Header, field: str, what: str, where: str) -> NoReturn:
    value = getattr(header, field)
    structure = f"header field {field}"
    raise ImageCorruptError(what, where=where, structure=structure, offset=_OFFSETS[field], value=value, remedy=CHECK)


def _check_features(header: Qcow2Header, where: str) -> None:
    unknown = header.incompatible & ~_READ_FEATURES
    if unknown:
        raise ImageUnsupportedError(f"unknown incompatible features {unknown:#x}", where=where, remedy=_NEWER)
    if header.compression_type > 1:
        what = f"unknown compression type {header.compression_type}"
        raise ImageUnsupportedError(what, where=where, remedy=_NEWER)
    if bool(header.incompatible & COMPRESSION_TYPE_BIT) != bool(header.compression_type):
        _refuse(header, "compression_type", "the compression type and its feature bit contradict each other", where)
    if header.autoclear & DATA_FILE_RAW_BIT and not header.has_data_file:
        _refuse(header, "autoclear", "it says that the external data file is raw, but there is none", where)
    if header.crypt_method > MAX_CRYPT_METHOD:
        what = f"unknown encryption method {header.crypt_method}"
        raise ImageUnsupportedError(what, where=where, remedy=_NEWER)


def _check_geometry(header: Qcow2Header, where: str) -> None:
    if not MIN_CLUSTER_BITS <= header.cluster_bits <= MAX_CLUSTER_BITS:
        _refuse(header, "cluster_bits", f"not within {MIN_CLUSTER_BITS} to {MAX_CLUSTER_BITS}", where)
    if header.extended_l2 and header.cluster_bits < MIN_EXTENDED_CLUSTER_BITS:
        _refuse(header, "cluster_bits", "extended L2 entries need clusters of 16 KiB or more", where)
    if header.refcount_order > MAX_REFCOUNT_ORDER:
        _refuse(header, "refcount_order", f"not within 0 to {MAX_REFCOUNT_ORDER}", where)
    shortest = _COMMON.size if header.version == 2 else _END_OF_3
    if not shortest <= header.header_length <= header.cluster_size:
        _refuse(header, "header_length", f"not within {shortest} and the cluster size", where)
    if header.backing_offset:
        if not header.header_length <= header.backing_offset <= header.cluster_size:
            _refuse(header, "backing_offset", "not behind the header in cluster 0", where)
        if header.backing_length > min(MAX_BACKING_NAME, header.cluster_size - header.backing_offset):
            _refuse(header, "backing_length", "longer than allowed, or than the rest of cluster 0", where)
    if header.l1_entries * 8 > MAX_L1_BYTES:
        _refuse(header, "l1_entries", f"the L1 table is larger than {MAX_L1_BYTES} bytes", where)
    if header.l1_entries < header.l1_needed:
        _refuse(
            header, "l1_entries", f"too few for a disk of {header.size} bytes, which needs {header.l1_needed}", where
        )
    if header.l1_entries and (header.l1_offset == 0 or header.l1_offset % header.cluster_size):
        _refuse(header, "l1_offset", "not at the start of a cluster behind the header", where)
