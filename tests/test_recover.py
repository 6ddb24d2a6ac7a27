"""Killed after every single command, cancelled after every single command: nothing is lost, and nothing left."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from qmpnbd.deadline import Deadline
from qmpnbd.qmp.monitor import Monitor
from qmpnbd.qmp.plan import Recipe
from qmpnbd.qmp.planning import plan_point_in_time
from qmpnbd.qmp.recover import Recovery, recover
from qmpnbd.qmp.rundir import RunDirectory
from tests.dying import RECOVER, Counting, hold_and_leave, mortal, wishes_for
from tests.instants import SIZE, UNIT, Machine, machine
from tests.qemu_versions import QemuBinaries, each_qemu

SOON = Deadline(None)  # pytest bounds each test

pytestmark = pytest.mark.real

LEAST = {Recipe.BACKUP: 25, Recipe.COPY_BEFORE_WRITE: 25, Recipe.SNAPSHOT: 12}
"""Commands of a point in time over two disks, up and down, at the very least."""


def recovered(running: Machine, *, dry_run: bool = False) -> Recovery:
    async def work() -> Recovery:
        async with await Monitor.connect(str(running.server.qmp), SOON) as monitor:
            return await recover(monitor, str(running.folder), SOON, dry_run=dry_run)

    return asyncio.run(work())


class Writes:
    """What was written, and must be there in the end."""

    def __init__(self, running: Machine) -> None:
        self._running = running
        self._contents = [bytearray(truth.content) for truth in running.truth()]

    def add(self, number: int) -> None:
        """Writes to both disks, at a place of its own for each number."""
        offset = number * 3 * UNIT % (SIZE - UNIT)
        for disk, content in enumerate(self._contents):
            self._running.write(disk, f"write -P {number % 255 + 1} {offset} {UNIT}")
            content[offset : offset + UNIT] = bytes([number % 255 + 1]) * UNIT

    def are_there(self) -> bool:
        for content in self._contents:
            content[-UNIT:] = bytes([238]) * UNIT  # what every controller has had written
        return [bytes(content) for content in self._contents] == [truth.content for truth in self._running.truth()]


@each_qemu
@pytest.mark.parametrize("recipe", list(Recipe))
@pytest.mark.timeout(300)
def test_killed_after_every_command_recover_brings_back_what_was(
    binaries: QemuBinaries, recipe: Recipe, folder: Path
) -> None:
    with machine(binaries, folder) as running:
        running.server.side("cont")
        before = running.state()
        writes = Writes(running)
        with mortal(running.server.qmp, folder, recipe, running.disks) as controller:
            number = 1
            while controller.dies_after(number):
                writes.add(number)
                planned = [str(undo) for _, undo in recovered(running, dry_run=True).removed]
                recovery = recovered(running)
                assert (recovery.left, recovery.unknown) == ([], []), number
                assert set(planned) <= {str(undo) for _, undo in recovery.removed}, number
                assert running.state() == before, number
                assert recovered(running).removed == [], number
                number += 1
        assert number > LEAST[recipe]
        assert running.state() == before
        assert writes.are_there()


def commands_until_held(running: Machine, recipe: Recipe) -> int:
    async def work() -> int:
        async with await Monitor.connect(str(running.server.qmp), SOON) as monitor:
            with RunDirectory.create(str(running.folder)) as directory:
                wishes = wishes_for(recipe, running.folder)
                plan = await plan_point_in_time(monitor, running.disks, directory, SOON, wishes)
                return len(plan.commands())

    return asyncio.run(work())


@each_qemu
@pytest.mark.parametrize("recipe", list(Recipe))
def test_a_recover_that_is_killed_after_every_command_can_be_done_again(
    binaries: QemuBinaries, recipe: Recipe, folder: Path
) -> None:
    with machine(binaries, folder) as running:
        running.server.side("cont")
        before = running.state()
        held = commands_until_held(running, recipe) + len(running.disks)  # and the writes
        writes = Writes(running)
        number = 0
        with (
            mortal(running.server.qmp, folder, recipe, running.disks) as controller,
            mortal(running.server.qmp, folder, RECOVER, running.disks) as recovering,
        ):
            died = True
            while died:
                number += 1
                assert controller.dies_after(held)
                died = recovering.dies_after(number)
                writes.add(number)
                assert recovered(running).left == [], number
                assert running.state() == before, number
        assert number > 8
        assert writes.are_there()


class Cancelling(Counting):
    """A monitor that cancels whoever uses it after its Nth command."""

    victim: asyncio.Task[None] | None = None

    def strike(self) -> None:
        assert self.victim is not None
        self.victim.cancel()


@each_qemu
@pytest.mark.parametrize("recipe", list(Recipe))
def test_cancelled_after_every_command_everything_is_taken_down(
    binaries: QemuBinaries, recipe: Recipe, folder: Path
) -> None:
    """As SIGTERM and Ctrl-C do it; also while it is being taken down already."""
    with machine(binaries, folder) as running:
        running.server.side("cont")
        before = running.state()
        writes = Writes(running)

        async def work() -> int:
            async with await Cancelling.connect(str(running.server.qmp), SOON) as monitor:
                number = 0
                while True:
                    number += 1
                    monitor.count, monitor.after = 0, number
                    monitor.victim = asyncio.ensure_future(hold_and_leave(monitor, running.disks, recipe, folder))
                    try:
                        await monitor.victim
                    except asyncio.CancelledError:
                        assert await asyncio.to_thread(running.state) == before, number
                        writes.add(number)
                    else:
                        return number

        assert asyncio.run(work()) > LEAST[recipe]
        assert running.state() == before
        assert writes.are_there()


def test_what_a_dead_run_left_in_another_qemu_can_still_be_recovered_there(
    binaries: QemuBinaries, folder: Path
) -> None:
    with machine(binaries, folder) as running, binaries.daemon() as other:
        before = running.state()
        with mortal(running.server.qmp, folder, Recipe.BACKUP, running.disks) as controller:
            assert controller.dies_after(12)
        running.server.side("nbd-server-stop")  # then no socket tells any more that the run is this QEMU's
        elsewhere = recovered(Machine(other, folder, ()))
        assert (elsewhere.removed, elsewhere.left) == ([], [])
        assert recovered(running).removed
        assert running.state() == before
