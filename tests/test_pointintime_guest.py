"""A real guest writes numbered pairs, one half to each of two disks: every point in time lies between two halves."""

from __future__ import annotations

import asyncio
import contextlib
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from qmpnbd.deadline import Deadline
from qmpnbd.export import blocking
from qmpnbd.export.depth import DIRTY, DepthReader
from qmpnbd.export.options import Options
from qmpnbd.extents import ExtentMap
from qmpnbd.images.files import open_chain
from qmpnbd.nbd.aio import Client
from qmpnbd.nbd.uri import NbdUri
from qmpnbd.qmp.depth_at import InstantDepth
from qmpnbd.qmp.monitor import Monitor
from qmpnbd.qmp.plan import Recipe
from qmpnbd.qmp.pointintime import Statement, point_in_time
from qmpnbd.qmp.rundir import RunDirectory
from tests.dying import wishes_for
from tests.qemu_versions import QemuBinaries, each_qemu
from tests.servers import Server, blockdev, wait_until
from tests.test_vm_images import PACKAGES, ROOT, guest

needs_a_kernel = pytest.mark.skipif(
    not (PACKAGES / "complete").exists(), reason="no kernel for a guest (scripts/setup demo fetches one)"
)

pytestmark = [pytest.mark.real, pytest.mark.timeout(300), needs_a_kernel]

SOON = Deadline(None)  # pytest bounds each test
SIZE = 16 << 20
RECORD = 4096
DISKS = ("vd0", "vd1")
BITMAP = "since"


@dataclass(frozen=True)
class Reading:
    """A disk as a point in time showed it."""

    records: Mapping[int, int]
    depth: InstantDepth
    dirty: ExtentMap | None


@dataclass(frozen=True)
class Taken:
    """A point in time over both disks."""

    statement: Statement
    disks: tuple[Reading, Reading]

    @property
    def pairs(self) -> int:
        """The last pair of which the first half is there."""
        return max(self.disks[0].records)


def records_in(content: bytes) -> dict[int, int]:
    """Returns number -> offset of the records that lie where their pair goes."""
    found = {}
    for match in re.finditer(rb"qmpnbd record (\d+) at (\d+) *\n", content):
        number, place = int(match[1]), int(match[2])
        if match.start() == place == guest.pair_place(number, SIZE):
            found[number] = place
    return found


@contextlib.contextmanager
def writing_guest(
    binaries: QemuBinaries, folder: Path, werror: str = "enospc", *more: str, device: str = ""
) -> Iterator[tuple[Server, list[ExtentMap]]]:
    """Boots the guest; yields it with the depth that its disks had before."""
    devices, before = [], []
    for number in range(2):
        base, top = folder / f"base{number}.qcow2", folder / f"top{number}.qcow2"
        create = [binaries.img, "create", "-q", "-f", "qcow2"]
        backing = ["-o", "cluster_size=4096", "-b", str(base), "-F", "qcow2"]
        subprocess.run([*create, str(base), str(SIZE)], check=True)
        subprocess.run([*create, *backing, str(top), str(SIZE)], check=True)
        for image, place in ((base, "2M"), (base, "9M"), (top, "1M"), (top, "8M")):
            command = [binaries.io, "-f", "qcow2", "-c", f"write -P 1 {place} 2M", str(image)]
            subprocess.run(command, check=True, capture_output=True)
        with open_chain(str(top), format="qcow2") as chain:
            before.append(chain.allocation_depth())
        devices += ["-blockdev", blockdev(top, f"disk{number}")]
        devices += ["-device", f"virtio-blk-pci,id=vd{number},drive=disk{number},werror={werror}{device}"]
    linux = guest.build(PACKAGES, ROOT / ".work/guest")
    serial = folder / "serial"
    words = f"{linux.append} qmpnbd.places=1048576 qmpnbd.write=pairs"
    boot = ["-m", "192", "-kernel", str(linux.kernel), "-initrd", str(linux.initramfs), "-append", words]
    with binaries.qemu(*boot, "-serial", f"file:{serial}", *devices, *more) as server:
        server.side("cont")
        wait_until(lambda: serial.exists() and guest.READY in serial.read_text(errors="replace"), "the guest", 90)
        yield server, before
        assert "failed" not in serial.read_text(errors="replace")


def written(server: Server) -> int:
    """Returns how many writes the guest has made to its second disk."""
    stats = {each["qdev"]: each["stats"]["wr_operations"] for each in server.side("query-blockstats") if "qdev" in each}
    return int(next(count for qdev, count in stats.items() if "vd1" in qdev))


def go_on(server: Server, more: int = 20) -> None:
    """Waits until the guest has written more."""
    begin = written(server)
    wait_until(lambda: written(server) >= begin + more, "the guest to write", 60)


async def take(server: Server, folder: Path, recipe: Recipe, actions: Sequence[str], *, dirty: bool) -> Taken:
    """Takes a point in time over both disks and reads it while the guest writes on."""
    bitmaps = {name: [BITMAP] if dirty else [] for name in DISKS}
    acts = {
        name: [{"type": action, "data": {"node": f"disk{number}", "name": BITMAP, **_granularity(action)}}]
        for number, name in enumerate(DISKS)
        for action in actions
    }
    wishes = replace(wishes_for(recipe, folder), bitmaps=bitmaps, actions=acts)
    async with await Monitor.connect(str(server.qmp), SOON) as monitor:
        with RunDirectory.create(str(folder), for_peer=monitor.peer) as directory:
            place = NbdUri.unix(str(directory.socket_path), "")
            async with (
                DepthReader(monitor, place, SOON) as reader,
                point_in_time(monitor, DISKS, directory, SOON, wishes=wishes, before=reader.before) as point,
            ):
                await asyncio.to_thread(go_on, server)
                found = []
                for offer in point.offers:
                    contexts = [DIRTY + BITMAP] if dirty else []
                    uri = replace(place, export=offer.export)
                    async with await Client.connect(uri, contexts=contexts) as client:
                        content = bytes(await client.read(0, SIZE))
                        bits = (await client.maps())[DIRTY + BITMAP] if dirty else None
                    found.append(Reading(records_in(content), await reader.at_instant(offer), bits))
                await asyncio.to_thread(go_on, server)
            return Taken(point.statement, (found[0], found[1]))


def _granularity(action: str) -> dict[str, int]:
    return {"granularity": RECORD} if action == "block-dirty-bitmap-add" else {}


def marked(places: Sequence[int]) -> ExtentMap:
    """Returns 1 at whole records, 0 elsewhere."""
    taken = {place // RECORD for place in places}
    return ExtentMap.of_extents((RECORD, int(block in taken)) for block in range(SIZE // RECORD))


@each_qemu
@pytest.mark.parametrize("recipe", list(Recipe))
def test_every_point_in_time_lies_between_two_halves_of_a_pair(
    binaries: QemuBinaries, recipe: Recipe, folder: Path
) -> None:
    with writing_guest(binaries, folder) as (server, before):
        go_on(server)
        first = asyncio.run(take(server, folder, recipe, ["block-dirty-bitmap-add"], dirty=False))
        go_on(server)
        second = asyncio.run(take(server, folder, recipe, ["block-dirty-bitmap-disable"], dirty=True))
        go_on(server)
        assert server.side("query-status")["status"] == "running"
    assert second.pairs > first.pairs > 0
    for taken in (first, second):
        assert taken.pairs - max(taken.disks[1].records) in (0, 1)
        for reading, depth in zip(taken.disks, before, strict=True):
            assert sorted(reading.records) == list(range(1, max(reading.records) + 1)), "a record is missing"
            places = [guest.pair_place(number, SIZE) for number in reading.records]
            assert reading.depth.depth == depth.overlay(marked(places))
    for old, new in zip(first.disks, second.disks, strict=True):
        since = [new.records[number] for number in new.records if number > max(old.records)]
        assert new.dirty == marked(since)


@each_qemu
def test_a_guest_in_an_iothread_is_not_harmed_by_reading_its_depth(binaries: QemuBinaries, folder: Path) -> None:
    """QEMU 7.2 aborts if a client leaves such a disk before its export is gone: none of ours does."""
    more = ("-object", "iothread,id=io")
    wishes = wishes_for(Recipe.COPY_BEFORE_WRITE, folder)  # before 8.0 that is a backup
    with writing_guest(binaries, folder, "enospc", *more, device=",iothread=io") as (server, before):
        go_on(server)
        with blocking.exporting(str(server.qmp), DISKS, Options(instant=wishes, allow=["iothread"])) as session:
            go_on(server)
            depths = [session.allocation_depth(export, SOON).depth for export in session.exports]
            go_on(server)
        go_on(server)
        assert server.side("query-status")["status"] == "running"
    for depth, earlier in zip(depths, before, strict=True):
        more_than_before = depth.combine(earlier, lambda now, then: (now != then) & (now != 1))
        assert more_than_before.totals() == {0: SIZE}, "the guest's writes are in the active layer"
        assert depth != earlier
