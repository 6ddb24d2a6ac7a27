"""Writes to the disks of a QEMU whose guest is paused, as the guest would make them, and what its bitmaps say of them.

Truth is kept here, independent of what is under test: which byte ranges were written since when.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import count
from pathlib import Path

from qmpnbd.control.ranges import joined
from qmpnbd.nbd.client import Client
from qmpnbd.nbd.uri import NbdUri
from tests.servers import Server, blockdev, qemu_img

Range = tuple[int, int]
_numbers = count()


def two_disks(folder: Path) -> list[str]:
    """Makes two disks and returns QEMU's arguments: vd0 (node a) is qcow2 and can store bitmaps, vd1 (b) is raw."""
    qemu_img("create", "-q", "-f", "qcow2", folder / "a.qcow2", "64M")
    qemu_img("create", "-q", "-f", "raw", folder / "b.raw", "64M")
    nodes = ["-blockdev", blockdev(folder / "a.qcow2", "a"), "-blockdev", blockdev(folder / "b.raw", "b", "raw")]
    return [*nodes, "-device", "virtio-blk-pci,drive=a,id=vd0", "-device", "virtio-blk-pci,drive=b,id=vd1"]


class Writer:
    """Writes through a virtio-blk device; remembers all of it."""

    def __init__(self, server: Server, device: str) -> None:
        self._server = server
        self._path = f"/machine/peripheral/{device}/virtio-backend"
        self.written: list[Range] = []

    def write(self, offset: int, length: int) -> None:
        line = f'qemu-io -d {self._path} "write -P 7 {offset} {length}"'
        answer = self._server.side("human-monitor-command", command_line=line)
        assert answer == ""  # what it did goes to QEMU's own output
        self.written.append((offset, offset + length))

    @property
    def mark(self) -> int:
        """The present moment, for `since`."""
        return len(self.written)

    def since(self, mark: int, granularity: int) -> list[Range]:
        """What was written since a moment, rounded out."""
        return rounded(self.written[mark:], granularity)


def rounded(ranges: Iterable[Range], granularity: int) -> list[Range]:
    return list(joined(sorted((o // granularity * granularity, -(-e // granularity) * granularity) for o, e in ranges)))


def dirty(server: Server, node: str, bitmaps: Sequence[str]) -> list[Range]:
    """What some bitmaps mark together, read over NBD from a disabled copy: bitmaps that record cannot be exported."""
    infos = [info for info in server.side("query-named-block-nodes", flat=True) if info["node-name"] == node]
    known = {each["name"]: each for info in infos for each in info.get("dirty-bitmaps", ())}
    probe = f"probe{next(_numbers)}"
    finest = min(known[name]["granularity"] for name in bitmaps)
    path = server.folder / "probe.sock"
    add = {"node": node, "name": probe, "disabled": True, "granularity": finest}
    server.side("block-dirty-bitmap-add", **add)
    server.side("block-dirty-bitmap-merge", node=node, target=probe, bitmaps=list(bitmaps))
    server.side("nbd-server-start", addr={"type": "unix", "data": {"path": str(path)}})
    try:
        server.side("block-export-add", type="nbd", id=probe, node_name=node, name=probe, bitmaps=[probe])
        context = f"qemu:dirty-bitmap:{probe}"
        with Client.connect(NbdUri.unix(str(path), probe), contexts=[context]) as client:
            found = client.maps()[context]
    finally:
        server.side("nbd-server-stop")  # waits until the export is gone
    server.side("block-dirty-bitmap-remove", node=node, name=probe)
    return [(extent.offset, extent.end) for extent in found if extent.value]


def bitmaps_of(server: Server, node: str) -> dict[str, dict[str, object]]:
    infos = server.side("query-named-block-nodes", flat=True)
    return {b["name"]: b for i in infos if i["node-name"] == node for b in i.get("dirty-bitmaps", ()) if "name" in b}
