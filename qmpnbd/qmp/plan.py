"""A point in time as a list of QMP commands, each with what takes it down again; pure.

`qmpnbd.qmp.recipes` writes the list, `qmpnbd.qmp.pointintime` carries it out, a dry run prints it. Three phases::

    prepare    what the guest does not notice: images, nodes, bitmaps; then the depth before the instant can be read
    instant    as short as can be
    offer      the exports
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from qmpnbd.qmp.undo import Command, Undo


class Recipe(StrEnum):
    """How a point in time is taken; see `qmpnbd.qmp.recipes`."""

    BACKUP = "backup"
    COPY_BEFORE_WRITE = "copy-before-write"
    SNAPSHOT = "snapshot"


@dataclass(frozen=True, slots=True)
class PlannedDisk:
    """A disk that takes part.

    Attributes:
        name: how people address it.
        qom_path: the device; empty for a node without one.
        node_name: the disk's format node.
        size: virtual size in bytes.
        unit: the smallest piece in which the node allocates, in bytes: a cluster, or a subcluster.
        file: name and format of the image, to be recorded as the backing file of a snapshot's overlay.
        bitmaps: dirty bitmaps of the node to export with the disk; disabled at the latest by `actions`.
        actions: transaction actions that shall happen at the instant (bitmaps of a checkpoint).
        filter: node-name of a filter of somebody's that the device stands on above `node_name`; empty if there is none.
    """

    name: str
    qom_path: str
    node_name: str
    size: int
    unit: int
    file: tuple[str, str] = ("", "")
    bitmaps: tuple[str, ...] = ()
    actions: tuple[Mapping[str, object], ...] = ()
    filter: str = ""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """An empty qcow2 image that must lie there before the first command, and go after the last.

    Attributes:
        path: where.
        node_name: the protocol node that QEMU will have of it.
        size: its virtual size in bytes.
        cluster_size: bytes in a cluster.
        backing: name and format of a backing file to record; None for a scratch image.
    """

    path: str
    node_name: str
    size: int
    cluster_size: int
    backing: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """A command, and what takes down what it makes.

    Attributes:
        command: as it goes over the wire.
        undo: in the order in which it is to be done.
    """

    command: Command
    undo: tuple[Undo, ...] = ()


@dataclass(frozen=True, slots=True)
class Offer:
    """What there is to read of a disk.

    Attributes:
        disk: the disk.
        export: export of the content, with the disk's bitmaps; its name is the id.
        depth_export: export with the depth and, unless `depth_is_exact`, the bitmap `touch`; empty if not needed.
        before_export: export of the format node until the instant, for the depth before it; empty if not needed.
        touch: dirty bitmap of what was written before the instant; empty if not needed.
        depth_is_exact: the depth can be taken as it is read; else `qmpnbd.qmp.depth_at.compose` tells it.
        scratch: node-name of the file node whose size is watched; empty if there is none.
    """

    disk: PlannedDisk
    export: str
    depth_export: str
    before_export: str = ""
    touch: str = ""
    depth_is_exact: bool = False
    scratch: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """All of a point in time.

    Attributes:
        recipe: how.
        why: the reason for this recipe, for people.
        files: images to make first.
        prepare: what the guest does not notice. After it, the depth before the instant can be read.
        instant: the instant itself, as short as can be.
        offer: the exports.
        offers: what there is to read then.
        pauses: whether the guest is paused in `instant`.
    """

    recipe: Recipe
    why: str
    files: tuple[ImageFile, ...]
    prepare: tuple[Step, ...]
    instant: tuple[Step, ...]
    offer: tuple[Step, ...]
    offers: tuple[Offer, ...]
    pauses: bool

    def commands(self) -> list[Command]:
        """Returns every command, in order: what a dry run prints."""
        return [step.command for step in (*self.prepare, *self.instant, *self.offer)]

    def undo_commands(self) -> list[Command]:
        """Returns the commands that take everything down again, in order, if nothing goes wrong in between."""
        steps = (*self.prepare, *self.instant, *self.offer)
        return [each for step in reversed(steps) for undo in step.undo for each in undo.commands]
