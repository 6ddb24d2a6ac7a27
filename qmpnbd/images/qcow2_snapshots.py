"""Internal snapshots of qcow2: the snapshot table. Bytes to values.

An entry, big-endian, at a multiple of 8 bytes::

    0   L1 table offset     16  seconds        24  nanoseconds of      36  length of extra data
    8   L1 entries          20  nanoseconds        virtual clock       40  extra data, id, name, padding
    12  length of id                           32  VM state size
    14  length of name

    extra data   0  VM state size   8  size of the disk   16  instruction count; each may be missing

Source: "Snapshots" in the qcow2 specification.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, replace

from qmpnbd.errors import ImageCorruptError, ImageUnsupportedError, UsageError
from qmpnbd.images.qcow2_format import CHECK, MAX_L1_BYTES, Qcow2Header

MAX_SNAPSHOTS = 65536  # QEMU's limit
_MAX_EXTRA = 1024  # QEMU's limit
_ENTRY = struct.Struct(">QIHHIIQII")
_NO_COUNT = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An internal snapshot.

    Attributes:
        id: unique in the image.
        name: given by whoever made it; need not be unique.
        seconds: since 1970 when it was made.
        nanoseconds: the rest of that moment.
        vm_clock_ns: how long the guest had run.
        vm_state_size: bytes of saved guest memory; 0 for a snapshot of the disk alone.
        disk_size: bytes of the disk when it was made; None in version 2 images, which do not tell.
        instruction_count: of a recorded guest; None if not recorded.
        l1_offset: where its L1 table lies.
        l1_entries: entries of that table.
    """

    id: str
    name: str
    seconds: int
    nanoseconds: int
    vm_clock_ns: int
    vm_state_size: int
    disk_size: int | None
    instruction_count: int | None
    l1_offset: int
    l1_entries: int


def unpack_snapshots(read: Callable[[int, int], bytes], header: Qcow2Header, where: str) -> tuple[Snapshot, ...]:
    """Reads the snapshot table.

    Args:
        read: returns so many bytes from an offset of the file; raises if they are not there.
        header: the image's header.
        where: the file, for messages.

    Raises:
        ImageCorruptError: an entry contradicts the format.
        ImageUnsupportedError: more snapshots than QEMU would open.
        ImageTruncatedError: the table lies beyond the end of the file.
    """
    if header.snapshot_count > MAX_SNAPSHOTS:
        what = f"{header.snapshot_count} internal snapshots, more than {MAX_SNAPSHOTS}"
        raise ImageUnsupportedError(what, where=where, remedy=CHECK)
    found, at = [], header.snapshots_offset
    if header.snapshot_count and (at == 0 or at % header.cluster_size):
        raise ImageCorruptError(
            "the snapshot table does not start at a cluster behind the header",
            where=where,
            structure="header field snapshots_offset",
            offset=64,
            value=at,
            remedy=CHECK,
        )
    for _ in range(header.snapshot_count):
        fixed = _ENTRY.unpack(read(at, _ENTRY.size))
        l1_offset, l1_entries, id_length, name_length, seconds, nanoseconds, clock, state_size, extra_length = fixed
        if extra_length > _MAX_EXTRA:
            what = f"more than {_MAX_EXTRA} bytes of extra data"
            raise ImageCorruptError(
                what, where=where, structure="snapshot table entry", offset=at, value=extra_length, remedy=CHECK
            )
        rest = read(at + _ENTRY.size, extra_length + id_length + name_length)
        extra, names = rest[:extra_length], rest[extra_length:]
        words = struct.unpack_from(f">{min(extra_length // 8, 3)}Q", extra)
        count = words[2] if len(words) > 2 else _NO_COUNT
        found.append(
            Snapshot(
                names[:id_length].decode(errors="surrogateescape"),
                names[id_length:].decode(errors="surrogateescape"),
                seconds,
                nanoseconds,
                clock,
                words[0] if words else state_size,
                words[1] if len(words) > 1 else None,
                None if count == _NO_COUNT else count,
                l1_offset,
                l1_entries,
            )
        )
        at += -(-(_ENTRY.size + len(rest)) // 8) * 8
    return tuple(found)


def header_of_snapshot(header: Qcow2Header, snapshots: tuple[Snapshot, ...], name: str, where: str) -> Qcow2Header:
    """Returns the header as it would be if a snapshot were the disk.

    Args:
        header: the image's.
        snapshots: its snapshots.
        name: an id, or else a name, as QEMU looks for them.
        where: the file, for messages.

    Raises:
        UsageError: there is none of that id or name.
        ImageCorruptError: its L1 table contradicts the format.
    """
    chosen = next((each for each in snapshots if each.id == name), None)
    chosen = chosen or next((each for each in snapshots if each.name == name), None)
    if chosen is None:
        there = ", ".join(f"{each.id} ({each.name})" for each in snapshots[:20]) or "none"
        raise UsageError(f"no internal snapshot {name}; there are: {there}", where=where)
    size = header.size if chosen.disk_size is None else chosen.disk_size
    changed = replace(header, size=size, l1_offset=chosen.l1_offset, l1_entries=chosen.l1_entries)
    bad = None
    if chosen.l1_entries and (chosen.l1_offset == 0 or chosen.l1_offset % header.cluster_size):
        bad = ("its L1 table does not start at a cluster behind the header", chosen.l1_offset)
    elif chosen.l1_entries * 8 > MAX_L1_BYTES:
        bad = (f"its L1 table is larger than {MAX_L1_BYTES} bytes", chosen.l1_entries)
    elif chosen.l1_entries < changed.l1_needed:
        bad = (f"its L1 table is too small for {size} bytes", chosen.l1_entries)
    if bad is not None:
        raise ImageCorruptError(
            bad[0],
            where=where,
            structure=f"entry of snapshot {chosen.id}",
            offset=header.snapshots_offset,
            value=bad[1],
            remedy=CHECK,
        )
    return changed
