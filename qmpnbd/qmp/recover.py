"""What killed runs left in a QEMU: found by its names, and taken down."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial

from qmpnbd.deadline import Deadline
from qmpnbd.errors import LeftBehindError
from qmpnbd.qmp.credentials import read_objects
from qmpnbd.qmp.inventory import guest_status, read_exports, read_inventory, read_nodes
from qmpnbd.qmp.jobs import read_jobs
from qmpnbd.qmp.leftovers import Contents, Thing, things_by_run, undo_of
from qmpnbd.qmp.monitor import Monitor
from qmpnbd.qmp.rundir import RunDirectory, dead_runs, is_alive
from qmpnbd.qmp.scratch import noted_images
from qmpnbd.qmp.server import STOP_SECONDS, is_ours, lost_server, stop_lost_server, stop_server
from qmpnbd.qmp.teardown import TakeDown
from qmpnbd.qmp.undo import StopServer, Undo
from qmpnbd.qmp.undoing import take_down

_MAX_PASSES = 3
"""How often what is left is looked at again: what one pass could not delete because it was in use, the next can."""


class State(StrEnum):
    """Whether a run lives."""

    ALIVE = "alive"
    DEAD = "dead"
    UNKNOWN = "unknown"
    """Its directory is not here: another runtime directory, another user, another host, or removed."""


@dataclass(frozen=True, slots=True)
class RunState:
    """A run, and what of it is in a QEMU.

    Attributes:
        run: the run id.
        state: whether it lives.
        things: what is there.
        undo: what would take it down, in order.
    """

    run: str
    state: State
    things: tuple[Thing, ...]
    undo: tuple[Undo, ...]


@dataclass(slots=True)
class Recovery:
    """What was taken down.

    Attributes:
        removed: run id and what, in order; in a dry run, what would be.
        left: what could not be taken down, in words.
        unknown: runs of which it is not known whether they live; left alone.
        alive: runs that live; left alone.
    """

    removed: list[tuple[str, Undo]] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    alive: list[str] = field(default_factory=list)


async def read_contents(monitor: Monitor, deadline: Deadline) -> Contents:
    """Reads what a QEMU has, anyone's.

    Raises:
        MonitorError: QEMU refused, or the graph never stood still.
        DeadlineError: no reply in time.
    """
    inventory = await read_inventory(monitor, deadline)
    return Contents(
        exports=await read_exports(monitor, deadline),
        nodes=await read_nodes(monitor, deadline),
        graph=inventory.graph,
        disks=inventory.disks,
        jobs=await read_jobs(monitor, deadline),
        objects=await read_objects(monitor, deadline),
        guest=await guest_status(monitor, deadline),
    )


async def read_runs(monitor: Monitor, base: str | None, deadline: Deadline) -> list[RunState]:
    """Returns the runs of which something is in a QEMU.

    Args:
        monitor: the QEMU.
        base: where runs make their directories; None for the folder for temporary files.
        deadline: for all of it.

    Raises:
        MonitorError: QEMU refused, or the graph never stood still.
        DeadlineError: no reply in time.
    """
    contents = await read_contents(monitor, deadline)
    return [
        RunState(run, _state_of(run, base), tuple(things), tuple(undo_of(run, contents)))
        for run, things in sorted(things_by_run(contents).items())
    ]


def _state_of(run: str, base: str | None) -> State:
    alive = is_alive(run, base)
    return State.UNKNOWN if alive is None else State.ALIVE if alive else State.DEAD


async def remove_leftovers(monitor: Monitor, base: str | None, deadline: Deadline) -> list[str]:
    """Takes down what killed runs of this user left in this QEMU; what cannot be taken down stays for `recover`.

    A run is dead when nobody holds the lock of its directory; what belongs to it is known from names. Runs that
    live, and runs whose directory is not here, are left alone.

    Args:
        monitor: the QEMU.
        base: where runs make their directories; None for the folder for temporary files.
        deadline: for all of it.

    Returns:
        What was taken down, for people.

    Raises:
        LeftBehindError: something could not be taken down.
        MonitorError: QEMU refused or is gone.
        DeadlineError: no reply in time.
    """
    recovery = Recovery()
    await _recover_dead(monitor, base, deadline, recovery, dry_run=False)
    if recovery.left:
        raise LeftBehindError(
            "; ".join(recovery.left), where=monitor.where, remedy="See `qmpnbd status`, then run `qmpnbd recover`."
        )
    return [str(undo) for _, undo in recovery.removed]


async def recover(
    monitor: Monitor, base: str | None, deadline: Deadline, *, also: Collection[str] = (), dry_run: bool = False
) -> Recovery:
    """Takes down what dead runs left in a QEMU; can be done any number of times.

    Args:
        monitor: the QEMU.
        base: where runs make their directories; None for the folder for temporary files.
        deadline: for reading; taking down has its own time (`qmpnbd.qmp.teardown`).
        also: runs that are dead on the caller's word, although their directory is not here.
        dry_run: tell what would be done, and do nothing.

    Raises:
        MonitorError: QEMU cannot be read.
        DeadlineError: no reply in time.
    """
    recovery = Recovery()
    states = {each.run: each.state for each in await read_runs(monitor, base, deadline)}
    recovery.alive = [run for run, state in states.items() if state is State.ALIVE]
    recovery.unknown = [run for run, state in states.items() if state is State.UNKNOWN and run not in also]
    for run, state in states.items():
        if state is State.UNKNOWN and run in also:
            await _RunRecovery(monitor, run, None, dry_run, recovery).all(deadline)
    await _recover_dead(monitor, base, deadline, recovery, dry_run=dry_run)
    return recovery


async def _recover_dead(
    monitor: Monitor, base: str | None, deadline: Deadline, recovery: Recovery, *, dry_run: bool
) -> None:
    """Goes through all dead runs; of some, only the NBD server is in this QEMU, or only files are left."""
    for dead in dead_runs(base, for_peer=monitor.peer):
        if dead.works_on_another(monitor.peer):
            dead.keep = True
            continue
        with _kept_if_needed(dead, recovery, dry_run):
            await _RunRecovery(monitor, dead.run, dead, dry_run, recovery).all(deadline)


@contextmanager
def _kept_if_needed(directory: RunDirectory, recovery: Recovery, dry_run: bool) -> Iterator[None]:
    """Keeps a dead run's directory as long as something of it is left: it says that the run is dead."""
    before = len(recovery.left)
    directory.keep = True
    yield
    directory.keep = dry_run or len(recovery.left) > before


@dataclass(slots=True)
class _RunRecovery:
    """One dead run."""

    monitor: Monitor
    run: str
    directory: RunDirectory | None
    dry_run: bool
    recovery: Recovery

    async def all(self, deadline: Deadline) -> None:
        failed: list[str] = []
        found = False
        for _ in range(_MAX_PASSES):
            undo = await self._undo(deadline)
            found = found or bool(undo)
            if not undo:
                failed = []
                break
            if self.dry_run:
                self.recovery.removed += [(self.run, each) for each in undo]
                break
            failed = await self._pass(undo)
        if self.directory is not None:
            ours = await is_ours(self.monitor, self.directory, deadline)
            if ours or (found and self.directory.listener() is not None):
                failed += await self._server(self.directory)
        else:
            failed += await self._lost_server(deadline)
        self.recovery.left += failed

    async def _undo(self, deadline: Deadline) -> list[Undo]:
        undo = undo_of(self.run, await read_contents(self.monitor, deadline))
        noted = await asyncio.to_thread(noted_images, self.directory) if self.directory is not None else []
        return undo + [each for each in noted if each not in undo]

    async def _pass(self, undo: list[Undo]) -> list[str]:
        steps = TakeDown(self.monitor.has_gone)
        for each in undo:
            before = len(steps.left)
            await steps.step(str(each), partial(take_down, self.monitor, each, self.directory))
            if len(steps.left) == before:
                self.recovery.removed.append((self.run, each))
        return steps.left

    async def _server(self, directory: RunDirectory) -> list[str]:
        async def stop(deadline: Deadline) -> bool:
            return await stop_server(self.monitor, directory, deadline, ours=True)

        return await self._stopped(str(directory.socket_path), stop)

    async def _lost_server(self, deadline: Deadline) -> list[str]:
        path = await lost_server(self.monitor, self.run, deadline)
        if path is None:
            return []

        async def stop(deadline: Deadline) -> bool:
            return await stop_lost_server(self.monitor, self.run, path, deadline)

        return await self._stopped(path or "a place that is not known", stop)

    async def _stopped(self, where: str, stop: Callable[[Deadline], Awaitable[bool]]) -> list[str]:
        server = StopServer(where)
        steps = TakeDown(self.monitor.has_gone)

        async def work(deadline: Deadline) -> None:
            if await stop(deadline):
                self.recovery.removed.append((self.run, server))

        if self.dry_run:
            self.recovery.removed.append((self.run, server))
        else:
            await steps.step(str(server), work, STOP_SECONDS)
        return steps.left
