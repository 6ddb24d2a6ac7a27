"""A point in time for a session of exports, with the checkpoint that begins at it."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from qmpnbd.deadline import Deadline
from qmpnbd.export.depth import DepthReader
from qmpnbd.qmp.address import MonitorAddress
from qmpnbd.qmp.agent_journal import AgentJournal
from qmpnbd.qmp.checkpoint_at import BegunCheckpoint, NextCheckpoint, checkpoint_at
from qmpnbd.qmp.monitor import Monitor
from qmpnbd.qmp.planning import Wishes
from qmpnbd.qmp.pointintime import Before, PointInTime, point_in_time
from qmpnbd.qmp.quiesce import at_rest, thaw_leftovers
from qmpnbd.qmp.rundir import RunDirectory

log = logging.getLogger(__name__)


class HeldInstant:
    """A point in time that is held until `release`, and its checkpoint, which outlasts it.

    Args:
        point: what is held.
        checkpoint: what began at that instant; None if nothing did.
        depths: tells the allocation depths of the instant; None if they cannot be told.
        holding: its end takes the point in time down.

    Attributes:
        point: see above.
        checkpoint: see above.
        depths: see above.
    """

    def __init__(
        self,
        point: PointInTime,
        checkpoint: BegunCheckpoint | None,
        depths: DepthReader | None,
        holding: AsyncExitStack,
    ) -> None:
        self.point = point
        self.checkpoint = checkpoint
        self.depths = depths
        self._holding = holding

    async def release(self) -> None:
        """Takes the point in time down; once is enough.

        Raises:
            QmpnbdError: what was read does not hold, or something was left behind; see `point_in_time`.
        """
        await self._holding.aclose()


@asynccontextmanager
async def held_instant(
    monitor: Monitor,
    disks: Sequence[str],
    directory: RunDirectory,
    deadline: Deadline,
    *,
    wishes: Wishes,
    checkpoint: NextCheckpoint | None = None,
    depths: DepthReader | None = None,
    agent: MonitorAddress | str | None = None,
    journal: str = "",
) -> AsyncIterator[HeldInstant]:
    """Holds disks as they are at one instant, at which a checkpoint may begin.

    Args:
        monitor: the QEMU.
        disks: qdev ids, QOM paths or node-names.
        directory: the run's.
        deadline: for getting there.
        wishes: how.
        checkpoint: what to begin at the instant; merged back at the end unless it is decided about.
        depths: reads before the instant what the allocation depths are composed of, and is closed at the end; None for
            no need of them.
        agent: the guest agent's socket, to have the guest's filesystems at rest; None to go without.
        journal: folder in which it is written down that the guest may be frozen; with `agent`.

    Yields:
        The point in time.

    Raises:
        QmpnbdError: see `point_in_time` and `checkpoint_at`.
    """
    quiesce = None
    if agent is not None:
        notes = AgentJournal(Path(journal))
        for thawed in await thaw_leftovers(notes, log.warning):
            log.warning("thawed a guest that a killed run had left frozen: %s", thawed)
        quiesce = at_rest(agent, notes, deadline, required=False)
    async with AsyncExitStack() as stack:
        begun = None
        before: Before | None = None if depths is None else (await stack.enter_async_context(depths)).before
        if checkpoint is not None:
            begun = await stack.enter_async_context(checkpoint_at(monitor, disks, directory, checkpoint, deadline))
            wishes, before = begun.wishes(wishes), begun.before(deadline, before)
        holding = await stack.enter_async_context(AsyncExitStack())
        taking = point_in_time(monitor, disks, directory, deadline, wishes=wishes, before=before, quiesce=quiesce)
        yield HeldInstant(await holding.enter_async_context(taking), begun, depths, holding)
