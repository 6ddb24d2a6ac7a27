"""What there is to do for one disk of a backup, and which bytes that means: maps over NBD, and what is known."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from qmpnbd.backup.plan import Decision
from qmpnbd.backup.selection import at_most, held, rounded_out, selected, touched, whole, zeroed_since
from qmpnbd.deadline import Deadline
from qmpnbd.export.joining import Join, straight
from qmpnbd.extents import ExtentMap
from qmpnbd.nbd.client import Client
from qmpnbd.nbd.uri import NbdUri

ALLOCATION = "base:allocation"
DEPTH = "qemu:allocation-depth"
DIRTY = "qemu:dirty-bitmap:"


@dataclass(frozen=True, slots=True)
class Template:
    """What a shallow backup leaves out: the layers below the active one.

    Attributes:
        path: the uppermost of them, as QEMU names it.
        format: its format.
        size: bytes of its disk.
    """

    path: str
    format: str
    size: int


@dataclass(frozen=True, slots=True)
class DiskTask:
    """A disk as it was at the instant, readable until the point in time is released.

    Attributes:
        name: as the disk is addressed.
        qom_path: its device; empty for a node without one.
        node_name: the node that its bitmaps are on.
        device: the device's type (``virtio-blk-pci``); empty for a node without one.
        identity: what tells its image from those of the other disks.
        size: bytes.
        uri: where to read it, with the contexts `ALLOCATION` and `DIRTY` + each of `bitmaps`.
        depth_uri: where to read its allocation depth; None if that is not offered.
        decision: what its layer shall hold.
        bitmaps: dirty bitmaps whose union was written since the backup that they count from.
        bitmap: the one that records from the instant on; empty if none does.
        granularity: of `bitmap`, in bytes; None without one.
        checkpoint: number of the checkpoint that begins; None if none does.
        transient_because: why `bitmap` vanishes with QEMU; empty if it persists.
        template: what lies below its active layer; None if nothing does.
    """

    name: str
    qom_path: str
    node_name: str
    device: str
    identity: str
    size: int
    uri: NbdUri
    depth_uri: NbdUri | None
    decision: Decision
    bitmaps: tuple[str, ...] = ()
    bitmap: str = ""
    granularity: int | None = None
    checkpoint: int | None = None
    transient_because: str = ""
    template: Template | None = None

    def content(
        self,
        layers: Iterable[ExtentMap],
        unit: int,
        deadline: Deadline,
        *,
        below: ExtentMap | None = None,
        join: Join = straight,
    ) -> ExtentMap:
        """Reads what the disk's layer is to hold; of a disk that is compared, everything.

        Args:
            layers: what the layers of `Decision.layers` hold.
            unit: bytes that are stored as a whole: a cluster of the layer.
            deadline: for reading the maps.
            below: what the backup that the layer stands on holds, with all below it; without it, what QEMU's bitmaps
                do not record is not noticed (`qmpnbd.backup.selection.zeroed_since`).
            join: how to connect.

        Returns:
            The layer's content. Its mask is rounded out to units; what is zero within one is not.

        Raises:
            NbdError: a map cannot be read.
            DeadlineError: the time is over.
        """
        dirty = [DIRTY + name for name in self.bitmaps] if self.decision.by_bitmap else []
        with join(partial(Client.connect, self.uri, contexts=[ALLOCATION, *dirty], deadline=deadline)) as client:
            maps = client.maps(deadline=deadline)
        disk = whole(maps[ALLOCATION])
        if self.decision.by_bitmap:
            wanted = [*(maps[each] for each in dirty), *map(held, layers)]
            if below is not None:
                wanted.append(zeroed_since(disk, below, unit))
            return selected(rounded_out(touched(self.size, wanted), unit), disk)
        if self.decision.kind == "shallow" and self.depth_uri is not None:
            return selected(rounded_out(self._active(deadline, join), unit), disk)
        return disk

    def _active(self, deadline: Deadline, join: Join) -> ExtentMap:
        """Returns where the active layer holds something at the instant, and perhaps a little more.

        The scratch image lies above the disk: depth 1 is what the guest has overwritten since, kept as it was, and 2 is
        the active layer. What the guest discards after the instant was kept first, so nothing is missing.
        """
        with join(partial(Client.connect, self.depth_uri or self.uri, contexts=[DEPTH], deadline=deadline)) as client:
            return at_most(client.maps(deadline=deadline)[DEPTH], 2)
