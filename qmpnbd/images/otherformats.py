"""Headers of qed, vmdk and luks, as far as a reader of allocation needs them. Bytes to values.

::

    qed      two levels of 64-bit little-endian offsets; 0 nothing, 1 zeroes, else a cluster
    vmdk     monolithicSparse, streamOptimized: two levels of 32-bit sectors; 0 nothing, 1 zeroes if the header says so
             descriptor of flat extents: the disk is the bytes of other files
    luks     an encrypted payload behind the header: allocated everywhere

`images.blocks` has those with one table; ``qcow`` (version 1), ``bochs``, ``cloop``, ``dmg`` are refused by name.
Sources: QEMU's "QED Image File Format Specification", VMware's "Virtual Disk Format 5.0", the LUKS1 on-disk format
specification, and images made by QEMU.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

from qmpnbd.errors import ImageTruncatedError
from qmpnbd.images.headerfaults import corrupt, need, not_like, unsupported
from qmpnbd.images.qcow2_format import CUT

HEADER_LENGTH = 1024
MAX_DESCRIPTOR = 20 << 10  # a descriptor of one extent has under 1 KiB; QEMU reads no more than this
SPARSE_MAGICS = (b"KDMV", b"COWD")
"""How vmdk files start that hold data; others are descriptors of files that do."""
MAX_GRANULE = 64 << 20  # QED's limit
_MAX_TOP = 1 << 22  # entries of the top table
_QED = struct.Struct("<4sIIIQQQQQII")
_VMDK = struct.Struct("<4sIIQQQQIQQQB4sH")
_QED_BACKING, _QED_NO_PROBE = 1 << 0, 1 << 2
_QED_KNOWN = 0b111  # backing file, needs a check, backing format is not probed
_VMDK_ZERO_GRAIN, _VMDK_COMPRESSED, _VMDK_MARKERS = 1 << 2, 1 << 16, 1 << 17
_SECTOR = 512
_AT_END = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Tabled:
    """An image with two levels of tables.

    Attributes:
        size: bytes of the disk.
        granule: bytes that an entry describes.
        per_table: entries of a second-level table.
        top_offset: where the first-level table lies.
        entry: numpy's name of an entry's type.
        scale: bytes in the unit of an entry.
        zeroes: an entry of 1 means zeroes.
        compressed: entries lead to compressed data.
        bounded: an entry that leads outside the file is an error for QEMU.
        backing_name: of the layer below, "" if there is none.
        backing_format: recorded for it; "" if QEMU guesses.
    """

    size: int
    granule: int
    per_table: int
    top_offset: int
    entry: str
    scale: int
    zeroes: bool
    compressed: bool
    bounded: bool
    backing_name: str = ""
    backing_format: str = ""

    @property
    def top_entries(self) -> int:
        """Entries of the first-level table that describe the disk."""
        return -(-self.size // (self.granule * self.per_table))


def unpack_qed(data: bytes, backing: bytes, where: str) -> Tabled:
    """Reads a QED header.

    Args:
        data: the first `HEADER_LENGTH` bytes of the file, or all of a shorter one.
        backing: the bytes that `qed_backing` told.
        where: the file, for messages.

    Raises:
        ImageTruncatedError: the file ends inside the header.
        ImageUnsupportedError: an unknown feature.
        ImageCorruptError: a field contradicts the format.
    """
    need(data, _QED.size, where)
    magic, cluster, table, _, features, _, _, top, size, _, _ = _QED.unpack_from(data)
    if magic != b"QED\0":
        raise not_like("qed", where)
    if features & ~_QED_KNOWN:
        what = f"unknown features {features & ~_QED_KNOWN:#x}"
        raise unsupported(what, where)
    if not 4096 <= cluster <= MAX_GRANULE or cluster & (cluster - 1):
        raise corrupt("cluster_size", 4, cluster, where)
    if not 1 <= table <= 16 or table & (table - 1):
        raise corrupt("table_size", 8, table, where)
    per_table = table * cluster // 8
    if size % _SECTOR or size > per_table * per_table * cluster:
        raise corrupt("image_size", 48, size, where)
    if top % cluster or top == 0:
        raise corrupt("l1_table_offset", 40, top, where)
    name = backing.split(b"\0")[0].decode(errors="surrogateescape") if features & _QED_BACKING else ""
    recorded = "raw" if features & _QED_NO_PROBE else ""
    found = Tabled(size, cluster, per_table, top, "<u8", 1, True, False, True, name, recorded)
    return _bounded(found, where)


def qed_backing(data: bytes, where: str) -> tuple[int, int]:
    """Returns where a QED file holds the name of its backing file, and its length; zeroes for none."""
    need(data, _QED.size, where)
    fields = _QED.unpack_from(data)
    if not fields[4] & _QED_BACKING:
        return 0, 0
    offset, length = fields[9], fields[10]
    if length > 1023 or offset + length > max(fields[1], 1) * max(fields[3], 1):
        raise corrupt("backing_filename_size", 60, length, where)
    return offset, length


@dataclass(frozen=True, slots=True)
class VmdkHeader:
    """The header of a vmdk sparse extent.

    Attributes:
        descriptor: where the descriptor lies, and its length.
        at_end: the header to go by is a footer, so many bytes before the end of the file; 0 for none.
        tabled: the tables; without what the descriptor tells.
    """

    descriptor: tuple[int, int]
    at_end: int
    tabled: Tabled


def unpack_vmdk(data: bytes, where: str) -> VmdkHeader:
    """Reads the header, or the footer, of a vmdk sparse extent.

    Raises:
        ImageTruncatedError: the file ends inside the header.
        ImageUnsupportedError: not a sparse extent, or of an unknown version.
        ImageCorruptError: a field contradicts the format.
    """
    if data[:4] != b"KDMV":
        raise unsupported("a vmdk of this version is not read here", where)
    need(data, _VMDK.size, where)
    fields = _VMDK.unpack_from(data)
    _, version, flags, capacity, grain, at, length, per_table, _, top, _, _, _, algorithm = fields
    if version not in (1, 2, 3):
        raise unsupported(f"vmdk version {version} is not read here", where)
    compressed = bool(flags & _VMDK_COMPRESSED)
    if compressed and (algorithm != 1 or not flags & _VMDK_MARKERS):
        raise unsupported(f"compression {algorithm} with the flags {flags:#x} is not read here", where)
    if not 1 <= grain <= MAX_GRANULE // _SECTOR or grain & (grain - 1):
        raise corrupt("grainSize", 20, grain, where)
    if per_table != 512:  # QEMU's limit, and VMware's only value
        raise corrupt("numGTEsPerGT", 44, per_table, where)
    if capacity > 1 << 54:
        raise corrupt("capacity", 12, capacity, where)
    if at > 1 << 40 or length * _SECTOR > MAX_DESCRIPTOR:
        raise corrupt("descriptorSize", 36, length, where)
    footer = 1024 if top == _AT_END else 0
    if not footer and top > 1 << 54:
        raise corrupt("gdOffset", 56, top, where)
    zeroes = bool(flags & _VMDK_ZERO_GRAIN)
    place = 0 if footer else top * _SECTOR
    size, granule = capacity * _SECTOR, grain * _SECTOR
    tabled = Tabled(size, granule, per_table, place, "<u4", _SECTOR, zeroes, compressed, False)
    return VmdkHeader((at * _SECTOR, length * _SECTOR), footer, _bounded(tabled, where))


def vmdk_backing(descriptor: bytes, where: str) -> str:
    """Returns the name of the layer below from a vmdk descriptor, "" for none.

    Raises:
        ImageUnsupportedError: the disk does not lie in this file alone.
    """
    text = descriptor.split(b"\0")[0].decode(errors="surrogateescape")
    kind = re.search(r'^createType="([^"\n]*)"', text, re.MULTILINE)
    if kind is None or kind[1] not in ("monolithicSparse", "streamOptimized"):
        what = f"a vmdk of the type {ascii(kind[1]) if kind else 'unknown'} is not read here"
        raise unsupported(what, where)
    if len(re.findall(r"^(?:RW|RDONLY|NOACCESS) ", text, re.MULTILINE)) != 1:
        raise unsupported("a vmdk of several extents is not read here", where)
    parent = re.search(r"^parentCID=([0-9a-fA-F]+)", text, re.MULTILINE)
    if parent is None or int(parent[1], 16) == 0xFFFFFFFF:
        return ""
    hint = re.search(r'^parentFileNameHint="([^"\n]*)"', text, re.MULTILINE)
    if hint is None or not hint[1]:
        raise unsupported("its descriptor does not name its parent", where)
    return hint[1]


def luks_size(data: bytes, file_size: int, where: str) -> int:
    """Returns the bytes of the disk of a LUKS image: what lies behind its header.

    Raises:
        ImageTruncatedError: the file ends inside the header.
        ImageUnsupportedError: a version that is not read here.
    """
    need(data, 208, where)
    if data[:6] != b"LUKS\xba\xbe":
        raise not_like("luks", where)
    if data[6:8] != b"\0\1":
        raise unsupported("luks versions other than 1 are not read here", where)
    payload = int.from_bytes(data[104:108], "big") * _SECTOR
    if payload > file_size:
        raise ImageTruncatedError(f"the file ends at byte {file_size}, inside its header", where=where, remedy=CUT)
    return -(-(file_size - payload) // _SECTOR) * _SECTOR


def _bounded(tabled: Tabled, where: str) -> Tabled:
    if tabled.top_entries > _MAX_TOP:
        what = f"its first table has {tabled.top_entries} entries, more than {_MAX_TOP}"
        raise unsupported(what, where)
    return tabled
