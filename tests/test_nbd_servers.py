"""Every command and flag against real servers that know it, through both doors."""

from __future__ import annotations

import asyncio
import itertools
import re
import socket
from pathlib import Path

import pytest

from qmpnbd.errors import NbdDisconnectedError, NbdRequestError, NbdUnsupportedError, UsageError
from qmpnbd.extents import ExtentMap
from qmpnbd.nbd import aio
from qmpnbd.nbd.client import Client
from qmpnbd.nbd.constants import TransmissionFlag
from qmpnbd.nbd.reconnect import Reconnect
from qmpnbd.nbd.uri import NbdUri
from tests.hostile_nbd import BASE, DEPTH, pattern
from tests.nbd_doors import LONG, Door, both_doors
from tests.nbd_servers import nbdkit, qemu_nbd
from tests.servers import new_qemu_nbd, qemu_img, qemu_io, storage_daemon, wait_until

pytestmark = pytest.mark.real
SIZE = 16 << 20


def disk(folder: Path, form: str = "raw") -> Path:
    """Makes a disk that holds `pattern` in some parts."""
    path = folder / f"disk.{form}"
    (folder / "flat").write_bytes(pattern(0, 4 << 20) + bytes(8 << 20) + pattern(12 << 20, 4 << 20))
    qemu_img("convert", "-f", "raw", "-O", form, folder / "flat", path)
    return path


@both_doors
@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_qemu_is_read_whole(door: Door, folder: Path, form: str) -> None:
    image = disk(folder, form)
    with qemu_nbd(folder, "-r", "-A", "-f", form, str(image)) as uri:
        whole, pieces, fragment, maps = door(
            uri,
            ("read", 0, SIZE),
            ("chunks", [(0, SIZE)], {"size": 300 * 1024}),
            ("read", 512, 65536, {"unfragmented": True}),
            "maps",
        )
    flat = (folder / "flat").read_bytes()
    assert whole == flat
    assert b"".join(data for _, data in sorted(pieces)) == flat
    assert fragment == flat[512:][:65536]
    assert {maps[BASE].at(0), maps[BASE].at(8 << 20)} == {0, 3}


@both_doors
def test_qemu_is_written_to_in_every_way(door: Door, folder: Path) -> None:
    image = disk(folder, "qcow2")
    with qemu_nbd(folder, "-f", "qcow2", "--discard=unmap", str(image)) as uri:
        outcomes = door(
            uri,
            ("write", 1 << 20, pattern(0, 3 << 20)),
            ("write", 512, b"x" * 512, {"fua": True}),
            ("write_zeroes", 12 << 20, 65536, {"fua": True}),
            ("write_zeroes", 13 << 20, 65536, {"no_hole": True}),
            ("trim", 14 << 20, 1 << 20, {"fua": True}),
            ("cache", 0, SIZE),
            "flush",
            ("read", 512, 512),
            ("read", 1 << 20, 3 << 20),
            ("maps", 12 << 20, 4 << 20),
            contexts=[BASE],
        )
        assert outcomes[:7] == [None] * 7
        assert outcomes[7] == b"x" * 512
        assert outcomes[8] == pattern(0, 3 << 20)
        assert outcomes[9][BASE].at(0) == outcomes[9][BASE].at(2 << 20) == 3
        (fast,) = door(uri, ("write_zeroes", 6 << 20, 65536, {"fast": True}), contexts=())
        assert fast is None or (isinstance(fast, NbdRequestError) and fast.wire_error == 95)
    qemu_io(image, "read -P 120 512 512", "read -P 0 12M 64k", "read -P 0 13M 64k")


@both_doors
def test_qemu_says_no(door: Door, folder: Path) -> None:
    image = disk(folder)
    with qemu_nbd(folder, "-r", "-f", "raw", str(image)) as uri:
        refused, cached, read = door(uri, ("write", 0, b"x" * 512), ("cache", 0, 512), ("read", 0, 512), contexts=())
        assert isinstance(refused, NbdUnsupportedError)
        assert cached is None or isinstance(cached, NbdRequestError)
        assert read == pattern(0, 512)


@both_doors
def test_the_storage_daemon_serves_while_it_is_asked_by_many(door: Door, folder: Path) -> None:
    image = disk(folder, "qcow2")
    with storage_daemon() as daemon:
        file = {"driver": "file", "filename": str(image)}
        daemon.side("blockdev-add", driver="qcow2", node_name="n", file=file)
        daemon.side("nbd-server-start", addr={"type": "unix", "data": {"path": str(folder / "s")}})
        daemon.side("block-export-add", type="nbd", id="e", node_name="n", name="disk", writable=True)
        uri = NbdUri.unix(str(folder / "s"), "disk")
        written, read = door(uri, ("write", 5 << 20, pattern(0, 2 << 20)), ("read", 5 << 20, 2 << 20), contexts=[BASE])
        assert written is None
        assert read == pattern(0, 2 << 20)

        async def main() -> None:
            async with await aio.Client.connect(uri, contexts=[BASE]) as client:
                reads = [client.read(n << 18, 1 << 18) for n in range(16)]
                assert b"".join(await asyncio.gather(*reads)) == pattern(0, 4 << 20)

        asyncio.run(main())
        with Client.connect(uri) as client:
            client.read(0, 512)
            daemon.side("block-export-del", id="e", mode="hard")
            with pytest.raises(NbdDisconnectedError):
                client.read(0, 512)


@both_doors
def test_several_bitmaps_the_depth_and_the_allocation_at_once(door: Door, folder: Path) -> None:
    image = disk(folder, "qcow2")
    cluster = 64 << 10
    with storage_daemon() as daemon:
        file = {"driver": "file", "filename": str(image)}
        daemon.side("blockdev-add", driver="qcow2", node_name="n", file=file)
        daemon.side("nbd-server-start", addr={"type": "unix", "data": {"path": str(folder / "s")}})
        daemon.side("block-export-add", type="nbd", id="guest", node_name="n", name="guest", writable=True)
        for number, name in enumerate(("first", "second")):
            daemon.side("block-dirty-bitmap-add", node="n", name=name, granularity=cluster)
            door(NbdUri.unix(str(folder / "s"), "guest"), ("write", number * 4 * cluster, bytes(cluster)), contexts=[])
        for name in ("first", "second"):
            daemon.side("block-dirty-bitmap-disable", node="n", name=name)
        export = {"type": "nbd", "id": "e", "node-name": "n", "name": "e", "allocation-depth": True}
        daemon.side.execute("block-export-add", {**export, "bitmaps": ["first", "second"]})
        contexts = [BASE, "qemu:dirty-bitmap:first", DEPTH, "qemu:dirty-bitmap:second"]
        (maps,) = door(NbdUri.unix(str(folder / "s"), "e"), "maps", contexts=contexts)
    assert isinstance(maps, dict)
    assert list(maps) == contexts
    dirty = {context: [run.offset for run in maps[context] if run.value] for context in contexts[1::2]}
    assert dirty == {contexts[1]: [0, 4 * cluster], contexts[3]: [4 * cluster]}
    assert (maps[DEPTH].at(0), maps[BASE].at(0)) == (1, 0)


# nbdkit.


@both_doors
def test_nbdkit_with_blocks_of_4096_and_payloads_of_64_kib(door: Door, folder: Path) -> None:
    policy = ["blocksize-minimum=4096", "blocksize-preferred=64K", "blocksize-maximum=64K"]
    policy += ["blocksize-error-policy=error"]
    with nbdkit(folder, "--filter=blocksize-policy", "memory", "16M", *policy) as uri:
        outcomes = door(
            uri,
            ("write", 4096, pattern(0, 1 << 20)),
            ("read", 4096, 1 << 20),
            ("read", 512, 512),
            ("maps", 1000, 9000),
            ("write_zeroes", 4096, 8192, {"fast": True}),
            ("cache", 0, 1 << 20),
            contexts=[BASE],
        )
    assert outcomes[:2] == [None, pattern(0, 1 << 20)]
    assert isinstance(outcomes[2], UsageError)
    assert outcomes[3] == {BASE: ExtentMap.uniform(9000, 0)}
    assert outcomes[4:] == [None, None]


@both_doors
@pytest.mark.parametrize("error", ["EIO", "EPERM", "ENOSPC", "ENOMEM", "EINVAL"])
def test_nbdkit_with_errors(door: Door, folder: Path, error: str) -> None:
    faulty = ["--filter=error", "memory", "1M", f"error-pread={error}", "error-pread-rate=100%"]
    with nbdkit(folder, *faulty, f"error-pwrite={error}", "error-pwrite-rate=100%") as uri:
        read, written, mapped = door(uri, ("read", 0, 512), ("write", 0, b"x"), "maps", contexts=[BASE])
    for outcome in (read, written):
        assert isinstance(outcome, NbdRequestError)
        assert error in str(outcome)
    assert mapped == {BASE: ExtentMap.uniform(1 << 20, 3)}


@both_doors
def test_nbdkit_shutting_down(door: Door, folder: Path) -> None:
    with nbdkit(folder, "--filter=error", "pattern", "1M", "error=ESHUTDOWN", "error-rate=100%") as uri:
        assert isinstance(door(uri, ("read", 0, 512), contexts=())[0], NbdDisconnectedError)


@both_doors
def test_nbdkit_without_structured_replies(door: Door, folder: Path) -> None:
    with nbdkit(folder, "--no-sr", "memory", "16M") as uri:
        outcomes = door(uri, ("write", 100, pattern(0, 3 << 20)), ("read", 100, 3 << 20), "flush", contexts=())
    assert outcomes == [None, pattern(0, 3 << 20), None]


@both_doors
def test_nbdkit_of_old_is_read(door: Door, folder: Path) -> None:
    with nbdkit(folder, "-o", "data", "1 @1000 2", "size=1M") as uri:
        (read,) = door(uri, ("read", 0, 2000), contexts=())
    assert read == b"\1" + bytes(999) + b"\2" + bytes(999)


def test_many_requests_are_in_flight(folder: Path) -> None:
    """Sixteen reads have begun at a server that lets none of them end before."""
    log, control = folder / "log", f"{folder}/c"
    filters = ["--filter=log", "--filter=pause", "pattern", "1M", f"logfile={log}", f"pause-control={control}"]
    with nbdkit(folder, *filters) as uri, socket.socket(socket.AF_UNIX) as pause:
        pause.connect(control)
        pause.settimeout(LONG)

        async def main() -> None:
            async with await aio.Client.connect(uri) as client:
                pause.sendall(b"p")
                assert pause.recv(1) == b"P"
                reads = [asyncio.create_task(client.read(512 * n, 512)) for n in range(16)]
                begun = re.compile(r"(?<!\.\.\.)Read id=")
                await asyncio.to_thread(wait_until, lambda: len(begun.findall(log.read_text())) == 16, "all reads")
                assert not any(read.done() for read in reads)
                pause.sendall(b"r")
                assert len(await asyncio.gather(*reads)) == 16

        asyncio.run(main())


def test_a_connection_that_breaks_while_pieces_are_read(folder: Path) -> None:
    image = disk(folder)
    with (
        qemu_nbd(folder, "-r", "-f", "raw", str(image)) as uri,
        Client.connect(uri, contexts=[BASE], reconnect=Reconnect(attempts=40, delay=0.05)) as client,
    ):
        assert client.read(0, 512) == pattern(0, 512)
        pieces = client.chunks([(0, SIZE)], size=65536, in_flight=1)
        first = [(offset, bytes(data)) for offset, data in itertools.islice(pieces, 3)]
        client._runner.stream.shut_down()
        rest = [(offset, bytes(data)) for offset, data in pieces]
        assert client.statistics.connections == 2
    found = dict(first + rest)
    assert b"".join(found[offset] for offset in sorted(found)) == (folder / "flat").read_bytes()
    assert len(first) + len(rest) == SIZE // 65536


# Extended headers.


@both_doors
def test_new_qemu_with_extended_headers(door: Door, folder: Path) -> None:
    image = disk(folder, "qcow2")
    with qemu_nbd(folder, "-A", "-f", "qcow2", str(image), program=new_qemu_nbd()) as uri:
        with Client.connect(uri, contexts=[DEPTH, BASE]) as client:
            assert client.export.replies == "extended"
            assert client.export.flags & TransmissionFlag.BLOCK_STATUS_PAYLOAD
        steps = (
            ("maps", {"contexts": [BASE]}),
            ("maps", {"contexts": [DEPTH]}),
            "maps",
            ("block_status", 0, SIZE, {"one": True}),
            ("write", 4 << 20, pattern(0, 2 << 20), {"fua": True}),
            ("read", 4 << 20, 2 << 20),
            ("read", 0, 65536, {"unfragmented": True}),
            ("write_zeroes", 0, 65536, {"no_hole": True}),
            ("trim", 65536, 65536),
            "flush",
        )
        base, depth, both, one, *rest = door(uri, *steps)
        compact = door(uri, "maps", best="structured")
    assert base | depth == both
    assert {name: found.size for name, found in one.items()} == {DEPTH: 4 << 20, BASE: 4 << 20}
    assert rest == [None, pattern(0, 2 << 20), pattern(0, 65536), None, None, None]
    assert compact[0][BASE].size == SIZE


@both_doors
def test_new_qemu_tells_of_a_huge_disk_in_few_requests(door: Door, folder: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", folder / "huge", "8T")
    with qemu_nbd(folder, "-r", "-A", "-f", "qcow2", str(folder / "huge"), program=new_qemu_nbd()) as uri:
        assert door(uri, "maps", contexts=[DEPTH]) == [{DEPTH: ExtentMap.uniform(8 << 40, 0)}]
        with Client.connect(uri, contexts=[DEPTH]) as client:
            client.maps()
            assert client.statistics.requests < 64


def test_a_dense_disk_is_mapped_alike_over_every_form(folder: Path) -> None:
    program = new_qemu_nbd()
    image = folder / "dense.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", image, "16M")
    qemu_io(image, *(f"write -q {n * 5120} 512" for n in range(800)))
    with qemu_nbd(folder, "-r", "-A", "-f", "qcow2", str(image), program=program) as uri:
        found = []
        for best in ("structured", "extended"):
            with Client.connect(uri, contexts=[DEPTH, BASE], best=best) as client:
                found.append(client.maps())
    assert found[0] == found[1]
    assert len(found[0][DEPTH]) > 1500
