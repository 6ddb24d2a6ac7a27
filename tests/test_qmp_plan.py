"""Plans as values: names that QEMU takes, an order that works, everything undone; and images that QEMU reads."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpnbd.extents import ExtentMap
from qmpnbd.qmp.depth_at import compose, exact
from qmpnbd.qmp.naming import Role, name_of, number_of, role_of, run_of
from qmpnbd.qmp.plan import Plan, PlannedDisk, Recipe
from qmpnbd.qmp.recipes import Surroundings, choose_recipe, make_plan
from qmpnbd.qmp.scratch_image import HEAD_BYTES, empty_qcow2, holds_nothing
from qmpnbd.qmp.undo import DeleteNode, RemoveBitmap, RemoveExport
from tests.servers import qemu_img, tool

RUN = "3f9a01c7"
DISKS = [
    PlannedDisk(f"vd{number}", f"/machine/peripheral/vd{number}", f"disk{number}", 1 << 30, 65536, ("/x", "qcow2"))
    for number in range(3)
]
AROUND = Surroundings(RUN, "/scratch", "/run/nbd.sock", 1 << 30, guest_runs=True)


def plan_of(recipe: Recipe, around: Surroundings = AROUND) -> Plan:
    return make_plan(recipe, "because", DISKS, around)


def names_made(plan: Plan) -> dict[str, str]:
    """Returns what a plan's commands make: name -> what takes it down, by class."""
    made = {}
    for command in plan.commands():
        arguments = command.get("arguments", {})
        assert isinstance(arguments, dict)
        match command["execute"]:
            case "blockdev-add":
                made[arguments["node-name"]] = DeleteNode.__name__
            case "block-export-add":
                made[arguments["id"]] = RemoveExport.__name__
            case "block-dirty-bitmap-add":
                made[arguments["name"]] = RemoveBitmap.__name__
    return made


@pytest.mark.parametrize("recipe", list(Recipe))
def test_everything_that_is_made_carries_our_name_and_is_undone(recipe: Recipe) -> None:
    plan = plan_of(recipe)
    undone = {
        getattr(undo, attribute): type(undo).__name__
        for step in (*plan.prepare, *plan.instant, *plan.offer)
        for undo in step.undo
        for attribute in ("export", "node_name", "name")
        if hasattr(undo, attribute) and not (attribute == "node_name" and isinstance(undo, RemoveBitmap))
    }
    made = names_made(plan)
    assert len(made) > len(DISKS)
    for name, how in made.items():
        assert run_of(name) == RUN
        assert len(name) <= 31
        assert undone[name] == how


@pytest.mark.parametrize("recipe", list(Recipe))
def test_bitmaps_change_in_one_transaction_with_the_instant(recipe: Recipe) -> None:
    """The peers lose writes because the filter and the bitmap come one after the other."""
    plan = plan_of(recipe)
    (transaction,) = [step for step in plan.instant if step.command["execute"] == "transaction"]
    actions = transaction.command["arguments"]["actions"]  # type: ignore[index]
    kinds = [action["type"] for action in actions]
    if recipe is Recipe.COPY_BEFORE_WRITE:
        names = [str(step.command["execute"]) for step in plan.instant]
        assert names.index("object-add") < names.index("stop") < names.index("qom-set")
        assert names.index("transaction") < names.index("cont") < names.index("object-del")
        assert plan.pauses
    else:
        started = "blockdev-backup" if recipe is Recipe.BACKUP else "blockdev-snapshot"
        assert kinds.count(started) == len(DISKS)
        assert not plan.pauses
    assert ("block-dirty-bitmap-disable" in kinds) == (recipe is not Recipe.SNAPSHOT)


@pytest.mark.parametrize("recipe", list(Recipe))
def test_a_plan_is_json(recipe: Recipe) -> None:
    plan = plan_of(recipe)
    assert json.loads(json.dumps(plan.commands() + plan.undo_commands()))


def test_the_recipe_is_chosen_by_what_qemu_can_do() -> None:
    def chosen(
        release: tuple[int, int], *, protect_guest: bool = False, exact_chain: bool = False, allow: Sequence[str] = ()
    ) -> Recipe:
        return choose_recipe(release, DISKS, protect_guest=protect_guest, exact_chain=exact_chain, allow=allow)[0]

    assert {chosen(release) for release in ((5, 2), (7, 2), (10, 0))} == {Recipe.BACKUP}
    assert chosen((8, 0), protect_guest=True) is Recipe.COPY_BEFORE_WRITE
    assert chosen((7, 2), protect_guest=True) is Recipe.BACKUP
    assert chosen((5, 2), exact_chain=True) is Recipe.SNAPSHOT
    risk = ["snapshot-access"]
    assert chosen((7, 0), protect_guest=True, allow=risk) is Recipe.BACKUP
    assert chosen((7, 1), protect_guest=True, allow=risk) is Recipe.COPY_BEFORE_WRITE
    assert "corrupt" in choose_recipe((7, 2), DISKS, protect_guest=True, exact_chain=False, allow=risk)[1]
    filtered = [replace(DISKS[0], filter="limits")]
    recipe, why = choose_recipe((10, 0), filtered, protect_guest=True, exact_chain=False)
    assert (recipe, "limits of vd0" in why) == (Recipe.BACKUP, True)
    free = [PlannedDisk("node", "", "node", 1, 512)]
    assert choose_recipe((10, 0), free, protect_guest=True, exact_chain=False)[0] is Recipe.BACKUP


@pytest.mark.parametrize("role", list(Role))
def test_roles_are_read_from_names(role: Role) -> None:
    name = name_of(RUN, role, 12)
    assert (role_of(name), number_of(name), run_of(name)) == (role, 12, RUN)
    assert role_of("disk0") is role_of(f"qmpnbd-{RUN}-x0") is role_of(f"qmpnbd-{RUN}-b0") is None


lengths = st.integers(1, 40)
depths = st.lists(st.tuples(lengths, st.integers(0, 4)), min_size=1, max_size=8)


@given(depths, st.data())
def test_depth_is_composed_byte_by_byte(runs: list[tuple[int, int]], data: st.DataObject) -> None:
    """A disk is written to before the instant and after it; readings of the overlay are taken in between."""
    before = ExtentMap.of_extents(runs)
    size = before.size
    blocks = st.lists(st.tuples(st.integers(0, size - 1), st.integers(1, 20)), max_size=6)
    earlier, later, latest = (data.draw(blocks) for _ in range(3))

    def at(where: list[tuple[int, int]], offset: int) -> bool:
        return any(start <= offset < start + length for start, length in where)

    def drawn(value_at: object) -> ExtentMap:
        return ExtentMap.of_extents((1, value_at(offset)) for offset in range(size))  # type: ignore[operator]

    truth = drawn(lambda offset: 1 if at(earlier, offset) else before.at(offset))

    def overlay(writes: list[tuple[int, int]]) -> ExtentMap:
        def value(offset: int) -> int:
            return 1 if at(writes, offset) else truth.at(offset) + (truth.at(offset) > 0)

        return drawn(value)

    touched = drawn(lambda offset: int(at(earlier, offset)))
    found = compose(before, touched, overlay(later), overlay(later + latest))
    assert found.depth == truth
    assert found.presumed == drawn(lambda offset: int(at(earlier, offset) and at(later + latest, offset)))


def test_a_depth_that_is_read_as_it_was_presumes_nothing() -> None:
    depth = ExtentMap.of_extents([(10, 3), (5, 0)])
    assert exact(depth).depth == depth
    assert exact(depth).presumed == ExtentMap.uniform(15, 0)


@pytest.mark.real
@pytest.mark.parametrize("size", [512, 1 << 20, 8 << 40, (1 << 50) + 512])
@pytest.mark.parametrize("cluster_size", [512, 65536, 2 << 20])
def test_qemu_reads_the_images_that_are_made(tmp_path: Path, size: int, cluster_size: int) -> None:
    path = tmp_path / "made.qcow2"
    (tmp_path / "base.raw").touch()
    with path.open("wb") as file:
        for offset, piece in empty_qcow2(size, cluster_size, ("base.raw", "raw")):
            file.seek(offset)
            file.write(piece)
    checked = subprocess.run([tool("qemu-img"), "check", "-f", "qcow2", path], check=False, capture_output=True)
    assert checked.returncode == 0, checked.stdout
    told = json.loads(qemu_img("info", "--output=json", path))
    assert told["virtual-size"] == size
    assert (told["backing-filename"], told["backing-filename-format"]) == ("base.raw", "raw")
    with path.open("rb") as file:
        head, length = file.read(HEAD_BYTES), path.stat().st_size
    assert holds_nothing(head, length)
    assert not holds_nothing(head, length + 1)
    assert not holds_nothing(bytes(HEAD_BYTES), length)


def test_an_image_that_qcow2_cannot_have_is_refused() -> None:
    with pytest.raises(ValueError, match="more than a qcow2 image can have"):
        list(empty_qcow2(1 << 62, 512))
    with pytest.raises(ValueError, match="too long"):
        list(empty_qcow2(1 << 20, 65536, ("x" * 1024, "raw")))
