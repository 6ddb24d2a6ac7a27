"""Listening sockets that are made here and handed to QEMU, and who is connected to them.

QEMU making the socket itself has three faults: it unlinks whatever lies at the path, it lets the whole world in (0755),
and it never tells which port it found free. A socket of ours has none of them::

    bind, chmod 0600, listen  ->  getfd  ->  nbd-server-start fd        QEMU unlinks the path when its server stops
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path, PurePath

from qmpnbd.qmp.address import TcpAddress, UnixAddress
from qmpnbd.qmp.process import Peer

BACKLOG = 128
"""Clients that may wait to be accepted: as many as the kernel allows by default (SOMAXCONN before Linux 5.4)."""

_ACCEPTING = "00010000"  # __SO_ACCEPTCON of /proc/net/unix
_CONNECTED = "03"  # SS_CONNECTED of /proc/net/unix
_ESTABLISHED = "01"  # TCP_ESTABLISHED of /proc/net/tcp


@contextlib.contextmanager
def listening(address: UnixAddress | TcpAddress) -> Iterator[socket.socket]:
    """Makes a listening socket, for as long as it takes to hand it over; a path stays.

    Args:
        address: where; for port 0 the kernel chooses.

    Raises:
        OSError: it cannot be made.
    """
    with socket.socket(_family(address), socket.SOCK_STREAM) as sock:
        if isinstance(address, UnixAddress):
            sock.bind(address.path)
            Path(address.path).chmod(0o600)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((address.host, address.port))
        sock.listen(BACKLOG)
        yield sock


def remove_socket(address: UnixAddress) -> None:
    """Removes the name of a socket if it is still there."""
    with contextlib.suppress(OSError):
        Path(address.path).unlink()


def _family(address: UnixAddress | TcpAddress) -> socket.AddressFamily:
    if isinstance(address, UnixAddress):
        return socket.AF_UNIX
    return socket.AF_INET6 if ":" in address.host else socket.AF_INET


def free_port(host: str) -> int:
    """Returns a port that is free now; another program may take it next.

    Raises:
        OSError: nothing can listen at `host`.
    """
    with listening(TcpAddress(host, 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def listens_in(peer: Peer, folder: str) -> UnixAddress | None:
    """Returns the UNIX socket in a folder of this name that a process listens on, None if there is none.

    The kernel remembers the path that a socket was bound to, even if nothing is there any more, and by the socket's
    inode who has it open.
    """
    mine = peer.open_sockets()
    for row in _rows("unix"):
        if row[3] == _ACCEPTING and len(row) > 7 and PurePath(row[7]).parent.name == folder and int(row[6]) in mine:
            return UnixAddress(row[7])
    return None


def has_clients(address: UnixAddress | TcpAddress) -> bool:
    """Returns whether anybody is connected there, as far as the kernel of this host knows."""
    if isinstance(address, UnixAddress):
        # The accepting side bears the path of its listener: Num RefCount Protocol Flags Type St Inode Path.
        rows = _rows("unix")
        return any(row[5] == _CONNECTED and row[7:] == [address.path] for row in rows if len(row) > 7)
    port = f":{address.port:04X}"
    rows = [*_rows("tcp"), *_rows("tcp6")]
    return any(row[3] == _ESTABLISHED and row[1].endswith(port) for row in rows if len(row) > 3)


def _rows(name: str) -> list[list[str]]:
    try:
        return [line.split(maxsplit=7) for line in Path("/proc/net", name).read_text().splitlines()[1:]]
    except (OSError, UnicodeDecodeError):
        return []
