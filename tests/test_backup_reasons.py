"""Each disk gets what it needs, with the reason, and makes no other one full; what is restored is right each time."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from qmpnbd.backup.plan import Wish
from qmpnbd.backup.run import BackedUp
from qmpnbd.backup.template import open_template
from qmpnbd.deadline import Deadline
from tests.backups import BackupMachine, new_images, quit_in_order, running
from tests.instants import SIZE, UNIT
from tests.qemu_versions import QemuBinaries, each_qemu
from tests.servers import blockdev, qemu_img, wait_until

pytestmark = pytest.mark.real

FULL = ("full", "no backup yet")
INCREMENT = ("increment", "")


def told(done: BackedUp) -> list[tuple[str, str]]:
    return [(each.entry.kind, each.entry.reason) for each in done.disks]


def write(machine: BackupMachine, value: int, *disks: str) -> None:
    """Writes a cluster, and zeroes another one, on each disk."""
    for name in disks or machine.disks:
        machine.write(name, 5 * UNIT, bytes([value]) * UNIT)
        machine.write(name, (10 + value) * UNIT, bytes(UNIT))


def ended(machine: BackupMachine) -> None:
    wait_until(lambda: not Path(f"/proc/{machine.server.pid}").exists() or _zombie(machine.server.pid), "QEMU's end")


def _zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@each_qemu
def test_a_lost_bitmap_has_that_disk_compared_and_no_other(binaries: QemuBinaries, folder: Path) -> None:
    """Only what differs is stored, not the disk."""
    with running(binaries, folder, new_images(binaries, folder)) as machine:
        assert told(machine.back_up()) == [FULL, FULL]
        write(machine, 1)
        (name,) = machine.checkpoints()["vd0"]
        machine.server.side("block-dirty-bitmap-remove", node="n-vd0", name=name)
        done = machine.back_up(Wish("increment"))
        assert told(done) == [("compared", "bitmap lost"), INCREMENT]
        assert done.disks[0].entry.data_bytes <= 2 * UNIT
        assert machine.is_right(done.backup)
        write(machine, 2)
        done = machine.back_up()
        assert told(done) == [INCREMENT, INCREMENT]
        assert machine.is_right(done.backup)


@each_qemu
def test_after_a_crash_of_qemu_the_inconsistent_bitmap_is_replaced(binaries: QemuBinaries, folder: Path) -> None:
    images = new_images(binaries, folder)
    with running(binaries, folder, images) as machine:
        machine.back_up(disks=["vd0"])
        write(machine, 1)
        quit_in_order(machine)
        ended(machine)
    with running(binaries, folder, images) as machine:
        assert told(machine.back_up()) == [INCREMENT, ("full", "new disk")]
        write(machine, 2)
        quit_in_order(machine)
        ended(machine)
    with running(binaries, folder, images) as machine:
        write(machine, 3)
        for uri in machine.guest_uris():
            _flush(uri)
        os.kill(machine.server.pid, signal.SIGKILL)
        ended(machine)
    with running(binaries, folder, images) as machine:
        done = machine.back_up()
        assert told(done) == [("compared", "bitmap inconsistent")] * 2
        assert machine.is_right(done.backup)
        write(machine, 4)
        done = machine.back_up()
        assert told(done) == [INCREMENT, INCREMENT]
        assert machine.is_right(done.backup)


def _flush(uri: object) -> None:
    from qmpnbd.nbd.client import Client

    with Client.connect(str(uri)) as client:
        client.flush()


def test_a_bitmap_that_was_removed_while_qemu_was_down(binaries: QemuBinaries, folder: Path) -> None:
    images = new_images(binaries, folder)
    with running(binaries, folder, images) as machine:
        machine.back_up()
        write(machine, 1)
        (name,) = machine.checkpoints()["vd1"]
        quit_in_order(machine)
        ended(machine)
    qemu_img("bitmap", "--remove", images["vd1"], name)
    with running(binaries, folder, images) as machine:
        done = machine.back_up()
        assert told(done) == [INCREMENT, ("compared", "bitmap lost")]
        assert done.disks[1].entry.data_bytes <= 2 * UNIT
        assert machine.is_right(done.backup)


@each_qemu
def test_a_grown_disk_is_full_and_the_other_an_increment(binaries: QemuBinaries, folder: Path) -> None:
    with running(binaries, folder, new_images(binaries, folder)) as machine:
        machine.back_up()
        write(machine, 1)
        machine.resize("vd1", SIZE + 3 * UNIT + 512)
        machine.write("vd1", SIZE + UNIT, b"x" * UNIT)
        done = machine.back_up(Wish("increment"))
        assert told(done) == [INCREMENT, ("full", "size changed")]
        assert machine.is_right(done.backup)
        write(machine, 2)
        done = machine.back_up()
        assert told(done) == [INCREMENT, INCREMENT]
        assert machine.is_right(done.backup)


@each_qemu
def test_a_disk_that_shrank_and_grew_again_does_not_bring_old_data_back(binaries: QemuBinaries, folder: Path) -> None:
    """QEMU's bitmaps do not record it: an increment that goes by them alone is wrong without a word."""
    with running(binaries, folder, new_images(binaries, folder)) as machine:
        for name in machine.disks:
            machine.write(name, SIZE - UNIT, b"old!" * (UNIT // 4))
        first = machine.back_up().backup.manifest.id
        write(machine, 1)
        machine.back_up()
        machine.resize("vd0", SIZE // 2)
        machine.resize("vd0", SIZE)
        done = machine.back_up()
        assert told(done) == [INCREMENT, INCREMENT]
        assert machine.is_right(done.backup)
        machine.resize("vd1", SIZE // 2)
        machine.resize("vd1", SIZE)
        done = machine.back_up(Wish("differential", since=first))
        assert [each.entry.kind for each in done.disks] == ["differential"] * 2
        assert machine.is_right(done.backup)
        write(machine, 3)
        done = machine.back_up()
        assert all(each.entry.data_bytes + each.entry.zero_bytes <= 2 * UNIT for each in done.disks)


@each_qemu
def test_disks_that_changed_places_are_not_taken_for_each_other(binaries: QemuBinaries, folder: Path) -> None:
    """Both images carry a bitmap of the same name. A naive increment would put each on the other's backup."""
    images = new_images(binaries, folder)
    with running(binaries, folder, images) as machine:
        first = machine.back_up().backup
        write(machine, 1)
        before = machine.contents()
        quit_in_order(machine)
        ended(machine)
    with running(binaries, folder, {"vd0": images["vd1"], "vd1": images["vd0"]}) as machine:
        assert machine.contents() == before[::-1]
        done = machine.back_up()
        assert told(done) == [("compared", "disk swapped")] * 2
        assert {each.entry.base for each in done.disks} == {first.manifest.id}
        assert machine.is_right(done.backup)
        write(machine, 2)
        done = machine.back_up()
        assert told(done) == [INCREMENT, INCREMENT]
        assert machine.is_right(done.backup)


@each_qemu
def test_a_raw_disk_has_increments_until_qemu_ends(binaries: QemuBinaries, folder: Path) -> None:
    raw = folder / "plain.raw"
    qemu_img("create", "-q", "-f", "raw", raw, str(SIZE))
    images: dict[str, Path | str] = {"vd0": blockdev(raw, "n-vd0", "raw", discard="unmap")}
    with running(binaries, folder, images) as machine:
        write(machine, 1)
        done = machine.back_up()
        assert told(done) == [FULL]
        assert done.disks[0].task.transient_because
        write(machine, 2)
        assert told(machine.back_up()) == [INCREMENT]
        write(machine, 3)
        quit_in_order(machine)
        ended(machine)
    with running(binaries, folder, images) as machine:
        done = machine.back_up()
        assert told(done) == [("compared", "cannot keep a bitmap")]
        assert machine.is_right(done.backup)


@each_qemu
def test_a_read_only_disk_is_stored_once(binaries: QemuBinaries, folder: Path) -> None:
    """And a machine that has nothing else is backed up all the same, without a checkpoint."""
    images = new_images(binaries, folder)
    fixed = json.loads(blockdev(images["vd1"], "n-vd1"))
    both: dict[str, Path | str] = {"vd0": images["vd0"], "vd1": json.dumps({**fixed, "read-only": True})}
    with running(binaries, folder, both, writable=["vd0"]) as machine:
        assert told(machine.back_up()) == [FULL, FULL]
        write(machine, 1, "vd0")
        done = machine.back_up()
        assert told(done) == [INCREMENT, ("compared", "read-only")]
        assert done.disks[1].entry.data_bytes == done.disks[1].entry.zero_bytes == 0
        assert machine.is_right(done.backup)
        assert machine.checkpoints()["vd1"] == []
        done = machine.back_up(disks=["vd1"])
        assert told(done) == [("compared", "read-only")]
        assert machine.restored(done.backup, "vd1") == machine.contents()[1]


@each_qemu
def test_two_disks_whose_files_have_one_name_do_not_meet(binaries: QemuBinaries, folder: Path) -> None:
    images: dict[str, Path | str] = {}
    for number, place in enumerate(("a", "b")):
        (folder / place).mkdir()
        qemu_img("create", "-q", "-f", "qcow2", folder / place / "disk.qcow2", str(SIZE))
        images[f"vd{number}"] = folder / place / "disk.qcow2"
    with running(binaries, folder, images) as machine:
        write(machine, 1, "vd0")
        write(machine, 2, "vd1")
        done = machine.back_up()
        assert machine.is_right(done.backup)
        assert machine.restored(done.backup, "vd0") != machine.restored(done.backup, "vd1")


@each_qemu
def test_what_became_zero_is_stored_as_zero(binaries: QemuBinaries, folder: Path) -> None:
    """A tool that leaves out what is dirty and zero brings the old data back."""
    with running(binaries, folder, new_images(binaries, folder)) as machine:
        write(machine, 1)
        machine.back_up()
        for name in machine.disks:
            machine.write(name, 5 * UNIT, bytes(UNIT))
        done = machine.back_up()
        assert [(each.entry.data_bytes, each.entry.zero_bytes) for each in done.disks] == [(0, UNIT)] * 2
        assert machine.is_right(done.backup)


def test_bitmaps_finer_than_clusters_lose_nothing_at_the_edges(binaries: QemuBinaries, folder: Path) -> None:
    with running(binaries, folder, new_images(binaries, folder)) as machine:
        machine.back_up(granularity=512)
        for sector in (3, 129, 130, 5000):
            machine.write("vd0", sector * 512, b"s" * 512)
            machine.write("vd1", sector * 512, bytes(512))
        done = machine.back_up()
        assert told(done) == [INCREMENT, INCREMENT]
        assert done.disks[0].entry.granularity == 512
        assert machine.is_right(done.backup)


@each_qemu
def test_a_shallow_backup_holds_the_active_layer_over_its_template(binaries: QemuBinaries, folder: Path) -> None:
    """Together with the template it is the disk; increments go on from it."""
    images = new_images(binaries, folder)
    with running(binaries, folder, images) as machine:
        write(machine, 1)
        done = machine.back_up(Wish(shallow=True))
        assert told(done) == [("shallow", "no backup yet")] * 2
        held = [each.entry.data_bytes + each.entry.zero_bytes for each in done.disks]
        assert all(0 < each < SIZE // 2 for each in held)
        template = done.disks[0].entry.template
        assert template is not None
        assert template.path == str(folder / "d0-1.qcow2")
        open_template(template, template.path, Deadline(60)).close()
        assert template.sha256
        assert machine.is_right(done.backup)
        again = machine.back_up(Wish("full", shallow=True))
        assert again.disks[0].entry.template == template
        sizes = machine.back_up(Wish("full", shallow=True), proof="sizes")
        assert sizes.disks[0].entry.template == template.model_copy(update={"sha256": ""})
        write(machine, 2)
        done = machine.back_up(Wish(shallow=True))
        assert told(done) == [INCREMENT, INCREMENT]
        assert machine.is_right(done.backup)


@each_qemu
def test_a_new_layer_above_the_bitmap_has_the_disk_compared(binaries: QemuBinaries, folder: Path) -> None:
    with running(binaries, folder, new_images(binaries, folder)) as machine:
        machine.back_up()
        write(machine, 1)
        side = machine.server.side
        side("blockdev-snapshot-sync", node_name="n-vd0", snapshot_file=str(folder / "s.qcow2"), snapshot_node_name="s")
        done = machine.back_up()
        assert told(done) == [("compared", "new active layer"), INCREMENT]
        assert machine.is_right(done.backup)


@each_qemu
def test_a_differential_from_before_a_full_backup_is_compared(binaries: QemuBinaries, folder: Path) -> None:
    with running(binaries, folder, new_images(binaries, folder)) as machine:
        first = machine.back_up().backup.manifest.id
        write(machine, 1)
        machine.back_up(Wish("full"))
        write(machine, 2)
        done = machine.back_up(Wish("differential", since=first))
        assert told(done) == [("compared", "no increments lead there")] * 2
        assert {each.entry.base for each in done.disks} == {first}
        assert max(each.entry.data_bytes for each in done.disks) <= 2 * UNIT
        assert machine.is_right(done.backup)


def test_each_repository_needs_a_chain_of_its_own(binaries: QemuBinaries, folder: Path) -> None:
    with running(binaries, folder, new_images(binaries, folder, 1)) as machine:
        machine.back_up()
        here = machine.repository
        machine.repository = type(here).create(folder / "other")
        assert told(machine.back_up()) == [FULL]
        write(machine, 1)
        machine.repository = here
        done = machine.back_up()
        assert told(done) == [("compared", "last backup not in repository")]
        assert machine.is_right(done.backup)


def test_a_damaged_layer_is_not_built_on(binaries: QemuBinaries, folder: Path) -> None:
    """The next run needs no repair, says what is damaged, and what it makes is whole."""
    with running(binaries, folder, new_images(binaries, folder)) as machine:
        machine.back_up()
        write(machine, 1)
        second = machine.back_up()
        os.truncate(second.backup.path / second.disks[0].entry.file, 4096)
        write(machine, 2)
        done = machine.back_up()
        assert told(done) == [("compared", "last backup not in repository"), INCREMENT]
        assert done.disks[0].entry.base != second.backup.manifest.id
        assert len(done.damaged) == 1
        assert machine.is_right(done.backup)


@pytest.mark.parametrize("damage", ["cut", "edited", "gone"])
def test_a_damaged_manifest_is_not_built_on(binaries: QemuBinaries, folder: Path, damage: str) -> None:
    with running(binaries, folder, new_images(binaries, folder, 1)) as machine:
        machine.back_up()
        write(machine, 1)
        manifest = machine.back_up().backup.path / "manifest.json"
        text = manifest.read_text()
        if damage == "gone":
            manifest.unlink()
        else:
            manifest.write_text(text[:-20] if damage == "cut" else text.replace('"increment"', '"compared"'))
        write(machine, 2)
        done = machine.back_up()
        assert told(done) == [("compared", "last backup not in repository")]
        assert len(done.damaged) == 1
        assert machine.is_right(done.backup)


def test_a_base_whose_hashes_are_damaged_is_not_relied_on(binaries: QemuBinaries, folder: Path) -> None:
    with running(binaries, folder, new_images(binaries, folder)) as machine:
        first = machine.back_up()
        write(machine, 1)
        hashes = first.backup.path / first.disks[1].entry.hashes
        hashes.write_bytes(hashes.read_bytes()[:-1])
        done = machine.back_up(Wish("increment"))
        assert told(done) == [INCREMENT, ("full", "last backup cannot be read")]
        assert machine.is_right(done.backup)
