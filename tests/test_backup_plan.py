"""What is copied of each disk, and the reason: every row of the table, without a QEMU."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qmpnbd.backup import plan
from qmpnbd.backup.plan import Catalog, Decision, DiskNow, KnownBackup, KnownDisk, Wish, decide, fell_back
from qmpnbd.qmp.checkpoint_state import State

SIZE = 8 << 20
FIRST, SECOND, THIRD = "00000001", "00000002", "00000003"


def backup(backup_id: str, number: int, base: str | None, **disks: int) -> KnownBackup:
    """A backup of disks, each with its size; the files are named after the disks."""
    return KnownBackup(
        backup_id, number, {name: KnownDisk(size, base, f"/{name}.qcow2") for name, size in disks.items()}
    )


CATALOG = Catalog(
    (
        backup(FIRST, 1, None, vd0=SIZE, vd1=SIZE),
        backup(SECOND, 2, FIRST, vd0=SIZE, vd1=SIZE),
        backup(THIRD, 4, SECOND, vd0=SIZE, vd1=SIZE),
    )
)
DISK = DiskNow("vd0", SIZE, "/vd0.qcow2", "recording", THIRD)
LOST = replace(DISK, state="missing", counts_from=None)


def kind_base_reason(decision: Decision) -> tuple[str, str | None, str]:
    return decision.kind, decision.base, decision.reason


def test_a_bitmap_that_counts_from_a_backup_of_the_disk_makes_an_increment_on_it() -> None:
    assert decide(DISK, CATALOG, Wish()) == Decision("increment", THIRD, by_bitmap=True)


def test_a_checkpoint_that_was_merged_back_makes_an_increment_on_the_backup_before() -> None:
    """A run killed between its manifest and its commit: the bitmap counts from the backup before that one."""
    found = decide(replace(DISK, counts_from=SECOND), CATALOG, Wish())
    assert found == Decision("increment", SECOND, by_bitmap=True)


def test_there_is_nothing_to_count_from_in_an_empty_catalog() -> None:
    assert kind_base_reason(decide(LOST, Catalog(), Wish())) == ("full", None, plan.NO_BACKUP)
    assert kind_base_reason(decide(DISK, Catalog(), Wish())) == ("full", None, plan.NO_BACKUP)


def test_a_new_disk_is_copied_in_full_whatever_is_asked_for() -> None:
    new = replace(LOST, name="vd2", identity="/vd2.qcow2")
    for wish in (Wish(), Wish("increment"), Wish("differential", FIRST)):
        assert kind_base_reason(decide(new, CATALOG, wish)) == ("full", None, plan.NEW_DISK)


@pytest.mark.parametrize(
    ("disk", "reason"),
    [
        (LOST, plan.BITMAP_LOST),
        (replace(LOST, transient=True), plan.TRANSIENT),
        (replace(LOST, state="inconsistent"), "bitmap inconsistent"),
        (replace(LOST, state="stopped"), "bitmap stopped"),
        (replace(LOST, state="displaced"), "new active layer"),
        (replace(LOST, read_only=True), plan.READ_ONLY),
        (replace(DISK, counts_from="ffffffff"), plan.NOT_IN_REPOSITORY),
        (replace(DISK, identity="/vd1.qcow2"), plan.SWAPPED),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_a_bitmap_that_cannot_be_relied_on_has_the_disk_compared(disk: DiskNow, reason: str) -> None:
    assert kind_base_reason(decide(disk, CATALOG, Wish())) == ("compared", THIRD, reason)
    assert kind_base_reason(decide(disk, CATALOG, Wish(compare=False))) == ("full", None, reason)
    assert kind_base_reason(decide(disk, CATALOG, Wish("differential", FIRST))) == ("compared", FIRST, reason)
    assert decide(disk, CATALOG, Wish()).layers == ()


def test_a_grown_disk_is_copied_in_full() -> None:
    for disk in (replace(DISK, size=2 * SIZE), replace(LOST, size=2 * SIZE)):
        assert kind_base_reason(decide(disk, CATALOG, Wish())) == ("full", None, plan.SIZE_CHANGED)


def test_the_only_disk_of_a_backup_cannot_have_changed_places() -> None:
    alone = Catalog((backup(FIRST, 1, None, vd0=SIZE),))
    moved = replace(DISK, identity="/elsewhere.qcow2", counts_from=FIRST)
    assert decide(moved, alone, Wish()).kind == "increment"


def test_two_disks_that_changed_places_are_both_noticed() -> None:
    """Their bitmaps have one and the same name: only the images tell."""
    for name, other in (("vd0", "vd1"), ("vd1", "vd0")):
        found = decide(replace(DISK, name=name, identity=f"/{other}.qcow2"), CATALOG, Wish())
        assert kind_base_reason(found) == ("compared", THIRD, plan.SWAPPED)


def test_a_differential_joins_the_layers_between() -> None:
    found = decide(DISK, CATALOG, Wish("differential", FIRST))
    assert found == Decision("differential", FIRST, by_bitmap=True, layers=(THIRD, SECOND))
    assert decide(DISK, CATALOG, Wish("differential", THIRD)) == Decision("differential", THIRD, by_bitmap=True)


def test_a_differential_from_a_backup_that_no_increments_lead_to_is_compared() -> None:
    again = Catalog((*CATALOG.backups, backup("00000005", 5, None, vd0=SIZE)))
    found = decide(replace(DISK, counts_from="00000005"), again, Wish("differential", FIRST))
    assert kind_base_reason(found) == ("compared", FIRST, plan.NOT_ON_THE_WAY)


def test_a_catalog_that_runs_in_circles_leads_nowhere() -> None:
    circle = Catalog((backup(FIRST, 1, None, vd0=SIZE), backup(SECOND, 2, THIRD, vd0=SIZE), backup(THIRD, 3, SECOND)))
    assert circle.way("vd0", SECOND, FIRST) is None
    circle = Catalog((backup(SECOND, 2, SECOND, vd0=SIZE),))
    assert circle.way("vd0", SECOND, FIRST) is None


def test_full_is_full_because_it_was_asked_for() -> None:
    assert kind_base_reason(decide(DISK, CATALOG, Wish("full"))) == ("full", None, plan.ASKED_FOR)


def test_a_shallow_backup_leaves_out_the_template_if_there_is_one() -> None:
    clone = replace(LOST, has_template=True)
    assert kind_base_reason(decide(clone, Catalog(), Wish(shallow=True))) == ("shallow", None, plan.NO_BACKUP)
    assert kind_base_reason(decide(LOST, Catalog(), Wish(shallow=True))) == ("full", None, plan.NO_TEMPLATE)
    assert decide(DISK, CATALOG, Wish(shallow=True)).kind == "increment"


@pytest.mark.parametrize("state", ["missing", "displaced", "stopped", "inconsistent"])
def test_every_reason_has_a_remedy(state: State) -> None:
    assert decide(replace(LOST, state=state), CATALOG, Wish()).remedy


def test_only_what_was_asked_for_by_name_can_be_fallen_back_from() -> None:
    lost = decide(LOST, CATALOG, Wish("increment"))
    assert fell_back(Wish("increment"), lost)
    assert fell_back(Wish("differential", FIRST), lost)
    assert not fell_back(Wish(), lost)
    assert not fell_back(Wish("increment"), decide(DISK, CATALOG, Wish("increment")))
