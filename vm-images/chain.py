#!/usr/bin/env python3
"""The demo's backing chain: five layers that between them hold every kind of cluster a validation has to tell apart.

::

    today.qcow2       128 MiB  2 MiB clusters                   a morning's writes        <- active layer
    tuesday.qcow2     128 MiB  512 KiB clusters                 zero clusters, discards
    monday.qcow2      128 MiB  4 KiB clusters                   zero clusters, discards
    installed.qcow2    96 MiB  64 KiB clusters, version 2       compressed clusters
    template.raw       48 MiB  raw                              data and holes            <- base

Both lower layers are shorter than what lies on them, each overlay records its backing format, and backing names are
relative: the folder can be copied and moved. The same QEMU makes the same bytes every time.

``spoil`` then breaks one layer in the way that matters most: it makes a cluster's L2 entry disappear from the file,
which a running QEMU that has the table in its cache does not notice.
"""

from __future__ import annotations

import struct
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

MIB = 1 << 20

TEMPLATE = "template.raw"
TEMPLATE_SIZE = 48 * MIB
TEMPLATE_DATA = ((0, 6 * MIB), (10 * MIB, 12 * MIB), (32 * MIB, 40 * MIB), (47 * MIB, 48 * MIB))

# A data cluster of a middle layer that is read through all layers above it, and that the guest leaves alone.
SPOILED_LAYER = "installed.qcow2"
SPOILED_OFFSET = 54 * MIB


@dataclass(frozen=True)
class Overlay:
    """One qcow2 layer: how it is created, and what qemu-io does to it."""

    name: str
    size: str
    options: str
    commands: tuple[str, ...]


def _compressed(pattern: int, start_kib: int, cluster_kib: int, clusters: int) -> tuple[str, ...]:
    """Write compressed clusters, one a command: in one long write QEMU places them in the order they are done."""
    starts = range(start_kib, start_kib + clusters * cluster_kib, cluster_kib)
    return tuple(f"write -c -P {pattern:#x} {start}k {cluster_kib}k" for start in starts)


OVERLAYS = (
    Overlay(
        "installed.qcow2",
        "96M",
        "compat=0.10,cluster_size=64k",
        (
            "write -P 0x11 0 2M",
            "write -P 0x12 5M 3M",
            "write -P 0x13 49M 7M",
            *_compressed(0x14, 60 * 1024, 64, 8),
            *_compressed(0x15, 88 * 1024, 64, 2),
            "write -P 0x16 95M 1M",
        ),
    ),
    Overlay(
        "monday.qcow2",
        "128M",
        "compat=1.1,cluster_size=4k",
        (
            "write -P 0x21 9M 64k",
            "write -P 0x22 9568k 4k",
            "write -P 0x23 9600k 12k",
            "write -z 33M 512k",
            "write -P 0x24 40M 1M",
            "discard 41200k 256k",
            "write -z 90M 64k",
            *_compressed(0x25, 110 * 1024, 4, 6),
        ),
    ),
    Overlay(
        "tuesday.qcow2",
        "128M",
        "compat=1.1,cluster_size=512k",
        (
            "write -P 0x31 16M 40k",
            "write -z 17M 1M",
            "write -P 0x33 36M 2M",
            "discard 37M 512k",
            "write -P 0x34 116M 8k",
        ),
    ),
    Overlay(
        "today.qcow2",
        "128M",
        "compat=1.1,cluster_size=2M",
        (
            "write -P 0x41 20M 4k",
            "write -z 24M 2M",
            "write -P 0x42 122M 6M",
            "discard 124M 2M",
        ),
    ),
)


def build(folder: Path) -> Path:
    """Make the chain in a folder and return its active layer.

    Raises:
        FileNotFoundError: qemu-img or qemu-io is not on PATH.
        subprocess.CalledProcessError: one of them failed; its own words are on stderr.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_template(folder / TEMPLATE)
    names = [TEMPLATE, *(overlay.name for overlay in OVERLAYS)]
    for (below, _), overlay in zip(pairwise(names), OVERLAYS, strict=True):
        backing_format = "raw" if below == TEMPLATE else "qcow2"
        options = f"{overlay.options},backing_file={below},backing_fmt={backing_format}"
        _run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, overlay.name, overlay.size, cwd=folder)
        # `unsafe` leaves out the fsyncs: nothing here has to survive a power cut.
        script = [word for command in overlay.commands for word in ("-c", command)]
        _run("qemu-io", "-t", "unsafe", "-f", "qcow2", *script, overlay.name, cwd=folder)
    return folder / OVERLAYS[-1].name


def _write_template(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(TEMPLATE_SIZE)
        for start, end in TEMPLATE_DATA:
            file.seek(start)
            file.write(b"\x01" * (end - start))


def _run(*command: str, cwd: Path) -> None:
    subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.DEVNULL)


def spoil(image: Path, guest_offset: int) -> str:
    r"""Clear the L2 entry of one data cluster in a qcow2 file, and say what was done.

    ::

        header   0  4s  "QFI\xfb"       20  u32  cluster_bits      40  u64  l1_table_offset
                 4  u32 version         36  u32  l1_size           72  u64  incompatible_features (version 3)
        L1 entry    bits 9-55: where the L2 table lies
        L2 entry    bit 0: reads as zeroes; bits 9-55: where the cluster lies; bit 62: compressed

    Written for itself, on purpose: what proves that qmpnbd sees a fault must not share a line with it.

    Raises:
        ValueError: not a qcow2, or there is no standard data cluster at that place.
    """
    offset_mask = 0x00FF_FFFF_FFFF_FE00
    with image.open("r+b") as file:
        header = file.read(80)
        if header[:4] != b"QFI\xfb":
            raise ValueError(f"{image}: not a qcow2")
        version, cluster_bits = struct.unpack_from(">I12xI", header, 4)
        l1_size, l1_table = struct.unpack_from(">IQ", header, 36)
        if version >= 3 and struct.unpack_from(">Q", header, 72)[0] & 1 << 4:
            raise ValueError(f"{image}: has extended L2 entries")
        l1_index, l2_index = divmod(guest_offset >> cluster_bits, 1 << (cluster_bits - 3))
        if l1_index >= l1_size:
            raise ValueError(f"{image}: ends before {guest_offset}")
        file.seek(l1_table + 8 * l1_index)
        l2_table = struct.unpack(">Q", file.read(8))[0] & offset_mask
        place = l2_table + 8 * l2_index
        file.seek(place)
        (entry,) = struct.unpack(">Q", file.read(8)) if l2_table else (0,)
        if not entry & offset_mask or entry & (1 << 62 | 1):
            raise ValueError(f"{image}: no standard data cluster at {guest_offset} (its L2 entry is {entry:#018x})")
        file.seek(place)
        file.write(bytes(8))
    start = guest_offset >> cluster_bits << cluster_bits
    return (
        f"{image.name}: the L2 entry of guest bytes [{start}, {start + (1 << cluster_bits)}), "
        f"8 bytes at file offset {place:#x}, was {entry:#018x} and is zero now"
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: chain.py FOLDER")
    print(build(Path(sys.argv[1])))
