"""A guest that never rests: qemu-io on a writable export of a storage daemon's node."""

from __future__ import annotations

import contextlib
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.servers import Server, tool

MIXED = ("write -q", "write -q -z -u", "discard -q", "write -q")


@contextlib.contextmanager
def writing(
    server: Server, socket_path: Path, size: int, commands: Sequence[str] = MIXED, node_name: str = "top"
) -> Iterator[None]:
    """Writes, discards and zeroes clusters of 64 KiB below `size` all the time, by turns as `commands` has them."""
    server.side("nbd-server-start", addr={"type": "unix", "data": {"path": str(socket_path)}})
    server.side("block-export-add", type="nbd", id="guest", node_name=node_name, name="guest", writable=True)
    stop = threading.Event()
    uri = f"nbd+unix:///guest?socket={socket_path}"
    child = subprocess.Popen(
        [tool("qemu-io"), "-t", "writeback", "-f", "raw", "-d", "unmap", uri],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    assert child.stdin is not None
    pipe = child.stdin

    def work() -> None:
        state = 1
        while not stop.is_set():
            state = state * 6364136223846793005 % 2**64 + 1442695040888963407
            offset = (state >> 20) % (size // 65536) * 65536
            command = commands[(state >> 60) % len(commands)]
            pipe.write(f"{command} {offset} 64k\n".encode())
            pipe.flush()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        child.communicate(b"quit\n", timeout=30)
        assert child.returncode == 0
        server.side("nbd-server-stop")


@contextlib.contextmanager
def written_and_not_flushed(uri: str, command: str) -> Iterator[None]:
    """Lets one writing command of qemu-io be done and acknowledged, and keeps the connection without a flush."""
    with subprocess.Popen(
        [tool("qemu-io"), "-t", "writeback", "-f", "raw", uri], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(f"{command}\n".encode())
        child.stdin.flush()
        while b"ops" not in (line := child.stdout.readline()):
            assert line, "qemu-io ended"
        try:
            yield
        finally:
            child.communicate(b"quit\n", timeout=30)
