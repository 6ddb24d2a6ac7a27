"""Where a monitor listens: a UNIX socket or a TCP port."""

from __future__ import annotations

import os
from dataclasses import dataclass

from qmpnbd.errors import UsageError

MAX_UNIX_PATH = 107
"""Bytes that fit into sun_path with its terminating NUL (unix(7)); QEMU refuses longer ones too."""


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A UNIX socket.

    Attributes:
        path: its path.
    """

    path: str

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A TCP port.

    Attributes:
        host: name or address, without brackets.
        port: 1 to 65535.
    """

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


MonitorAddress = UnixAddress | TcpAddress


def parse_address(text: str) -> MonitorAddress:
    """Reads an address as people write it: ``PATH``, ``unix:PATH``, ``HOST:PORT`` or ``tcp:HOST:PORT``.

    A text with a slash is a path, as is one without a colon; so ``./a:1`` is a path, and ``a:1`` a port.

    Raises:
        UsageError: it is none of these.
    """
    if text.startswith("tcp:"):
        return _parse_tcp(text.removeprefix("tcp:"))
    if not text.startswith("unix:") and "/" not in text and ":" in text:
        return _parse_tcp(text)
    path = text.removeprefix("unix:")
    if not path:
        raise UsageError("an empty monitor address", where="--qmp", remedy="Give the path of QEMU's QMP socket.")
    if len(os.fsencode(path)) > MAX_UNIX_PATH:
        raise UsageError(
            f"the socket path is longer than {MAX_UNIX_PATH} bytes", where=path, remedy="Use a shorter or relative one."
        )
    return UnixAddress(path)


def _parse_tcp(text: str) -> TcpAddress:
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    # isdecimal alone would take digits of other scripts, which int() takes too.
    if not host or not port.isascii() or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError("not HOST:PORT", where=text, remedy="A TCP monitor is written 127.0.0.1:4444 or [::1]:4444.")
    return TcpAddress(host, int(port))
