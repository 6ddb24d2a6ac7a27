"""From the connection to QEMU's monitor until an NBD client has read from the export. Prints Markdown."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from measure import ROUNDS

from qmpnbd.deadline import Deadline
from qmpnbd.export.blocking import exporting
from qmpnbd.nbd.client import Client
from tests.servers import blockdev, qemu


def up_and_down(monitor: str) -> tuple[float, float]:
    """Returns the seconds until a client has read, and those that taking down took."""
    started = time.monotonic()
    with exporting(monitor, ["vd0"]) as session:
        with Client.connect(session.exports[0].uri, deadline=Deadline(10)) as client:
            client.read(0, 4096)
        answered = time.monotonic()
    return answered - started, time.monotonic() - answered


def main() -> None:
    """Times one disk of a guest; the first round does not count."""
    with tempfile.TemporaryDirectory() as folder:
        disk = Path(folder, "disk.qcow2")
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), "1T"], check=True)
        with qemu("-blockdev", blockdev(disk, "n"), "-device", "virtio-blk-pci,id=vd0,drive=n") as server:
            rounds = [up_and_down(str(server.qmp)) for _ in range(ROUNDS + 1)][1:]
    up, down = (statistics.median(times) * 1000 for times in zip(*rounds, strict=True))
    print("**Export of one disk**\n\n| | ms |\n|---|---|")
    print(f"| connected, exported, first 4 KiB read | {up:.0f} |\n| taken down | {down:.0f} |")


if __name__ == "__main__":
    main()
