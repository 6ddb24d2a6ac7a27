"""A machine with two disks that a test writes to at will, through the very devices, and knows at every moment.

No guest is needed for that: QEMU's human monitor has qemu-io, and with ``-d`` it writes as the device does, through
whatever filters lie below it.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qmpnbd.extents import ExtentMap
from qmpnbd.images.files import open_chain
from tests.qemu_versions import QemuBinaries
from tests.servers import Server, blockdev

SIZE = 8 << 20
UNIT = 65536
WRITES = ("write -P {value} {offset} {length}", "write -z {offset} {length}", "write -z -u {offset} {length}")
DISCARDS = ("discard {offset} {length}",)


def commands(seed: int, count: int, kinds: Sequence[str] = WRITES) -> list[str]:
    """Returns qemu-io commands at places that need not be clusters."""
    chance = random.Random(seed)
    found = []
    for _ in range(count):
        offset = chance.randrange(SIZE // 4096) * 4096
        length = min(chance.choice((4096, 65536, 131072, 200704)), SIZE - offset)
        found.append(chance.choice(kinds).format(value=chance.randrange(1, 256), offset=offset, length=length))
    return found


def build_chain(binaries: QemuBinaries, folder: Path, name: str, seed: int, *, layers: int = 3) -> Path:
    """Makes a chain of qcow2 layers, each holding something; returns the active one."""
    below: Path | None = None
    for number in range(layers):
        path = folder / f"{name}-{number}.qcow2"
        backing = ["-b", str(below), "-F", "qcow2"] if below else []
        command = [binaries.img, "create", "-q", "-f", "qcow2", *backing, str(path), str(SIZE)]
        subprocess.run(command, check=True, timeout=60)
        options = [part for each in commands(seed * 10 + number, 12) for part in ("-c", each)]
        subprocess.run([binaries.io, "-f", "qcow2", *options, str(path)], check=True, capture_output=True, timeout=60)
        below = path
    assert below is not None
    return below


def write_line(disk: int, command: str) -> str:
    """Returns the human monitor's line that has a disk's device write."""
    return f'qemu-io -d /machine/peripheral/vd{disk}/virtio-backend "{command}"'


@dataclass(frozen=True)
class Truth:
    """What a disk was at one moment, by an own reading of a copy of its files."""

    content: bytes
    depth: ExtentMap


@dataclass
class Machine:
    """A QEMU with disks ``vd0``, ``vd1``, … on the nodes ``disk0``, ``disk1``, …"""

    server: Server
    folder: Path
    images: tuple[Path, ...]

    @property
    def disks(self) -> list[str]:
        return [f"vd{number}" for number in range(len(self.images))]

    def write(self, disk: int, *each: str) -> None:
        """Writes as the device does."""
        for command in each:
            answer = self.server.side("human-monitor-command", command_line=write_line(disk, command))
            assert answer.strip() == "", answer

    def truth(self) -> list[Truth]:
        """Reads all disks as they are now; nobody may write meanwhile."""
        found = []
        for number, image in enumerate(self.images):
            self.write(number, "flush")
            copy = self.folder / f"copy-{number}-{image.name}"
            shutil.copy(image, copy)
            with open_chain(str(copy), format="qcow2") as chain:
                found.append(Truth(bytes(chain.read(0, SIZE)), chain.allocation_depth()))
        return found

    def state(self) -> object:
        """Everything in QEMU that a point in time could change, and must not have changed in the end."""
        side = self.server.side
        graph = side("x-debug-query-block-graph")
        names = {vertex["id"]: vertex["name"] for vertex in graph["nodes"]}
        edges = sorted((names[edge["parent"]], edge["name"], names[edge["child"]]) for edge in graph["edges"])
        nodes = [
            (
                node["node-name"],
                node["file"],
                node["ro"],
                [bitmap.get("name") for bitmap in node.get("dirty-bitmaps", ())],
            )
            for node in side("query-named-block-nodes", flat=True)
        ]
        drives = [(drive["qdev"], drive["inserted"]["node-name"]) for drive in side("query-block")]
        jobs = [job["id"] for job in side("query-jobs")]
        exports = sorted(export["id"] for export in side("query-block-exports"))
        objects = sorted(each["name"] for each in side("qom-list", path="/objects"))
        files = sorted(path.name for path in self.folder.iterdir() if path.name.startswith("qmpnbd-"))
        guest = side("query-status")["status"]
        return edges, sorted(nodes), drives, jobs, exports, objects, files, guest, self.server.nbd_server_runs()


@contextlib.contextmanager
def machine(
    binaries: QemuBinaries,
    folder: Path,
    *arguments: str,
    disks: int = 2,
    discard: str = "ignore",
    layers: int = 3,
    device: str = "",
) -> Iterator[Machine]:
    """Runs a machine whose processor stands still, with `disks` chains of `layers` qcow2 layers.

    Args:
        binaries: which QEMU.
        folder: for the images.
        arguments: more for QEMU.
        disks: how many.
        discard: what the disks do with discards.
        layers: of each chain.
        device: more options of each device, with a comma before.
    """
    images = tuple(build_chain(binaries, folder, f"d{number}", number, layers=layers) for number in range(disks))
    with machine_on(binaries, folder, images, *arguments, discard=discard, device=device) as running:
        yield running


@contextlib.contextmanager
def machine_on(
    binaries: QemuBinaries,
    folder: Path,
    images: Sequence[Path],
    *arguments: str,
    discard: str = "ignore",
    device: str = "",
) -> Iterator[Machine]:
    """Runs such a machine on images that are there; a name that ends in raw is a raw one."""
    devices = []
    for number, image in enumerate(images):
        driver = image.suffix.removeprefix(".")
        devices += ["-blockdev", blockdev(image, f"disk{number}", driver, discard=discard)]
        devices += ["-device", f"virtio-blk-pci,id=vd{number},drive=disk{number}{device}"]
    with binaries.qemu(*arguments, *devices) as server:
        yield Machine(server, folder, tuple(images))
