"""Machines for tools that back up running guests: one of QEMU alone, one of libvirt's. Their processors stand still.

The devices are made to write over the human monitor, as `tests.instants` does it, through whatever a tool has put
below them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.libvirt_session import Session, session
from tests.qemu_versions import installed
from tests.servers import Server, blockdev, qemu_img, tool, wait_until

SIZE = 8 << 20


def content(image: Path) -> bytes:
    """Reads an image by qemu-img, whatever its format."""
    raw = image.with_name("read.raw")
    qemu_img("convert", "-U", "-O", "raw", image, raw)
    found = raw.read_bytes()
    raw.unlink()
    return found


class Machine(ABC):
    """A machine.

    Attributes:
        images: of its disks.
        monitor: the address of its monitor, for those who use one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images: list[Path] = []
        self.monitor = ""

    @abstractmethod
    def start(self) -> None:
        """Starts it."""

    @abstractmethod
    def stop(self) -> None:
        """Ends it in order."""

    @abstractmethod
    def kill(self) -> None:
        """Has QEMU die."""

    @abstractmethod
    def command(self, line: str) -> str:
        """Says something to the human monitor."""

    @abstractmethod
    def query(self, command: str) -> Any:
        """Says something to the monitor and returns the answer."""

    def present(self) -> set[str]:
        """Returns the jobs and the nodes in QEMU."""
        nodes = {node["node-name"] for node in self.query("query-named-block-nodes")}
        return nodes | {job["id"] for job in self.query("query-jobs")}

    def target(self, disk: int) -> str:
        """Returns libvirt's name of a disk."""
        return f"vd{'abc'[disk]}"

    def device(self, disk: int) -> str:
        """Returns the QOM path of a disk's device."""
        return f"/machine/peripheral/vd{disk}/virtio-backend"

    def write(self, disk: int, *each: str) -> None:
        """Writes as the device does."""
        for words in each:
            self.command(f'qemu-io -d {self.device(disk)} "{words}"')

    def more(self) -> None:
        """Gives it another disk, from the next start on."""
        path = self.folder / f"d{len(self.images)}.qcow2"
        qemu_img("create", "-q", "-f", "qcow2", path, str(SIZE))
        self.images.append(path)

    def content(self, disk: int) -> bytes:
        """Reads a disk as it is now, from a copy; nobody writes meanwhile."""
        self.write(disk, "flush")
        copy = self.folder / "copy.qcow2"
        shutil.copy(self.images[disk], copy)
        return content(copy)


class QemuMachine(Machine):
    """A QEMU that nobody manages."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._stack = ExitStack()
        self._server: Server | None = None
        for _ in range(2):
            self.more()

    @property
    def server(self) -> Server:
        """The QEMU that runs."""
        assert self._server is not None
        return self._server

    def start(self) -> None:
        words = []
        for number, image in enumerate(self.images):
            words += ["-blockdev", blockdev(image, f"disk{number}")]
            words += ["-device", f"virtio-blk-pci,id=vd{number},drive=disk{number}"]
        self._server = self._stack.enter_context(installed().qemu(*words))
        self.monitor = str(self._server.qmp)

    def stop(self) -> None:
        self.server.side("quit")
        self.close()

    def kill(self) -> None:
        os.kill(self.server.pid, signal.SIGKILL)
        self.close()

    def close(self) -> None:
        """Ends it in any case."""
        self._stack.close()

    def command(self, line: str) -> str:
        return str(self.server.side("human-monitor-command", command_line=line))

    def query(self, command: str) -> Any:
        return self.server.side(command)


class Domain(Machine):
    """A domain of a libvirt session.

    Attributes:
        reaching: the options that name the session; a user is asked for wherever the socket is named, and not used.
    """

    name = "peer"

    def __init__(self, folder: Path, libvirtd: Session) -> None:
        super().__init__(folder)
        self.reaching = ["-U", libvirtd.uri, "--user", "anybody", "--password", "any"]
        self._session = libvirtd
        self._domain: Any = None
        self._uuid = uuid.uuid4()
        self._connection = libvirtd.libvirt.open(libvirtd.uri)
        for _ in range(2):
            self.more()
        os.chmod(folder, 0o777)  # noqa: PTH101 - libvirt's user, too

    def more(self) -> None:
        self.images.append(self._session.image(f"d{len(self.images)}.qcow2"))

    def start(self) -> None:
        disks = "".join(
            f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{image}'/>"
            f"<target dev='{self.target(number)}' bus='virtio'/><alias name='ua-vd{number}'/></disk>"
            for number, image in enumerate(self.images)
        )
        xml = (
            f"<domain type='qemu'><name>{self.name}</name><uuid>{self._uuid}</uuid><memory unit='MiB'>32</memory>"
            f"<os><type arch='x86_64' machine='pc'>hvm</type></os><devices>"
            f"<emulator>{tool('qemu-system-x86_64')}</emulator>{disks}<memballoon model='none'/></devices></domain>"
        )
        self._domain = self._connection.defineXML(xml)
        self._domain.createWithFlags(self._session.libvirt.VIR_DOMAIN_START_PAUSED)

    @property
    def domain(self) -> Any:
        """libvirt's own object."""
        assert self._domain is not None
        return self._domain

    def device(self, disk: int) -> str:
        return f"/machine/peripheral/ua-vd{disk}/virtio-backend"

    def stop(self) -> None:
        self.domain.destroyFlags(self._session.libvirt.VIR_DOMAIN_DESTROY_GRACEFUL)

    def kill(self) -> None:
        (path,) = self._session.folder.rglob(f"{self.name}.pid")
        os.kill(int(path.read_text()), signal.SIGKILL)
        wait_until(lambda: not self.domain.isActive(), "libvirt to notice")

    def command(self, line: str) -> str:
        return self._say(line, human=True)

    def query(self, command: str) -> Any:
        return json.loads(self._say(json.dumps({"execute": command}), human=False))["return"]

    def _say(self, line: str, *, human: bool) -> str:
        qemu = import_module("libvirt_qemu")
        return str(qemu.qemuMonitorCommand(self.domain, line, int(human)))  # VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP is 1

    def close(self) -> None:
        """Ends it in any case."""
        with contextlib.suppress(self._session.libvirt.libvirtError):
            self.domain.destroy()
        self._connection.close()
        time.sleep(0.1)


@contextlib.contextmanager
def qemu_machine(folder: Path) -> Iterator[QemuMachine]:
    """Runs a QEMU with two disks."""
    machine = QemuMachine(folder)
    try:
        machine.start()
        yield machine
    finally:
        machine.close()


@contextlib.contextmanager
def libvirt_machine(folder: Path) -> Iterator[Domain]:
    """Runs a libvirt session with a domain of two disks."""
    with pytest.MonkeyPatch.context() as patch, session(patch) as libvirtd:
        machine = Domain(folder, libvirtd)
        try:
            machine.start()
            yield machine
        finally:
            machine.close()
