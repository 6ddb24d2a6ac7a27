"""Which backups are kept, and how the others go: never the newest, and never a base of what stays."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpnbd.backup.manifest import Manifest, ManifestDisk
from qmpnbd.backup.prune_plan import Merge, Step, steps
from qmpnbd.backup.retention import NEWEST, Moment, Policy, kept

START = datetime(2026, 1, 1, 12, tzinfo=UTC)
INSTANTS = st.datetimes(datetime(1970, 1, 1), datetime(2120, 1, 1), timezones=st.just(UTC))
COUNTS = st.integers(0, 5)
POLICIES = st.builds(Policy, last=COUNTS, hourly=COUNTS, daily=COUNTS, weekly=COUNTS, monthly=COUNTS, yearly=COUNTS)


def daily(count: int) -> list[Moment]:
    return [Moment(number, START + timedelta(days=number)) for number in range(1, count + 1)]


def test_one_of_each_day_and_of_each_month_is_kept() -> None:
    found = kept(daily(100), Policy(daily=3, monthly=3))
    assert found == {
        100: (NEWEST, "daily", "monthly"),
        99: ("daily",),
        98: ("daily",),
        89: ("monthly",),
        58: ("monthly",),
    }


@pytest.mark.parametrize(
    ("rule", "expected"), [("hourly", [9, 8]), ("daily", [9, 6]), ("weekly", [9, 6]), ("yearly", [9, 2])]
)
def test_the_newest_of_each_period_is_kept(rule: str, expected: list[int]) -> None:
    texts = ["2024-12-28T10", "2024-12-29T10", "2026-01-04T10", "2026-01-04T11", "2026-01-04T12", "2026-01-04T23"]
    texts += ["2026-01-05T00", "2026-01-05T01", "2026-01-05T02"]
    moments = [Moment(number, datetime.fromisoformat(f"{text}:30:00Z")) for number, text in enumerate(texts, 1)]
    assert list(kept(moments, Policy(**{rule: 2}))) == expected


def test_a_clock_that_went_back_does_not_make_old_ones_new() -> None:
    moments = [Moment(1, START), Moment(2, START + timedelta(days=9000)), Moment(3, START)]
    assert list(kept(moments, Policy(last=1))) == [3]
    assert list(kept(moments, Policy(daily=2))) == [3, 2]


@settings(deadline=None)
@given(st.lists(INSTANTS, max_size=30), POLICIES)
def test_the_newest_is_always_kept_and_no_rule_keeps_more_than_it_says(
    instants: list[datetime], policy: Policy
) -> None:
    moments = [Moment(number, instant) for number, instant in enumerate(instants, 1)]
    found = kept(moments, policy)
    assert set(found) <= {each.number for each in moments}
    if moments:
        assert NEWEST in found[len(moments)]
    for rule in ("last", "hourly", "daily", "weekly", "monthly", "yearly"):
        assert sum(rule in rules for rules in found.values()) <= getattr(policy, rule)


@settings(deadline=None)
@given(st.lists(INSTANTS, max_size=30), POLICIES, st.sampled_from(["last", "hourly", "daily", "weekly", "yearly"]))
def test_a_larger_number_never_keeps_less(instants: list[datetime], policy: Policy, rule: str) -> None:
    moments = [Moment(number, instant) for number, instant in enumerate(instants, 1)]
    values = {name: getattr(policy, name) for name in Policy.__dataclass_fields__}
    more = Policy(**values | {rule: values[rule] + 1})
    assert set(kept(moments, policy)) <= set(kept(moments, more))


def manifest(number: int, bases: dict[str, int | None]) -> Manifest:
    return Manifest(
        id=f"{number:08x}",
        chain="c",
        number=number,
        parent=None,
        created="2026-01-01T00:00:00Z",
        qmpnbd="",
        qemu="",
        statement=None,
        disks=tuple(
            ManifestDisk(
                name=name,
                qom_path="",
                node_name="",
                size=0,
                kind="full" if base is None else "increment",
                base=None if base is None else f"{base:08x}",
                file=f"{name}.qcow2",
                file_bytes=0,
                data_bytes=0,
                zero_bytes=0,
                cluster_size=65536,
                hashes=f"{name}.hashes",
                root="0" * 64,
            )
            for name, base in bases.items()
        ),
    )


@st.composite
def chains(draw: st.DrawFn) -> list[Manifest]:
    """Chains of backups of up to two disks, each standing on any earlier one that has the disk, or on none."""
    made: list[dict[str, int | None]] = []
    for number in range(1, draw(st.integers(1, 9)) + 1):
        disks = {}
        for name in draw(st.sets(st.sampled_from("ab"))):
            holders = [each for each in range(1, number) if name in made[each - 1]]
            disks[name] = draw(st.sampled_from([*holders, None]))
        made.append(disks)
    return [manifest(number, bases) for number, bases in enumerate(made, 1)]


def layers(found: list[Manifest], id_: str, disk: str) -> tuple[str, ...]:
    """The layers that a disk of a backup is made of, newest first."""
    bases = {(each.id, entry.name): entry.base for each in found for entry in each.disks}
    chain, base = [id_], bases[id_, disk]
    while base is not None:
        chain.append(base)
        base = bases[base, disk]
    return tuple(chain)


@settings(deadline=None)
@given(chains(), st.data())
def test_after_each_step_every_layer_stands_on_one_that_is_there(found: list[Manifest], data: st.DataObject) -> None:
    removed = data.draw(st.sets(st.sampled_from([each.id for each in found[:-1]])) if found[1:] else st.just(set()))
    whole = {(each.id, disk.name): layers(found, each.id, disk.name) for each in found for disk in each.disks}
    # What each layer consists of now, and what it stands on.
    holds = {key: chain[:1] for key, chain in whole.items()}
    bases = {(each.id, disk.name): disk.base for each in found for disk in each.disks}
    there = {each.id for each in found}
    for step in steps(found, removed):
        for merge in step.merges:
            assert step.backup is not None
            assert step.backup not in removed
            assert merge.base not in removed
            key = (step.backup, merge.disk)
            holds[key] = holds[key] + tuple(part for over in merge.over for part in holds[over, merge.disk])
            bases[key] = merge.base
        assert set(step.removes) <= there & removed
        there -= set(step.removes)
        for id_, disk in ((id_, disk) for id_, disk in whole if id_ in there):
            chain, base = holds[id_, disk], bases[id_, disk]
            while base is not None:
                assert base in there
                chain, base = chain + holds[base, disk], bases[base, disk]
            assert chain == whole[id_, disk]
    assert there == {each.id for each in found} - removed


def test_what_nothing_stands_on_goes_first() -> None:
    found = [manifest(1, {"a": None}), manifest(2, {"a": None}), manifest(3, {"a": 2}), manifest(4, {"a": 3})]
    first, second, third, fourth = (each.id for each in found)
    assert steps(found, {first, second, third}) == (
        Step(None, (), (first,)),
        Step(fourth, (Merge("a", (third, second), None),), (second, third)),
    )


def test_a_backup_stays_with_all_its_disks_until_none_is_needed() -> None:
    """Nobody needs disk b of backup 2, but as long as disk a of it is there, so is what b stands on."""
    found = [manifest(1, {"b": None}), manifest(2, {"a": None, "b": 1}), manifest(3, {"a": 2})]
    first, second, third = (each.id for each in found)
    assert steps(found, {first, second}) == (Step(third, (Merge("a", (second,), None),), (first, second)),)
