"""What is to be copied of each disk, and why: from what a catalog of backups and a QEMU know; pure.

Each disk is decided about by itself. What a bitmap tells is relied on only if it says for certain which backup of this
very disk it counts from; otherwise the disk is read as a whole, and what differs from a backup of it is stored::

    bitmap counts from a backup that is there ---- yes --> increment, or differential with the layers in between
                     | no, and why
    a backup of a disk of that name and size ----- yes --> compared
                     | no
                     `-----------------------------------> full, or shallow

A bitmap's name holds the id of a backup, but not which of its disks: all bitmaps of one instant have one name. So two
images that change places would each be taken for the other, if it were not for what `KnownDisk.identity` remembers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from qmpnbd.qmp.checkpoint_state import State

Kind = Literal["full", "increment", "differential", "compared", "shallow"]
"""What a disk's layer holds: everything; what was written since the base; the same, since an earlier one; what differs
from the base by comparison; what lies above the disk's template."""

Type = Literal["auto", "full", "increment", "differential"]
"""What is asked for."""

ASKED_FOR = "asked for"
NO_BACKUP = "no backup yet"
NEW_DISK = "new disk"
SIZE_CHANGED = "size changed"
SWAPPED = "disk swapped"
NOT_IN_REPOSITORY = "last backup not in repository"
NOT_ON_THE_WAY = "no increments lead there"
READ_ONLY = "read-only"
TRANSIENT = "cannot keep a bitmap"
NO_TEMPLATE = "no template"
BITMAP_LOST = "bitmap lost"
UNREADABLE = "last backup cannot be read"

_BY_STATE: Mapping[State, str] = {
    "missing": BITMAP_LOST,
    "displaced": "new active layer",
    "stopped": "bitmap stopped",
    "inconsistent": "bitmap inconsistent",
}

REMEDIES: Mapping[str, str] = {
    NEW_DISK: "Nothing: the next one can be an increment.",
    SIZE_CHANGED: "Nothing: the next one can be an increment.",
    BITMAP_LOST: "Nothing: a new bitmap records from now on. It is lost when QEMU is killed, or made on a raw image.",
    "bitmap inconsistent": "Nothing: a new bitmap records from now on. End QEMU in order, so that it is stored.",
    "bitmap stopped": "Let nobody else disable the bitmaps of qmpnbd.",
    "new active layer": "Nothing: a new bitmap records from now on. Snapshots leave the bitmaps in the layer below.",
    SWAPPED: "Nothing, if the disk's image was moved or exchanged on purpose.",
    NOT_IN_REPOSITORY: "Give each repository a chain of its own.",
    NOT_ON_THE_WAY: "Name a backup that increments were made from, for a differential that need not read the disk.",
    UNREADABLE: "See `qmpnbd repository check`.",
    TRANSIENT: "Use qcow2 of version 3, which stores bitmaps.",
    NO_TEMPLATE: "Only a disk with a backing file can be backed up without its template.",
}
"""Reason -> what to do about it."""


@dataclass(frozen=True, slots=True)
class KnownDisk:
    """A disk as a backup holds it.

    Attributes:
        size: bytes.
        base: id of the backup that its layer stands on; None for one that stands on nothing of the repository.
        identity: what told its image from those of the other disks; see `same_image`.
    """

    size: int
    base: str | None = None
    identity: str = ""


@dataclass(frozen=True, slots=True)
class KnownBackup:
    """A backup that is whole.

    Attributes:
        id: its id, which is in the names of the bitmaps that count from it.
        number: orders the backups of a chain.
        disks: by name.
    """

    id: str
    number: int
    disks: Mapping[str, KnownDisk]


@dataclass(frozen=True, slots=True)
class Catalog:
    """The backups of one chain.

    Attributes:
        backups: by number, ascending.
        newest: the highest number that was ever given, as far as is known.
    """

    backups: tuple[KnownBackup, ...] = ()
    newest: int = 0

    def find(self, backup: str | None) -> KnownBackup | None:
        """Returns the backup of an id."""
        return next((each for each in self.backups if each.id == backup), None)

    def newest_of(self, disk: str) -> KnownBackup | None:
        """Returns the newest backup that holds a disk."""
        return next((each for each in reversed(self.backups) if disk in each.disks), None)

    def way(self, disk: str, above: str, below: str) -> tuple[str, ...] | None:
        """Returns the backups whose layers lie between two: `above`, and on down to the one that stands on `below`.

        None if the layers of `above` do not lead there; nothing lies between a backup and itself.
        """
        found: list[str] = []
        at: str | None = above
        while at is not None and at != below:
            backup = self.find(at)
            if backup is None or disk not in backup.disks or at in found:
                return None
            found.append(at)
            at = backup.disks[disk].base
        return tuple(found) if at == below else None


@dataclass(frozen=True, slots=True)
class DiskNow:
    """A disk of the guest.

    Attributes:
        name: as it is addressed.
        size: bytes.
        identity: what tells its image from those of the other disks; see `same_image`.
        state: the state of its checkpoints.
        counts_from: id of the backup since which everything written is recorded; None if nothing is.
        read_only: whether the guest cannot write it.
        transient: whether its bitmaps vanish with QEMU.
        has_template: whether something lies below its active layer.
    """

    name: str
    size: int
    identity: str = ""
    state: State = "missing"
    counts_from: str | None = None
    read_only: bool = False
    transient: bool = False
    has_template: bool = False


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked for.

    Attributes:
        type: of the backup.
        since: for a differential, the id of the backup that it shall count from.
        compare: where a bitmap cannot be relied on, compare with a backup and store what differs; else all is stored.
        shallow: where everything would be stored, leave out the template: what lies below the active layer.
    """

    type: Type = "auto"
    since: str | None = None
    compare: bool = True
    shallow: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to be done with a disk.

    Attributes:
        kind: what its layer shall hold.
        base: id of the backup that it shall stand on; None if it shall stand on none.
        reason: why it is not an increment; empty if it is.
        remedy: what to do about it; may be empty.
        by_bitmap: whether the bitmap tells what is to be copied.
        layers: ids of the backups whose layers tell what more is to be copied.
    """

    kind: Kind
    base: str | None = None
    reason: str = ""
    remedy: str = ""
    by_bitmap: bool = False
    layers: tuple[str, ...] = field(default=())


def decide(disk: DiskNow, catalog: Catalog, wish: Wish) -> Decision:
    """Decides what is to be copied of a disk."""
    if wish.type == "full":
        return _whole(disk, wish, ASKED_FOR)
    last = catalog.newest_of(disk.name)
    if last is None:
        return _whole(disk, wish, NEW_DISK if catalog.backups else NO_BACKUP)
    counted = catalog.find(disk.counts_from)
    doubt = _doubt(disk, counted)
    target = catalog.find(wish.since) if wish.type == "differential" else (last if doubt else counted)
    if target is None or disk.name not in target.disks:
        return _whole(disk, wish, NEW_DISK)
    if target.disks[disk.name].size != disk.size:
        return _whole(disk, wish, SIZE_CHANGED)
    if doubt or counted is None:
        return _compared(disk, wish, target, doubt)
    return _recorded(disk, catalog, wish, counted, target)


def fell_back(wish: Wish, decision: Decision) -> bool:
    """Returns whether a disk got something else than was asked for."""
    return wish.type in ("increment", "differential") and decision.kind != wish.type


def unreadable(decision: Decision) -> Decision:
    """Returns what is to be done instead if the backup that was decided for turns out to be damaged: all of it."""
    return Decision("full", None, decision.reason or UNREADABLE, REMEDIES[UNREADABLE])


def same_image(known: KnownBackup, disk: DiskNow) -> bool:
    """Returns whether the image of a disk is for certain the one that had this name in a backup.

    It is if its file is. It is, too, if the backup has no other disk with whose image it could have changed places.
    """
    others = [name for name in known.disks if name != disk.name]
    return not others or known.disks[disk.name].identity == disk.identity


def _doubt(disk: DiskNow, counted: KnownBackup | None) -> str:
    """Returns why the bitmap cannot be relied on; empty if it can."""
    if disk.read_only:
        return READ_ONLY
    if disk.counts_from is None:
        return TRANSIENT if disk.transient and disk.state == "missing" else _BY_STATE.get(disk.state, BITMAP_LOST)
    if counted is None or disk.name not in counted.disks:
        return NOT_IN_REPOSITORY
    if not same_image(counted, disk):
        return SWAPPED
    return SIZE_CHANGED if counted.disks[disk.name].size != disk.size else ""


def _recorded(disk: DiskNow, catalog: Catalog, wish: Wish, counted: KnownBackup, target: KnownBackup) -> Decision:
    if wish.type != "differential":
        return Decision("increment", counted.id, by_bitmap=True)
    way = catalog.way(disk.name, counted.id, target.id)
    if way is None:
        return _compared(disk, wish, target, NOT_ON_THE_WAY)
    return Decision("differential", target.id, by_bitmap=True, layers=way)


def _whole(disk: DiskNow, wish: Wish, reason: str) -> Decision:
    if wish.shallow and not disk.has_template:
        reason = NO_TEMPLATE
    kind: Kind = "shallow" if wish.shallow and disk.has_template else "full"
    return Decision(kind, None, reason, REMEDIES.get(reason, ""))


def _compared(disk: DiskNow, wish: Wish, target: KnownBackup, reason: str) -> Decision:
    if not wish.compare:
        return _whole(disk, wish, reason)
    return Decision("compared", target.id, reason, REMEDIES.get(reason, ""))
