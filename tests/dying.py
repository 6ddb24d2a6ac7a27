"""A controller that holds a point in time, or recovers one, and dies of SIGKILL after its Nth command; a program.

One process that has imported everything reads ``N`` from its input, forks, and says how the child ended: a kill costs
milliseconds. Commands that ask (``query-…``) are not counted: they change nothing.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from qmpnbd.deadline import Deadline
from qmpnbd.export.depth import DepthReader
from qmpnbd.nbd.uri import NbdUri
from qmpnbd.qmp.checkpoint_at import NextCheckpoint, checkpoint_at
from qmpnbd.qmp.monitor import Monitor
from qmpnbd.qmp.plan import Recipe
from qmpnbd.qmp.planning import Wishes
from qmpnbd.qmp.pointintime import point_in_time
from qmpnbd.qmp.recover import recover
from qmpnbd.qmp.rundir import RunDirectory
from tests.instants import SIZE, UNIT, write_line

RECOVER = "recover"
CHAIN = "nightly"
WRITTEN = f"write -P 238 {SIZE - UNIT} {UNIT}"
ASKING = ("query-", "x-debug-query-", "qom-list", "qom-get")


def wishes_for(recipe: Recipe, folder: Path) -> Wishes:
    """Returns wishes that a recipe is chosen for."""
    return Wishes(
        protect_guest=recipe is Recipe.COPY_BEFORE_WRITE,
        exact_chain=recipe is Recipe.SNAPSHOT,
        scratch_dir=str(folder),
    )


class Counting(Monitor):
    """A monitor that does something after its Nth command that changes something."""

    after = 0
    count = 0

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        deadline: Deadline,
        fd: int | None = None,
    ) -> object:
        try:
            return await super().execute(command, arguments, deadline=deadline, fd=fd)
        finally:
            if not command.startswith(ASKING):
                self.count += 1
                if self.count == self.after:
                    self.strike()

    def strike(self) -> None:
        """Dies."""
        os.kill(os.getpid(), signal.SIGKILL)


async def hold_and_leave(monitor: Monitor, disks: list[str], recipe: Recipe, folder: Path) -> None:
    """Takes a point in time, reads the depth, has the disks written to, and takes it down."""
    with RunDirectory.create(str(folder), for_peer=monitor.peer) as directory:
        wishes, soon = wishes_for(recipe, folder), Deadline(20)
        async with (
            DepthReader(monitor, NbdUri.unix(str(directory.socket_path), ""), soon) as reader,
            point_in_time(monitor, disks, directory, soon, wishes=wishes, before=reader.before) as point,
        ):
            for number, offer in enumerate(point.offers):
                await reader.at_instant(offer)
                # As the guest would: now there is something in the overlay to be lost.
                line = write_line(number, WRITTEN)
                await monitor.execute("human-monitor-command", {"command-line": line}, deadline=Deadline(20))


async def hold_and_decide(monitor: Monitor, disks: list[str], recipe: Recipe, folder: Path, decision: str) -> None:
    """Begins a checkpoint at a point in time, has the disks written to, and commits, aborts or leaves it."""
    with RunDirectory.create(str(folder), for_peer=monitor.peer) as directory:
        async with checkpoint_at(monitor, disks, directory, NextCheckpoint(CHAIN), Deadline(20)) as begun:
            wishes, before = begun.wishes(wishes_for(recipe, folder)), begun.before(Deadline(20))
            async with point_in_time(monitor, disks, directory, Deadline(20), wishes=wishes, before=before):
                for number in range(len(disks)):
                    line = write_line(number, WRITTEN)
                    await monitor.execute("human-monitor-command", {"command-line": line}, deadline=Deadline(20))
            await {"commit": begun.commit, "abort": begun.abort, "leave": begun.leave}[decision](Deadline(20))


async def _die(address: str, folder: str, recipe: str, disks: str, after: int) -> None:
    async with await Counting.connect(address, Deadline(20)) as monitor:
        monitor.count, monitor.after = 0, after
        if recipe == RECOVER:
            await recover(monitor, folder, Deadline(20))
            return
        name, _, decision = recipe.partition("/")
        if decision:
            await hold_and_decide(monitor, disks.split(","), Recipe(name), Path(folder), decision)
        else:
            await hold_and_leave(monitor, disks.split(","), Recipe(name), Path(folder))


def main(address: str, folder: str, recipe: str, disks: str) -> None:
    """Dies as often as it is told to."""

    def hold(after: int) -> int:
        asyncio.run(_die(address, folder, recipe, disks, after))
        return 0

    forked(hold)


def forked(work: Callable[[int], int]) -> None:
    """Does `work` in a child of its own for every line, and tells how that one ended."""
    for line in sys.stdin:
        child = os.fork()
        if not child:
            os._exit(work(int(line)))
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        sys.stdout.flush()


class Mortal:
    """The program, seen from a test."""

    def __init__(self, child: subprocess.Popen[str]) -> None:
        self._child = child

    def dies_after(self, command: int) -> bool:
        """Returns whether it died; False if it had fewer commands, and came to its end."""
        code = self.ends_with(command)
        assert code in (0, -signal.SIGKILL), code
        return code != 0

    def ends_with(self, command: int) -> int:
        """Returns how it ended that was struck after a command."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(f"{command}\n")
        self._child.stdin.flush()
        return int(self._child.stdout.readline())


@contextmanager
def mortal(address: Path, folder: Path, recipe: str, disks: list[str]) -> Iterator[Mortal]:
    """Runs the program."""
    with program("tests.dying", str(address), str(folder), str(recipe), ",".join(disks)) as child:
        yield Mortal(child)


@contextmanager
def program(module: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Runs a module of the tests as a program."""
    command = [sys.executable, "-m", module, *arguments]
    root = Path(__file__).parent.parent
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            yield child
        finally:
            child.communicate(timeout=30)


if __name__ == "__main__":
    main(*sys.argv[1:])
