"""Backups of real machines whose guest never rests, and an own record of what the guest had written at every moment.

The guest writes numbered records to its disks by turns, one after the other, over writable exports of its nodes. So
whatever is restored must be the state after exactly one of its records, on all disks the same: which one is found out
from the content, and every byte is compared.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import struct
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qmpnbd.backup.backups import Backup
from qmpnbd.backup.begin import BeginOptions
from qmpnbd.backup.plan import Wish
from qmpnbd.backup.repository import Repository
from qmpnbd.backup.run import BackedUp, BackupOptions, back_up
from qmpnbd.nbd.client import Client
from qmpnbd.nbd.uri import NbdUri
from qmpnbd.qmp.planning import Wishes
from tests.instants import SIZE, build_chain
from tests.qemu_versions import QemuBinaries
from tests.servers import Server, blockdev, wait_until

CHAIN = "nightly"
RECORD = 4096
KINDS = ("data", "data", "data", "zero")


@dataclass
class Record:
    """Something the guest wrote: `number` all over the range, or zeroes."""

    disk: int
    offset: int
    length: int
    content: bytes


@dataclass
class Guest:
    """The guest's own record.

    Attributes:
        first: what the disks held before.
        records: what it wrote since, in order; the last one may be under way.
    """

    first: list[bytes]
    records: list[Record] = field(default_factory=list)

    def moment(self, disks: Sequence[bytes]) -> int:
        """Returns after how many records the disks were as given; fails if they never were."""
        now = [bytearray(each) for each in self.first]
        count = self._newest(disks)
        for record in self.records[:count]:
            self._apply(now, record)
        while [bytes(each) for each in now] != list(disks):
            assert count < len(self.records), f"the disks never held this, not after record {self._newest(disks)}"
            assert not any(self.records[count].content), "the disks hold the records of no one moment"
            self._apply(now, self.records[count])
            count += 1
        return count

    def _newest(self, disks: Sequence[bytes]) -> int:
        """Returns the highest number of a record that can still be seen."""
        starts = {(each.disk, each.offset) for each in self.records}
        seen = (struct.unpack_from("<QQ", disks[disk], offset) for disk, offset in starts)
        return max((number for magic, number in seen if magic == _MAGIC and number <= len(self.records)), default=0)

    @staticmethod
    def _apply(now: list[bytearray], record: Record) -> None:
        now[record.disk][record.offset : record.offset + record.length] = record.content


_MAGIC = 0x6472_6F63_6572_0A0A


def record_content(number: int, length: int) -> bytes:
    return struct.pack("<QQ", _MAGIC, number) * (length // 16)


@contextlib.contextmanager
def restless(machine: BackupMachine, seed: int = 1) -> Iterator[Guest]:
    """A guest that writes all the time, until the end of the context."""
    guest = Guest(machine.contents())
    stop = threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        chance = random.Random(seed)
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(Client.connect(uri)) for uri in machine.guest_uris()]
            while not stop.is_set():
                disk, kind = chance.randrange(len(clients)), chance.choice(KINDS)
                length = chance.choice((1, 1, 16, 40)) * RECORD
                offset = chance.randrange((SIZE - length) // RECORD) * RECORD
                number = len(guest.records) + 1
                content = bytes(length) if kind == "zero" else record_content(number, length)
                guest.records.append(Record(disk, offset, length, content))
                if kind == "zero":
                    clients[disk].write_zeroes(offset, length)
                else:
                    clients[disk].write(offset, content)

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    try:
        yield guest
    finally:
        stop.set()
        thread.join(30)
        assert not thread.is_alive()
    assert not failures, failures


@dataclass
class BackupMachine:
    """A QEMU with disks ``vd0``, ``vd1``, … and an NBD server, in which the guest's own exports are.

    Attributes:
        server: the QEMU.
        binaries: its release.
        folder: where everything is.
        repository: the backups.
        disks: names of the disks.
        writable: those that the guest may write.
    """

    server: Server
    binaries: QemuBinaries
    folder: Path
    repository: Repository
    disks: list[str]
    writable: list[str]

    @property
    def socket(self) -> Path:
        return self.server.folder / "guest.sock"

    def serve(self) -> None:
        """Starts the NBD server and exports the disks' nodes for the guest."""
        self.server.side("nbd-server-start", addr={"type": "unix", "data": {"path": str(self.socket)}})
        for name in self.disks:
            self._export(name)

    def _export(self, name: str) -> None:
        node, export, writable = f"n-{name}", f"guest-{name}", name in self.writable
        self.server.side("block-export-add", type="nbd", id=export, name=export, node_name=node, writable=writable)

    def resize(self, name: str, size: int) -> None:
        """Resizes a disk, which QEMU refuses while it is exported."""
        self.server.side("block-export-del", id=f"guest-{name}", mode="hard")
        wait_until(lambda: f"guest-{name}" not in self.server.exports(), "the end of the export")
        self.server.side("block_resize", node_name=f"n-{name}", size=size)
        self._export(name)

    def guest_uris(self) -> list[NbdUri]:
        return [NbdUri.unix(str(self.socket), f"guest-{name}") for name in self.disks]

    def write(self, disk: str, offset: int, data: bytes) -> None:
        """Writes as the guest does."""
        with Client.connect(NbdUri.unix(str(self.socket), f"guest-{disk}")) as client:
            if any(data):
                client.write(offset, data)
            else:
                client.write_zeroes(offset, len(data))

    def contents(self) -> list[bytes]:
        """Returns what the disks hold now."""
        found = []
        for uri in self.guest_uris():
            with Client.connect(uri) as client:
                found.append(bytes(client.read(0, client.export.size)))
        return found

    def options(self, wish: Wish | None = None, *, granularity: int | None = None, **more: Any) -> BackupOptions:
        begin = BeginOptions(
            wish=wish or Wish(),
            granularity=granularity,
            instant=Wishes(depth=False, scratch_dir=str(self.folder)),
            nbd=str(NbdUri.unix(str(self.socket), "")),
            runtime_dir=str(self.folder),
        )
        return BackupOptions(begin=begin, **more)

    def back_up(self, wish: Wish | None = None, disks: Sequence[str] = (), **more: Any) -> BackedUp:
        options = self.options(wish, **more)
        return asyncio.run(back_up(str(self.server.qmp), self.repository.path, CHAIN, disks, options))

    def restored(self, backup: Backup, disk: str) -> bytes:
        """Returns a disk of a backup as QEMU's own tool reads it."""
        return restored(self.binaries, backup.image(disk), self.folder)

    def restored_disks(self, backup: Backup) -> list[bytes]:
        return [self.restored(backup, name) for name in self.disks]

    def is_right(self, backup: Backup, contents: Sequence[bytes] | None = None) -> bool:
        """Whether a backup holds what the disks hold now, or held then; nobody may write meanwhile."""
        return self.restored_disks(backup) == list(contents if contents is not None else self.contents())

    def left(self) -> list[str]:
        """What is in QEMU that is neither the guest's nor a checkpoint; names."""
        side = self.server.side
        nodes = side("query-named-block-nodes", flat=True)
        names = [node["node-name"] for node in nodes]
        names += [b["name"] for node in nodes for b in node.get("dirty-bitmaps", ()) if "name" in b]
        names += [job["id"] for job in side("query-jobs")]
        names += self.server.exports()
        names += [each["name"] for each in side("qom-list", path="/objects")]
        return sorted(name for name in names if name.startswith("qmpnbd-"))

    def checkpoints(self) -> dict[str, list[str]]:
        """Returns the names of the checkpoints' bitmaps on each disk."""
        nodes = self.server.side("query-named-block-nodes", flat=True)
        found = {node["node-name"]: node.get("dirty-bitmaps", ()) for node in nodes}
        return {
            name: sorted(b["name"] for b in found[f"n-{name}"] if b.get("name", "").startswith("qmpnbd."))
            for name in self.disks
        }


def restored(binaries: QemuBinaries, image: Path, folder: Path) -> bytes:
    """Returns what an image and its backing chain hold as QEMU's own tool reads them; the image must be in order."""
    out = folder / "restored.raw"
    subprocess.run([binaries.img, "check", "-q", image], check=True, timeout=60)
    subprocess.run([binaries.img, "convert", "-O", "raw", image, out], check=True, timeout=60)
    return out.read_bytes()


def new_images(binaries: QemuBinaries, folder: Path, count: int = 2) -> dict[str, Path]:
    """Makes the images of disks ``vd0``, …, each a chain of three layers."""
    return {f"vd{n}": build_chain(binaries, folder, f"d{n}", n) for n in range(count)}


@contextlib.contextmanager
def running(
    binaries: QemuBinaries,
    folder: Path,
    images: Mapping[str, Path | str],
    *arguments: str,
    writable: Sequence[str] | None = None,
) -> Iterator[BackupMachine]:
    """Runs a QEMU on images by the names of their disks; a value that begins with ``{`` is a whole ``-blockdev``.

    The repository outlasts it.
    """
    where = folder / "repository"
    repository = Repository.open(where) if where.exists() else Repository.create(where)
    devices: list[str] = []
    for name, image in images.items():
        node = image if isinstance(image, str) else blockdev(image, f"n-{name}", discard="unmap")
        devices += ["-blockdev", node, "-device", f"virtio-blk-pci,id={name},drive=n-{name},share-rw=on"]
    with binaries.qemu(*devices, *arguments) as server:
        disks = list(images)
        machine = BackupMachine(
            server, binaries, folder, repository, disks, disks if writable is None else list(writable)
        )
        machine.serve()
        yield machine


def quit_in_order(machine: BackupMachine) -> None:
    """Ends QEMU as an administrator does, so that it stores its bitmaps."""
    with contextlib.suppress(ValueError, ConnectionError):  # it may end before it answers
        machine.server.side("quit")
