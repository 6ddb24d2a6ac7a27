"""Both doors, with no server, with the end of one's patience, and against real servers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qmpnbd.deadline import Deadline
from qmpnbd.errors import (
    DeadlineError,
    NbdConnectError,
    NbdContextError,
    NbdDisconnectedError,
    NbdRefusedError,
    NbdRequestError,
    NbdUnsupportedError,
    UsageError,
)
from qmpnbd.extents import ExtentMap
from qmpnbd.nbd import aio
from qmpnbd.nbd.client import Client
from qmpnbd.nbd.uri import NbdUri
from tests.hostile_nbd import BASE, DEPTH, Script, serving
from tests.nbd_doors import LONG, SHORT, Door, both_doors
from tests.servers import listening, process, tool, wait_until

# No server at all.


@both_doors
@pytest.mark.parametrize(
    ("name", "match"), [("none", "no such socket"), ("file", "Nobody listens"), ("x" * 120, "too long")]
)
def test_nobody_there(door: Door, folder: Path, name: str, match: str) -> None:
    (folder / "file").write_bytes(b"")
    with pytest.raises(NbdConnectError, match=match):
        door(NbdUri.unix(str(folder / name), "disk"))


@both_doors
@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_nobody_at_a_tcp_port(door: Door, host: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody else gets it, nobody answers
        with pytest.raises(NbdConnectError):
            door(NbdUri.tcp(host, taken.getsockname()[1]))


@both_doors
def test_a_host_that_cannot_be_found(door: Door) -> None:
    with pytest.raises(NbdConnectError, match="cannot find the host"):
        door(NbdUri.tcp("a..b"), seconds=LONG)


@both_doors
def test_a_full_queue_is_waited_for_in_vain(door: Door, folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as waiting:
        listener.bind(str(folder / "s"))
        listener.listen(0)
        for _ in range(2):
            sock = waiting.enter_context(socket.socket(socket.AF_UNIX))
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                sock.connect(str(folder / "s"))
        with pytest.raises(DeadlineError):
            door(NbdUri.unix(str(folder / "s")), seconds=SHORT)


# What only one of the doors has.


def asked_something(script: Script) -> None:
    wait_until(lambda: bool(script.requests), "a request")


@contextlib.contextmanager
def meanwhile(script: Script, action: Callable[[], None]) -> Iterator[None]:
    """Does something in another thread once the server was asked something."""

    def act() -> None:
        asked_something(script)
        action()

    thread = threading.Thread(target=act)
    thread.start()
    yield
    thread.join()


def test_close_may_be_called_again_and_ends_everything(folder: Path) -> None:
    with serving(folder, Script()) as uri:
        client = Client.connect(uri, contexts=[DEPTH])
        assert (client.where, client.export.size) == (uri, 8 << 20)
        client.close()
        client.close()
        with pytest.raises(UsageError, match="closed"):
            client.maps()


def test_a_deadline_told_to_stop_ends_a_wait_in_another_thread(folder: Path) -> None:
    script = Script(answer=lambda request, count: [])
    with serving(folder, script) as uri, Client.connect(uri, contexts=[DEPTH]) as client:
        deadline = Deadline(None)
        with meanwhile(script, deadline.stop), pytest.raises(DeadlineError, match="stopped"):
            client.maps(deadline=deadline)


def test_close_ends_a_call_of_another_thread(folder: Path) -> None:
    script = Script(answer=lambda request, count: [])
    with (
        serving(folder, script) as uri,
        Client.connect(uri, contexts=[DEPTH]) as client,
        meanwhile(script, client.close),
        pytest.raises(NbdDisconnectedError),
    ):
        client.maps(deadline=Deadline(LONG))


def test_a_cancelled_call_leaves_the_client_usable_and_no_task(folder: Path) -> None:
    script = Script(answer=lambda request, count: [])

    async def main() -> None:
        client = await aio.Client.connect(uri, contexts=[DEPTH])
        task = asyncio.create_task(client.maps())
        await asyncio.to_thread(asked_something, script)
        await client.flush()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}
        await client.flush()
        await client.close()
        with pytest.raises(UsageError, match="closed"):
            await client.flush()

    with serving(folder, script) as uri:
        asyncio.run(main(), debug=True)


def test_close_ends_a_call_of_another_task(folder: Path) -> None:
    script = Script(answer=lambda request, count: [])

    async def main() -> None:
        client = await aio.Client.connect(uri, contexts=[DEPTH])
        task = asyncio.create_task(client.maps())
        await asyncio.to_thread(asked_something, script)
        await client.close()
        with pytest.raises(NbdDisconnectedError):
            await asyncio.wait_for(task, LONG)

    with serving(folder, script) as uri:
        asyncio.run(main(), debug=True)


@pytest.mark.parametrize("greeting", [b"", b"NBDMAGI"])
def test_a_cancelled_connect_closes(folder: Path, greeting: bytes) -> None:
    async def main() -> None:
        task = asyncio.create_task(aio.Client.connect(uri))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with serving(folder, Script(greeting=greeting)) as uri:
        asyncio.run(main())


# Real servers.


@contextlib.contextmanager
def qemu_nbd(folder: Path, *arguments: str) -> Iterator[NbdUri]:
    path = folder / "s"
    command = [tool("qemu-nbd"), "-k", str(path), "-r", "-t", "-x", "disk", *arguments]
    with process(command, folder / "log") as child:
        wait_until(lambda: listening(path) or child.poll() is not None, "qemu-nbd")
        assert child.poll() is None, (folder / "log").read_text()
        yield NbdUri.unix(str(path), "disk")


@contextlib.contextmanager
def nbdkit(folder: Path, *arguments: str) -> Iterator[NbdUri]:
    path = folder / "s"
    with process([tool("nbdkit"), "-f", "-U", str(path), *arguments], folder / "log") as child:
        wait_until(lambda: listening(path) or child.poll() is not None, "nbdkit")
        assert child.poll() is None, (folder / "log").read_text()
        yield NbdUri.unix(str(path))


def nbdinfo(uri: NbdUri, context: str) -> ExtentMap:
    """Asks libnbd, which shares nothing with us."""
    command = [tool("nbdinfo"), f"--map={context}", "--json", str(uri)]
    done = subprocess.run(command, capture_output=True, check=True, timeout=LONG)
    return ExtentMap.of_extents([(extent["length"], extent["type"]) for extent in json.loads(done.stdout)])


@both_doors
@pytest.mark.real
def test_a_chain_is_mapped_as_nbdinfo_maps_it(door: Door, folder: Path, three_layers: Path) -> None:
    with qemu_nbd(folder, "-A", "-e", "5", "-f", "qcow2", str(three_layers / "top.qcow2")) as uri:
        mapped, flushed, again = door(uri, "maps", "flush", "maps")
        expected = {context: nbdinfo(uri, context) for context in (DEPTH, BASE)}
    assert mapped == again == expected
    assert flushed is None
    assert set(expected[DEPTH].totals()) == {1, 2, 3}


@both_doors
@pytest.mark.real
def test_a_server_without_the_depth(door: Door, folder: Path, three_layers: Path) -> None:
    with qemu_nbd(folder, "-e", "5", "-f", "qcow2", str(three_layers / "top.qcow2")) as uri:
        with pytest.raises(NbdContextError, match="qemu-nbd -A"):
            door(uri, "maps")
        with pytest.raises(NbdRefusedError, match="no export of this name"):
            door(NbdUri.unix(uri.path, "other"), "maps", contexts=[BASE])
        assert door(uri, "maps", contexts=[BASE]) == [{BASE: nbdinfo(uri, BASE)}]
    assert "due to" not in (folder / "log").read_text().replace("Failed to read opts magic", ""), "we took leave"


@both_doors
@pytest.mark.real
def test_a_server_at_its_connection_limit(door: Door, folder: Path, three_layers: Path) -> None:
    with qemu_nbd(folder, "-A", "-e", "1", "-f", "qcow2", str(three_layers / "top.qcow2")) as uri:
        with Client.connect(uri), pytest.raises(DeadlineError, match="connection limit"):
            door(uri, seconds=SHORT)
        assert door(uri, "flush") == [None]


@both_doors
@pytest.mark.real
def test_a_read_error_of_the_server_in_the_first_of_two_contexts(door: Door, folder: Path, three_layers: Path) -> None:
    image = (
        "driver=blkdebug,inject-error.0.event=none,inject-error.0.iotype=block-status,inject-error.0.once=on,"
        f"inject-error.0.errno=5,image.driver=qcow2,image.file.filename={three_layers / 'top.qcow2'}"
    )
    with qemu_nbd(folder, "-A", "-e", "5", "--image-opts", image) as uri:
        failed, mapped, flushed = door(uri, "maps", "maps", "flush")
        expected = nbdinfo(uri, DEPTH)
    assert isinstance(failed, NbdRequestError)
    assert failed.wire_error == 5
    assert isinstance(mapped, dict)
    assert mapped[DEPTH] == expected
    assert flushed is None


@both_doors
@pytest.mark.real
def test_nbdkit_beyond_32_bits(door: Door, folder: Path) -> None:
    with nbdkit(folder, "data", "1 @131072 2 @6442450944 3", "size=8G") as uri:
        assert door(uri, "maps", contexts=[BASE]) == [{BASE: nbdinfo(uri, BASE)}]
        with pytest.raises(NbdContextError):
            door(uri, "maps")


@both_doors
@pytest.mark.real
def test_nbdkit_without_structured_replies(door: Door, folder: Path) -> None:
    with nbdkit(folder, "--no-sr", "memory", "1M") as uri:
        assert door(uri, "flush", contexts=()) == [None]
        with pytest.raises(NbdUnsupportedError, match="no structured replies"):
            door(uri, contexts=[BASE])


@both_doors
@pytest.mark.real
def test_nbdkit_over_tcp(door: Door, folder: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with process([tool("nbdkit"), "-f", "-i", "127.0.0.1", "-p", str(port), "memory", "1M"], folder / "log") as child:
        uri, end = NbdUri.tcp("localhost", port), time.monotonic() + LONG
        while child.poll() is None and time.monotonic() < end:
            with contextlib.suppress(NbdConnectError):
                assert door(uri, "maps", contexts=[BASE]) == [{BASE: ExtentMap.uniform(1 << 20, 3)}]
                return
    pytest.fail((folder / "log").read_text())


@both_doors
@pytest.mark.real
@pytest.mark.parametrize("arguments", [("-o",), ("--mask-handshake=0",)])
def test_nbdkit_of_old(door: Door, folder: Path, arguments: tuple[str, ...]) -> None:
    with nbdkit(folder, *arguments, "memory", "1M") as uri:
        assert door(uri, contexts=()) == []
        with pytest.raises(NbdUnsupportedError):
            door(uri, contexts=[BASE])


@both_doors
@pytest.mark.real
def test_nbdkit_with_blocks_of_4096(door: Door, folder: Path) -> None:
    policy = ["blocksize-minimum=4096", "blocksize-error-policy=error"]
    with nbdkit(folder, "--filter=blocksize-policy", "data", "@4096 1 @99999 2", "size=5G", *policy) as uri:
        assert door(uri, "maps", contexts=[BASE]) == [{BASE: nbdinfo(uri, BASE)}]
