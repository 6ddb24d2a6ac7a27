"""The client API: a product that copies and stores the data itself, with a catalog of its own."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from qmpnbd.backup.begin import BegunBackup, begin
from qmpnbd.backup.content import DATA, ZERO
from qmpnbd.backup.plan import Catalog, KnownBackup, KnownDisk
from qmpnbd.deadline import Deadline
from qmpnbd.nbd.client import Client
from tests.backups import BackupMachine, new_images, restless, running
from tests.instants import SIZE, UNIT
from tests.qemu_versions import QemuBinaries, each_qemu

pytestmark = pytest.mark.real


class Product:
    """Keeps whole disks in memory, by backup."""

    def __init__(self, machine: BackupMachine) -> None:
        self._machine = machine
        self.kept: dict[str, list[bytes]] = {}
        self.catalog = Catalog()
        self.bytes_read = 0

    def back_up(self, *, commit: bool) -> list[bytes]:
        """Returns what the disks held at the instant, made of a former backup and of what was read."""
        return asyncio.run(self._back_up(commit=commit))

    async def _back_up(self, *, commit: bool) -> list[bytes]:
        how = self._machine.options().begin
        async with begin(str(self._machine.server.qmp), "product", self.catalog, options=how) as backup:
            disks = [await asyncio.to_thread(self._read, backup, number) for number in range(len(backup.tasks))]
            await backup.release()
            if commit:
                self.kept[backup.id] = disks
                known = {task.name: KnownDisk(task.size, task.decision.base, task.identity) for task in backup.tasks}
                backups = (*self.catalog.backups, KnownBackup(backup.id, backup.number, known))
                self.catalog = Catalog(backups, backup.number)
                await backup.commit(Deadline(20))
            else:
                await backup.abort(Deadline(20))
            return disks

    def _read(self, backup: BegunBackup, number: int) -> bytes:
        task = backup.tasks[number]
        base = self.kept[task.decision.base][number] if task.decision.base else bytes(task.size)
        found, self.bytes_read = bytearray(base), 0
        with Client.connect(task.uri) as client:
            for extent in task.content((), UNIT, Deadline(20)):
                if extent.value == ZERO:
                    found[extent.offset : extent.end] = bytes(extent.length)
                elif extent.value == DATA:
                    found[extent.offset : extent.end] = client.read(extent.offset, extent.length)
                    self.bytes_read += extent.length
        return bytes(found)


@each_qemu
def test_a_product_that_owns_its_data_commits_and_aborts_and_loses_nothing(
    binaries: QemuBinaries, folder: Path
) -> None:
    with running(binaries, folder, new_images(binaries, folder)) as machine:
        product = Product(machine)
        with restless(machine) as guest:
            found = [product.back_up(commit=commit) for commit in (True, True, False, True)]
        moments = [guest.moment(disks) for disks in found]
        assert moments == sorted(moments)
        machine.write("vd0", 3 * UNIT, b"x" * UNIT)
        assert product.back_up(commit=True) == machine.contents()
        assert product.bytes_read < SIZE
        assert [backup.number for backup in product.catalog.backups] == [1, 2, 3, 4]
        assert machine.left() == []


@each_qemu
def test_leaving_without_a_word_is_an_abort(binaries: QemuBinaries, folder: Path) -> None:
    async def leave(machine: BackupMachine) -> None:
        async with begin(str(machine.server.qmp), "product", Catalog(), options=machine.options().begin) as backup:
            assert [(task.decision.kind, task.decision.reason) for task in backup.tasks] == [
                ("full", "no backup yet")
            ] * 2

    with running(binaries, folder, new_images(binaries, folder)) as machine:
        asyncio.run(leave(machine))
        assert machine.checkpoints() == {"vd0": [], "vd1": []}
        assert machine.left() == []
