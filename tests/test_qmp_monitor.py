"""The monitor against servers that are none, that are taken, stopped, dying or lying."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from qmpnbd.deadline import Deadline
from qmpnbd.errors import (
    CommandFailedError,
    DeadlineError,
    InterferenceError,
    MonitorConnectError,
    MonitorLostError,
    MonitorSilentError,
    NotAMonitorError,
    OutcomeUnknownError,
    QmpnbdError,
    ReplyTooLongError,
    UsageError,
)
from qmpnbd.qmp import direct
from qmpnbd.qmp import monitor as monitor_module
from qmpnbd.qmp.inventory import guest_status
from qmpnbd.qmp.monitor import Monitor, finish
from qmpnbd.qmp.process import Peer, is_ended, peer_of
from tests.qemu_versions import QemuBinaries, each_qemu
from tests.servers import qemu, storage_daemon, wait_until

GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 9}, "package": ""}, "capabilities": []}}\r\n'
)
OK = b'{"return": {}}\r\n'
VERSION = b'{"return": {"qemu": {"major": 9, "minor": 0, "micro": 0}, "package": ""}, "id": "@id"}\r\n'


@contextlib.contextmanager
def scripted(folder: Path, *replies: bytes | None) -> Iterator[Path]:
    """A monitor that says the first reply at once and one more for every line it hears; None hangs up.

    ``@id`` in a reply becomes the id of the command it answers.
    """
    path = folder / "fake"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        with contextlib.suppress(OSError):
            peer, _ = listener.accept()
            with peer:
                heard = b'{"id": ""}'
                for number, reply in enumerate(replies):
                    # A command comes in one piece, and qemu.qmp ends it with no newline.
                    if number and not (heard := peer.recv(65536)):
                        return
                    if reply is None:
                        return
                    peer.sendall(reply.replace(b"@id", json.loads(heard).get("id", "").encode()))
                while peer.recv(65536):
                    pass

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield path
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)
        assert not thread.is_alive()


def connect(path: Path | str, seconds: float = 20, use: Callable[[Monitor], Awaitable[object]] | None = None) -> object:
    async def session() -> object:
        async with await Monitor.connect(str(path), Deadline(seconds)) as monitor:
            return await use(monitor) if use else str(monitor.version)

    return asyncio.run(session())


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "GREETING_SECONDS", 0.3)
    monkeypatch.setattr(direct, "CLOSE_SECONDS", 0.3)


def test_no_such_socket(folder: Path) -> None:
    with pytest.raises(MonitorConnectError, match="no such socket"):
        connect(folder / "nothing")


def test_nobody_listens(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(folder / "stale"))
    with pytest.raises(MonitorConnectError, match="nobody listens"):
        connect(folder / "stale")


def test_tcp_nobody_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(MonitorConnectError, match="nobody listens"):
            connect(f"127.0.0.1:{taken.getsockname()[1]}")


def test_a_file_is_no_socket(folder: Path) -> None:
    (folder / "file").write_bytes(b"")
    with pytest.raises(MonitorConnectError):
        connect(folder / "file")


@pytest.mark.parametrize(
    "said",
    [b"NBDMAGICIHAVEOPT\0\3", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\0", b'{"no": "greeting"}\r\n', b"{]\r\n", None],
)
def test_what_is_no_monitor(folder: Path, said: bytes | None) -> None:
    with scripted(folder, said) as path, pytest.raises(NotAMonitorError):
        connect(path)


def test_what_happens_before_the_greeting_is_passed_over(folder: Path) -> None:
    """QEMU 10.0 tells a client that comes right after another one."""
    event = b'{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "JOB_STATUS_CHANGE", "data": {"id": "j"}}\r\n'
    with scripted(folder, event * 3 + GREETING, OK, VERSION) as path:
        assert connect(path) == "9.0.0"


def test_a_reply_of_another_shape(folder: Path) -> None:
    version = b'{"return": {"qemu": {"major": "x"}}, "id": "@id"}\r\n'
    with (
        scripted(folder, GREETING, OK, version) as path,
        pytest.raises(NotAMonitorError, match=r"query-version: qemu\.major"),
    ):
        connect(path)


@pytest.mark.usefixtures("impatient")
def test_silence_says_that_another_client_may_hold_it(folder: Path) -> None:
    with scripted(folder, b"") as path, pytest.raises(MonitorSilentError, match="Another client holds"):
        connect(path)


@pytest.mark.usefixtures("impatient")
def test_a_queue_full_of_waiting_clients(folder: Path) -> None:
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(folder / "full"))
        listener.listen(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
                waiting.setblocking(False)
                waiting.connect(str(folder / "full"))
        with pytest.raises(MonitorSilentError):
            connect(folder / "full")


@pytest.mark.usefixtures("impatient")
def test_half_a_greeting_then_silence(folder: Path) -> None:
    with scripted(folder, GREETING[:20]) as path, pytest.raises(MonitorSilentError):
        connect(path)


@pytest.mark.usefixtures("impatient")
def test_negotiation_that_is_never_answered(folder: Path) -> None:
    with scripted(folder, GREETING) as path, pytest.raises(MonitorSilentError):
        connect(path)


def test_hanging_up_during_a_command(folder: Path) -> None:
    with (
        scripted(folder, GREETING, OK, None) as path,
        pytest.raises(MonitorLostError, match="query-version"),
    ):
        connect(path)


@pytest.mark.real
@pytest.mark.usefixtures("impatient")
def test_a_real_monitor_taken_by_another_client() -> None:
    with storage_daemon() as server:

        async def twice() -> None:
            async with await Monitor.connect(str(server.qmp), Deadline(20)):
                with pytest.raises(MonitorSilentError):
                    await Monitor.connect(str(server.qmp), Deadline(20))

        asyncio.run(twice())
        assert str(connect(server.qmp)).count(".") >= 2  # and it can be had again


@pytest.mark.real
def test_a_stopped_qemu_is_not_waited_for_beyond_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "CLOSE_SECONDS", 0.3)
    with storage_daemon() as server:

        async def stopped(monitor: Monitor) -> None:
            os.kill(server.pid, signal.SIGSTOP)
            with pytest.raises(DeadlineError, match=r"timed out after 0\.3 s waiting for QEMU's reply to query-block"):
                await monitor.execute("query-block", deadline=Deadline(0.3))

        connect(server.qmp, use=stopped)
        os.kill(server.pid, signal.SIGCONT)


@pytest.mark.real
def test_a_killed_qemu_is_a_lost_monitor_at_once() -> None:
    with storage_daemon() as server:

        async def killed(monitor: Monitor) -> None:
            with monitor.events("BLOCK_EXPORT_DELETED") as events:
                os.kill(server.pid, signal.SIGKILL)
                with pytest.raises(MonitorLostError):
                    await monitor.next_event(events, "an event", Deadline(20))
            with pytest.raises(MonitorLostError):
                await monitor.execute("query-block", deadline=Deadline(20))

        connect(server.qmp, use=killed)


@pytest.mark.real
def test_a_qemu_that_has_closed_its_monitor_is_given_time_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with storage_daemon() as server, subprocess.Popen(["cat"], stdin=subprocess.PIPE) as other:

        async def lost(monitor: Monitor) -> None:
            with monitor.events("SHUTDOWN") as events:
                os.kill(server.pid, signal.SIGKILL)
                with pytest.raises(MonitorLostError):
                    await monitor.next_event(events, "an event", Deadline(None))
            monitor.peer = Peer(other.pid)  # another process, which ends when it is told to
            monkeypatch.setattr(monitor_module, "ENDING_SECONDS", None)
            gone = asyncio.ensure_future(monitor.has_gone())
            assert await asyncio.wait({gone}, timeout=0.1) == (set(), {gone})
            other.communicate()
            assert await gone

        connect(server.qmp, use=lost)


@pytest.mark.real
def test_a_qemu_that_goes_on_without_its_monitor_is_not_waited_for_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_module, "ENDING_SECONDS", 0.05)
    with storage_daemon() as server:

        async def goes_on(monitor: Monitor) -> bool:
            return await monitor.has_gone()

        assert connect(server.qmp, use=goes_on) is False


@pytest.mark.parametrize(
    ("state", "threads", "ended"), [("Z", 1, True), ("X", 0, True), ("Z", 2, False), ("R", 1, False), ("T", 3, False)]
)
def test_a_process_has_ended_when_all_of_its_threads_have(state: str, threads: int, ended: bool) -> None:
    assert is_ended(f"4711 (qemu) Z (x) {state} {'1 ' * 16}{threads} 0 0 0") is ended


@pytest.mark.real
def test_a_refused_command_carries_qemus_words() -> None:
    with qemu() as server:

        async def refused(monitor: Monitor) -> CommandFailedError:
            with pytest.raises(CommandFailedError) as caught:
                await monitor.execute("block-export-del", {"id": "none"}, deadline=Deadline(20))
            assert await guest_status(monitor, Deadline(20)) == "prelaunch"
            return caught.value

        error = connect(server.qmp, use=refused)
    assert isinstance(error, CommandFailedError)
    assert (error.command, error.error_class) == ("block-export-del", "GenericError")
    assert "none" in error.description


@pytest.mark.real
def test_tcp_and_the_peer(folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with qemu("-qmp", f"tcp:127.0.0.1:{port},server=on,wait=off", cwd=folder) as server:

        async def peer(monitor: Monitor) -> tuple[bool, int | None, str | None]:
            if monitor.peer is None:
                return monitor.is_local, None, None
            return monitor.is_local, monitor.peer.pid, monitor.peer.working_directory()

        assert connect(f"127.0.0.1:{port}", use=peer) == (True, None, None)
        assert connect(f"localhost:{port}", use=peer) == (True, None, None)
        assert connect(server.qmp, use=peer) == (True, server.pid, str(folder))


@pytest.mark.real
def test_a_command_lost_on_its_way_says_what_to_ask_and_is_not_repeated() -> None:
    with storage_daemon() as server:

        async def lost(monitor: Monitor) -> None:
            os.kill(server.pid, signal.SIGSTOP)
            command = asyncio.ensure_future(monitor.execute("block-export-del", {"id": "x"}, deadline=Deadline(20)))
            os.kill(server.pid, signal.SIGKILL)
            with pytest.raises(OutcomeUnknownError, match="whether QEMU carried it out is unknown") as caught:
                await command
            assert (caught.value.command, caught.value.asks) == ("block-export-del", ("query-block-exports",))
            with pytest.raises(MonitorConnectError):
                await monitor.reconnect(Deadline(20))

        connect(server.qmp, use=lost)


def test_a_lost_query_needs_no_asking(folder: Path) -> None:
    with scripted(folder, GREETING, OK, VERSION, None) as path:

        async def asks(monitor: Monitor) -> None:
            with pytest.raises(MonitorLostError, match="ended during query-block") as caught:
                await monitor.execute("query-block", deadline=Deadline(20))
            assert not isinstance(caught.value, OutcomeUnknownError)

        connect(path, use=asks)


@pytest.mark.real
def test_what_ran_out_of_time_may_be_carried_out_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "CLOSE_SECONDS", 0.3)
    with storage_daemon() as server:

        async def late(monitor: Monitor) -> None:
            node = {"driver": "null-co", "node-name": "n"}
            os.kill(server.pid, signal.SIGSTOP)
            with pytest.raises(DeadlineError, match="before doing it again, ask query-named-block-nodes"):
                await monitor.execute("blockdev-add", node, deadline=Deadline(0.3))
            os.kill(server.pid, signal.SIGCONT)
            wait_until(lambda: server.nodes() == ["n"], "the node")
            await monitor.execute("blockdev-del", {"node-name": "n"}, deadline=Deadline(20))

        connect(server.qmp, use=late)


@pytest.mark.real
def test_reconnecting_finds_the_same_qemu_and_ends_old_events() -> None:
    with storage_daemon() as server:

        async def again(monitor: Monitor) -> None:
            with monitor.events("BLOCK_EXPORT_DELETED") as old:
                await monitor.reconnect(Deadline(20))
                with pytest.raises(MonitorLostError, match="while waiting for an event"):
                    await monitor.next_event(old, "an event", Deadline(20))
            assert await monitor.execute("query-block-exports", deadline=Deadline(20)) == []

        connect(server.qmp, use=again)


@pytest.mark.real
def test_reconnecting_to_another_qemu_is_told(folder: Path) -> None:
    path = folder / "qmp"

    async def again(monitor: Monitor) -> None:
        path.unlink()
        with storage_daemon() as second:
            path.symlink_to(second.qmp)
            with pytest.raises(InterferenceError, match="another one answers"):
                await monitor.reconnect(Deadline(20))

    with storage_daemon() as first:
        path.symlink_to(first.qmp)
        connect(path, use=again)


def test_a_reply_beyond_all_sense_ends_the_connection_and_says_why(folder: Path) -> None:
    long = b'{"return": "' + b"x" * (11 << 20) + b'", "id": "@id"}\r\n'
    with scripted(folder, GREETING, OK, VERSION, long) as path:

        async def asks(monitor: Monitor) -> None:
            with pytest.raises(ReplyTooLongError, match="reply to query-block is longer than 10 MiB"):
                await monitor.execute("query-block", deadline=Deadline(20))

        connect(path, use=asks)


def test_an_event_of_another_shape(folder: Path) -> None:
    event = b'{"event": "BLOCK_EXPORT_DELETED", "data": {"id": 7}, "timestamp": {}}\r\n'
    with scripted(folder, GREETING, OK, VERSION, event + b'{"return": {}, "id": "@id"}\r\n') as path:

        async def listens(monitor: Monitor) -> None:
            with monitor.events("BLOCK_EXPORT_DELETED") as events:
                await monitor.execute("block-export-del", {"id": "x"}, deadline=Deadline(20))
                with pytest.raises(NotAMonitorError, match="BLOCK_EXPORT_DELETED: id"):
                    await monitor.next_event(events, "an event", Deadline(20))

        connect(path, use=listens)


UNSAYABLE = [math.nan, math.inf, b"bytes", "\udc80", "\ufdd0", "\ufffe", "\U0010ffff"]


@pytest.mark.real
@pytest.mark.parametrize("value", UNSAYABLE, ids=ascii)
def test_what_would_end_the_session_is_refused_here(value: object) -> None:
    with storage_daemon() as server:

        async def refused(monitor: Monitor) -> None:
            with pytest.raises(UsageError, match="blockdev-del"):
                await monitor.execute("blockdev-del", {"node-name": value}, deadline=Deadline(20))
            with pytest.raises(CommandFailedError):
                await monitor.execute("blockdev-del", {"node-name": "\ufffd\0\U0001f4be"}, deadline=Deadline(20))

        connect(server.qmp, use=refused)


@pytest.mark.real
@each_qemu
def test_a_descriptor_is_passed_with_its_command(binaries: QemuBinaries, folder: Path) -> None:
    with binaries.qemu() as server, (folder / "image").open("w+b") as image:
        image.truncate(1 << 20)

        async def passes(monitor: Monitor) -> object:
            await monitor.execute("add-fd", {"fdset-id": 7}, deadline=Deadline(20), fd=image.fileno())
            node = {"driver": "file", "node-name": "n", "filename": "/dev/fdset/7"}
            await monitor.execute("blockdev-add", node, deadline=Deadline(20))
            return server.side("query-named-block-nodes", flat=True)[0]["image"]["virtual-size"]

        assert connect(server.qmp, use=passes) == 1 << 20


@pytest.mark.real
def test_the_storage_daemon_takes_no_descriptors_and_is_sent_none() -> None:
    with storage_daemon() as server:

        async def passes(monitor: Monitor) -> object:
            with pytest.raises(CommandFailedError, match="closefd has not been found"):
                await monitor.pass_descriptor(0, "x", Deadline(20))
            return monitor.passes_descriptors

        assert connect(server.qmp, use=passes) is True


@pytest.mark.real
def test_no_descriptor_goes_over_tcp() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with qemu("-qmp", f"tcp:127.0.0.1:{port},server=on,wait=off"):

        async def passes(monitor: Monitor) -> None:
            assert not monitor.passes_descriptors
            with pytest.raises(UsageError, match="over TCP"):
                await monitor.pass_descriptor(0, "x", Deadline(20))

        connect(f"127.0.0.1:{port}", use=passes)


@pytest.mark.real
def test_an_inherited_socket_is_used_once() -> None:
    with qemu() as server:
        ours = socket.socket(socket.AF_UNIX)
        ours.connect(str(server.qmp))

        async def once(monitor: Monitor) -> object:
            with pytest.raises(MonitorConnectError, match="cannot be connected again"):
                await monitor.reconnect(Deadline(20))
            return monitor.peer and monitor.peer.pid

        assert connect(f"fd:{ours.detach()}", use=once) == server.pid
        assert str(connect(server.qmp)).count(".") >= 2  # it was closed


def test_half_of_a_pair_tells_nothing_of_who_has_the_other() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert peer_of(ours) is None


def test_a_socket_that_this_process_listens_on_tells_nothing_of_who_accepts(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(str(folder / "given-away"))
        listener.listen()
        client.connect(str(folder / "given-away"))
        assert peer_of(client) is None


def test_what_was_inherited_is_no_connected_socket(folder: Path) -> None:
    with pytest.raises(UsageError, match="not a socket that was inherited"):
        connect("fd:987654")
    with (folder / "file").open("wb") as file, pytest.raises(UsageError, match="not a socket that was inherited"):
        connect(f"fd:{file.fileno()}")
    with pytest.raises(UsageError, match="not connected"):
        connect(f"fd:{socket.socket(socket.AF_UNIX).detach()}")


def test_finish_ends_the_work_before_it_is_cancelled() -> None:
    async def outer() -> list[str]:
        gate, told = asyncio.Event(), []

        async def work() -> None:
            await gate.wait()
            told.append("done")

        async def caller() -> None:
            try:
                await finish(work())
            finally:
                told.append("cancelled")

        task = asyncio.ensure_future(caller())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(0)
        gate.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        return told

    assert asyncio.run(outer()) == ["done", "cancelled"]


def test_finish_gives_the_result_and_the_error() -> None:
    async def good() -> int:
        return 7

    async def bad() -> None:
        raise QmpnbdError("no", where="here")

    assert asyncio.run(finish(good())) == 7
    with pytest.raises(QmpnbdError, match="here: no"):
        asyncio.run(finish(bad()))
