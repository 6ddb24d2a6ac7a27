"""A machine whose guest never rests: its disks are written to through exports of them, by numbered operations.

Its processor stands still; what a guest is to a backup, requests to its disks at any moment, comes over NBD. The disks
are those of devices all the same (`share-rw` lets two write), so that they are found, grown and swapped as a guest's.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from qmpnbd.deadline import Deadline
from qmpnbd.errors import NbdError
from qmpnbd.nbd.client import Client
from qmpnbd.nbd.uri import NbdUri
from tests.backup_record import Operation, Replay, operation
from tests.qemu_versions import QemuBinaries
from tests.servers import Server, blockdev, qemu_img, wait_until

SIZE = 24 << 20
SOON = Deadline(None)


def raw_content(image: Path) -> bytes:
    """Reads an image that nobody has open, by qemu-img alone."""
    raw = image.with_name(f"read-{image.name}")
    qemu_img("convert", "-f", driver_of(image), "-O", "raw", image, raw)
    found = raw.read_bytes()
    raw.unlink()
    return found


def driver_of(image: Path) -> str:
    """Returns QEMU's format driver of an image: its suffix."""
    return image.suffix.removeprefix(".")


class Writer(threading.Thread):
    """Makes one operation after the other, whatever the disk.

    Attributes:
        acknowledged: number of the last operation that is done.
        issued: number of the last operation that may be done.
        error: why it ended, if it was not told to.
    """

    def __init__(self, disks: Sequence[NbdUri], sizes: Sequence[int], after: int, seconds_each: float) -> None:
        super().__init__(daemon=True)
        self.acknowledged = self.issued = after
        self.error: NbdError | None = None
        self._ending = threading.Event()
        self._disks, self._sizes = list(disks), list(sizes)
        self._pause = seconds_each

    def run(self) -> None:
        """Writes until it is told to end, or the machine dies."""
        with ExitStack() as stack:
            try:
                clients = [stack.enter_context(Client.connect(each, deadline=Deadline(20))) for each in self._disks]
                while not self._ending.is_set():
                    self._do(clients, operation(self.issued + 1, self._sizes))
                    self._ending.wait(self._pause)
                for client in clients:
                    client.flush(Deadline(20))
            except NbdError as error:
                self.error = error

    def _do(self, clients: Sequence[Client], what: Operation) -> None:
        client = clients[what.disk]
        self.issued = what.number
        if what.kind == "write":
            client.write(what.offset, what.data(), deadline=Deadline(20))
        else:
            client.write_zeroes(what.offset, what.length, no_hole=what.kind == "zero", deadline=Deadline(20))
        self.acknowledged = what.number

    def end(self) -> None:
        """Has it come to its end."""
        self._ending.set()
        self.join(30)
        assert not self.is_alive(), "the guest hangs"


class Guest:
    """The machine, from one start to the next.

    Attributes:
        images: of its disks ``vd0``, ``vd1``, …, by the suffix that names their format.
        replay: the record, moved on by whoever compares.
    """

    def __init__(self, binaries: QemuBinaries, folder: Path, images: Sequence[Path], seconds_each: float) -> None:
        self.images = list(images)
        self.replay = Replay([raw_content(each) for each in images], 0)
        self._binaries, self._folder = binaries, folder
        self._stack = ExitStack()
        self._seconds_each = seconds_each
        self._server: Server | None = None
        self._writer: Writer | None = None

    @property
    def server(self) -> Server:
        """The QEMU that runs."""
        assert self._server is not None, "the machine is off"
        return self._server

    @property
    def writer(self) -> Writer:
        """The one that writes."""
        assert self._writer is not None, "the machine is off"
        return self._writer

    @property
    def disks(self) -> list[str]:
        """Names of the disks."""
        return [f"vd{number}" for number in range(len(self.images))]

    @property
    def nbd(self) -> Path:
        """The socket of QEMU's NBD server, which is the guest's way to its disks."""
        return self.server.folder / "guest.sock"

    def start(self) -> None:
        """Starts it; the guest goes on with the operation after the last one that is on its disks."""
        words = []
        for number, image in enumerate(self.images):
            words += ["-blockdev", blockdev(image, f"disk{number}", driver_of(image), discard="unmap")]
            words += ["-device", f"virtio-blk-pci,id=vd{number},drive=disk{number},share-rw=on"]
        self._server = self._stack.enter_context(self._binaries.qemu(*words))
        self.server.side("nbd-server-start", addr={"type": "unix", "data": {"path": str(self.nbd)}})
        self._write(range(len(self.images)))

    def _write(self, new: Sequence[int]) -> None:
        for number in new:
            more = {"node_name": f"disk{number}", "name": f"vd{number}", "writable": True}
            self.server.side("block-export-add", type="nbd", id=f"guest{number}", **more)
        uris = [NbdUri.unix(str(self.nbd), name) for name in self.disks]
        self._writer = Writer(uris, self.replay.sizes, self.replay.number, self._seconds_each)
        self._writer.start()
        self.go_on()

    def add(self, image: Path) -> None:
        """Plugs in a disk while the machine runs."""
        number = len(self.images)
        content = raw_content(image)
        self.rest()
        self.replay = Replay([*map(bytes, self.replay.contents), content], self.replay.number)
        self.images.append(image)
        file = {"driver": "file", "filename": str(image)}
        node = {"driver": driver_of(image), "node_name": f"disk{number}", "discard": "unmap", "file": file}
        self.server.side("blockdev-add", **node)
        device = {"driver": "virtio-blk-pci", "id": f"vd{number}", "drive": f"disk{number}", "share_rw": True}
        self.server.side("device_add", **device)
        self._write([number])

    def rest(self) -> None:
        """Has the guest stop writing; the record is that of the disks then."""
        self.writer.end()
        assert self.writer.error is None, f"the guest was hurt: {self.writer.error}"
        self.replay.reach(self.writer.acknowledged)

    def go_on(self, more: int = 5) -> None:
        """Waits until the guest has done some more operations."""
        begin = self.writer.acknowledged
        wait_until(lambda: self.writer.acknowledged >= begin + more or not self.writer.is_alive(), "the guest")
        assert self.writer.error is None, f"the guest was hurt: {self.writer.error}"

    def stop(self) -> None:
        """Ends it as an administrator does; what is on the disks then must be what the record says."""
        self.rest()
        self.server.side("quit")
        self._ended()
        found = [raw_content(each) for each in self.images]
        assert [bytes(each) for each in self.replay.contents] == found, self.replay.explain(found)

    def changed(self) -> None:
        """Takes note that the images were changed while the machine was off."""
        self.replay = Replay([raw_content(each) for each in self.images], self.replay.number)

    def kill(self) -> None:
        """Has QEMU die; what its disks hold after that is read from them, since nobody had flushed them."""
        os.kill(self.server.pid, signal.SIGKILL)
        wait_until(lambda: not self.writer.is_alive(), "the guest to notice")
        last = self.writer.issued
        self._ended()
        self.replay = Replay([raw_content(each) for each in self.images], last)

    def _ended(self) -> None:
        self._stack.close()
        self._server = self._writer = None

    def close(self) -> None:
        """Ends it in any case."""
        if self._writer is not None:
            self._writer.end()
        self._ended()


def steadily(guest: Guest, seconds: float) -> None:
    """Lets the guest write for a while."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        guest.go_on(1)
