"""Checkpoints that a run has begun and not yet decided about, marked so that a killed run's are known; pure.

The transaction that begins a checkpoint adds a mark to each of its disks, and the one that decides about it removes the
mark::

    begin     add c13.RUN, disable c12, add the mark qmpnbd-RUN-u0       undecided: the mark is there
    commit    remove c12,                             remove the mark    } decided: it is not, at the very same moment
    abort     enable c12, merge c13, remove c13,      remove the mark    }

So what `qmpnbd recover` finds marked is merged back, and what was committed is never touched. A mark is a dirty bitmap,
because nothing else can be made and removed in a transaction; it is disabled and costs nothing. It is transient: once
QEMU has ended, the checkpoint is `pending`, and it is the catalog of backups that decides.

The backup id of such a checkpoint is the run id, so mark and checkpoint find each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from qmpnbd.errors import BitmapError
from qmpnbd.qmp.checkpoint_plan import MAX_GRANULARITY, Action, bitmap_action, fold_back, plan_commit
from qmpnbd.qmp.checkpoint_state import DiskCheckpoints, marks_of, node_checkpoints
from qmpnbd.qmp.models import BlockDeviceInfo
from qmpnbd.qmp.naming import Role, checkpoint_of, name_of


def mark(run: str, number: int, node_name: str) -> Action:
    """Returns the action that marks a run's checkpoint on a node; `number` tells its disks apart."""
    name = name_of(run, Role.UNDECIDED, number)
    data = {"node": node_name, "name": name, "granularity": MAX_GRANULARITY, "persistent": False, "disabled": True}
    return {"type": "block-dirty-bitmap-add", "data": data}


@dataclass(frozen=True, slots=True)
class Undecided:
    """A run's checkpoint that is marked.

    Attributes:
        chain: chain id; empty if somebody has removed the checkpoint, and only marks are left.
        number: of the checkpoint; 0 then.
        disks: the chain on each marked node; known by its node, since the device may be gone.
        marks: node-name -> name of the mark.
    """

    chain: str
    number: int
    disks: tuple[DiskCheckpoints, ...]
    marks: Mapping[str, str]

    def __str__(self) -> str:
        return f"checkpoint {self.number} of chain {self.chain}" if self.chain else "mark of a checkpoint"

    def idle(self) -> Undecided:
        """Returns it as it will be when nothing uses its bitmaps any more."""
        disks = [
            replace(disk, checkpoints=tuple(replace(e, busy=False) for e in disk.checkpoints)) for disk in self.disks
        ]
        return replace(self, disks=tuple(disks))

    def abort(self) -> list[Action]:
        """Returns the actions that merge it back.

        Raises:
            BitmapError: a bitmap is in use.
        """
        return self._with_marks(fold_back(self.chain, self.disks, self.number).actions if self.chain else [])

    def commit(self, *, keep: bool) -> list[Action]:
        """Returns the actions that remove the older ones; with `keep`, those that only say that it is decided.

        Raises:
            BitmapError: a bitmap is in use, or somebody has removed the checkpoint.
        """
        if not self.chain:
            raise BitmapError(
                "somebody has removed the checkpoint",
                where=f"node {', '.join(self.marks)}",
                remedy="Make a full backup, with a new checkpoint.",
            )
        return self._with_marks([] if keep else plan_commit(self.chain, self.disks, self.number).actions)

    def leave(self) -> list[Action]:
        """Returns the actions that leave it pending, for somebody else to decide about."""
        return self._with_marks([])

    def _with_marks(self, actions: list[Action]) -> list[Action]:
        marks = [bitmap_action("remove", node, name) for node, name in self.marks.items()]
        return actions + [each for each in marks if each not in actions]


def undecided_of(run: str, nodes: Iterable[BlockDeviceInfo]) -> Undecided | None:
    """Returns the checkpoint that a run has not decided about, None if there is none."""
    marked = [(node, name) for node in nodes if (name := marks_of(node).get(run)) is not None]
    if not marked:
        return None
    names = [checkpoint_of(bitmap.name or "") for node, _ in marked for bitmap in node.dirty_bitmaps]
    begun = next((name for name in names if name is not None and name.backup == run), None)
    return Undecided(
        chain=begun.chain if begun else "",
        number=begun.number if begun else 0,
        disks=_disks(begun.chain, [node for node, _ in marked]) if begun else (),
        marks={node.node_name or "": name for node, name in marked},
    )


def _disks(chain: str, nodes: Sequence[BlockDeviceInfo]) -> tuple[DiskCheckpoints, ...]:
    return tuple(
        DiskCheckpoints(f"node {name}", name, chain, "", node_checkpoints(chain, node))
        for node in nodes
        if (name := node.node_name or "")
    )
