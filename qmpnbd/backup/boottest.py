"""A boot test: a QEMU starts from a backup and must say something on its serial line.

::

    repository   0001/vda.qcow2 <- 0002/vda.qcow2 <- 0003/vda.qcow2        read-only, all of them
                                                          ^
    private directory                              throw-away overlay      what the guest writes goes here
                                                          ^
                                              qemu-system-x86_64, no network, serial line -> us

The overlay is removed afterwards, the backup is not changed. The guest has no network card unless one is asked for: a
copy of a machine that runs must not meet it. QEMU ends with us, also when we are killed; what a killed boot test left
the next one removes.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qmpnbd.deadline import Deadline
from qmpnbd.errors import DeadlineError, UsageError
from qmpnbd.printable import printable
from qmpnbd.qmp.monitor import finish
from qmpnbd.qmp.rundir import RunDirectory
from qmpnbd.qmp.scratch_image import empty_qcow2
from qmpnbd.qmp.storage_daemon import ended, started

SYSTEM = "qemu-system-x86_64"

CONSOLE_BYTES = 4096
"""What is kept of the serial line for the report: its end."""

_LOG_BYTES = 2048
_CHUNK = 65536
_CLUSTER = 65536
_END_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class BootImage:
    """A disk to boot with.

    Attributes:
        path: the backup's image of it.
        size: bytes of the disk.
    """

    path: str
    size: int


@dataclass(frozen=True, slots=True)
class BootOptions:
    """How to boot.

    Attributes:
        marker: what the guest must say on its serial line.
        seconds: how long it may take.
        memory: MiB of memory.
        program: QEMU.
        arguments: further options of QEMU, each an argument: a kernel, firmware, another machine.
        device: the device that each disk becomes; the first one is booted from.
        runtime_dir: where the throw-away overlays are made; None for the folder for temporary files.
    """

    marker: str
    seconds: float = 300.0
    memory: int = 512
    program: str = SYSTEM
    arguments: tuple[str, ...] = ()
    device: str = "virtio-blk-pci"
    runtime_dir: str | None = None


@dataclass(frozen=True, slots=True)
class BootResult:
    """How it went.

    Attributes:
        reached: the marker came.
        why: why it did not; empty if it did.
        console: the end of what the guest said, fit to be shown.
    """

    reached: bool
    why: str
    console: str


async def boot_test(images: Sequence[BootImage], options: BootOptions, deadline: Deadline) -> BootResult:
    """Boots a guest from images, which are not written to, and waits for the marker.

    Args:
        images: the disks; the first one is booted from.
        options: how.
        deadline: for all of it.

    Raises:
        UsageError: there is no such QEMU, the marker is empty, or no overlay can be made.
        DeadlineError: `deadline` passed before the guest's own time was over.
    """
    program = shutil.which(options.program)
    if program is None:
        remedy = "Install QEMU (Debian: qemu-system-x86), or name another program."
        raise UsageError("there is no such program, and nothing boots without it", where=options.program, remedy=remedy)
    if not options.marker:
        raise UsageError("no marker", where="boot test", remedy="Say what the guest prints when it is up.")
    with RunDirectory.create(options.runtime_dir, for_child=True) as directory:
        disks = [
            word
            for number, image in enumerate(images)
            for word in _disk(directory.path / f"disk{number}.qcow2", image, number, options.device)
        ]
        return await _boot(program, disks, directory, options, deadline)


def _disk(overlay: Path, image: BootImage, number: int, device: str) -> list[str]:
    """Makes a throw-away overlay and returns QEMU's options for it."""
    backing = str(Path(image.path).absolute())
    try:
        with overlay.open("xb") as file:
            for offset, data in empty_qcow2(image.size, _CLUSTER, (backing, "qcow2")):
                file.seek(offset)
                file.write(data)
    except (OSError, ValueError) as error:
        raise UsageError(f"no throw-away overlay can be made: {error}", where=str(overlay)) from error
    file_node = {"driver": "file", "filename": str(overlay)}
    node = {"driver": "qcow2", "node-name": f"disk{number}", "discard": "unmap", "file": file_node}
    # A kernel that is given by -kernel takes the boot index 0.
    return ["-blockdev", json.dumps(node), "-device", f"{device},drive=disk{number},bootindex={number + 1}"]


async def _boot(
    program: str, disks: Sequence[str], directory: RunDirectory, options: BootOptions, deadline: Deadline
) -> BootResult:
    ours, its = socket.socketpair()
    log = directory.log_path
    words = ["-nodefaults", "-no-user-config", "-display", "none", "-nic", "none", "-m", str(options.memory)]
    words += ["-no-reboot", "-chardev", f"socket,id=serial,fd={its.fileno()}", "-serial", "chardev:serial"]
    with ours, its, log.open("wb") as output:
        ours.setblocking(False)
        process = await started(program, [*words, *disks, *options.arguments], output, its)
        its.close()
        try:
            return await _listen(ours, options, deadline, log)
        finally:
            await finish(ended(process, _END_SECONDS))


async def _listen(serial: socket.socket, options: BootOptions, deadline: Deadline, log: Path) -> BootResult:
    """Reads the serial line until the marker comes, QEMU ends, or the time is over."""
    wanted, said = options.marker.encode(), bytearray()
    own = deadline.within(options.seconds)
    loop = asyncio.get_running_loop()
    kept = max(CONSOLE_BYTES, len(wanted))
    why = f"no such words on the serial line within {options.seconds:g} s"
    try:
        while True:
            async with asyncio.timeout(own.remaining("the guest to boot", "boot test")):
                chunk = await loop.sock_recv(serial, _CHUNK)
            if not chunk:
                why = f"QEMU ended before: {_end_of(log)}"
                break
            said += chunk
            if wanted in said:
                return BootResult(True, "", _shown(said))
            del said[:-kept]
    except (TimeoutError, DeadlineError):
        deadline.check("the guest to boot", "boot test")  # that the time of the whole is over is no fault of the guest
    except ConnectionError:
        why = f"QEMU ended before: {_end_of(log)}"
    return BootResult(False, why, _shown(said))


def _shown(said: bytearray) -> str:
    text = said[-CONSOLE_BYTES:].decode("utf-8", "replace")
    return "\n".join(printable(line.rstrip("\r")) for line in text.split("\n"))


def _end_of(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _LOG_BYTES))
        text = file.read(_LOG_BYTES).decode("utf-8", "replace")
    lines = [line for line in text.splitlines() if line.strip()]
    return printable(lines[-1]) if lines else "it said nothing"
