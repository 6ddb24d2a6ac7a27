"""Plans for checkpoints carried out by a simulated QEMU that lets the guest write between any two actions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpnbd.errors import BitmapError
from qmpnbd.qmp.checkpoint_plan import (
    CheckpointPlan,
    plan_abort,
    plan_commit,
    plan_create,
    plan_merge,
    plan_remove,
)
from qmpnbd.qmp.checkpoint_state import Checkpoint, DiskCheckpoints
from qmpnbd.qmp.naming import CheckpointName, checkpoint_of, new_backup, run_of


@dataclass
class Bitmap:
    recording: bool = True
    dirty: set[int] = field(default_factory=set)
    granularity: int = 65536


@dataclass
class Disk:
    """A disk's bitmaps, as QEMU keeps them, and what was written since each of them was made."""

    bitmaps: dict[str, Bitmap] = field(default_factory=dict)
    truth: dict[str, set[int]] = field(default_factory=dict)
    writes: int = 0

    def write(self) -> None:
        self.writes += 1
        for bitmap in self.bitmaps.values():
            if bitmap.recording:
                bitmap.dirty.add(self.writes)
        for written in self.truth.values():
            written.add(self.writes)

    def carry_out(self, plan: CheckpointPlan) -> None:
        for action in plan.actions:
            data: Any = action["data"]
            assert data["node"] == "node"
            match str(action["type"]).removeprefix("block-dirty-bitmap-"):
                case "add":
                    self.bitmaps[data["name"]] = Bitmap()
                    self.truth[data["name"]] = set()
                case "remove":
                    del self.bitmaps[data["name"]]
                case "merge":
                    for name in data["bitmaps"]:
                        self.bitmaps[data["target"]].dirty |= self.bitmaps[name].dirty
                case verb:
                    self.bitmaps[data["name"]].recording = verb == "enable"
            self.write()

    def state(self) -> DiskCheckpoints:
        checkpoints = []
        for text, bitmap in self.bitmaps.items():
            name = checkpoint_of(text)
            assert name is not None
            checkpoints.append(
                Checkpoint(
                    name.number,
                    name.backup,
                    text,
                    "node",
                    bitmap.granularity,
                    0,
                    bitmap.recording,
                    persistent=True,
                    busy=False,
                    inconsistent=False,
                )
            )
        return DiskCheckpoints("vd0", "node", "c", "", tuple(sorted(checkpoints, key=lambda each: each.number)))


OPERATIONS = st.lists(st.tuples(st.sampled_from(["create", "commit", "abort", "merge", "remove"]), st.integers(1, 6)))


@settings(max_examples=300)
@given(OPERATIONS)
def test_whatever_is_done_nothing_written_since_a_checkpoint_is_missing(operations: list[tuple[str, int]]) -> None:
    disk = Disk()
    for operation, number in [("create", 0), *operations]:
        states = [disk.state()]
        try:
            match operation:
                case "create":
                    plan = plan_create("c", states, new_backup(), keep=True)
                case "commit":
                    plan = plan_commit("c", states, number)
                case "abort":
                    plan = plan_abort("c", states)
                case "merge":
                    plan = plan_merge("c", states, number)
                case _:
                    plan = plan_remove("c", states, number)
        except BitmapError:
            continue
        disk.carry_out(plan)
        after = disk.state()
        assert len(after.usable) == len(after.checkpoints)
        for each in after.usable:
            found = set().union(*(disk.bitmaps[one.bitmap].dirty for one in after.since(each.number)))
            assert disk.truth[each.bitmap] <= found


def test_a_disk_where_nothing_is_done_says_why() -> None:
    has, lacks = Disk(), DiskCheckpoints("vd1", "other", "c", "")
    has.carry_out(plan_create("c", [has.state()], "0badcafe"))
    has.carry_out(plan_create("c", [has.state()], "0badcaff", keep=True))
    for plan in (plan_commit("c", [has.state(), lacks]), plan_abort("c", [has.state(), lacks])):
        assert (plan.number, len(plan.disks[1].actions)) == (2, 0)
        assert "no checkpoint" in plan.disks[1].reason
    with pytest.raises(BitmapError, match="the oldest"):
        plan_merge("c", [has.state()], 1)


def test_names_say_everything_and_are_no_runs() -> None:
    name = CheckpointName("a_b-C", 12, "0badcafe")
    assert str(name) == "qmpnbd.a_b-C.c12.0badcafe"
    assert checkpoint_of(str(name)) == name
    assert run_of(str(name)) is None
    for other in ("qmpnbd.a.c0.0badcafe", "qmpnbd.a.c1", "qmpnbd.a.b.c1.0badcafe", "qmpnbd.a.c1.0BADCAFE", f"{name}\n"):
        assert checkpoint_of(other) is None
