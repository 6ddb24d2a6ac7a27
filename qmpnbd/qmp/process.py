"""The process at the other end of a UNIX socket: which files it has open, as whom it runs, and where.

All of it is the kernel's word, not the peer's. What it does not tell (another host, another process namespace, another
user's process) is None: unknown, never assumed.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

FileIdentity: TypeAlias = tuple[str, int, int]
"""``file``, device and inode; or ``device``, the device number and 0: two device nodes can lead to one device."""

_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


@dataclass(frozen=True, slots=True)
class Peer:
    """A process.

    Attributes:
        pid: its process id.
    """

    pid: int

    def has_ended(self) -> bool:
        """Returns whether it has ended for certain; one that nobody has buried yet has ended, too."""
        try:
            return is_ended(Path(f"/proc/{self.pid}/stat").read_text())
        except (FileNotFoundError, ProcessLookupError):
            return True
        except (OSError, ValueError, IndexError):
            return False

    def user(self) -> tuple[int, int] | None:
        """Returns the user and group ids that it runs as now, which may be others than when it made the socket."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
            words = {line.split(":")[0]: line.split() for line in lines}
            return int(words["Uid"][2]), int(words["Gid"][2])
        return None

    def working_directory(self) -> str | None:
        """Returns its working directory, to which relative image names refer."""
        with contextlib.suppress(OSError):
            return str(Path(f"/proc/{self.pid}/cwd").readlink())
        return None

    def open_files(self) -> frozenset[FileIdentity] | None:
        """Returns the regular files and block devices that it has open, those that lost their name included."""
        found = set()
        try:
            descriptors = os.listdir(f"/proc/{self.pid}/fd")  # noqa: PTH208 - names are all that is wanted
        except OSError:
            return None
        for descriptor in descriptors:
            with contextlib.suppress(OSError):  # closed meanwhile
                found.add(identity_of(Path(f"/proc/{self.pid}/fd/{descriptor}").stat()))
        return frozenset(found)

    def open_sockets(self) -> frozenset[int]:
        """Returns the inodes of the sockets that it has open; none if it is not told."""
        found = set()
        with contextlib.suppress(OSError):
            for descriptor in Path(f"/proc/{self.pid}/fd").iterdir():
                with contextlib.suppress(OSError, ValueError):  # closed meanwhile, or no socket
                    found.add(int(str(descriptor.readlink()).removeprefix("socket:[").removesuffix("]")))
        return frozenset(found)


def is_ended(stat_line: str) -> bool:
    """Returns whether a process has ended by its line in ``/proc/PID/stat`` (proc(5)): state, and number of threads.

    The first thread can be a zombie while others still hold the files and sockets of all.
    """
    fields = stat_line.rpartition(")")[2].split()
    return fields[0] in "ZX" and int(fields[17]) <= 1


def identity_of(status: os.stat_result) -> FileIdentity:
    """Returns what is equal for two names of one file."""
    if stat.S_ISBLK(status.st_mode):
        return "device", status.st_rdev, 0
    return "file", status.st_dev, status.st_ino


def peer_of(sock: socket.socket) -> Peer | None:
    """Returns the process that listens at the other end of a UNIX socket.

    The kernel tells who made the socket listen, or who made the pair of which a socket without a name is half. Where
    that was this process itself, it says nothing of who has the other end now.
    """
    if sock.family != socket.AF_UNIX or not sock.getpeername():
        return None
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid: int = _CREDENTIALS.unpack(credentials)[0]
    # 0: in a process namespace that cannot be seen from here.
    return Peer(pid) if pid not in (0, os.getpid()) else None


def listener_at(path: Path, seconds: float) -> Peer | None:
    """Returns the process that listens on a UNIX socket, None if nobody does; pid 0 if the kernel does not tell who."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, contextlib.suppress(OSError):
        probe.settimeout(seconds)
        probe.connect(str(path))
        return peer_of(probe) or Peer(0)
    return None
