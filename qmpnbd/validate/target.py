"""What is to be validated: disks of running QEMUs, exports of any NBD server, image files; pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from qmpnbd.qmp.address import MonitorAddress


@dataclass(frozen=True, slots=True)
class MonitorTarget:
    """Disks of a running QEMU.

    Attributes:
        monitor: the QMP address.
        disks: qdev ids, QOM paths or node-names; none for all disks of the guest.
        nbd: URI of the NBD server that this QEMU runs already, to be shared; None to start one.
        name: how the report calls it until its disks are known.
    """

    monitor: MonitorAddress | str
    disks: tuple[str, ...] = ()
    nbd: str | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", str(self.monitor))

    @property
    def source(self) -> str:
        """Where it is found."""
        return str(self.monitor)


@dataclass(frozen=True, slots=True)
class ServedTarget:
    """An export of any NBD server, and the image that it should be an export of.

    Attributes:
        uri: the export.
        image: the active layer.
        format: its format; None to guess it from its first bytes.
        name: how the report calls it.
    """

    uri: str
    image: str
    format: str | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", self.image)

    @property
    def source(self) -> str:
        """Where it is found."""
        return self.uri


@dataclass(frozen=True, slots=True)
class ImageTarget:
    """An image file alone: a storage daemon is started to serve it.

    Attributes:
        image: the active layer.
        format: its format; None to guess it from its first bytes.
        name: how the report calls it.
    """

    image: str
    format: str | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", self.image)

    @property
    def source(self) -> str:
        """Where it is found."""
        return self.image


Target: TypeAlias = MonitorTarget | ServedTarget | ImageTarget
