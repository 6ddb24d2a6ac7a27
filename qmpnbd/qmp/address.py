"""Where a monitor is: a UNIX socket, a TCP port, a descriptor that was inherited, or a domain of libvirt's."""

from __future__ import annotations

import os
from dataclasses import dataclass

from qmpnbd.errors import UsageError

MAX_UNIX_PATH = 107
"""Bytes that fit into sun_path with its terminating NUL (unix(7)); QEMU refuses longer ones too."""

MAX_DESCRIPTOR = (1 << 31) - 1
"""A descriptor is a C int."""


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


@dataclass(frozen=True, slots=True)
class FdAddress:
    """A connected socket that this process has inherited; it can be used once, and is closed then.

    Attributes:
        fd: the descriptor.
        name: what messages call it; empty for its number.
    """

    fd: int
    name: str = ""

    def __str__(self) -> str:
        return self.name or f"fd:{self.fd}"


@dataclass(frozen=True, slots=True)
class LibvirtAddress:
    """A domain that libvirt runs: libvirt holds its monitor, and passes commands on.

    Attributes:
        uri: the connection URI; empty for libvirt's own default.
        domain: its name, or its UUID.
    """

    uri: str
    domain: str

    def __str__(self) -> str:
        return f"{self.uri or 'libvirt'} domain {self.domain}"


MonitorAddress = UnixAddress | TcpAddress | FdAddress | LibvirtAddress


def parse_address(text: str) -> MonitorAddress:
    """Reads an address as people write it: ``PATH``, ``unix:PATH``, ``HOST:PORT``, ``tcp:HOST:PORT`` or ``fd:N``.

    A text with a slash is a path, as is one without a colon; so ``./a:1`` is a path, and ``a:1`` a port.

    Raises:
        UsageError: it is none of these.
    """
    if text.startswith("tcp:"):
        return _parse_tcp(text.removeprefix("tcp:"))
    if text.startswith("fd:"):
        return _parse_fd(text)
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
    if not host or not _is_number(port, 65535) or int(port) == 0:
        raise UsageError("not HOST:PORT", where=text, remedy="A TCP monitor is written 127.0.0.1:4444 or [::1]:4444.")
    return TcpAddress(host, int(port))


def _parse_fd(text: str) -> FdAddress:
    number = text.removeprefix("fd:")
    if not _is_number(number, MAX_DESCRIPTOR):
        raise UsageError("not fd:N", where=text, remedy="An inherited descriptor is written fd:3.")
    return FdAddress(int(number))


def _is_number(text: str, most: int) -> bool:
    # isdecimal alone would take digits of other scripts, which int() takes too; the length bounds what int() reads.
    return text.isascii() and text.isdecimal() and len(text) <= len(str(most)) and int(text) <= most
