"""A guest at rest for an instant, and what can truly be said of that instant.

A freeze outlives us. So it is written down before (`qmpnbd.qmp.agent_journal`), and thawed on every way out::

    journal -> freeze -> what shall happen at rest -> still frozen? -> thaw -> journal
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal

from qmpnbd.deadline import Deadline
from qmpnbd.errors import AgentError, AgentRefusedError, AgentSilentError, MonitorConnectError, QmpnbdError
from qmpnbd.qmp.address import MonitorAddress
from qmpnbd.qmp.agent import FROZEN_ALREADY, SYNC_SECONDS, Agent
from qmpnbd.qmp.agent_journal import AgentJournal, JournalEntry
from qmpnbd.qmp.monitor import finish

FREEZE_SECONDS = 30.0
"""For the freeze itself: the guest writes everything to its disks before."""

REST_SECONDS = 10.0
"""How long a guest is kept frozen at most; Windows ends a freeze by itself after as long."""

THAW_SECONDS = 20.0
"""For the thaw, beyond the caller's time; it may have to wait for a freeze that is under way."""

_TRIES = 2

Kind = Literal["frozen", "paused", "crash-consistent"]


@dataclass(frozen=True, slots=True)
class Consistency:
    """What can be said of the disks' content at an instant.

    Attributes:
        kind: ``frozen`` (the guest's filesystems were at rest, by its own word before and after), ``paused`` (the
            guest's processors stood still: as after a power cut, but the same instant on all disks), or
            ``crash-consistent`` (as after a power cut).
        window_ms: how long the guest's writes were held up, in milliseconds; 0 where they were not.
        filesystems: how many were frozen; 0 otherwise.
        reason: why not ``frozen``; empty if it is, or was not wanted.
        remedy: what to do about it.
    """

    kind: Kind
    window_ms: float = 0.0
    filesystems: int = 0
    reason: str = ""
    remedy: str = ""


class Rest:
    """A guest at rest, or not; given out by `at_rest`.

    Attributes:
        consistency: what can be said of the instant; final when the ``async with`` has ended.
        agent: the guest agent; None if none answers. Its channel has room for one client, so it is this or none.
    """

    def __init__(self, consistency: Consistency, agent: Agent | None = None) -> None:
        self.consistency = consistency
        self.agent = agent


@asynccontextmanager
async def at_rest(
    address: MonitorAddress | str,
    journal: AgentJournal,
    deadline: Deadline,
    *,
    required: bool = True,
    seconds: float = REST_SECONDS,
) -> AsyncIterator[Rest]:
    """Freezes the guest for the length of an ``async with``, and thaws it on every way out.

    Whether it was at rest all the time is asked at the end: somebody else may have thawed it, or it itself. Then what
    is said is ``crash-consistent``.

    Args:
        address: the agent's socket.
        journal: where it is written down that the guest may be frozen.
        deadline: for the freeze, which may take `FREEZE_SECONDS`. Thawing has its own time.
        required: raise if it cannot be frozen; else go on without, and say so in `Rest.consistency`.
        seconds: how long it may stay frozen; what is done meanwhile is cancelled then.

    Raises:
        AgentError: it cannot be frozen, or not be thawed: the message says which.
        MonitorConnectError: no agent's socket.
        DeadlineError: what is done meanwhile took longer than `seconds`.
    """
    where = str(address)
    try:
        agent = await Agent.connect(address, deadline)
    except (AgentError, MonitorConnectError) as error:
        if required:
            raise
        yield Rest(_crash_consistent(error))
        return
    async with agent:
        try:
            await _require_thawed(agent, deadline)
        except AgentError as error:
            if required:
                raise
            yield Rest(_crash_consistent(error))
            return
        entry = journal.write_down(where)
        try:
            async with _frozen(agent, entry, deadline, required=required, seconds=seconds) as rest:
                yield rest
        finally:
            entry.let_go()


async def _require_thawed(agent: Agent, deadline: Deadline) -> None:
    if await agent.status(deadline) == "frozen":
        raise AgentRefusedError(
            "the guest is frozen already, and not by us",
            where=agent.where,
            remedy="Another backup is at work: wait. If it died, thaw the guest with guest-fsfreeze-thaw.",
        )


@asynccontextmanager
async def _frozen(
    agent: Agent, entry: JournalEntry, deadline: Deadline, *, required: bool, seconds: float
) -> AsyncIterator[Rest]:
    began = time.monotonic()
    try:
        count = await _freeze(agent, entry, deadline)
    except AgentError as error:
        if required:
            raise
        rest = Rest(_crash_consistent(error), agent)
        count = 0
    if not count:
        yield rest
        return
    rest = Rest(Consistency("crash-consistent"), agent)
    held, thawed = False, 0
    try:
        async with asyncio.timeout(seconds) as scope:
            yield rest
        held = await _is_frozen(agent)
    except TimeoutError:
        if scope.expired():
            raise Deadline(seconds).expired("what is done while the guest is frozen", agent.where) from None
        raise
    finally:
        thawed = await finish(_thaw(agent, entry))
        rest.consistency = _outcome(count, (time.monotonic() - began) * 1000, held=held and thawed > 0)


async def _freeze(agent: Agent, entry: JournalEntry, deadline: Deadline) -> int:
    """Freezes, and returns how many filesystems, at least one; if that fails, the guest is thawed when this returns.

    What was given up may come late; the thaw stands in line behind it.
    """
    try:
        count = await agent.freeze(deadline.within(FREEZE_SECONDS))
        _require_some(count, agent.where)
    except BaseException as error:
        if isinstance(error, AgentRefusedError) and FROZEN_ALREADY in error.what:
            entry.cross_out()  # somebody else's freeze, which is not ours to end
        else:
            await finish(_thaw(agent, entry))
        raise
    return count


def _require_some(count: int, where: str) -> None:
    if not count:
        raise AgentRefusedError(
            "the guest has no filesystem that can be frozen",
            where=where,
            remedy="Filesystems on the guest's disks must be mounted to be frozen.",
        )


async def _is_frozen(agent: Agent) -> bool:
    try:
        return await agent.status(Deadline(SYNC_SECONDS)) == "frozen"
    except AgentError:
        return False  # nobody can say that it was


def _outcome(count: int, window_ms: float, *, held: bool) -> Consistency:
    if held:
        return Consistency("frozen", window_ms, count)
    return Consistency(
        "crash-consistent",
        window_ms,
        reason="the guest was thawed, by somebody else or by itself, before all was done",
        remedy="See what else talks to the guest agent; Windows thaws itself after 10 s.",
    )


def _crash_consistent(error: QmpnbdError) -> Consistency:
    return Consistency("crash-consistent", reason=f"{error.where}: {error.what}", remedy=error.remedy)


async def _thaw(agent: Agent, entry: JournalEntry) -> int:
    """Thaws, over a new connection if the old one is no good any more, and crosses the entry out.

    Returns:
        How many filesystems were frozen until then.
    """
    deadline = Deadline(THAW_SECONDS)
    try:
        thawed = await agent.thaw(deadline.within(THAW_SECONDS / _TRIES))
    except AgentError:
        await agent.close()  # or it would keep the new one out
        try:
            async with await Agent.connect(entry.agent, deadline) as again:
                thawed = await again.thaw(deadline)
        except QmpnbdError as error:
            raise AgentSilentError(
                f"the guest may still be frozen: {error.what}",
                where=agent.where,
                remedy=f"Thaw it with guest-fsfreeze-thaw. It is written down in {entry.path}, for the next start.",
            ) from error
    entry.cross_out()
    return thawed


def frozen_leftovers(journal: AgentJournal) -> list[str]:
    """Returns the addresses of the agents whose guests killed runs may have left frozen."""
    return [entry.agent for entry in journal.leftovers()]


async def thaw_leftovers(journal: AgentJournal, tell: Callable[[str], None]) -> list[str]:
    """Thaws the guests that killed runs left frozen.

    Args:
        journal: where they are written down.
        tell: is told what could not be thawed; it stays written down, unless its QEMU is gone.

    Returns:
        The addresses of the agents whose guests were thawed now.
    """
    thawed = []
    for entry in journal.leftovers():
        try:
            async with await Agent.connect(entry.agent, Deadline(THAW_SECONDS)) as agent:
                if await agent.thaw(Deadline(THAW_SECONDS)):
                    thawed.append(entry.agent)
            entry.cross_out()
        except QmpnbdError as error:
            if isinstance(error.__cause__, FileNotFoundError | ConnectionRefusedError):
                entry.cross_out()  # its QEMU is gone, and with it the frozen guest
            tell(str(error))
    return thawed
