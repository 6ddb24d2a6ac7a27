"""What can go wrong around a point in time: it is told with a remedy, the guest is unharmed, and nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from qmpnbd.deadline import Deadline
from qmpnbd.errors import (
    BitmapError,
    CommandFailedError,
    DeadlineError,
    DiskBusyError,
    ExportRefusedError,
    InterferenceError,
    LeftBehindError,
    MonitorLostError,
    NbdRequestError,
    QmpnbdError,
    ScratchError,
    ServerBusyError,
    UsageError,
)
from qmpnbd.export import blocking
from qmpnbd.export.session import Options
from qmpnbd.nbd.aio import Client
from qmpnbd.nbd.uri import NbdUri
from qmpnbd.qmp import pointintime, scratch, teardown
from qmpnbd.qmp.checkpoint_at import NextCheckpoint
from qmpnbd.qmp.monitor import Monitor
from qmpnbd.qmp.plan import Recipe
from qmpnbd.qmp.planning import Wishes, plan_point_in_time
from qmpnbd.qmp.pointintime import PointInTime, point_in_time
from qmpnbd.qmp.rundir import RunDirectory
from tests.dying import mortal, wishes_for
from tests.instants import SIZE, UNIT, Machine, machine
from tests.qemu_versions import QemuBinaries, each_qemu
from tests.servers import blockdev, qemu_img, wait_until
from tests.test_pointintime import expected
from tests.test_pointintime_guest import go_on, needs_a_kernel, writing_guest
from tests.test_recover import recovered

SOON = Deadline(None)  # pytest bounds each test

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]  # many runs in one test, on a machine that may be busy

Body = Callable[[PointInTime, RunDirectory], Awaitable[None]]


async def nothing(_point: PointInTime, _directory: RunDirectory) -> None:
    """Does nothing with a point in time."""


async def until_cancelled(_point: PointInTime, _directory: RunDirectory) -> None:
    """Holds a point in time until it is given up."""
    await asyncio.Event().wait()


def hold(
    qmp: Path, folder: Path, disks: list[str], wishes: Wishes, body: Body = nothing, deadline: Deadline = SOON
) -> None:
    async def work() -> None:
        async with await Monitor.connect(str(qmp), SOON) as monitor:
            with RunDirectory.create(str(folder), for_peer=monitor.peer) as directory:
                async with point_in_time(monitor, disks, directory, deadline, wishes=wishes) as point:
                    await body(point, directory)

    asyncio.run(work())


def held(running: Machine, wishes: Wishes, body: Body = nothing, deadline: Deadline = SOON) -> None:
    hold(running.server.qmp, running.folder, running.disks, wishes, body, deadline)


def start_a_mirror(running: Machine, folder: Path) -> None:
    qemu_img("create", "-q", "-f", "raw", folder / "mirror.raw", str(SIZE))
    running.server.side(
        "blockdev-add",
        node_name="mirror",
        driver="raw",
        file={"driver": "file", "filename": str(folder / "mirror.raw")},
    )
    running.server.side("blockdev-mirror", job_id="theirs", device="disk1", target="mirror", sync="full")
    wait_until(lambda: _status(running, "theirs") == "ready", "the mirror")


def noise(folder: Path) -> str:
    """Returns the command that fills a disk with what does not compress: before 6.0 the scratch is compressed."""
    (folder / "noise").write_bytes(os.urandom(SIZE))
    return f"write -s {folder}/noise 0 {SIZE}"


@each_qemu
@pytest.mark.parametrize("recipe", [Recipe.BACKUP, Recipe.SNAPSHOT])
def test_a_disk_with_another_job_is_busy_and_the_others_are_not_touched(
    binaries: QemuBinaries, recipe: Recipe, folder: Path
) -> None:
    with machine(binaries, folder) as running:
        start_a_mirror(running, folder)
        before = running.state()
        with pytest.raises(DiskBusyError, match="query-block-jobs"):
            held(running, wishes_for(recipe, folder))
        assert running.state() == before


@each_qemu
def test_a_second_point_in_time_is_refused_and_the_first_one_goes_on(binaries: QemuBinaries, folder: Path) -> None:
    with machine(binaries, folder) as running:

        async def work() -> None:
            async with await Monitor.connect(str(running.server.qmp), SOON) as monitor:
                with RunDirectory.create(str(folder)) as first, RunDirectory.create(str(folder)) as second:
                    async with point_in_time(monitor, running.disks, first, SOON):
                        state = await asyncio.to_thread(running.state)
                        with pytest.raises(DiskBusyError, match="another point in time is held"):
                            await plan_point_in_time(monitor, ["vd1"], second, SOON)
                        assert await asyncio.to_thread(running.state) == state

        before = running.state()
        asyncio.run(work())
        assert running.state() == before


def refused_with(running: Machine, wishes: Wishes, kind: type[QmpnbdError]) -> QmpnbdError:
    """Returns why a point in time is refused, and makes sure that this has left nothing behind."""
    before = running.state()
    with pytest.raises(kind) as refused:
        held(running, wishes)
    assert running.state() == before
    assert refused.value.remedy
    return refused.value


@each_qemu
@pytest.mark.parametrize("recipe", list(Recipe))
def test_what_qemu_refuses_at_a_point_in_time_has_a_reason_and_a_remedy(
    binaries: QemuBinaries, recipe: Recipe, folder: Path
) -> None:
    with machine(binaries, folder, disks=1) as running:
        side = running.server.side
        wishes = wishes_for(recipe, folder)
        for name in ("records", "stands"):
            side("block-dirty-bitmap-add", node="disk0", name=name, disabled=name == "stands")
        offered = {name: replace(wishes, bitmaps={"vd0": [name]}) for name in ("nothing", "records", "stands")}
        missing = refused_with(running, offered["nothing"], ExportRefusedError)
        assert getattr(missing, "reason", None) == "bitmap-missing"
        if expected(recipe, binaries) is Recipe.BACKUP:
            records = refused_with(running, offered["records"], ExportRefusedError)
            assert getattr(records, "reason", None) == "bitmap-enabled"
        elif recipe is Recipe.COPY_BEFORE_WRITE:
            # QEMU would export it, and have it go on: what is read of it would not be of the instant.
            refused_with(running, offered["records"], BitmapError)
        else:
            held(running, offered["records"])  # nobody writes to its node as long as the overlay is there
        disable = {"type": "block-dirty-bitmap-disable", "data": {"node": "disk0", "name": "records"}}
        held(running, replace(offered["records"], actions={"vd0": [disable]}))

        server = {"type": "unix", "data": {"path": str(running.server.folder / "theirs")}}
        side("nbd-server-start", addr=server)
        refused_with(running, wishes, ServerBusyError)
        side("block-export-add", type="nbd", id="x", node_name="disk0", bitmaps=["stands"])
        busy = refused_with(running, replace(offered["stands"], start_server=False), ExportRefusedError)
        assert getattr(busy, "reason", None) == "bitmap-busy"
        remove = {"type": "block-dirty-bitmap-remove", "data": {"node": "disk0", "name": "stands"}}
        shared = replace(wishes, start_server=False, actions={"vd0": [remove]})
        assert "End the export" in refused_with(running, shared, CommandFailedError).remedy


@each_qemu
def test_a_plan_changes_nothing_and_is_what_is_done(binaries: QemuBinaries, folder: Path) -> None:
    with machine(binaries, folder) as running:

        async def work() -> list[str]:
            async with await Monitor.connect(str(running.server.qmp), SOON) as monitor:
                with RunDirectory.create(str(folder)) as directory:
                    before = await asyncio.to_thread(running.state)
                    plan = await plan_point_in_time(monitor, running.disks, directory, SOON)
                    assert await asyncio.to_thread(running.state) == before
                    with pytest.raises(UsageError, match="each disk once"):
                        await plan_point_in_time(monitor, ["vd0", "disk0"], directory, SOON)
                    return [str(command["execute"]) for command in plan.commands()]

        names = asyncio.run(work())
        assert names.count("transaction") == 1
        assert (names[0], names[-1]) == ("nbd-server-start", "block-export-add")


@each_qemu
@pytest.mark.parametrize("recipe", [Recipe.BACKUP, Recipe.COPY_BEFORE_WRITE])
def test_scratch_space_that_runs_out_ends_the_point_in_time_before_the_guest_is_hurt(
    binaries: QemuBinaries, recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "LEAST_BYTES", 1 << 20)
    with machine(binaries, folder) as running:
        running.write(1, noise(folder))  # zeroes would take no space, nor what compresses well
        before = running.state()

        async def body(_point: PointInTime, _directory: RunDirectory) -> None:
            await asyncio.to_thread(running.write, 1, f"write -P 9 0 {SIZE}")
            await asyncio.Event().wait()

        with pytest.raises(ScratchError, match=r"disk vd1.*before the guest was hurt"):
            held(running, replace(wishes_for(recipe, folder), scratch_bytes=8 << 20), body)
        assert running.state() == before
        assert running.truth()[1].content == bytes([9]) * SIZE


@each_qemu
@pytest.mark.parametrize("recipe", [Recipe.BACKUP, Recipe.COPY_BEFORE_WRITE])
def test_a_caller_that_cannot_be_interrupted_hears_of_it_in_the_end(
    binaries: QemuBinaries, recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocking twin: the exports end at once, and what was read is not taken for good; nor is a checkpoint."""
    monkeypatch.setattr(scratch, "LEAST_BYTES", 1 << 20)
    with machine(binaries, folder) as running:
        running.write(1, noise(folder))
        before = running.state()
        wishes = replace(wishes_for(recipe, folder), scratch_bytes=8 << 20)
        choice = Options(instant=wishes, checkpoint=NextCheckpoint("nightly"), runtime_dir=str(folder))

        def copy() -> None:
            with blocking.exporting(str(running.server.qmp), running.disks, choice) as session:
                running.write(1, f"write -P 9 0 {SIZE}")
                wait_until(lambda: not running.server.exports(), "the exports to end")
                session.commit(SOON)

        with pytest.raises(ScratchError, match=r"disk vd1.*before the guest was hurt"):
            copy()
        assert running.state() == before


@each_qemu
@pytest.mark.parametrize("recipe", list(Recipe))
def test_a_job_that_starts_meanwhile_does_no_harm(binaries: QemuBinaries, recipe: Recipe, folder: Path) -> None:
    """QEMU refuses it, or it runs: what is read is of the instant, the guest's writes are there, nothing is left."""
    with machine(binaries, folder) as running:
        before = running.state()
        truth = running.truth()
        starts: list[tuple[str, dict[str, object]]] = [
            ("blockdev-mirror", {"target": "theirs", "sync": "full"}),
            ("blockdev-backup", {"target": "theirs", "sync": "full"}),
        ]
        if recipe is Recipe.BACKUP:
            starts.append(("block-stream", {}))

        async def body(point: PointInTime, directory: RunDirectory) -> None:
            drive = running.server.side("query-block")[0]["inserted"]["node-name"]
            running.server.side("blockdev-add", node_name="theirs", driver="null-co", size=SIZE)
            for command, arguments in starts:
                with contextlib.suppress(AssertionError):
                    running.server.side(command, job_id="theirs", device=drive, **arguments)
                    wait_until(lambda: _status(running, "theirs") in ("ready", ""), "their job")
                running.write(0, f"write -P 5 0 {UNIT}")
                if _status(running, "theirs"):
                    running.server.side("job-cancel", id="theirs")
                    wait_until(lambda: not _status(running, "theirs"), "the end of their job")
            running.server.side("blockdev-del", node_name="theirs")
            for offer, known in zip(point.offers, truth, strict=True):
                uri = NbdUri.unix(str(directory.socket_path), offer.export)
                async with await Client.connect(uri) as client:
                    assert bytes(await client.read(0, SIZE)) == known.content

        held(running, wishes_for(recipe, folder), body)
        assert running.truth()[0].content == bytes([5]) * UNIT + truth[0].content[UNIT:]
        assert running.state() == before


@each_qemu
@pytest.mark.parametrize("recipe", [Recipe.COPY_BEFORE_WRITE, Recipe.SNAPSHOT])
def test_a_stream_into_what_is_ours_is_told_and_does_not_hurt_the_guest(
    binaries: QemuBinaries, recipe: Recipe, folder: Path
) -> None:
    """It makes the overlay the disk; on a filter it is refused, and QEMU 10.0 does not let go of that any more."""
    if expected(recipe, binaries) is not recipe:
        pytest.skip("this QEMU has no such recipe")
    with machine(binaries, folder) as running:

        async def body(_point: PointInTime, _directory: RunDirectory) -> None:
            drive = running.server.side("query-block")[0]["inserted"]["node-name"]
            with contextlib.suppress(AssertionError):
                running.server.side("block-stream", job_id="theirs", device=drive)
            wait_until(lambda: not _status(running, "theirs"), "their job")

        with pytest.raises(LeftBehindError, match="in use"):
            held(running, wishes_for(recipe, folder), body)
        running.write(0, f"write -P 5 0 {UNIT}", f"read -P 5 0 {UNIT}")
        assert list(folder.glob("qmpnbd-*-[os]0.qcow2")), "what the guest stands on is not removed"
        assert recovered(running).left
        assert list(folder.glob("qmpnbd-*-[os]0.qcow2"))


def test_too_little_room_is_told_before_anything_is_done(binaries: QemuBinaries, folder: Path) -> None:
    with machine(binaries, folder) as running:
        before = running.state()
        missing = str(folder / "missing")
        for wishes in (Wishes(scratch_bytes=1), Wishes(scratch_bytes=1 << 60), Wishes(scratch_dir=missing)):
            with pytest.raises(ScratchError, match="scratch space"):
                held(running, wishes)
        with pytest.raises(ScratchError, match="a folder that lasts"):
            held(running, Wishes(exact_chain=True))
        assert running.state() == before


@each_qemu
def test_a_job_that_somebody_cancels_ends_the_point_in_time(binaries: QemuBinaries, folder: Path) -> None:
    """Without its job, the scratch image would go on showing what the guest writes now."""
    with machine(binaries, folder) as running:
        before = running.state()

        async def body(point: PointInTime, directory: RunDirectory) -> None:
            running.server.side("job-cancel", id=f"qmpnbd-{directory.run}-j0")
            await until_cancelled(point, directory)

        with pytest.raises(InterferenceError, match=r"the job qmpnbd-.*-j0 ended"):
            held(running, Wishes(), body)
        assert running.state() == before


@each_qemu
@pytest.mark.parametrize("recipe", list(Recipe))
def test_a_snapshot_meanwhile_is_refused_or_told_and_nothing_is_lost(
    binaries: QemuBinaries, recipe: Recipe, folder: Path
) -> None:
    """Above a job QEMU refuses it; above our own filter or overlay it does not."""
    with machine(binaries, folder) as running:
        before = running.state()
        overlay = folder / "theirs.qcow2"
        qemu_img("create", "-q", "-f", "qcow2", "-b", running.images[0], "-F", "qcow2", overlay)
        done: list[bool] = []

        async def body(_point: PointInTime, directory: RunDirectory) -> None:
            drive = running.server.side("query-block")[0]["inserted"]["node-name"]
            file = {"driver": "file", "filename": str(overlay)}
            running.server.side("blockdev-add", node_name="theirs", driver="qcow2", backing=None, file=file)
            try:
                running.server.side("blockdev-snapshot", node=drive, overlay="theirs")
            except AssertionError:
                running.server.side("blockdev-del", node_name="theirs")
                return
            done.append(True)
            running.write(0, f"write -P 5 0 {UNIT}")

        told = None
        try:
            held(running, wishes_for(recipe, folder), body)
        except LeftBehindError as error:
            told = error
        # Committing our overlay into the disk works below theirs; a filter of ours stays.
        assert (told is not None) == (bool(done) and expected(recipe, binaries) is Recipe.COPY_BEFORE_WRITE), told
        if done:
            assert running.server.side("query-block")[0]["inserted"]["node-name"] == "theirs"
            running.server.side("block-commit", job_id="back", device="theirs", auto_dismiss=False, **_below(running))
            wait_until(lambda: _status(running, "back") == "ready", "the commit")
            running.server.side("job-complete", id="back")
            wait_until(lambda: _status(running, "back") == "concluded", "the commit")
            running.server.side("job-dismiss", id="back")
            running.server.side("blockdev-del", node_name="theirs")
            assert recovered(running).left == []
            assert running.truth()[0].content[:UNIT] == bytes([5]) * UNIT
        assert running.state() == before


def _below(running: Machine) -> dict[str, str]:
    graph = running.server.side("x-debug-query-block-graph")
    names = {vertex["id"]: vertex["name"] for vertex in graph["nodes"]}
    edges = [edge for edge in graph["edges"] if names[edge["parent"]] == "theirs" and edge["name"] == "backing"]
    return {"top_node": "theirs", "base_node": names[edges[0]["child"]]}


def _status(running: Machine, job: str) -> str:
    return next((str(each["status"]) for each in running.server.side("query-jobs") if each["id"] == job), "")


@each_qemu
def test_a_qemu_that_is_killed_is_told_and_leaves_no_files(binaries: QemuBinaries, folder: Path) -> None:
    with machine(binaries, folder) as running:

        async def body(point: PointInTime, directory: RunDirectory) -> None:
            os.kill(running.server.pid, signal.SIGKILL)
            await until_cancelled(point, directory)

        with pytest.raises(MonitorLostError):
            held(running, Wishes(scratch_dir=str(folder)), body)
        assert [path.name for path in folder.iterdir() if path.name.startswith("qmpnbd-")] == []


@each_qemu
@pytest.mark.parametrize("recipe", list(Recipe))
def test_a_qemu_that_quits_is_told_and_leaves_no_files(binaries: QemuBinaries, recipe: Recipe, folder: Path) -> None:
    """It closes its monitor before its images: until it has ended, those cannot be removed."""
    with machine(binaries, folder) as running:

        async def body(point: PointInTime, directory: RunDirectory) -> None:
            await asyncio.to_thread(running.server.side, "quit")
            await until_cancelled(point, directory)

        with pytest.raises((MonitorLostError, InterferenceError)) as caught:
            held(running, wishes_for(recipe, folder), body)
        assert getattr(caught.value, "__notes__", []) == []
        assert [path.name for path in folder.iterdir() if path.name.startswith("qmpnbd-")] == []


@each_qemu
def test_an_overlay_outlives_a_killed_qemu_with_what_the_guest_wrote(binaries: QemuBinaries, folder: Path) -> None:
    with machine(binaries, folder) as running:

        async def body(point: PointInTime, directory: RunDirectory) -> None:
            running.write(0, f"write -P 7 0 {UNIT}", "flush")
            os.kill(running.server.pid, signal.SIGKILL)
            await until_cancelled(point, directory)

        with pytest.raises(MonitorLostError) as caught:
            held(running, wishes_for(Recipe.SNAPSHOT, folder), body)
        (overlay,) = folder.glob("qmpnbd-*-o*.qcow2")
        assert overlay.stem.endswith("-o0"), "the other one holds nothing"
        assert any(str(overlay) in note for note in caught.value.__notes__)
        qemu_img("commit", "-q", overlay)
        with_it = folder / "out.raw"
        qemu_img("convert", "-O", "raw", running.images[0], with_it)
        assert with_it.read_bytes()[:UNIT] == bytes([7]) * UNIT


@each_qemu
def test_a_qemu_that_stands_still_is_told_and_recovered_once_it_goes_on(
    binaries: QemuBinaries, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (teardown, pointintime):
        monkeypatch.setattr(module, "TEARDOWN_SECONDS", 1.0)
    monkeypatch.setattr(teardown, "RETRY_SECONDS", 0.1)
    with machine(binaries, folder) as running:
        before = running.state()

        async def body(_point: PointInTime, _directory: RunDirectory) -> None:
            os.kill(running.server.pid, signal.SIGSTOP)

        with pytest.raises(QmpnbdError) as caught:
            held(running, Wishes(scratch_dir=str(folder)), body)
        assert isinstance(caught.value, DeadlineError | LeftBehindError)
        assert "left behind in QEMU" in str(caught.value) + "".join(getattr(caught.value, "__notes__", ()))
        os.kill(running.server.pid, signal.SIGCONT)
        assert recovered(running).left == []
        assert running.state() == before


@needs_a_kernel
@each_qemu
@pytest.mark.parametrize("end", ["left", "killed"])
def test_a_guest_stopped_by_a_full_scratch_runs_on_and_has_lost_nothing(
    binaries: QemuBinaries, end: str, folder: Path
) -> None:
    """The file system's limit comes before ours: QEMU stops the guest, and the end of the point in time frees it."""
    wrapper = folder / "qemu"
    wrapper.write_text(f"#!/bin/sh\ntrap '' XFSZ\nexec {binaries.system} \"$@\"\n")
    wrapper.chmod(0o755)
    limited = replace(binaries, system=str(wrapper))
    with writing_guest(limited, folder, werror="stop") as (server, _):

        def stopped() -> bool:
            return bool(server.side("query-status")["status"] == "io-error")

        def fill(limit: int) -> None:
            resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            wait_until(stopped, "the guest to be stopped", 60)
            resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

        limit = 8 << 20  # more than the disks' own files need, less than the scratch would
        if end == "left":

            async def body(_point: PointInTime, _directory: RunDirectory) -> None:
                await asyncio.to_thread(fill, limit)

            hold(server.qmp, folder, ["vd0", "vd1"], Wishes(scratch_dir=str(folder)), body)
        else:
            with mortal(server.qmp, folder, Recipe.BACKUP, ["vd0", "vd1"]) as controller:
                assert controller.dies_after(14)
            fill(limit)
            assert recovered(Machine(server, folder, ())).left == []
        wait_until(lambda: server.side("query-status")["status"] == "running", "the guest to run on")
        go_on(server)


@each_qemu
def test_a_filter_whose_scratch_fails_breaks_the_export_and_not_the_guest(binaries: QemuBinaries, folder: Path) -> None:
    wrapper = folder / "qemu"
    wrapper.write_text(f"#!/bin/sh\ntrap '' XFSZ\nexec {binaries.system} \"$@\"\n")
    wrapper.chmod(0o755)
    with machine(replace(binaries, system=str(wrapper)), folder) as running:
        before = running.state()
        running.write(0, noise(folder), "flush")
        extents = json.loads(qemu_img("map", "-U", "--output=json", running.images[0]))
        early = min((each for each in extents if each["depth"] == 0), key=lambda each: int(each["offset"]))["start"]

        async def body(point: PointInTime, directory: RunDirectory) -> None:
            if binaries.version < (8, 0, 0):
                assert point.statement.recipe is Recipe.BACKUP
                assert "cannot protect the guest" in point.statement.why
                await asyncio.to_thread(running.write, 0, f"write -P 3 {early} {UNIT}")
                return
            # All is copied but one cluster, which the disk's own file has at its beginning; then files may not grow.
            for offset in range(0, SIZE, UNIT):
                if offset != early:
                    await asyncio.to_thread(running.write, 0, f"write -P 2 {offset} {UNIT}")
            resource.prlimit(running.server.pid, resource.RLIMIT_FSIZE, (SIZE - (1 << 20), resource.RLIM_INFINITY))
            await asyncio.to_thread(running.write, 0, f"write -P 3 {early} {UNIT}")
            infinite = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            resource.prlimit(running.server.pid, resource.RLIMIT_FSIZE, infinite)
            uri = NbdUri.unix(str(directory.socket_path), point.offers[0].export)
            async with await Client.connect(uri) as client:
                with pytest.raises(NbdRequestError):
                    await client.read(0, UNIT)

        held(running, wishes_for(Recipe.COPY_BEFORE_WRITE, folder), body)
        assert running.state() == before
        assert running.truth()[0].content[early : early + UNIT] == bytes([3]) * UNIT


@needs_a_kernel
@each_qemu
def test_a_disk_that_is_unplugged_meanwhile_stays_readable(binaries: QemuBinaries, folder: Path) -> None:
    extra = folder / "extra.raw"
    extra.write_bytes(bytes([6]) * (1 << 20))
    more = ("-blockdev", blockdev(extra, "extra", "raw"), "-device", "virtio-blk-pci,id=vd2,drive=extra")
    with writing_guest(binaries, folder, "enospc", *more) as (server, _):

        def unplugged() -> bool:
            return all("vd2" not in drive.get("qdev", "") for drive in server.side("query-block"))

        def unplug() -> None:
            server.side("device_del", id="vd2")
            wait_until(unplugged, "the device to be unplugged", 60)

        async def body(point: PointInTime, directory: RunDirectory) -> None:
            await asyncio.to_thread(unplug)
            uri = NbdUri.unix(str(directory.socket_path), point.offers[1].export)
            async with await Client.connect(uri) as client:
                assert bytes(await client.read(0, 1 << 20)) == bytes([6]) * (1 << 20)

        before = server.nodes()
        hold(server.qmp, folder, ["vd0", "vd2"], Wishes(scratch_dir=str(folder)), body)
        assert (server.nodes(), server.exports()) == (before, [])
        go_on(server)


@needs_a_kernel
@each_qemu
def test_a_migration_meanwhile_does_not_hurt_the_guest(binaries: QemuBinaries, folder: Path) -> None:
    """QEMU 7.2 and 10.0 do not migrate while a job holds a disk; 5.2 does, and what is held is taken down there."""
    with writing_guest(binaries, folder) as (server, _):

        def migrate() -> str:
            server.side("migrate", uri="exec:cat > /dev/null")
            ended = ("failed", "completed")
            wait_until(lambda: server.side("query-migrate").get("status") in ended, "the migration", 60)
            return str(server.side("query-migrate")["status"])

        async def body(_point: PointInTime, _directory: RunDirectory) -> None:
            outcomes.append(await asyncio.to_thread(migrate))

        outcomes: list[str] = []
        before = server.nodes()
        hold(server.qmp, folder, ["vd0", "vd1"], Wishes(scratch_dir=str(folder)), body)
        assert (server.nodes(), server.exports()) == (before, [])
        assert outcomes == ["completed" if binaries.version < (6, 0, 0) else "failed"]
        server.side("cont")  # where it went, nobody was
        go_on(server)
