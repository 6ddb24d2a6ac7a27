"""The record that backups are compared with finds every number, and takes nothing else for one."""

from __future__ import annotations

import functools

import pytest

from tests.backup_record import BLOCK, CLUSTER, ZONE, Replay, operation

SIZES = [8 << 20, 12 << 20]


@functools.cache
def made(number: int) -> tuple[bytes, ...]:
    replay = Replay([bytes(size) for size in SIZES], 0)
    replay.reach(number)
    return tuple(map(bytes, replay.contents))


def after(number: int) -> list[bytes]:
    return [*made(number)]


def test_operations_lie_in_their_disk_and_are_the_same_every_time() -> None:
    kinds = set()
    for number in range(1, 2000):
        done = operation(number, SIZES)
        assert done == operation(number, SIZES)
        assert 0 <= done.offset < done.end <= SIZES[done.disk]
        assert done.offset % (CLUSTER if done.kind == "unmap" else BLOCK) == 0
        assert len(done.data()) == done.length
        kinds.add((done.disk, done.kind))
    assert len(kinds) == 6


@pytest.mark.parametrize("number", [40, 41, 97, 150, 200])
def test_the_number_of_what_is_found_is_found(number: int) -> None:
    replay = Replay(after(40), 40)
    found = replay.find(after(number), 200)
    assert found is not None
    assert after(found) == after(number)


def test_a_write_that_is_lost_or_too_early_is_no_number() -> None:
    """Also on the other disk alone: then the disks are not of one instant."""
    for number in range(100, 120):
        missing = operation(number, SIZES)
        content = after(120)
        before = after(number - 1)
        end = missing.end
        spoilt = bytearray(content[missing.disk])
        spoilt[missing.offset : end] = before[missing.disk][missing.offset : end]
        content[missing.disk] = bytes(spoilt)
        if content != after(120):  # zeroes over zeroes
            assert Replay(after(80), 80).find(content, 150) is None
    mixed = [after(100)[0], after(130)[1]]
    assert Replay(after(80), 80).find(mixed, 150) is None
    assert "blocks differ" in Replay(after(80), 80).explain(mixed)


def test_a_zone_is_less_than_a_disk() -> None:
    assert min(SIZES) > ZONE
