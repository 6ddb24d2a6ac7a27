"""Real NBD servers for tests, by their socket or port."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from qmpnbd.nbd.tls import Tls
from qmpnbd.nbd.uri import NbdUri
from tests.servers import listening, process, tool, wait_until


@contextlib.contextmanager
def running(folder: Path, *command: str, name: str = "s") -> Iterator[tuple[NbdUri, subprocess.Popen[bytes]]]:
    """Runs a server that is told to listen on the UNIX socket `name` in a folder; yields its process as well."""
    path = folder / name
    with _started(folder, command, lambda: listening(path), name) as child:
        yield NbdUri.unix(str(path)), child
    path.unlink(missing_ok=True)


@contextlib.contextmanager
def server(folder: Path, *command: str, name: str = "s") -> Iterator[NbdUri]:
    """The same without its process."""
    with running(folder, *command, name=name) as (uri, _):
        yield uri


@contextlib.contextmanager
def tcp_server(folder: Path, *command: str, tls: Tls | None = None, export: str = "") -> Iterator[NbdUri]:
    """Runs a server that is told to listen on PORT of this machine."""
    port = free_port()
    named = [part.replace("PORT", str(port)) for part in command]
    with _started(folder, named, lambda: accepts(port), "tcp"):
        yield NbdUri.tcp("127.0.0.1", port, export, tls)


@contextlib.contextmanager
def _started(
    folder: Path, command: list[str] | tuple[str, ...], ready: Callable[[], bool], name: str
) -> Iterator[subprocess.Popen[bytes]]:
    log = folder / f"{name}.log"
    with process(command, log) as child:
        wait_until(lambda: ready() or child.poll() is not None, command[0])
        assert child.poll() is None, log.read_text()
        yield child


def qemu_nbd(folder: Path, *arguments: str, program: str | None = None) -> contextlib.AbstractContextManager[NbdUri]:
    """A qemu-nbd on a UNIX socket."""
    return server(folder, program or tool("qemu-nbd"), "-k", str(folder / "s"), "-t", "-e", "0", *arguments)


def nbdkit(folder: Path, *arguments: str) -> contextlib.AbstractContextManager[NbdUri]:
    """An nbdkit on a UNIX socket."""
    return server(folder, tool("nbdkit"), "-f", "-U", str(folder / "s"), *arguments)


def free_port() -> int:
    """Returns a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def accepts(port: int) -> bool:
    """Whether somebody listens on a port of this machine; asks the kernel, because a server counts whoever connects."""
    listens, ending = "0A", f":{port:04X}"
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return any(fields[1].endswith(ending) and fields[3] == listens for fields in map(str.split, lines))
