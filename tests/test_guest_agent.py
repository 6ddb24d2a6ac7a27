"""A real guest agent in a real guest: its filesystem stands still while frozen, and is thawed whatever happens."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from qmpnbd.deadline import Deadline
from qmpnbd.errors import AgentRefusedError, AgentSilentError
from qmpnbd.qmp.agent import Agent
from qmpnbd.qmp.agent_journal import AgentJournal
from qmpnbd.qmp.quiesce import at_rest, thaw_leftovers
from tests.qemu_versions import QemuBinaries, each_qemu
from tests.servers import Server, blockdev, qemu_img, wait_until
from tests.test_cli import document, qmpnbd
from tests.test_export import running as exporting
from tests.test_export import told
from tests.test_vm_images import PACKAGES, ROOT, guest

AGENT_PACKAGES = ROOT / ".work/agent-packages"

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        not (PACKAGES / "complete").exists() or not (AGENT_PACKAGES / "complete").exists(),
        reason="no kernel or guest agent for a guest (scripts/setup test fetches them)",
    ),
]


@dataclass(frozen=True)
class Machine:
    """A guest that counts in a file, and its agent."""

    server: Server
    agent: str
    serial: Path

    def count(self) -> int:
        """The last number that reached the guest's filesystem."""
        found = re.findall(r"qmpnbd-guest: file (\d+)", self.serial.read_text(errors="replace"))
        return int(found[-1]) if found else 0

    def goes_on(self) -> None:
        """Waits until the guest has written its file again, twice: the first may have been under way."""
        before = self.count()
        wait_until(lambda: self.count() > before + 1, "the guest to write", 30)


@contextlib.contextmanager
def machine(binaries: QemuBinaries, folder: Path) -> Iterator[Machine]:
    linux = guest.build(PACKAGES, ROOT / ".work/guest-agent", AGENT_PACKAGES)
    qemu_img("create", "-q", "-f", "qcow2", folder / "a.qcow2", "64M")
    qemu_img("create", "-q", "-f", "qcow2", folder / "b.qcow2", "32M")
    serial = folder / "serial"
    devices = ["-blockdev", blockdev(folder / "a.qcow2", "a"), "-device", "virtio-blk-pci,id=vd0,drive=a"]
    devices += ["-blockdev", blockdev(folder / "b.qcow2", "b"), "-device", "virtio-blk-pci,id=vd1,drive=b"]
    devices += ["-chardev", f"socket,id=ga,path={folder}/ga,server=on,wait=off", "-device", "virtio-serial-pci"]
    devices += ["-device", "virtserialport,chardev=ga,name=org.qemu.guest_agent.0"]
    boot = ["-m", "192", "-kernel", str(linux.kernel), "-initrd", str(linux.initramfs)]
    boot += ["-append", f"{linux.append} qmpnbd.agent=yes", "-serial", f"file:{serial}"]
    with binaries.qemu(*boot, *devices) as server:
        server.side("cont")
        running = Machine(server, f"{folder}/ga", serial)
        wait_until(lambda: serial.exists() and running.count() > 0, "the guest", 90)
        yield running


KILLED = """
import asyncio, os, sys
from pathlib import Path
from qmpnbd.deadline import Deadline
from qmpnbd.qmp.agent_journal import AgentJournal
from qmpnbd.qmp.quiesce import at_rest

async def main(address, folder):
    async with at_rest(address, AgentJournal(Path(folder)), Deadline(30), seconds=60):
        print("frozen", flush=True)
        await asyncio.sleep(60)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.timeout(240)
@each_qemu
def test_a_guest_is_frozen_and_thawed(binaries: QemuBinaries, folder: Path) -> None:
    journal = AgentJournal(folder / "journal")
    with machine(binaries, folder) as running:

        async def frozen_for_a_while() -> None:
            async with at_rest(running.agent, journal, Deadline(30)) as rest:
                assert len(list((folder / "journal").iterdir())) == 1
                # One sync may have been on its way to the console; after that, nothing for as long as 100 would take.
                before = running.count()
                await asyncio.sleep(0.5)
                assert running.count() <= before + 1
            assert (rest.consistency.kind, rest.consistency.filesystems) == ("frozen", 1)
            assert rest.consistency.window_ms > 500

        asyncio.run(frozen_for_a_while())
        assert list((folder / "journal").iterdir()) == []
        running.goes_on()

        async def failing() -> None:
            async with at_rest(running.agent, journal, Deadline(30)):
                raise RuntimeError("the work fails")

        with pytest.raises(RuntimeError, match="the work fails"):
            asyncio.run(failing())
        running.goes_on()

        async def thawed_by_another() -> None:
            async with at_rest(running.agent, journal, Deadline(30)) as rest:
                # As a guest that thaws itself would: through the same agent, since its channel has room for one.
                assert rest.agent is not None
                assert await rest.agent.thaw(Deadline(10)) == 1
            assert rest.consistency.kind == "crash-consistent"
            assert "thawed" in rest.consistency.reason

        asyncio.run(thawed_by_another())

        command = [sys.executable, "-c", KILLED, running.agent, str(folder / "journal")]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"frozen\n"
            child.send_signal(signal.SIGKILL)
        assert len(list((folder / "journal").iterdir())) == 1

        async def found() -> None:
            async with await Agent.connect(running.agent, Deadline(10)) as agent:
                assert await agent.status(Deadline(10)) == "frozen"
            with pytest.raises(AgentRefusedError, match="frozen already"):
                async with at_rest(running.agent, journal, Deadline(30)):
                    pass
            assert await thaw_leftovers(journal, print) == [running.agent]
            assert await thaw_leftovers(journal, print) == []

        asyncio.run(found())
        running.goes_on()

        running.server.side("stop")
        with pytest.raises(AgentSilentError, match="the guest is paused"):
            asyncio.run(failing())
        running.server.side("cont")
        running.goes_on()
        asyncio.run(frozen_for_a_while())


@pytest.mark.timeout(240)
def test_recover_thaws_the_guest_that_a_killed_run_left_frozen(
    binaries: QemuBinaries, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(folder / "state"))
    journal = folder / "state/qmpnbd/agent"
    with machine(binaries, folder) as running:
        recover = ("recover", "--qmp", running.server.qmp, "--runtime-dir", folder, "--json")
        assert document(qmpnbd(*recover).stdout)["thawed"] == []
        command = [sys.executable, "-c", KILLED, running.agent, str(journal)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"frozen\n"
            assert document(qmpnbd(*recover).stdout)["thawed"] == [], "its run lives"
            child.send_signal(signal.SIGKILL)
        assert document(qmpnbd(*recover, "--dry-run").stdout)["thawed"] == [running.agent]
        running.server.side("stop")
        paused = qmpnbd(*recover, code=16)
        assert "may still be frozen" in paused.stdout
        assert "the guest is paused" in paused.stderr
        running.server.side("cont")
        assert document(qmpnbd(*recover).stdout)["thawed"] == [running.agent]
        running.goes_on()
        assert document(qmpnbd(*recover).stdout)["thawed"] == []
        assert list(journal.iterdir()) == []


@pytest.mark.timeout(240)
def test_a_point_in_time_of_a_guest_at_rest(binaries: QemuBinaries, folder: Path) -> None:
    with machine(binaries, folder) as running:
        options = ["--point-in-time", "--agent", running.agent, "--json"]
        with exporting("--qmp", running.server.qmp, *options) as child:
            found = told(child)
            assert isinstance(found["instant"], dict)
            assert (found["instant"]["consistency"], found["instant"]["reason"]) == ("frozen", "")
            assert found["instant"]["frozen_ms"] > 0
            running.goes_on()
            child.send_signal(signal.SIGTERM)
            child.communicate(timeout=60)
        assert running.server.exports() == []
        with exporting("--qmp", running.server.qmp, "--point-in-time", "--agent", folder / "none", "--json") as child:
            found = told(child)
            assert isinstance(found["instant"], dict)
            assert found["instant"]["consistency"] == "crash-consistent"
            assert "no such file" in found["instant"]["reason"].lower()
            child.send_signal(signal.SIGTERM)
            child.communicate(timeout=60)
