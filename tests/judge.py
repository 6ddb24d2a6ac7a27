"""QEMU as the judge of chains: one storage daemon for many of them, asked over QMP and NBD.

A process a question costs more than the answer; a chain is added, exported, read and removed again in milliseconds.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qmpnbd.extents import ExtentMap
from qmpnbd.nbd.client import Client
from tests.servers import Server, storage_daemon, tool

DEPTH = "qemu:allocation-depth"
BASE = "base:allocation"


class Judge:
    """A running storage daemon."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._socket = server.folder / "nbd"
        self._numbers = itertools.count()
        address = {"type": "unix", "data": {"path": str(self._socket)}}
        server.side("nbd-server-start", addr=address)

    def maps(
        self, image: Path | str, image_format: str = "qcow2", bitmaps: Sequence[str] = (), **options: object
    ) -> Mapping[str, ExtentMap]:
        """What an export of an image serves: base:allocation, qemu:allocation-depth, and its bitmaps by name."""
        with self.added(image, image_format, **options) as node:
            more = {"bitmaps": list(bitmaps)} if bitmaps else {}
            self._server.side("block-export-add", type="nbd", id=node, node_name=node, allocation_depth=True, **more)
            contexts = [BASE, DEPTH, *(f"qemu:dirty-bitmap:{name}" for name in bitmaps)]
            try:
                with Client.connect(f"nbd+unix:///{node}?socket={self._socket}", contexts=contexts) as client:
                    return client.maps()
            finally:
                self._server.side("block-export-del", id=node, mode="hard")
                self._wait_for_export_to_go(node)

    @contextlib.contextmanager
    def added(self, image: Path | str, image_format: str = "qcow2", **options: object) -> Iterator[str]:
        """An image as a node; file names in its header are followed by QEMU."""
        node = f"n{next(self._numbers)}"
        file = {"driver": "file", "filename": str(image), "locking": "off"}
        self._server.side("blockdev-add", node_name=node, driver=image_format, file=file, read_only=True, **options)
        try:
            yield node
        finally:
            self._server.side("blockdev-del", node_name=node)

    def command(self, name: str, **arguments: object) -> Any:
        """Executes any QMP command."""
        return self._server.side(name, **arguments)

    def _wait_for_export_to_go(self, node: str) -> None:
        while node in self._server.exports():
            pass


@contextlib.contextmanager
def judge(cwd: Path | None = None) -> Iterator[Judge]:
    """Starts a judge, and ends it."""
    with storage_daemon(cwd=cwd) as server:
        yield Judge(server)


def qemu_map(image: Path | str, image_format: str = "qcow2") -> list[dict[str, Any]]:
    """What ``qemu-img map`` says."""
    command = [tool("qemu-img"), "map", "--output=json", "-U", "-f", image_format, str(image)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    entries: list[dict[str, Any]] = json.loads(done.stdout)
    return entries
