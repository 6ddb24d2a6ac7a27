"""Real qcow2 images, and what can happen to their structures: the same damage every time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.chains import run

HOST_MASK = 0x00FF_FFFF_FFFF_FE00


@dataclass(frozen=True)
class Victim:
    """An image to damage; commands of qemu-io, or ``snapshot`` or ``bitmap``."""

    name: str
    options: str
    size: str
    commands: Sequence[str]


_WRITES = ("write -q -c 0 4k", "write -q 64k 100k", "write -q 5M 9k")
_MORE = ("write -q 68k 8k", "write -q -z 1M 64k", "discard -q 64k 4k")
VICTIMS = [
    Victim("order0", "cluster_size=4k,refcount_bits=1", "8M", (*_WRITES, *_MORE)),
    *(
        Victim(f"order{order}", f"cluster_size=4k,refcount_bits={1 << order}", "8M", (*_WRITES, "snapshot", *_MORE))
        for order in range(1, 7)
    ),
    Victim(
        "smallest",
        "cluster_size=512",
        "1M",
        ("write -q 0 5k", "write -q -c 9k 512", "write -q -c 9728 512", "snapshot", "write -q 99k 9k", "write -q 0 1k"),
    ),
    Victim("old", "cluster_size=4k,compat=0.10", "4M", ("write -q 0 50k", "snapshot", "write -q 0 5k", "snapshot")),
    Victim(
        "extended",
        "cluster_size=16k,extended_l2=on",
        "8M",
        ("write -q 0 50k", "write -q -z 1M 1k", "snapshot", "write -q 0 5k", "write -q -c 4M 16k"),
    ),
    Victim("bitmaps", "cluster_size=4k", "16M", ("write -q 0 50k", "bitmap", "bitmap", "write -q -c 2M 4k")),
    Victim("outside", "cluster_size=4k,data_file=outside.raw", "4M", ("write -q 0 50k", "write -q 1M 64k")),
    Victim("outside32", "cluster_size=16k,extended_l2=on,data_file=outside32.raw", "4M", ("write -q 0 50k",)),
]


def make(victim: Victim, folder: Path) -> Path:
    """Makes an image in `folder`, which must be the working directory: data files are beside that."""
    path = folder / f"{victim.name}.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", victim.options, path, victim.size)
    for number, command in enumerate(victim.commands):
        if command == "snapshot":
            run("qemu-img", "snapshot", "-q", "-c", f"s{number}", path)
        elif command == "bitmap":
            run("qemu-img", "bitmap", "--add", path, f"b{number}")
        else:
            run("qemu-io", "-f", "qcow2", "-c", command, path)
    return path


def number(image: bytes | bytearray, offset: int) -> int:
    """Returns the 64-bit number at a byte of an image."""
    return int.from_bytes(image[offset : offset + 8], "big")


def places(image: bytes | bytearray) -> dict[str, list[int]]:
    """Where the entries of an image lie: L1, L2, refcount table; and where refcount blocks start."""
    cluster, l1_at, refcounts_at = 1 << int.from_bytes(image[20:24], "big"), number(image, 40), number(image, 48)
    l1 = [l1_at + 8 * index for index in range(int.from_bytes(image[36:40], "big"))]
    tables = [number(image, place) & HOST_MASK for place in l1]
    l2 = [table + 8 * index for table in tables if table for index in range(cluster // 8)]
    table = [refcounts_at + 8 * index for index in range(cluster // 8)]
    blocks = [number(image, place) for place in table if number(image, place)]
    return {"l1": l1, "l2": l2, "refcount table": table, "refcount block": blocks}


def damage(image: bytearray, dice: random.Random) -> None:
    """Does one to three bad things to an image."""
    cluster, known = 1 << int.from_bytes(image[20:24], "big"), places(image)
    for _ in range(dice.choice([1, 1, 1, 2, 3])):
        kind = dice.choice(["l1", "l2", "l2", "l2", "refcount table", "refcount block", "cut", "any", "snapshots"])
        if kind in ("l1", "l2", "refcount table"):
            among = known[kind][:3] if kind == "refcount table" else known[kind]
            used = [place for place in among if number(image, place)] if dice.random() < 0.8 else among
            _entry(image, dice.choice(used or among), cluster, dice)
        elif kind == "refcount block":
            image[known[kind][0] + dice.randrange(2 * len(image) // cluster)] = dice.choice([0, 1, 2, 3, 255])
        elif kind == "cut":
            del image[dice.randrange(len(image) * 3 // 4, len(image)) :]
            return
        elif kind == "snapshots" and number(image, 64):
            image[number(image, 64) + dice.randrange(60)] = dice.randrange(256)
        else:
            image[dice.randrange(cluster, len(image))] = dice.randrange(256)


def _entry(image: bytearray, place: int, cluster: int, dice: random.Random) -> None:
    entry = number(image, place)
    match dice.randrange(8):
        case 0:
            entry ^= 1 << 63
        case 1:
            entry ^= 1 << dice.randrange(64)
        case 2:
            entry = 0
        case 3:
            entry = dice.randrange(len(image) // cluster + 3) * cluster | 1 << 63
        case 4:
            entry = entry & ~HOST_MASK | dice.randrange(len(image) // 512 + 20) * 512
        case 5:
            entry = dice.getrandbits(64)
        case 6:
            entry ^= 1 << 62
        case _:
            entry = 1 << dice.randrange(64)
    image[place : place + 8] = entry.to_bytes(8, "big")
