"""What is exported, and how: the choices of whoever starts a session of exports; pure."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from qmpnbd.nbd.tls import Tls
from qmpnbd.qmp.address import MonitorAddress, TcpAddress
from qmpnbd.qmp.checkpoint_at import NextCheckpoint
from qmpnbd.qmp.credentials import ServerTls
from qmpnbd.qmp.exports import ExportOptions
from qmpnbd.qmp.planning import Wishes

SETUP_SECONDS = 30.0
"""Time until the exports are up: what only asks a few questions, and starts a storage daemon at most."""


@dataclass(frozen=True, slots=True)
class Image:
    """An image file that no QEMU has open.

    Attributes:
        path: the file or block device.
        format: QEMU's name of its format.
    """

    path: str
    format: str


@dataclass(frozen=True, slots=True)
class Options:
    """How to export.

    Attributes:
        listen: a TCP port to listen on; None for a UNIX socket in a private directory.
        tls: TLS of the server.
        insecure: a TCP port without TLS.
        nbd: URI of the NBD server this QEMU runs already, to be shared; None to start one.
        runtime_dir: where the private directory is made; None for the folder for temporary files.
        allow_iothread: export disks in an iothread although this QEMU is known to abort on them.
        allow: names of hazards to take the risk of (`qmpnbd.qmp.capabilities.HAZARDS`).
        export: what each export offers.
        seconds: time until everything is up; None for no bound. Taking down has its own time.
        instant: export the disks as they are at one instant, taken like this; None for the disks as they go on.
        checkpoint: begin this checkpoint at that instant, and offer what was recorded until then; with `instant`.
        composed_depth: read before that instant what `Session.allocation_depth` composes; with an `instant` that has a
            depth. Nothing is read, and nothing can be composed, if this is False.
        client_tls: how our own client, which reads that, is let in where the server wants TLS.
        agent: the guest agent's socket, to have the guest's filesystems at rest at that instant; None to go without.
        journal: folder in which it is written down that the guest may be frozen; with `agent`.
    """

    listen: TcpAddress | None = None
    tls: ServerTls | None = None
    insecure: bool = False
    nbd: str | None = None
    runtime_dir: str | None = None
    allow_iothread: bool = False
    allow: Collection[str] = ()
    export: ExportOptions = field(default_factory=ExportOptions)
    seconds: float | None = SETUP_SECONDS
    instant: Wishes | None = None
    checkpoint: NextCheckpoint | None = None
    composed_depth: bool = True
    client_tls: Tls | None = None
    agent: MonitorAddress | str | None = None
    journal: str = ""

    @property
    def composes_depth(self) -> bool:
        """Whether the allocation depths of an instant can be told."""
        return self.composed_depth and self.instant is not None and self.instant.depth
