"""Real servers of every kind over every transport: what they hold arrives as it is."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qmpnbd.errors import (
    NbdRefusedError,
    NbdTlsError,
)
from qmpnbd.extents import ExtentMap
from qmpnbd.nbd import aio
from qmpnbd.nbd.client import Client
from qmpnbd.nbd.tls import Tls
from qmpnbd.nbd.uri import NbdUri
from tests.hostile_nbd import BASE, DEPTH, pattern
from tests.nbd_doors import Door, both_doors
from tests.nbd_servers import free_port, nbdkit, server, tcp_server
from tests.servers import Server, blockdev, qemu, qemu_img, qemu_io, storage_daemon, tool
from tests.tls_files import Authority

pytestmark = pytest.mark.real
MIB = 1 << 20


# Every server over every transport.

SIZE = 2 * MIB
FLAT = pattern(0, MIB) + bytes(MIB // 2) + b"\5" * 65536 + bytes(MIB // 2 - 65536)
HOLE = 3
MAPS = {
    DEPTH: ExtentMap.of_extents([(MIB, 2), (MIB // 2, 0), (65536, 1), (MIB // 2 - 65536, 0)]),
    BASE: ExtentMap.of_extents([(MIB, 0), (MIB // 2, HOLE), (65536, 0), (MIB // 2 - 65536, HOLE)]),
}


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def certificates(authority: Authority) -> Path:
    return authority.server()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers; beside the active one, `flat` is what they hold."""
    folder = tmp_path_factory.mktemp("interop")
    qemu_img("create", "-q", "-f", "qcow2", folder / "base", str(SIZE))
    (folder / "pattern").write_bytes(pattern(0, MIB))
    qemu_io(folder / "base", f"write -q -s {folder / 'pattern'} 0 1M")
    top = folder / "top.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", top)
    qemu_io(top, "write -q -P 5 1536k 64k")
    (folder / "flat").write_bytes(FLAT)
    return top


@contextlib.contextmanager
def by_qmp(server: Server, transport: str, certificates: Path) -> Iterator[NbdUri]:
    """Has a QEMU or a storage daemon serve its node `disk`."""
    more: dict[str, Any] = {}
    if transport == "tls":
        creds = {"qom_type": "tls-creds-x509", "id": "tls", "endpoint": "server", "verify_peer": False}
        server.side("object-add", dir=str(certificates), **creds)
        more["tls_creds"] = "tls"
    if transport == "unix":
        uri = NbdUri.unix(str(server.folder / "n"), "disk")
        addr: dict[str, Any] = {"type": "unix", "data": {"path": uri.path}}
    else:
        uri = NbdUri.tcp("127.0.0.1", free_port(), "disk")
        addr = {"type": "inet", "data": {"host": "127.0.0.1", "port": str(uri.port)}}
    server.side("nbd-server-start", addr=addr, **more)
    server.side("block-export-add", type="nbd", id="e", node_name="disk", name="disk", allocation_depth=True)
    yield uri
    server.side("nbd-server-stop")


@contextlib.contextmanager
def served(kind: str, transport: str, folder: Path, image: Path, certificates: Path) -> Iterator[NbdUri]:
    """Runs a server of one kind over one transport."""
    disk = blockdev(image, "disk", read_only=True)
    if kind == "qemu":
        with qemu("-blockdev", disk) as machine, by_qmp(machine, transport, certificates) as uri:
            yield uri
        return
    if kind == "storage daemon":
        with storage_daemon("--blockdev", disk) as daemon, by_qmp(daemon, transport, certificates) as uri:
            yield uri
        return
    if kind == "qemu-nbd":
        command = [tool("qemu-nbd"), "-r", "-A", "-t", "-e", "0", "-f", "qcow2", str(image)]
        secure = ["--object", f"tls-creds-x509,id=t,endpoint=server,dir={certificates},verify-peer=no"]
        secure += ["--tls-creds", "t"]
        unix, tcp = ["-k", f"{folder}/s"], ["-b", "127.0.0.1", "-p", "PORT"]
    else:
        command = [tool("nbdkit"), "-f", "-r", "file", str(image.with_name("flat"))]
        secure = ["--tls=require", f"--tls-certificates={certificates}"]
        unix, tcp = ["-U", f"{folder}/s"], ["-i", "127.0.0.1", "-p", "PORT"]
    if transport == "tls":
        tcp += secure
    program, *arguments = command
    options = unix if transport == "unix" else tcp
    start = server if transport == "unix" else tcp_server
    with start(folder, program, *options, *arguments) as uri:
        yield uri


@pytest.mark.parametrize("transport", ["unix", "tcp", "tls"])
@pytest.mark.parametrize("kind", ["qemu", "storage daemon", "qemu-nbd", "nbdkit"])
@both_doors
def test_every_server_over_every_transport(
    door: Door, kind: str, transport: str, folder: Path, image: Path, authority: Authority, certificates: Path
) -> None:
    tls = Tls(ca_file=str(authority.ca_file)) if transport == "tls" else None
    contexts = [BASE] if kind == "nbdkit" else [DEPTH, BASE]
    with served(kind, transport, folder, image, certificates) as uri:
        whole, pieces, maps = door(
            uri,
            ("read", 0, SIZE),
            ("chunks", [(0, SIZE)], {"size": 100_000}),
            "maps",
            contexts=contexts,
            tls=tls,
        )
        if transport == "tls":
            with pytest.raises(NbdRefusedError, match="requires TLS"):
                door(uri, contexts=contexts)
        else:
            with pytest.raises(NbdTlsError, match="refuses it"):
                door(uri, contexts=contexts, tls=Tls(hostname="127.0.0.1", ca_file=str(authority.ca_file)))
    assert whole == FLAT
    assert b"".join(data for _, data in sorted(pieces)) == FLAT
    if kind == "nbdkit":  # what is a hole in a file is up to the file system
        assert set(maps) == {BASE}
        assert maps[BASE].size == SIZE
    else:
        assert maps == MAPS


@both_doors
def test_a_socket_that_is_in_no_folder(door: Door, image: Path) -> None:
    name = f"qmpnbd-test-{os.getpid()}"
    with storage_daemon("--blockdev", blockdev(image, "disk", read_only=True)) as daemon:
        daemon.side("nbd-server-start", addr={"type": "unix", "data": {"path": name, "abstract": True}})
        daemon.side("block-export-add", type="nbd", id="e", node_name="disk", name="disk", allocation_depth=True)
        assert door(f"nbd+unix:///disk?socket=%00{name}", "maps", ("read", 0, 512)) == [MAPS, FLAT[:512]]


async def filled(uri: NbdUri, buffer: bytearray) -> None:
    async with await aio.Client.connect(uri) as client:
        await client.read_into(0, buffer)


def filled_blocking(uri: NbdUri, buffer: bytearray) -> None:
    with Client.connect(uri) as client:
        client.read_into(0, buffer)


@pytest.mark.parametrize("fill", [filled_blocking, lambda uri, buffer: asyncio.run(filled(uri, buffer))])
def test_a_buffer_of_the_caller_is_filled_without_a_copy(fill: Any, folder: Path) -> None:
    buffer = bytearray(32 * MIB)
    with nbdkit(folder, "pattern", "32M") as uri:
        fill(uri, bytearray(8))  # what is made once
        tracemalloc.start()
        try:
            fill(uri, buffer)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 2 * MIB
    assert buffer[-8:] == (32 * MIB - 8).to_bytes(8, "big")
