"""Points in time on real QEMUs: one instant, exact content and depth, and everything as it was at the end."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from qmpnbd.deadline import Deadline
from qmpnbd.errors import InterferenceError, NoSuchDiskError, UnsafeOperationError
from qmpnbd.export.depth import DepthReader
from qmpnbd.images.files import open_chain
from qmpnbd.nbd.aio import Client
from qmpnbd.nbd.client import Client as BlockingClient
from qmpnbd.nbd.uri import NbdUri
from qmpnbd.qmp.depth_at import InstantDepth
from qmpnbd.qmp.held import held_point_in_time
from qmpnbd.qmp.monitor import Monitor
from qmpnbd.qmp.plan import Offer, Recipe
from qmpnbd.qmp.planning import Wishes
from qmpnbd.qmp.pointintime import PointInTime, point_in_time
from qmpnbd.qmp.rundir import RunDirectory
from tests.instants import DISCARDS, SIZE, WRITES, Machine, Truth, build_chain, commands, machine
from tests.qemu_versions import QemuBinaries, each_qemu
from tests.servers import blockdev

SOON = Deadline(None)  # pytest bounds each test

pytestmark = pytest.mark.real

RECIPES = list(Recipe)


def expected(recipe: Recipe, binaries: QemuBinaries) -> Recipe:
    """Before QEMU 8.0 snapshot-access serves wrong data, so that the guest cannot be protected."""
    return Recipe.BACKUP if recipe is Recipe.COPY_BEFORE_WRITE and binaries.version < (8, 0, 0) else recipe


def wishes_for(recipe: Recipe, folder: Path) -> Wishes:
    return Wishes(
        protect_guest=recipe is Recipe.COPY_BEFORE_WRITE,
        exact_chain=recipe is Recipe.SNAPSHOT,
        scratch_dir=str(folder),
    )


async def content_of(server: NbdUri, offer: Offer) -> bytes:
    async with await Client.connect(replace(server, export=offer.export)) as client:
        return bytes(await client.read(0, SIZE))


async def hold(
    running: Machine,
    wishes: Wishes,
    just_before: Callable[[], None],
    body: Callable[[PointInTime, NbdUri, DepthReader], Awaitable[None]],
) -> None:
    async with await Monitor.connect(str(running.server.qmp), SOON) as monitor:
        with RunDirectory.create(str(running.folder), for_peer=monitor.peer) as directory:
            server = NbdUri.unix(str(directory.socket_path), "")
            async with DepthReader(monitor, server, SOON) as reader:

                async def before(offers: Sequence[Offer]) -> None:
                    await reader.before(offers)
                    just_before()

                async with point_in_time(
                    monitor, running.disks, directory, SOON, wishes=wishes, before=before
                ) as point:
                    await body(point, server, reader)


@each_qemu
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("discard", ["ignore", "unmap"])
def test_content_and_depth_are_those_of_the_instant(
    binaries: QemuBinaries, recipe: Recipe, discard: str, folder: Path
) -> None:
    """Every disk is written to before the instant (recorded), and after it; also where it was written before."""
    wishes = wishes_for(recipe, folder)
    kinds = WRITES + (DISCARDS if discard == "unmap" else ())
    with machine(binaries, folder, discard=discard) as running:
        before = running.state()
        truth: list[Truth] = []

        def just_before() -> None:
            for number in range(2):
                running.write(number, *commands(100 + number, 10, kinds))
            truth.extend(running.truth())

        found: list[tuple[bytes, InstantDepth]] = []

        async def body(point: PointInTime, server: NbdUri, reader: DepthReader) -> None:
            assert point.statement.recipe is expected(recipe, binaries)
            for number in range(2):
                running.write(number, *commands(200 + number, 25, kinds))
            for offer in point.offers:
                found.append((await content_of(server, offer), await reader.at_instant(offer)))

        asyncio.run(hold(running, wishes, just_before, body))
        for known, (content, depth) in zip(truth, found, strict=True):
            assert content == known.content
            wrong = list(depth.depth.differences(known.depth))
            assert all(set(depth.presumed.clip(each.offset, each.end).totals()) == {1} for each in wrong)
            assert not wrong or discard == "unmap"
        after = running.truth()
        assert [each.content for each in after] != [each.content for each in truth], "nothing was written meanwhile"
        assert running.state() == before
        assert all(bool(depth.presumed.totals().get(1)) == (recipe is not Recipe.SNAPSHOT) for _, depth in found)


@each_qemu
@pytest.mark.parametrize("recipe", RECIPES)
def test_disks_in_an_iothread_are_as_they_were(binaries: QemuBinaries, recipe: Recipe, folder: Path) -> None:
    """On a QEMU that would abort when a client leaves, they are refused by name."""
    in_thread = ("-object", "iothread,id=io")
    with machine(binaries, folder, *in_thread, device=",iothread=io") as running:
        before = running.state()
        truth: list[Truth] = []
        found: list[tuple[bytes, InstantDepth]] = []

        async def body(point: PointInTime, server: NbdUri, reader: DepthReader) -> None:
            assert point.statement.recipe is expected(recipe, binaries)
            for number in range(2):
                running.write(number, *commands(200 + number, 25))
            for offer in point.offers:
                found.append((await content_of(server, offer), await reader.at_instant(offer)))

        work = hold(running, wishes_for(recipe, folder), lambda: truth.extend(running.truth()), body)
        if (7, 0) <= binaries.version < (9, 0):
            with pytest.raises(UnsafeOperationError, match="--allow iothread"):
                asyncio.run(work)
        else:
            asyncio.run(work)
            assert [content for content, _ in found] == [known.content for known in truth]
            assert [depth.depth for _, depth in found] == [known.depth for known in truth]
            assert [each.content for each in running.truth()] != [each.content for each in truth]
        assert running.state() == before


@each_qemu
def test_the_blocking_twin_holds_the_same(binaries: QemuBinaries, folder: Path) -> None:
    with machine(binaries, folder) as running:
        before = running.state()
        truth: list[Truth] = []

        def just_before(offers: Sequence[Offer], socket_path: str) -> None:
            assert [offer.disk.name for offer in offers] == running.disks
            assert Path(socket_path).is_socket()
            truth.extend(running.truth())

        address = str(running.server.qmp)
        with held_point_in_time(address, running.disks, runtime_dir=str(folder), before=just_before) as held:
            running.write(0, f"write -P 77 0 {SIZE}")
            for offer, known in zip(held.offers, truth, strict=True):
                with BlockingClient.connect(f"nbd+unix:///{offer.export}?socket={held.socket_path}") as client:
                    assert bytes(client.read(0, SIZE)) == known.content
        assert running.state() == before
        with (
            pytest.raises(NoSuchDiskError),
            held_point_in_time(address, ["vd9"], runtime_dir=str(folder)),
        ):
            pytest.fail("there is no such disk")
        with (
            pytest.raises(InterferenceError, match="ended"),
            held_point_in_time(address, ["vd0"], runtime_dir=str(folder)) as held,
        ):
            running.server.side("job-cancel", id=held.offers[0].export.replace("-x0", "-j0"))
        assert running.state() == before


@each_qemu
def test_a_storage_daemon_with_a_server_of_its_own(binaries: QemuBinaries, folder: Path) -> None:
    """Its guest is whoever writes through an export; its server is shared, and left running."""
    image = build_chain(binaries, folder, "disk", 5)
    with binaries.daemon("--blockdev", blockdev(image, "disk0")) as server:
        address = {"type": "unix", "data": {"path": str(folder / "nbd")}}
        server.side("nbd-server-start", addr=address)
        server.side("block-export-add", type="nbd", id="guest", node_name="disk0", writable=True)
        place = NbdUri.unix(str(folder / "nbd"), "")

        async def work() -> None:
            async with (
                await Monitor.connect(str(server.qmp), SOON) as monitor,
                await Client.connect(replace(place, export="disk0")) as guest,
            ):
                with RunDirectory.create(str(folder), for_peer=monitor.peer) as directory:
                    wishes = Wishes(start_server=False)
                    async with (
                        DepthReader(monitor, place, SOON) as reader,
                        point_in_time(
                            monitor, ["disk0"], directory, SOON, wishes=wishes, before=reader.before
                        ) as point,
                    ):
                        await guest.write(0, bytes([9]) * SIZE)
                        (offer,) = point.offers
                        content, depth = await content_of(place, offer), await reader.at_instant(offer)
            with open_chain(str(copy), format="qcow2") as chain:
                assert content == bytes(chain.read(0, SIZE))
                assert depth.depth == chain.allocation_depth()

        copy = folder / "copy.qcow2"
        shutil.copy(image, copy)
        asyncio.run(work())
        assert server.exports() == ["guest"]
        assert server.nbd_server_runs()
        assert [name for name in server.nodes() if name.startswith("qmpnbd")] == []
