"""A checkpoint begun at a point in time, on real QEMUs: commit, abort, leave, and a kill after every single command."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from qmpnbd.deadline import Deadline
from qmpnbd.errors import BitmapError, InterferenceError, UsageError
from qmpnbd.export import blocking
from qmpnbd.export.session import Options, Session, exporting
from qmpnbd.nbd.client import Client
from qmpnbd.qmp.checkpoint_at import NextCheckpoint, checkpoint_at
from qmpnbd.qmp.checkpoint_state import DiskCheckpoints
from qmpnbd.qmp.checkpoints import Change, change_checkpoints, list_checkpoints
from qmpnbd.qmp.monitor import Monitor
from qmpnbd.qmp.plan import Recipe
from qmpnbd.qmp.planning import Wishes
from qmpnbd.qmp.pointintime import point_in_time
from qmpnbd.qmp.rundir import RunDirectory
from tests.dying import CHAIN, mortal, wishes_for
from tests.guestwrites import Range, dirty
from tests.instants import SIZE, UNIT, Machine, machine
from tests.qemu_versions import QemuBinaries, each_qemu
from tests.test_recover import recovered

SOON = Deadline(None)  # pytest bounds each test

pytestmark = pytest.mark.real

RECIPES = list(Recipe)
DIRTY = "qemu:dirty-bitmap:"


class Writes:
    """What was written to both disks, a cluster at a time, and since when."""

    def __init__(self, running: Machine) -> None:
        self._running = running
        self._places: list[int] = []

    def add(self) -> None:
        """Writes a cluster to each disk, at a place of its own as long as there are places."""
        number = len(self._places)
        self._places.append(number * 7 % (SIZE // UNIT - 1))
        for disk in range(2):
            self._running.write(disk, f"write -P {number % 255 + 1} {self._places[-1] * UNIT} {UNIT}")

    @property
    def mark(self) -> int:
        return len(self._places)

    def between(self, begin: int, end: int | None = None) -> list[Range]:
        places = sorted(set(self._places[begin:end]))
        found: list[Range] = []
        for place in places:
            if found and found[-1][1] == place * UNIT:
                found[-1] = (found[-1][0], (place + 1) * UNIT)
            else:
                found.append((place * UNIT, (place + 1) * UNIT))
        return found


def states(running: Machine, chain: str = CHAIN) -> list[DiskCheckpoints]:
    found = {disk.disk: disk for disk in list_checkpoints(str(running.server.qmp), chain=chain).disks}
    return [found[name] for name in running.disks]


def recorded(running: Machine, number: int) -> list[list[Range]]:
    """What is recorded on each disk since a checkpoint."""
    return [
        dirty(running.server, disk.node_name, [each.bitmap for each in disk.since(number)]) for disk in states(running)
    ]


def frozen(export: str, bitmap: str) -> list[Range]:
    """What the bitmap of an export says, over NBD."""
    with Client.connect(export, contexts=[DIRTY + bitmap]) as client:
        return [(extent.offset, extent.end) for extent in client.maps()[DIRTY + bitmap] if extent.value]


def options(running: Machine, recipe: Recipe, wish: NextCheckpoint) -> Options:
    return Options(instant=wishes_for(recipe, running.folder), checkpoint=wish, runtime_dir=str(running.folder))


def without_the_end(ranges: list[Range]) -> list[Range]:
    last = SIZE - UNIT
    return [(offset, min(end, last)) for offset, end in ranges if offset < last]


Body = Callable[[Session], Awaitable[None]]


def export(running: Machine, recipe: Recipe, body: Body, wish: NextCheckpoint | None = None) -> None:
    async def work() -> None:
        choice = options(running, recipe, wish or NextCheckpoint(CHAIN))
        async with exporting(str(running.server.qmp), running.disks, choice) as session:
            await body(session)

    asyncio.run(work())


@each_qemu
@pytest.mark.parametrize("recipe", RECIPES)
def test_one_call_freezes_view_and_increment_and_the_decision_loses_nothing(
    binaries: QemuBinaries, recipe: Recipe, folder: Path
) -> None:
    """Full and committed, increment and aborted, increment and left: each time exactly what was written is told."""
    with machine(binaries, folder) as running:
        running.server.side("cont")
        before = running.state()
        writes = Writes(running)
        seen: list[tuple[int | None, list[list[Range]]]] = []

        def taking(decision: str) -> Body:
            async def body(session: Session) -> None:
                begun = session.checkpoint
                assert begun is not None
                await asyncio.to_thread(writes.add)
                deltas = []
                for one, disk in zip(session.exports, begun.disks, strict=True):
                    assert one.bitmaps == disk.increment
                    deltas += [await asyncio.to_thread(frozen, str(one.uri), name) for name in one.bitmaps]
                base = begun.disks[0].base
                seen.append((base.number if base else None, deltas))
                await {"commit": session.commit, "abort": session.abort, "leave": session.leave}[decision](SOON)

            return body

        writes.add()
        export(running, recipe, taking("commit"))
        first = writes.mark - 1
        writes.add()
        assert recorded(running, 1) == [writes.between(first)] * 2
        export(running, recipe, taking("abort"))
        second = writes.mark - 1
        assert [[each.number for each in disk.checkpoints] for disk in states(running)] == [[1], [1]]
        writes.add()
        assert recorded(running, 1) == [writes.between(first)] * 2
        export(running, recipe, taking("leave"))
        third = writes.mark - 1
        assert [disk.state for disk in states(running)] == ["pending"] * 2
        assert recorded(running, 2) == [writes.between(third)] * 2
        assert seen == [
            (None, []),
            (1, [writes.between(first, second)] * 2),
            (1, [writes.between(first, third)] * 2),
        ]
        change_checkpoints(str(running.server.qmp), Change("commit", CHAIN))
        assert [[each.number for each in disk.checkpoints] for disk in states(running)] == [[2], [2]]
        change_checkpoints(str(running.server.qmp), Change("remove", CHAIN))
        assert running.state() == before


@each_qemu
@pytest.mark.parametrize(
    ("recipe", "decision"), [*((recipe, "commit") for recipe in RECIPES), (Recipe.BACKUP, "abort")]
)
@pytest.mark.timeout(400)
def test_killed_after_every_command_nothing_recorded_is_lost(
    binaries: QemuBinaries, recipe: Recipe, decision: str, folder: Path
) -> None:
    """`recover` merges an undecided checkpoint back, and leaves a committed one alone; a second one finds nothing."""
    with machine(binaries, folder) as running:
        running.server.side("cont")
        change_checkpoints(str(running.server.qmp), Change("create", CHAIN))
        before = running.state()
        writes = Writes(running)
        newest, base, committed = 1, 0, 0
        with mortal(running.server.qmp, folder, f"{recipe}/{decision}", running.disks) as controller:
            number, died = 0, True
            while died:
                number += 1
                begin = writes.mark
                writes.add()
                died = controller.dies_after(number)
                recovery = recovered(running)
                assert (recovery.left, recovery.unknown) == ([], []), number
                assert recovered(running).removed == [], number
                (one,) = {each.number for disk in states(running) for each in disk.checkpoints}
                if one != newest:
                    committed += 1
                    newest, base = one, begin + 1
                    before = running.state()
                # The controller has the end of each disk written to, if it gets there.
                held = [without_the_end(disk) for disk in recorded(running, newest)]
                assert held == [without_the_end(writes.between(base))] * 2, number
                assert running.state() == before, number
        assert number > 10
        assert bool(committed) == (decision == "commit")
        assert committed < number / 2


@each_qemu
def test_a_first_checkpoint_that_was_not_decided_about_is_taken_back(binaries: QemuBinaries, folder: Path) -> None:
    with machine(binaries, folder) as running:
        before = running.state()

        async def nothing(session: Session) -> None:
            assert session.checkpoint is not None
            assert [(disk.base, bool(disk.reason)) for disk in session.checkpoint.disks] == [(None, True)] * 2

        async def failing(_session: Session) -> None:
            raise InterferenceError("by the test", where="here")

        export(running, Recipe.BACKUP, nothing)
        assert running.state() == before
        with pytest.raises(InterferenceError, match="by the test"):
            export(running, Recipe.BACKUP, failing)
        assert running.state() == before


@each_qemu
def test_what_was_read_does_not_hold_and_is_not_committed(binaries: QemuBinaries, folder: Path) -> None:
    with machine(binaries, folder) as running:
        change_checkpoints(str(running.server.qmp), Change("create", CHAIN))
        before = running.state()

        async def body(session: Session) -> None:
            job = session.exports[0].id.replace("-x0", "-j0")
            await asyncio.to_thread(running.server.side, "job-cancel", id=job)
            await session.commit(SOON)

        with pytest.raises(InterferenceError, match="ended"):
            export(running, Recipe.BACKUP, body)
        assert running.state() == before
        assert [disk.state for disk in states(running)] == ["recording"] * 2


def test_a_decision_by_hand_after_a_kill_is_not_undone_by_recover(binaries: QemuBinaries, folder: Path) -> None:
    with machine(binaries, folder) as running:
        running.server.side("cont")
        change_checkpoints(str(running.server.qmp), Change("create", CHAIN))
        with mortal(running.server.qmp, folder, f"{Recipe.BACKUP}/leave", running.disks) as controller:
            number = 1
            while states(running)[0].state != "pending":
                recovered(running)
                assert controller.dies_after(number)
                number += 1
            for each in running.server.exports():  # nobody may read what is decided about
                running.server.side("block-export-del", id=each, mode="hard")
            change_checkpoints(str(running.server.qmp), Change("commit", CHAIN))
        assert recovered(running).left == []
        assert [[each.number for each in disk.checkpoints] for disk in states(running)] == [[2], [2]]


def test_kept_checkpoints_are_bases_to_count_from(binaries: QemuBinaries, folder: Path) -> None:
    with machine(binaries, folder) as running:
        writes = Writes(running)
        found: list[tuple[tuple[str, ...], int | None, bool]] = []

        async def body(session: Session) -> None:
            assert session.checkpoint is not None
            (disk, _) = session.checkpoint.disks
            found.append((disk.increment, disk.base.number if disk.base else None, bool(disk.reason)))
            await session.commit(SOON)

        for since in (None, None, 1, 7):
            writes.add()
            export(running, Recipe.BACKUP, body, NextCheckpoint(CHAIN, keep=True, since=since, granularity=UNIT))
        assert [(len(increment), base, full) for increment, base, full in found] == [
            (0, None, True),
            (1, 1, False),
            (2, 1, False),
            (0, None, True),
        ]
        assert recorded(running, 1) == [writes.between(1)] * 2
        with pytest.raises(BitmapError, match="undecided"):
            export(running, Recipe.BACKUP, body)


def test_checkpoints_that_somebody_changes_before_the_instant_are_not_relied_on(
    binaries: QemuBinaries, folder: Path
) -> None:
    """A bitmap that was disabled meanwhile has a gap; QEMU would disable it again without a word."""
    with machine(binaries, folder) as running:
        change_checkpoints(str(running.server.qmp), Change("create", CHAIN))

        async def work() -> None:
            async with await Monitor.connect(str(running.server.qmp), SOON) as monitor:
                with RunDirectory.create(str(folder), for_peer=monitor.peer) as directory:
                    wish = NextCheckpoint(CHAIN)
                    async with checkpoint_at(monitor, running.disks, directory, wish, SOON) as begun:
                        (name,) = begun.disks[0].increment
                        running.server.side("block-dirty-bitmap-disable", node="disk0", name=name)
                        before, wishes = begun.before(SOON), begun.wishes(Wishes(depth=False))
                        taking = point_in_time(monitor, running.disks, directory, SOON, wishes=wishes, before=before)
                        async with taking:
                            pytest.fail("the increment is not whole")

        before = running.state()
        with pytest.raises(BitmapError, match="changed the checkpoints"):
            asyncio.run(work())
        assert running.state() == before
        assert [disk.state for disk in states(running)] == ["stopped", "recording"]


def test_a_disk_that_is_read_only_has_no_checkpoint(binaries: QemuBinaries, folder: Path) -> None:
    with machine(binaries, folder) as running:
        running.server.side("blockdev-add", driver="null-co", node_name="still", read_only=True, size=SIZE)

        async def work() -> None:
            address = str(running.server.qmp)
            choice = options(running, Recipe.BACKUP, NextCheckpoint(CHAIN))
            async with exporting(address, ["still", "vd0"], choice) as session:
                assert session.checkpoint is not None
                still, disk = session.checkpoint.disks
                assert (still.bitmap, still.base, "read-only" in still.reason) == ("", None, True)
                assert disk.bitmap == f"qmpnbd.{CHAIN}.c1.{session.checkpoint.backup}"
            with pytest.raises(BitmapError, match="no disk can be written"):
                async with exporting(address, ["still"], choice):
                    pytest.fail("there is nothing to record")

        asyncio.run(work())


def test_a_checkpoint_needs_a_point_in_time(folder: Path) -> None:
    with (
        pytest.raises(UsageError, match="needs a point in time"),
        blocking.exporting(str(folder / "qmp"), options=Options(checkpoint=NextCheckpoint(CHAIN))),
    ):
        pytest.fail("nothing can be exported")


@each_qemu
def test_the_blocking_twin_commits_and_aborts(binaries: QemuBinaries, folder: Path) -> None:
    with machine(binaries, folder) as running:
        writes = Writes(running)
        choice = Options(instant=Wishes(depth=False), checkpoint=NextCheckpoint(CHAIN), runtime_dir=str(folder))
        with blocking.exporting(str(running.server.qmp), running.disks, choice) as session:
            assert session.statement is not None
            session.release()
            session.commit(SOON)
        writes.add()
        with blocking.exporting(str(running.server.qmp), running.disks, choice) as session:
            assert session.checkpoint is not None
            (name,) = session.checkpoint.disks[1].increment
            assert frozen(str(session.exports[1].uri), name) == writes.between(0)
            session.abort(SOON)
        with blocking.exporting(str(running.server.qmp), running.disks, choice) as session:
            session.leave(SOON)
        assert [disk.state for disk in states(running)] == ["pending"] * 2
