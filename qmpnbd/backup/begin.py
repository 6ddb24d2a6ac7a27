"""A backup whose data somebody else copies: begun at one instant over all disks, then committed or aborted.

::

    async with begin("vm.qmp", "nightly", catalog) as backup:
        for task in backup.tasks:
            ...                           # task.uri, task.decision, task.content(…)
        await backup.release()            # what was read holds, or this raises
        ...                               # prove it, make it durable under backup.id
        await backup.commit(Deadline(30))

Until `commit` both are there: what was recorded before the instant, and what is recorded since. Whoever leaves without
it has aborted, and the next increment holds it all again. Of whoever was killed the next `begin` finds out which of the
two is right, by looking for the backup's id in the catalog. Hence the order: durable first, commit then.

`qmpnbd.backup.run` is such a client, with a repository.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from qmpnbd.backup.plan import Catalog, Decision, Wish, decide
from qmpnbd.backup.scout import Scouted, commit_published, scout, settle
from qmpnbd.backup.task import DiskTask
from qmpnbd.deadline import Deadline
from qmpnbd.errors import InterferenceError
from qmpnbd.export.options import SETUP_SECONDS, Options
from qmpnbd.export.session import Session, exporting
from qmpnbd.qmp.address import MonitorAddress
from qmpnbd.qmp.checkpoint_at import NextCheckpoint
from qmpnbd.qmp.inventory import read_nodes
from qmpnbd.qmp.monitor import Monitor
from qmpnbd.qmp.naming import new_backup
from qmpnbd.qmp.planning import Wishes
from qmpnbd.qmp.pointintime import Statement
from qmpnbd.qmp.recover import remove_leftovers


@dataclass(frozen=True, slots=True)
class BeginOptions:
    """How to begin.

    Attributes:
        wish: what to make of each disk.
        granularity: of new bitmaps, in bytes; None for that of the ones before.
        instant: how the point in time is taken.
        nbd: URI of the NBD server this QEMU runs already, to be shared; None to start one.
        runtime_dir: where the private directory is made; None for the folder for temporary files.
        allow: names of hazards to take the risk of (`qmpnbd.qmp.capabilities.HAZARDS`).
        agent: the guest agent's socket, to have the guest's filesystems at rest at the instant; None to go without.
        journal: folder in which it is written down that the guest may be frozen; with `agent`.
        seconds: time until everything is up; None for no bound.
    """

    wish: Wish = field(default_factory=Wish)
    granularity: int | None = None
    instant: Wishes = field(default_factory=lambda: Wishes(depth=False))
    nbd: str | None = None
    runtime_dir: str | None = None
    allow: frozenset[str] = frozenset()
    agent: MonitorAddress | str | None = None
    journal: str = ""
    seconds: float | None = SETUP_SECONDS


@dataclass(frozen=True, slots=True)
class BegunBackup:
    """A backup that has begun; made by `begin`.

    Attributes:
        id: of the backup; it is in the names of the bitmaps that count from it.
        number: orders the backups of the chain.
        chain: chain id.
        session: the exports.
        tasks: what there is to do for each disk.
        flash: the same for firmware and its variables, of which everything is to be kept.
        left_out: disk -> why it is not part of this.
    """

    id: str
    number: int
    chain: str
    session: Session
    tasks: tuple[DiskTask, ...]
    flash: tuple[DiskTask, ...]
    left_out: Mapping[str, str]

    @property
    def statement(self) -> Statement | None:
        """How the point in time was taken."""
        return self.session.statement

    async def release(self) -> None:
        """Ends the point in time: once this returns, what was read of it holds.

        Raises:
            QmpnbdError: it does not hold, or something was left behind; see `Session.release`.
        """
        await self.session.release()

    async def commit(self, deadline: Deadline) -> None:
        """The backup is durable and proved: the next increment counts from it.

        Raises:
            QmpnbdError: see `Session.commit`. Whichever way it came out, nothing is lost.
        """
        if self.session.checkpoint is None:
            await self.session.release()
        else:
            await self.session.commit(deadline)

    async def abort(self, deadline: Deadline) -> None:
        """The backup has failed: the next increment counts from the one before.

        Raises:
            QmpnbdError: see `Session.abort`. Nothing is lost.
        """
        if self.session.checkpoint is None:
            await self.session.release()
        else:
            await self.session.abort(deadline)


@asynccontextmanager
async def begin(
    address: MonitorAddress | str,
    chain: str,
    catalog: Catalog,
    disks: Sequence[str] = (),
    options: BeginOptions | None = None,
) -> AsyncIterator[BegunBackup]:
    """Begins a backup of disks at one instant, and aborts it unless it is committed.

    Args:
        address: where QEMU's QMP monitor listens.
        chain: chain id.
        catalog: the backups of the chain that are whole.
        disks: qdev ids, QOM paths or node-names; none for all of the guest's but those in removable drives.
        options: how.

    Yields:
        The backup.

    Raises:
        QmpnbdError: it cannot be begun, and nothing was changed; or, out of the body, what was read does not hold.
    """
    choice = options or BeginOptions()
    deadline = Deadline(choice.seconds)
    async with await Monitor.connect(address, deadline) as monitor:
        await commit_published(monitor, catalog, deadline)
        await remove_leftovers(monitor, choice.runtime_dir, deadline)
        await settle(monitor, chain, catalog, disks, deadline)
        scouted, left_out = await scout(monitor, chain, disks, deadline)
    checkpoint = None
    if any(not each.now.read_only for each in scouted):
        checkpoint = NextCheckpoint(chain, granularity=choice.granularity, newest=catalog.newest)
    how = Options(
        nbd=choice.nbd,
        runtime_dir=choice.runtime_dir,
        allow=choice.allow,
        seconds=choice.seconds,
        instant=replace(choice.instant, depth=choice.wish.shallow),
        checkpoint=checkpoint,
        composed_depth=False,  # the overlay's tells enough of the active layer (`DiskTask.content`)
        agent=choice.agent,
        journal=choice.journal,
    )
    async with exporting(address, [each.disk.name for each in scouted], how) as session:
        begun = session.checkpoint
        tasks = [_task(each, number, session, catalog, choice.wish) for number, each in enumerate(scouted)]
        tasks = await _with_granularity(session.monitor, tasks, deadline)
        flash = {each.disk.name for each in scouted if each.is_flash}
        yield BegunBackup(
            id=begun.backup if begun else new_backup(),
            number=begun.number if begun else catalog.newest + 1,
            chain=chain,
            session=session,
            tasks=tuple(task for task in tasks if task.name not in flash),
            flash=tuple(task for task in tasks if task.name in flash),
            left_out=left_out,
        )


def _task(scouted: Scouted, number: int, session: Session, catalog: Catalog, wish: Wish) -> DiskTask:
    export, now, begun = session.exports[number], scouted.now, session.checkpoint
    part = begun.disks[number] if begun else None
    if part is not None and part.bitmap and part.node_name != scouted.node_name:
        raise InterferenceError(
            f"the disk stands on another node than before: {part.node_name}, not {scouted.node_name}",
            where=f"disk {now.name}",
            remedy="Somebody takes snapshots meanwhile. Try again.",
        )
    base = part.base if part else None
    now = replace(now, size=export.size, counts_from=base.backup if base else None)
    decision = Decision("full") if scouted.is_flash else decide(now, catalog, wish)
    depth_export = session.held.point.offers[number].depth_export if session.held else ""
    return DiskTask(
        name=now.name,
        qom_path=scouted.disk.qom_path,
        node_name=scouted.node_name,
        device=scouted.device,
        identity=now.identity,
        size=export.size,
        uri=export.uri,
        depth_uri=replace(export.uri, export=depth_export) if depth_export else None,
        decision=decision,
        bitmaps=part.increment if part else (),
        bitmap=part.bitmap if part else "",
        checkpoint=begun.number if begun and part and part.bitmap else None,
        transient_because=part.transient_because if part else "",
        template=scouted.template,
    )


async def _with_granularity(monitor: Monitor, tasks: Sequence[DiskTask], deadline: Deadline) -> list[DiskTask]:
    """Fills in the granularity that QEMU has given the new bitmaps."""
    nodes = await read_nodes(monitor, deadline)
    known = {(node.node_name, each.name): each.granularity for node in nodes for each in node.dirty_bitmaps}
    return [replace(task, granularity=known.get((task.node_name, task.bitmap))) for task in tasks]
