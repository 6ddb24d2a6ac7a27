"""A domain that libvirt runs, through libvirt's own monitor: a real libvirtd, and a double for what that never does."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import types
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qmpnbd.deadline import Deadline
from qmpnbd.errors import (
    CommandFailedError,
    DeadlineError,
    InterferenceError,
    MonitorConnectError,
    MonitorLostError,
    NotAMonitorError,
    OutcomeUnknownError,
    ReplyTooLongError,
    ScratchError,
    UsageError,
)
from qmpnbd.export.blocking import exporting
from qmpnbd.export.options import Options
from qmpnbd.qmp import libvirt as libvirt_transport
from qmpnbd.qmp.address import LibvirtAddress
from qmpnbd.qmp.exports import add_export, remove_export
from qmpnbd.qmp.inventory import read_exports, read_inventory
from qmpnbd.qmp.monitor import Monitor
from qmpnbd.qmp.planning import Wishes
from qmpnbd.qmp.polling import POLLED
from qmpnbd.qmp.process import Peer
from qmpnbd.validate.run import validate
from tests.libvirt_session import Session, session
from tests.servers import wait_until


@pytest.fixture(scope="module")
def libvirtd() -> Iterator[Session]:
    with pytest.MonkeyPatch.context() as monkeypatch, session(monkeypatch) as running:
        yield running


@pytest.fixture(scope="module")
def domain(libvirtd: Session) -> Iterator[Any]:
    """A domain that several tests use, and leave as it was."""
    with libvirtd.domain("shared", libvirtd.image("shared.qcow2")) as running:
        yield running


@pytest.fixture
def mortal(libvirtd: Session) -> Iterator[Any]:
    """A domain that a test may kill."""
    with libvirtd.domain("mortal", libvirtd.image("mortal.qcow2")) as running:
        yield running


def use(address: LibvirtAddress, work: Callable[[Monitor], Awaitable[object]]) -> object:
    async def whole() -> object:
        async with await Monitor.connect(address, Deadline(30)) as monitor:
            return await work(monitor)

    return asyncio.run(whole())


def qemu_pid(session: Session, domain: Any) -> int:
    (path,) = session.folder.rglob(f"{domain.name()}.pid")
    return int(path.read_text())


@pytest.mark.real
class TestRealLibvirt:
    def test_disks_of_a_domain_by_name_and_by_uuid(self, libvirtd: Session, domain: Any) -> None:
        async def look(monitor: Monitor) -> object:
            assert (monitor.is_polled, monitor.is_local, monitor.peer) == (True, True, None)
            return [disk.name for disk in (await read_inventory(monitor, Deadline(30))).disks]

        for name in (domain.name(), domain.UUIDString()):
            assert use(LibvirtAddress(libvirtd.uri, name), look) == ["virtio-disk0"]

    def test_an_export_comes_and_goes_and_its_end_is_found_out_by_asking(self, libvirtd: Session, domain: Any) -> None:
        async def whole(monitor: Monitor) -> None:
            node = (await read_inventory(monitor, Deadline(30))).disks[0].node_name
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(libvirtd.folder / "nbd"))
                listener.listen()
                await monitor.pass_descriptor(listener.fileno(), "nbd", Deadline(30))
            address = {"type": "fd", "data": {"str": "nbd"}}
            await monitor.execute("nbd-server-start", {"addr": address}, deadline=Deadline(30))
            await add_export(monitor, node, "x0", Deadline(30))
            assert [export.id for export in await read_exports(monitor, Deadline(30))] == ["x0"]
            await remove_export(monitor, "x0", Deadline(30))
            assert await read_exports(monitor, Deadline(30)) == []
            await monitor.execute("nbd-server-stop", deadline=Deadline(30))
            assert not (libvirtd.folder / "nbd").exists()

        use(LibvirtAddress(libvirtd.uri, domain.name()), whole)

    def test_a_job_is_followed_to_its_end(self, libvirtd: Session, domain: Any) -> None:
        async def whole(monitor: Monitor) -> list[object]:
            node = (await read_inventory(monitor, Deadline(30))).disks[0].node_name
            target = {"driver": "null-co", "node-name": "target", "size": 16 << 20}
            await monitor.execute("blockdev-add", target, deadline=Deadline(30))
            seen: list[object] = []
            with monitor.events("JOB_STATUS_CHANGE") as changes:
                job = {"job-id": "j", "device": node, "target": "target", "sync": "full", "auto-dismiss": False}
                await monitor.execute("blockdev-backup", job, deadline=Deadline(30))
                while seen[-1:] != ["concluded"]:
                    seen.append((await monitor.next_event(changes, "the job", Deadline(30)))["status"])
                await monitor.execute("job-dismiss", {"id": "j"}, deadline=Deadline(30))
                seen.append((await monitor.next_event(changes, "the job", Deadline(30)))["status"])
            return seen

        seen = use(LibvirtAddress(libvirtd.uri, domain.name()), whole)
        assert isinstance(seen, list)
        assert seen[-2:] == ["concluded", "null"]

    def test_a_guest_that_stops_and_goes_on(self, libvirtd: Session, domain: Any) -> None:
        async def whole(monitor: Monitor) -> None:
            with monitor.events("STOP", "RESUME") as events:
                for command in ("cont", "stop"):
                    await monitor.execute(command, deadline=Deadline(30))
                    assert await monitor.next_event(events, command, Deadline(30)) == {}

        use(LibvirtAddress(libvirtd.uri, domain.name()), whole)

    def test_a_write_threshold_that_is_crossed(self, libvirtd: Session, domain: Any) -> None:
        async def whole(monitor: Monitor) -> object:
            for node in ("from", "to"):
                null = {"driver": "null-co", "node-name": node, "size": 4 << 20}
                await monitor.execute("blockdev-add", null, deadline=Deadline(30))
            with monitor.events("BLOCK_WRITE_THRESHOLD") as crossed:
                threshold = {"node-name": "to", "write-threshold": 1 << 20}
                await monitor.execute("block-set-write-threshold", threshold, deadline=Deadline(30))
                job = {"job-id": "fill", "device": "from", "target": "to", "sync": "full"}
                await monitor.execute("blockdev-backup", job, deadline=Deadline(30))
                return await monitor.next_event(crossed, "the threshold", Deadline(30))

        found = use(LibvirtAddress(libvirtd.uri, domain.name()), whole)
        assert found == {"node-name": "to", "write-threshold": 1 << 20, "amount-exceeded": 0}

    def test_a_validation_through_libvirt_agrees_and_leaves_nothing(
        self, libvirtd: Session, domain: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Root's directories are closed to another user's QEMU; so if root runs this, the test says whose it is."""
        if libvirtd.user:
            monkeypatch.setattr(libvirt_transport.LibvirtTransport, "peer", Peer(qemu_pid(libvirtd, domain)))
        address = LibvirtAddress(libvirtd.uri, domain.name())
        report = validate(address, ["virtio-disk0"])
        assert (report.verdict, report.left_behind) == ("agreed", ())

        async def left(monitor: Monitor) -> object:
            return await read_exports(monitor, Deadline(30))

        assert use(address, left) == []

    def test_a_point_in_time_through_libvirt_is_held_or_refused_with_a_remedy(
        self, libvirtd: Session, domain: Any, folder: Path
    ) -> None:
        """Nobody tells as whom QEMU runs; so root, who could, does not know to whom to give the scratch image."""
        address = LibvirtAddress(libvirtd.uri, "shared")
        for wishes in (Wishes(), Wishes(exact_chain=True, scratch_dir=str(folder))):
            choice = Options(instant=wishes, runtime_dir=str(folder))
            if libvirtd.user:
                with pytest.raises(ScratchError, match="Permission denied") as refused, exporting(address, [], choice):
                    pytest.fail("QEMU cannot have opened the scratch image")
                assert "QEMU's user" in refused.value.remedy
            else:
                with exporting(address, [], choice) as session:
                    found = session.allocation_depth(session.exports[0], Deadline(30))
                    assert found.depth.totals() == {0: 16 << 20}
        assert not list(folder.iterdir())
        assert use(address, lambda monitor: read_exports(monitor, Deadline(30))) == []

    def test_what_qemu_refuses_is_refused_in_qemus_words(self, libvirtd: Session, domain: Any) -> None:
        async def refused(monitor: Monitor) -> object:
            with pytest.raises(CommandFailedError, match="nonsense has not been found") as caught:
                await monitor.execute("nonsense", deadline=Deadline(30))
            return caught.value.error_class

        assert use(LibvirtAddress(libvirtd.uri, domain.name()), refused) == "CommandNotFound"

    def test_a_domain_that_is_not_there(self, libvirtd: Session) -> None:
        with pytest.raises(MonitorConnectError, match="Domain not found"):
            use(LibvirtAddress(libvirtd.uri, "nobody-has-this"), read_nothing)

    def test_a_libvirt_that_is_not_there(self, libvirtd: Session, folder: Path) -> None:
        with pytest.raises(MonitorConnectError, match="libvirt: Failed to connect socket"):
            use(LibvirtAddress(f"qemu+unix:///session?socket={folder}/none", "vm"), read_nothing)

    def test_a_killed_domain_is_gone_and_nothing_was_passed_on(self, libvirtd: Session, mortal: Any) -> None:
        async def killed(monitor: Monitor) -> bool:
            mortal.destroy()
            with pytest.raises(MonitorLostError, match="did not pass nbd-server-stop on") as caught:
                await monitor.execute("nbd-server-stop", deadline=Deadline(30))
            assert not isinstance(caught.value, OutcomeUnknownError)
            return monitor.is_gone()

        assert use(LibvirtAddress(libvirtd.uri, mortal.name()), killed) is True

    def test_a_domain_that_was_started_anew_is_another_one(self, libvirtd: Session, mortal: Any) -> None:
        async def again(monitor: Monitor) -> None:
            await monitor.reconnect(Deadline(30))
            mortal.destroy()
            anew = libvirtd.domain("mortal", libvirtd.folder / "mortal.qcow2")
            with anew, pytest.raises(InterferenceError, match="another one answers"):
                await monitor.reconnect(Deadline(30))

        use(LibvirtAddress(libvirtd.uri, mortal.name()), again)

    def test_a_domain_that_dies_during_a_command_leaves_its_outcome_unknown(
        self, libvirtd: Session, mortal: Any
    ) -> None:
        async def dies(monitor: Monitor) -> object:
            pid = qemu_pid(libvirtd, mortal)
            os.kill(pid, signal.SIGSTOP)
            command = asyncio.ensure_future(monitor.execute("nbd-server-stop", deadline=Deadline(30)))
            occupied = libvirtd.libvirt.VIR_DOMAIN_CONTROL_OCCUPIED
            await asyncio.to_thread(wait_until, lambda: mortal.controlInfo()[0] == occupied, "libvirt to pass it on")
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(OutcomeUnknownError) as caught:
                await command
            return caught.value.command

        assert use(LibvirtAddress(libvirtd.uri, mortal.name()), dies) == "nbd-server-stop"

    def test_a_stopped_qemu_is_not_waited_for_beyond_the_deadline(self, libvirtd: Session, domain: Any) -> None:
        async def stopped(monitor: Monitor) -> None:
            pid = qemu_pid(libvirtd, domain)
            os.kill(pid, signal.SIGSTOP)
            try:
                with pytest.raises(DeadlineError, match=r"0\.3 s waiting for QEMU's reply to query-block"):
                    await monitor.execute("query-block", deadline=Deadline(0.3))
            finally:
                os.kill(pid, signal.SIGCONT)

        use(LibvirtAddress(libvirtd.uri, domain.name()), stopped)

    def test_the_command_line_takes_a_domain(self, libvirtd: Session, domain: Any) -> None:
        command = [sys.executable, "-m", "qmpnbd", "disks", "--libvirt", libvirtd.uri, "--domain", domain.name()]
        found = {**os.environ, "PYTHONPATH": str(libvirtd.folder / "modules")}
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60, env=found)
        assert "disk virtio-disk0: 16 MiB" in done.stdout
        assert done.stderr == ""


async def read_nothing(_monitor: Monitor) -> None:
    raise AssertionError("connected to nothing")


class Double(types.ModuleType):
    """Stands for both of libvirt's modules: one domain that runs, whose monitor says what it is told to."""

    class libvirtError(Exception):  # noqa: N801 - libvirt's own name
        def get_error_code(self) -> int:
            return 1

    VIR_ERR_NO_DOMAIN = 42

    def __init__(self) -> None:
        super().__init__("libvirt")
        self.replies: dict[str, str] = {"query-version": json.dumps({"return": VERSION})}
        self.asked: list[str] = []

    def registerErrorHandler(self, _handler: object, _context: object) -> None:  # noqa: N802 - likewise
        pass

    def open(self, _uri: str | None) -> Any:
        return types.SimpleNamespace(
            lookupByName=lambda _name: types.SimpleNamespace(isActive=lambda: 1, UUIDString=str, ID=int),
            getURI=lambda: "qemu+ssh://far.example/system",
            close=lambda: None,
        )

    def qemuMonitorCommand(self, _domain: object, text: str, _flags: int) -> str:  # noqa: N802 - likewise
        command = json.loads(text)["execute"]
        self.asked.append(command)
        return self.replies[command]


VERSION = {"qemu": {"major": 9, "minor": 0, "micro": 0}, "package": ""}
FAR = LibvirtAddress("", "vm")


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Double:
    made = Double()
    for name in libvirt_transport._NOT_PASSED_ON:
        monkeypatch.setattr(made, name, 42, raising=False)
    monkeypatch.setitem(sys.modules, "libvirt", made)
    monkeypatch.setitem(sys.modules, "libvirt_qemu", made)
    return made


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        ("", NotAMonitorError),
        ("[]", NotAMonitorError),
        ("{}", NotAMonitorError),
        ('{"error": {"class": 1}}', NotAMonitorError),
        ("[" * 100_000, NotAMonitorError),
        ('{"return": "' + "x" * (11 << 20) + '"}', ReplyTooLongError),
    ],
)
def test_replies_that_are_none(double: Double, reply: str, error: type[Exception]) -> None:
    async def asks(monitor: Monitor) -> None:
        with pytest.raises(error):
            await monitor.execute("query-block", deadline=Deadline(30))

    double.replies["query-block"] = reply
    use(FAR, asks)


def test_a_hypervisor_elsewhere_is_not_local(double: Double) -> None:
    async def place(monitor: Monitor) -> object:
        return monitor.is_local

    assert use(FAR, place) is False


def test_an_event_that_no_query_tells_is_refused(double: Double) -> None:
    async def listens(monitor: Monitor) -> None:
        with pytest.raises(UsageError, match="DEVICE_DELETED cannot be found out"), monitor.events("DEVICE_DELETED"):
            raise AssertionError("listened")

    use(FAR, listens)


def test_a_libvirt_too_old_for_file_descriptors_says_so(double: Double) -> None:
    async def passes(monitor: Monitor) -> None:
        with pytest.raises(UsageError, match="cannot be passed through this libvirt"):
            await monitor.execute("getfd", {"fdname": "x"}, deadline=Deadline(30), fd=0)

    use(FAR, passes)


def test_what_there_was_before_is_looked_at_before_the_command(double: Double) -> None:
    double.replies |= {"query-block-exports": '{"return": []}', "block-export-del": '{"return": {}}'}

    async def listens(monitor: Monitor) -> None:
        with monitor.events("BLOCK_EXPORT_DELETED"):
            await monitor.execute("block-export-del", {"id": "x"}, deadline=Deadline(30))
        await monitor.execute("query-block-exports", deadline=Deadline(30))

    use(FAR, listens)
    looks = ["query-block-exports", "block-export-del", "query-block-exports"]
    assert double.asked == ["query-version", *looks, "query-block-exports"]


def test_without_the_python_module_the_way_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libvirt", None)
    with pytest.raises(MonitorConnectError, match=r"Python module libvirt is not here\..*Install python3-libvirt"):
        use(FAR, read_nothing)


@pytest.mark.parametrize(
    ("name", "before", "after", "events"),
    [
        ("BLOCK_EXPORT_DELETED", {"a": True, "b": True}, {"b": True, "c": True}, [{"id": "a"}]),
        (
            "JOB_STATUS_CHANGE",
            {"a": "running", "b": "running", "c": "ready"},
            {"a": "concluded", "b": "running", "d": "created"},
            [
                {"id": "a", "status": "concluded"},
                {"id": "d", "status": "created"},
                {"id": "c", "status": "null"},
            ],
        ),
        ("BLOCK_WRITE_THRESHOLD", {"a": 0, "b": 7, "c": 7}, {"a": 7, "b": 8}, []),
        ("STOP", {"running": False}, {"running": True}, []),
        ("RESUME", {"running": True}, {"running": True}, []),
    ],
)
def test_what_changed_between_two_looks(
    name: str, before: dict[str, object], after: dict[str, object], events: list[dict[str, object]]
) -> None:
    assert list(POLLED[name].changes(before, after)) == events
