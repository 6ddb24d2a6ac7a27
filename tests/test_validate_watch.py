"""What is written while a disk is judged is told without a bitmap of the guest's nodes ever being in use."""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from qmpnbd.extents import ExtentMap
from qmpnbd.validate import watch as watching
from qmpnbd.validate.choice import Choice
from qmpnbd.validate.run import Options, validate
from qmpnbd.validate.window import Place, Window, open_window
from tests.qemu_versions import QemuBinaries, each_qemu
from tests.servers import Server, blockdev, tool, wait_until
from tests.test_cli import qmpnbd
from tests.test_validate_live import one, overlay, reading

pytestmark = pytest.mark.real

WHOLE = Choice(content="whole")


def export_guest(server: Server, folder: Path) -> None:
    server.side("nbd-server-start", addr={"type": "unix", "data": {"path": f"{folder}/guest"}})
    server.side("block-export-add", type="nbd", id="guest", node_name="top", name="guest", writable=True)


def qemu_io_words(folder: Path, *offsets: str) -> list[str]:
    """The command that writes clusters of 64 KiB as a guest does."""
    commands = [word for offset in offsets for word in ("-c", f"write -P 9 {offset} 64k")]
    return [tool("qemu-io"), "-f", "raw", *commands, f"nbd+unix:///guest?socket={folder}/guest"]


def write(folder: Path, *offsets: str) -> None:
    subprocess.run(qemu_io_words(folder, *offsets), check=True, capture_output=True, timeout=60)


def committed(server: Server, over: str, below: str) -> None:
    """Commits an overlay and takes it away, as whoever manages the disk does."""
    side = server.side
    side("block-commit", job_id="commit", device=over, top_node=over, base_node=below)
    wait_until(lambda: any(job["status"] == "ready" for job in side("query-jobs")), "the commit to be ready")
    side("job-complete", id="commit")
    wait_until(lambda: not side("query-jobs"), "the commit to end")
    side("blockdev-del", node_name=over)


@each_qemu
@pytest.mark.parametrize("moment", ["recording", "read"])
def test_a_watched_layer_that_is_committed_and_deleted_does_not_take_qemu_with_it(
    binaries: QemuBinaries, copies: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """QEMU aborts when a node goes of which a bitmap is exported; no guest may die of being looked at."""
    uri = f"nbd+unix:///?socket={copies}/guest"
    done: list[str] = []

    def meanwhile(count: int) -> None:
        if not count:
            write(copies, "1M")
            if moment == "recording":
                commit()

    def commit() -> None:
        if not done:
            done.append(moment)
            committed(server, "over", "top")

    async def opened(place: Place, stack: AsyncExitStack, *more: object) -> Window:
        window = await open_window(place, stack, *more)  # type: ignore[arg-type]
        if moment == "read":
            commit()
        return window

    with binaries.daemon("--blockdev", blockdev(copies / "top.qcow2", "top", discard="unmap")) as server:
        export_guest(server, copies)
        overlay(server, copies, "over")
        monkeypatch.setattr(watching, "open_window", opened)
        with reading(monkeypatch, meanwhile):
            disk = one(validate(str(server.qmp), ["over"], Options(nbd=uri, choice=WHOLE)))
        assert done == [moment]
        assert (disk.verdict, disk.discrepancy_count) == ("agreed", 0), disk
        assert server.exports() == ["guest"]
        assert [each for each in server.nodes() if each.startswith("qmpnbd")] == []


DYING = """
import os, signal, subprocess, sys
from qmpnbd.qmp.monitor import Monitor
from qmpnbd.validate import live
from qmpnbd.validate.choice import Choice
from qmpnbd.validate.run import Options, validate

monitor, folder, after, *write = sys.argv[1:]
left, execute, read_chain = int(after), Monitor.execute, live.read_chain

async def mortal(self, command, *given, **more):
    global left
    reply = await execute(self, command, *given, **more)
    left -= left < int(after) or command == "blockdev-add"
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return reply

def read(*given):
    subprocess.run(write, check=True, stdout=subprocess.DEVNULL)
    return read_chain(*given)

Monitor.execute, live.read_chain = mortal, read
validate(monitor, ["top"], Options(nbd=f"nbd+unix:///?socket={folder}/guest", runtime_dir=folder))
"""
"""A validation that dies after so many commands, from the first on that copies what was recorded."""


@each_qemu
def test_what_a_killed_run_leaves_of_a_copy_is_taken_down(binaries: QemuBinaries, copies: Path) -> None:
    """After each command: node, bitmap, merge, no more recording, export, and what follows."""
    with binaries.daemon("--blockdev", blockdev(copies / "top.qcow2", "top", discard="unmap")) as server:
        export_guest(server, copies)
        nodes = server.nodes()
        found = set()
        for after in range(1, 8):
            words = [
                sys.executable,
                "-c",
                DYING,
                str(server.qmp),
                str(copies),
                str(after),
                *qemu_io_words(copies, "1M"),
            ]
            done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=60)
            assert done.returncode == -signal.SIGKILL, done.stderr
            found |= {each for each in server.nodes() if each not in nodes}
            qmpnbd("recover", "--qmp", server.qmp, "--runtime-dir", copies)
            assert (server.nodes(), server.exports()) == (nodes, ["guest"]), after
            listed = server.side("query-named-block-nodes", flat=True)
            assert [node["node-name"] for node in listed if node.get("dirty-bitmaps")] == [], after
        assert len(found) == 7


@each_qemu
def test_what_was_written_is_told_of_every_layer(
    binaries: QemuBinaries, copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing else, whatever the granularity of the bitmaps is."""
    seen: list[ExtentMap] = []
    touched = watching.Watch.touched

    async def noted(watch: watching.Watch, size: int) -> ExtentMap:
        seen.append(await touched(watch, size))
        return seen[-1]

    def meanwhile(count: int) -> None:
        if not count:
            write(copies, "0", "3M")

    monkeypatch.setattr(watching.Watch, "touched", noted)
    with binaries.daemon("--blockdev", blockdev(copies / "top.qcow2", "top", discard="unmap")) as server:
        export_guest(server, copies)
        with reading(monkeypatch, meanwhile):
            validate(str(server.qmp), ["top"], Options(nbd=f"nbd+unix:///?socket={copies}/guest", choice=WHOLE))
    dirty = [(each.offset, each.end) for each in seen[0] if each.value]
    assert dirty == [(0, 65536), (3 << 20, (3 << 20) + 65536)]
