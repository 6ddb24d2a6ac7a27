"""vmdk whose data lies in other files as it is: a descriptor, which is text, names them. Bytes to values.

::

    createType="twoGbMaxExtentFlat"              or monolithicFlat
    parentCID=ffffffff                           no other disk below
    RW 4192256 FLAT "disk-f001.vmdk" 0           access, sectors, kind, file beside the descriptor, first sector there
    RW 2048 FLAT "disk-f002.vmdk" 0

Source: VMware's "Virtual Disk Format 5.0", and images made by QEMU.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from qmpnbd.images.headerfaults import corrupt, unsupported

MAX_LENGTH = 256 << 10
"""Bytes of a descriptor that are read: enough for `_MAX_EXTENTS`."""
_MAX_EXTENTS = 2048  # 4 TiB in files of 2 GiB
_MAX_SECTORS = 1 << 40  # 512 TiB
_SECTOR = 512
_NO_PARENT = 0xFFFF_FFFF
_TYPES = ("monolithicFlat", "twoGbMaxExtentFlat")
_EXTENT = re.compile(
    r'^(RW|RDONLY|NOACCESS)[ \t]+(\d{1,18})[ \t]+(\w+)[ \t]*(?:"([^"\r\n]*)"(?:[ \t]+(\d{1,18}))?)?', re.M
)


@dataclass(frozen=True, slots=True)
class FlatExtent:
    """A part of the disk.

    Attributes:
        name: of the file, as the descriptor has it.
        offset: bytes in that file before the part.
        size: bytes of the part.
    """

    name: str
    offset: int
    size: int


def flat_extents(descriptor: bytes, where: str) -> tuple[FlatExtent, ...]:
    """Reads a descriptor.

    Args:
        descriptor: the file, or its first `MAX_LENGTH` + 1 bytes.
        where: the file, for messages.

    Raises:
        ImageUnsupportedError: another kind of disk.
        ImageCorruptError: an extent without a file, or larger than any disk.
    """
    if len(descriptor) > MAX_LENGTH:
        raise unsupported(f"a vmdk descriptor of more than {MAX_LENGTH} bytes is not read here", where)
    text = descriptor.split(b"\0")[0].decode(errors="surrogateescape")
    kind = re.search(r'^createType="([^"\r\n]*)"', text, re.MULTILINE)
    if kind is None or kind[1] not in _TYPES:
        raise unsupported(f"a vmdk of the type {ascii(kind[1]) if kind else 'unknown'} is not read here", where)
    parent = re.search(r"^parentCID=([0-9a-fA-F]{1,8})\b", text, re.MULTILINE)
    if parent is not None and int(parent[1], 16) != _NO_PARENT:
        raise unsupported("a flat vmdk with a parent is not read here", where)
    extents = []
    for number, found in enumerate(_EXTENT.finditer(text)):
        access, sectors, form, name, first = found.groups()
        if number >= _MAX_EXTENTS:
            raise unsupported(f"a vmdk of more than {_MAX_EXTENTS} extents is not read here", where)
        if access != "RW" or form != "FLAT":
            raise unsupported(f"a vmdk with an extent of the kind {access} {form!a} is not read here", where)
        if not name or not first or not 1 <= int(sectors) <= _MAX_SECTORS or int(first) > _MAX_SECTORS:
            place = len(text[: found.start()].encode(errors="surrogateescape"))
            raise corrupt("extent", place, int(sectors), where, structure="descriptor")
        extents.append(FlatExtent(name, int(first) * _SECTOR, int(sectors) * _SECTOR))
    if not extents:
        raise unsupported("a vmdk without extents is not read here", where)
    return tuple(extents)
