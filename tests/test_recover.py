"""Killed after every single command, cancelled after every single command: nothing is lost, and nothing left."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from qmpnbd.deadline import Deadline
from qmpnbd.qmp.checkpoints import Change, change_checkpoints, list_checkpoints
from qmpnbd.qmp.monitor import Monitor
from qmpnbd.qmp.plan import Recipe
from qmpnbd.qmp.planning import plan_point_in_time
from qmpnbd.qmp.recover import Recovery, recover
from qmpnbd.qmp.rundir import RunDirectory
from tests.dying import CHAIN, RECOVER, mortal, wishes_for
from tests.instants import SIZE, UNIT, Machine, machine
from tests.qemu_versions import QemuBinaries, each_qemu
from tests.signalled import signalled

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

    def are_there(self, *, by_controller: bool = True) -> bool:
        for content in self._contents if by_controller else ():
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


def without_bitmaps(state: object) -> str:
    return re.sub(rf"qmpnbd\.{CHAIN}\.c\d+\.[0-9a-f]+", "", str(state))


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


@each_qemu
@pytest.mark.parametrize("recipe", list(Recipe))
@pytest.mark.timeout(300)
def test_sigterm_after_every_command_everything_is_taken_down(
    binaries: QemuBinaries, recipe: Recipe, folder: Path
) -> None:
    """The real command gets the real signal, also while it is taking down already; nobody recovers."""
    wish = {Recipe.BACKUP: [], Recipe.COPY_BEFORE_WRITE: ["--protect-guest"], Recipe.SNAPSHOT: ["--exact-chain"]}
    with machine(binaries, folder) as running:
        running.server.side("cont")
        change_checkpoints(str(running.server.qmp), Change("create", CHAIN))
        before = running.state()
        writes = Writes(running)
        options: list[str | Path] = ["--scratch", folder, "--runtime-dir", folder, "--checkpoint", CHAIN, *wish[recipe]]
        command: list[str | Path] = ["export", "--qmp", running.server.qmp, "--point-in-time", *options]
        with signalled(*command, "--exec", "true") as controller:
            number, codes = 0, set()
            while 0 not in codes:
                number += 1
                codes.add(controller.ends_with(number))
                decided = [len(disk.checkpoints) for disk in list_checkpoints(str(running.server.qmp)).disks]
                assert decided == [1, 1], "neither committed nor merged back"
                if running.state() != before:  # only by a commit, which the signal came too late for
                    assert without_bitmaps(running.state()) == without_bitmaps(before), number
                    before = running.state()
                writes.add(number)
        assert codes == {0, 143}
        assert number > LEAST[recipe] - 8
        assert recovered(running).removed == []
        assert writes.are_there(by_controller=False)


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
