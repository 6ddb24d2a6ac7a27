"""Backups of restless guests on real QEMUs: every restore point is one instant, byte for byte, whatever happens."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from qmpnbd.backup.begin import BeginOptions
from qmpnbd.backup.plan import Wish
from qmpnbd.backup.repository import Repository
from qmpnbd.backup.run import BackupOptions, back_up
from qmpnbd.backup.tally import DisksProgress
from qmpnbd.nbd.client import Client
from qmpnbd.qmp.checkpoints import Change, change_checkpoints
from qmpnbd.qmp.planning import Wishes
from tests.backups import CHAIN, new_images, restless, restored, running
from tests.instants import UNIT, commands, machine
from tests.qemu_versions import QemuBinaries, each_qemu

pytestmark = pytest.mark.real


@each_qemu
def test_every_restore_point_is_one_instant_over_all_disks_while_the_guest_writes(
    binaries: QemuBinaries, folder: Path
) -> None:
    """Full, increments, a differential and a full one again, none of them a byte off the guest's own record."""
    with running(binaries, folder, new_images(binaries, folder)) as machine:
        with restless(machine) as guest:
            done = [machine.back_up() for _ in range(4)]
            done.append(machine.back_up(Wish("differential", since=done[0].backup.manifest.id)))
            done.append(machine.back_up(Wish("full")))
            done.append(machine.back_up())
        assert [each.disks[0].entry.kind for each in done] == [
            "full", "increment", "increment", "increment", "differential", "full", "increment"
        ]  # fmt: skip
        moments = [guest.moment(machine.restored_disks(each.backup)) for each in done]
        assert moments == sorted(moments)
        assert 0 < moments[0] < moments[-1]
        assert machine.left() == []
        assert [len(each) for each in machine.checkpoints().values()] == [1, 1]


@each_qemu
def test_shallow_and_compared_layers_are_of_one_instant_too(binaries: QemuBinaries, folder: Path) -> None:
    with running(binaries, folder, new_images(binaries, folder)) as machine:
        with restless(machine) as guest:
            done = [machine.back_up(Wish(shallow=True)), machine.back_up(Wish(shallow=True))]
            (name,) = machine.checkpoints()["vd0"]
            machine.server.side("block-dirty-bitmap-remove", node="n-vd0", name=name)
            done.append(machine.back_up())
        assert [[disk.entry.kind for disk in each.disks] for each in done] == [
            ["shallow", "shallow"], ["increment", "increment"], ["compared", "increment"]
        ]  # fmt: skip
        for each in done:
            guest.moment(machine.restored_disks(each.backup))


@each_qemu
@pytest.mark.parametrize("wish", [Wish(), Wish(shallow=True)], ids=["whole", "shallow"])
def test_what_the_guest_discards_during_a_backup_is_in_it_and_what_it_reads_afterwards_in_the_next(
    binaries: QemuBinaries, folder: Path, wish: Wish
) -> None:
    """Whatever QEMU makes of a discard while a point in time is held, and in between."""
    with running(binaries, folder, new_images(binaries, folder)) as machine:
        for disk in machine.disks:
            machine.write(disk, 0, b"discarded later" * UNIT)
        before, discarded = machine.contents(), []

        def discard(progress: DisksProgress) -> None:
            disk = progress.disk
            if disk not in discarded:
                discarded.append(disk)
                with Client.connect(machine.guest_uris()[machine.disks.index(disk)]) as guest:
                    guest.trim(0, 4 * UNIT)
                    guest.write(8 * UNIT, b"new" * UNIT)
                    guest.trim(9 * UNIT, UNIT)
                    guest.write_zeroes(12 * UNIT, UNIT)

        done = machine.back_up(wish, progress=discard)
        assert sorted(discarded) == machine.disks
        assert machine.is_right(done.backup, before)
        discarded.clear()
        with Client.connect(machine.guest_uris()[0]) as guest:
            guest.trim(UNIT, UNIT)  # with no point in time held: it reads as zeroes, or as what lies below
        before = machine.contents()
        assert machine.is_right(machine.back_up(progress=discard).backup, before)
        assert machine.is_right(machine.back_up().backup)


def test_compressed_layers_hold_the_same(binaries: QemuBinaries, folder: Path) -> None:
    with running(binaries, folder, new_images(binaries, folder)) as machine:
        for value in (b"a", b"b"):
            machine.write("vd0", 0, value * (32 * UNIT))
            done = machine.back_up(compression="zstd")
            assert machine.is_right(done.backup)
            assert done.disks[0].entry.file_bytes < done.disks[0].entry.data_bytes


def test_numbers_order_backups_though_the_clock_goes_back(
    binaries: QemuBinaries, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(binaries, folder, new_images(binaries, folder)) as machine:
        for day in (3, 2, 1):
            moment = f"2026-11-0{day}T00:00:00.000000Z"
            monkeypatch.setattr("qmpnbd.backup.run.now", lambda moment=moment: moment)
            machine.write("vd0", day * UNIT, b"d" * UNIT)
            done = machine.back_up()
            assert machine.is_right(done.backup)
        assert [each.manifest.number for each in machine.repository.backups(CHAIN)] == [1, 2, 3]
        assert done.disks[0].entry.kind == "increment"


@each_qemu
@pytest.mark.parametrize("shallow", [False, True])
def test_a_guest_can_be_protected_from_a_scratch_space_that_fails(
    binaries: QemuBinaries, folder: Path, shallow: bool
) -> None:
    """Where QEMU can do that right: by a filter of our own. What the guest writes meanwhile is not in the backup."""
    repository = Repository.create(folder / "repository")
    with machine(binaries, folder) as still:
        instant = Wishes(protect_guest=True, depth=False, scratch_dir=str(folder))
        begin = BeginOptions(Wish(shallow=shallow), instant=instant, runtime_dir=str(folder))
        before = still.state()

        def guest_writes(progress: DisksProgress) -> None:
            still.write(int(progress.disk[-1]), *commands(7, 3))

        for number in range(3):
            truth = [each.content for each in still.truth()]
            options = BackupOptions(begin, progress=guest_writes)
            done = asyncio.run(back_up(str(still.server.qmp), repository.path, CHAIN, options=options))
            assert done.statement is not None
            protects = binaries.version >= (8, 0, 0)
            assert done.statement.recipe == ("copy-before-write" if protects else "backup")
            kind = "increment" if number else "shallow" if shallow else "full"
            assert [each.entry.kind for each in done.disks] == [kind] * 2
            assert [restored(binaries, done.backup.image(name), folder) for name in still.disks] == truth
            still.write(0, *commands(number, 3))
        change_checkpoints(str(still.server.qmp), Change("remove", CHAIN))
        assert still.state() == before
