"""The NBD client against libnbd's tools: whole maps, their memory, and sequential reads.

Run it as ``scripts/bench/nbd``; ``--only dense,empty,chain,far,read`` for parts. All processes are timed from outside,
start-up included; the servers are qemu-nbd over UNIX sockets, and an nbdkit that takes its time.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from measure import Run, run, side_by_side, table

HERE = Path(__file__).parent
DEPTH = "qemu:allocation-depth"
EXTENTS = 2_200_000
BLOCK = 1 << 20
READ_SIZE = 8 << 30

MAP = """
import sys, time
import numpy
from qmpnbd.nbd.client import Client
began = time.monotonic()
with Client.connect(sys.argv[1], contexts=["qemu:allocation-depth"]) as client:
    client.maps()
print("inside", time.monotonic() - began)
"""
MAP_LIMITED = """
import sys, time
import numpy
from qmpnbd.nbd.client import Client
from qmpnbd.nbd.limits import Limits
began = time.monotonic()
with Client.connect(sys.argv[1], contexts=[sys.argv[2]]) as client:
    client.maps(limits=Limits(in_flight=int(sys.argv[3])))
print("inside", time.monotonic() - began)
"""
MAP_AIO = """
import asyncio, sys, time
import numpy
from qmpnbd.nbd.aio import Client
async def main():
    began = time.monotonic()
    async with await Client.connect(sys.argv[1], contexts=["qemu:allocation-depth"]) as client:
        await client.maps()
    print("inside", time.monotonic() - began)
asyncio.run(main())
"""
READ = """
import sys, time
import numpy
from qmpnbd.nbd.client import Client
began = time.monotonic()
with Client.connect(sys.argv[1], contexts=["base:allocation"]) as client:
    data = [(e.offset, e.length) for e in client.maps()["base:allocation"] if not e.value & 1]
    assert sum(len(view) for _, view in client.chunks(data)) == 4 << 30
print("inside", time.monotonic() - began)
"""
READ_AIO = """
import asyncio, sys, time
import numpy
from qmpnbd.nbd.aio import Client
async def main():
    began = time.monotonic()
    async with await Client.connect(sys.argv[1], contexts=["base:allocation"]) as client:
        data = [(e.offset, e.length) for e in (await client.maps())["base:allocation"] if not e.value & 1]
        total = 0
        async for _, view in client.chunks(data):
            total += len(view)
    assert total == 4 << 30
    print("inside", time.monotonic() - began)
asyncio.run(main())
"""


def python(code: str, *arguments: str) -> Sequence[str]:
    """Returns the command that runs `code`."""
    return [sys.executable, "-c", code, *arguments]


@contextmanager
def served(image: Path, image_format: str, folder: Path) -> Iterator[str]:
    """Serves an image read-only; the URI."""
    path = folder / "socket"
    command = ["qemu-nbd", "-A", "-r", "-t", "-e", "0", "-f", image_format, "-k", str(path), str(image)]
    with listening(command, path) as uri:
        yield uri


@contextmanager
def listening(command: Sequence[str], path: Path) -> Iterator[str]:
    """Runs a server that listens on a UNIX socket; the URI."""
    with subprocess.Popen(command) as server:
        try:
            deadline = time.monotonic() + 10
            while f"{path}\n" not in Path("/proc/net/unix").read_text():
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{command[0]} does not listen")
                time.sleep(0.01)
            yield f"nbd+unix:///?socket={path}"
        finally:
            server.terminate()
            path.unlink(missing_ok=True)


def maps(title: str, image: Path, folder: Path, rounds: int) -> dict[str, Run]:
    """Times whole maps of an image and prints the table."""
    with served(image, "qcow2", folder) as uri:
        commands: dict[str, Sequence[str]] = {
            "`nbdinfo --map=qemu:allocation-depth`": ["nbdinfo", f"--map={DEPTH}", uri],
            "`nbdinfo --map=qemu:allocation-depth --json`": ["nbdinfo", f"--map={DEPTH}", "--json", uri],
            "`Client.maps()`, blocking, a process of its own": python(MAP, uri),
            "`Client.maps()`, asyncio, a process of its own": python(MAP_AIO, uri),
            "`qmpnbd map --nbdinfo` (the bytes of `nbdinfo --json`)": ["qmpnbd", "map", uri, "--nbdinfo"],
        }
        results = side_by_side(commands, rounds)
    print(table(title, results, next(iter(commands))), flush=True)
    return results


def dense(folder: Path, rounds: int) -> None:
    """A map of more than two million extents, and the memory it takes."""
    image = folder / "dense.qcow2"
    subprocess.run([sys.executable, str(HERE / "images.py"), "alternating", str(EXTENTS), image], check=True)
    subprocess.run(["qemu-img", "check", "-q", image], check=True)
    results = maps(f"Depth map, dense: {EXTENTS:,} extents", image, folder, rounds)
    bare = run(python("pass"))
    ours = results["`Client.maps()`, blocking, a process of its own"]
    print(
        f"Peak memory over a bare interpreter: {(ours.memory - bare.memory) * 2**20 / EXTENTS:.0f} bytes an extent.\n"
    )


def empty(folder: Path, rounds: int) -> None:
    """A map of one extent that takes 65,538 requests of 32 bits."""
    image = folder / "empty.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", image, "256T"], check=True)
    maps("Depth map, empty: 256 TiB", image, folder, rounds)


def in_flight(title: str, uri: str, context: str, rounds: int) -> None:
    """Times maps with one request in flight and with as many as the client chooses."""
    commands: dict[str, Sequence[str]] = {
        f"`nbdinfo --map={context}`": ["nbdinfo", f"--map={context}", uri],
        "`Client.maps()`, one request in flight": python(MAP_LIMITED, uri, context, "1"),
        "`Client.maps()`": python(MAP_LIMITED, uri, context, "16"),
    }
    print(table(title, side_by_side(commands, rounds), next(iter(commands))), flush=True)


def chain(folder: Path, rounds: int) -> None:
    """A chain whose tables do not fit QEMU's caches: requests in flight wait for one another."""
    command = [sys.executable, str(HERE / "chain.py"), "--make", "four", str(folder)]
    image = Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
    with served(image, "qcow2", folder) as uri:
        in_flight("Depth map, 1 TiB in four layers: 2.3 million extents", uri, DEPTH, rounds)


def far(folder: Path, rounds: int) -> None:
    """A server that takes 20 ms for each block status, and any number of them at a time."""
    path = folder / "far"
    command = ["nbdkit", "-f", "-U", str(path), "--filter=delay", "null", "900G", "delay-extents=20ms"]
    with listening(command, path) as uri:
        in_flight("Map, 900 GiB, 20 ms a reply", uri, "base:allocation", rounds)


def read(folder: Path, rounds: int) -> None:
    """All data of a half-full raw disk; the page cache holds it."""
    image = folder / "half.raw"
    block = os.urandom(BLOCK)
    with image.open("wb") as file:
        for offset in range(0, READ_SIZE, 128 * BLOCK):
            file.seek(offset)
            for _ in range(64):
                file.write(block)
        file.truncate(READ_SIZE)
        file.flush()
        os.fsync(file.fileno())  # or the kernel would write it back while it is read
    with served(image, "raw", folder) as uri:
        commands: dict[str, Sequence[str]] = {
            "`nbdcopy URI null:`": ["nbdcopy", uri, "null:"],
            "`Client.chunks()`, blocking": python(READ, uri),
            "`Client.chunks()`, asyncio": python(READ_AIO, uri),
        }
        results = side_by_side(commands, rounds)
    print(table(f"Sequential read, {READ_SIZE >> 30} GiB half full, one connection", results, "`nbdcopy URI null:`"))


PARTS = {"dense": dense, "empty": empty, "chain": chain, "far": far, "read": read}


def main() -> None:
    """Runs the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, comma-separated: {', '.join(PARTS)}")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default: 5)")
    parser.add_argument("--folder", help="where to make the images; 5 GiB (default: the folder for temporary files)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-", dir=arguments.folder) as name:
        for part in arguments.only.split(","):
            PARTS[part](Path(name), arguments.rounds)


if __name__ == "__main__":
    main()
