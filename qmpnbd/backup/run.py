"""The whole of a backup, in the order in which nothing can be lost.

::

    lock the repository, clear what killed runs left | decide | one instant over all disks: freeze, next bitmaps begin
    | copy and hash -> files fsynced | release: what was read holds | read again: the hashes agree
    | publish: manifest fsynced, renamed | commit: the older bitmaps go
                                         ^
      before this point whatever fails, or kills us, is as if nothing had been: draft gone, bitmaps merged back;
      after it the backup is there, and counting from it or from the one before are both right
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

from qmpnbd import __version__
from qmpnbd.backup import durable
from qmpnbd.backup.backups import Backup
from qmpnbd.backup.begin import BeginOptions, BegunBackup, begin
from qmpnbd.backup.catalog import Shelf, shelf_of
from qmpnbd.backup.draft import Draft
from qmpnbd.backup.machine import machine_facts
from qmpnbd.backup.manifest import ExtraFile, Manifest, StatementEntry, now
from qmpnbd.backup.pace import paced
from qmpnbd.backup.plan import Wish
from qmpnbd.backup.prove_layer import prove_extra, prove_layer
from qmpnbd.backup.repository import Repository
from qmpnbd.backup.several import several
from qmpnbd.backup.storing import StoredDisk, Storing
from qmpnbd.backup.tally import DisksProgress, Tally
from qmpnbd.backup.template import with_sha256
from qmpnbd.deadline import Deadline
from qmpnbd.errors import TargetError
from qmpnbd.export.joining import JoinFromThread
from qmpnbd.qmp.address import MonitorAddress
from qmpnbd.qmp.monitor import finish
from qmpnbd.qmp.pointintime import Statement

T = TypeVar("T")

COMMIT_SECONDS = 30.0
"""For the transaction that commits: it takes milliseconds, unless QEMU is busy."""

JOBS = 2
"""Disks at a time. Each takes up to some 30 MiB (requests in flight, what waits to be hashed and written)."""

_FACTS_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class BackupOptions:
    """How to back up.

    Attributes:
        begin: how to begin; `Wish.since` may be whatever `Repository.find` knows.
        proof: ``hashes`` to read all data again before the backup is published, ``sizes`` for the images' tables only.
        compression: of the data.
        jobs: disks that are copied, and proved, at a time; 1 or more.
        bytes_per_second: of data of all disks together, at most; None for no limit.
        progress: told how far the disks are, in some thread, but never by two at once; None to tell nobody.
        seconds: time for everything but taking down; None for no bound.
    """

    begin: BeginOptions = field(default_factory=BeginOptions)
    proof: Literal["hashes", "sizes"] = "hashes"
    compression: Literal["", "zstd"] = ""
    jobs: int = JOBS
    bytes_per_second: int | None = None
    progress: Callable[[DisksProgress], None] | None = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class BackedUp:
    """A backup that is durable, proved, and counted from.

    Attributes:
        backup: in the repository.
        disks: what was made of each disk, in the order of the manifest.
        begun: what it began with; its exports are gone.
        qemu: QEMU's version.
        statement: how the instant was taken.
        cleared: what killed runs had left in the repository, and was removed.
        damaged: what in the chain is damaged; nothing was built on that.
        seconds: it took.
    """

    backup: Backup
    disks: tuple[StoredDisk, ...]
    begun: BegunBackup
    qemu: str
    statement: Statement | None
    cleared: tuple[str, ...]
    damaged: tuple[str, ...]
    seconds: float


async def back_up(
    address: MonitorAddress | str,
    repository: Path,
    chain: str,
    disks: Sequence[str] = (),
    options: BackupOptions | None = None,
) -> BackedUp:
    """Backs up disks of a running QEMU.

    Args:
        address: where its QMP monitor listens.
        repository: the repository.
        chain: the chain of backups.
        disks: qdev ids, QOM paths or node-names; none for all of the guest's but those in removable drives.
        options: how.

    Raises:
        RepositoryBusyError: another run holds the repository.
        NotProvedError: what was read again is not what was written.
        TargetError: the repository cannot be written.
        NoSuchBackupError: there is no repository, or not the backup to count from.
        QmpnbdError: see `qmpnbd.errors`. In all of these cases there is no backup, and the next increment holds what
            this one would have held; or the error's notes tell the backup that is there all the same.
    """
    choice = options or BackupOptions()
    opened = Repository.open(repository)
    with opened.lock(f"a backup of chain {chain}"):
        run = _Run(opened, chain, choice, Deadline(choice.seconds))
        return await run.all(address, disks)


class _Run:
    """A backup in the making; the repository is locked."""

    def __init__(self, repository: Repository, chain: str, choice: BackupOptions, deadline: Deadline) -> None:
        self._repository = repository
        self._chain = chain
        self._choice = choice
        self._deadline = deadline
        self._started = time.monotonic()

    async def all(self, address: MonitorAddress | str, disks: Sequence[str]) -> BackedUp:
        cleared = self._repository.recover()
        shelf = shelf_of(self._repository, self._chain)
        how = replace(self._choice.begin, wish=self._wish(self._choice.begin.wish))
        async with begin(address, self._chain, shelf.catalog, disks, how) as begun:
            created = now()
            draft = self._repository.begin(self._chain, begun.id, begun.number)
            try:
                stored, extras = await self._write(begun, draft, shelf)
                await begun.release()
                await self._prove(draft, stored, extras)
                stored = await self._identified(stored, shelf)
                manifest = self._manifest(begun, shelf, created, stored, extras)
            except BaseException as error:
                _discard(draft, error)
                raise
            backup = await finish(self._publish(begun, draft, manifest))
            return BackedUp(
                backup=backup,
                disks=stored,
                begun=begun,
                qemu=manifest.qemu,
                statement=begun.statement,
                cleared=tuple(cleared),
                damaged=shelf.faults,
                seconds=time.monotonic() - self._started,
            )

    def _wish(self, wish: Wish) -> Wish:
        if wish.type != "differential":
            return wish
        return replace(wish, since=self._repository.find(self._chain, wish.since or "latest").manifest.id)

    async def _write(
        self, begun: BegunBackup, draft: Draft, shelf: Shelf
    ) -> tuple[tuple[StoredDisk, ...], tuple[ExtraFile, ...]]:
        """Writes everything but the manifest into the draft."""
        facts = await machine_facts(begun.session.monitor, self._deadline.within(_FACTS_SECONDS))
        durable.write(draft.path / "machine.json", facts)
        digest = hashlib.sha256(facts).hexdigest()
        extras = [ExtraFile(name="machine", file="machine.json", bytes=len(facts), sha256=digest)]
        choice = self._choice
        names = [task.name for task in (*begun.flash, *begun.tasks)]
        draft.name_files(names)
        storing = Storing(
            draft,
            shelf.backups,
            choice.compression,
            paced(choice.bytes_per_second),
            Tally(names, choice.progress),
            JoinFromThread(begun.session.monitor, self._deadline),
        )
        extras += await self._several([partial(storing.flash, task, self._deadline) for task in begun.flash])
        stored = await self._several([partial(storing.disk, task, self._deadline) for task in begun.tasks])
        return tuple(stored), tuple(extras)

    async def _prove(self, draft: Draft, stored: Sequence[StoredDisk], extras: Sequence[ExtraFile]) -> None:
        """Holds every file but the manifest against what was meant to be written."""
        deadline, read_data = self._deadline, self._choice.proof == "hashes"
        files = [partial(prove_extra, draft.path / each.file, each, deadline, read_data=read_data) for each in extras]
        layers = [partial(prove_layer, each.path, each.hashes, deadline, read_data=read_data) for each in stored]
        await self._several([*files, *layers])

    async def _several(self, work: Sequence[Callable[[], T]]) -> list[T]:
        return await self._stoppable(partial(several, work, self._choice.jobs, self._deadline))

    async def _identified(self, stored: Sequence[StoredDisk], shelf: Shelf) -> tuple[StoredDisk, ...]:
        """Adds to the templates of shallow layers what proves them later; they are read once, not for each backup."""
        if self._choice.proof != "hashes":
            return tuple(stored)

        def work() -> tuple[StoredDisk, ...]:
            known = [disk.template for backup in shelf.backups.values() for disk in backup.manifest.disks]
            found = []
            for each in stored:
                template = each.entry.template
                if template is not None:
                    template = with_sha256(template, known, self._deadline)
                    known.append(template)
                found.append(replace(each, entry=each.entry.model_copy(update={"template": template})))
            return tuple(found)

        return await self._stoppable(work)

    def _manifest(
        self,
        begun: BegunBackup,
        shelf: Shelf,
        created: str,
        stored: Sequence[StoredDisk],
        extras: Sequence[ExtraFile],
    ) -> Manifest:
        said = begun.statement
        return Manifest(
            id=begun.id,
            chain=self._chain,
            number=begun.number,
            parent=shelf.newest,
            created=created,
            qmpnbd=__version__,
            qemu=str(begun.session.monitor.version),
            statement=None
            if said is None
            else StatementEntry(
                recipe=said.recipe.value,
                why=said.why,
                consistency=said.consistency.kind,
                window_ms=said.window_ms,
                paused_ms=said.paused_ms,
            ),
            disks=tuple(each.entry for each in stored),
            extras=tuple(extras),
        )

    async def _publish(self, begun: BegunBackup, draft: Draft, manifest: Manifest) -> Backup:
        """Makes the backup known, then has the next increment count from it; not to be interrupted in between."""
        try:
            backup = await asyncio.to_thread(draft.publish, manifest)
        except BaseException as error:
            _discard(draft, error)
            raise
        try:
            await begun.commit(Deadline(COMMIT_SECONDS))
        except BaseException as error:
            error.add_note(
                f"the backup {manifest.id} is whole and proved; only its checkpoint could not be committed: the next "
                "increment counts from it, or from the one before, and holds all that it must"
            )
            raise
        return backup

    async def _stoppable(self, work: Callable[[], T]) -> T:
        """Runs blocking work in a thread; a cancellation has it stop, and waits for that."""
        task = asyncio.ensure_future(asyncio.to_thread(work))
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            self._deadline.stop()
            await finish(_settled(task))
            raise
        return task.result()


def _discard(draft: Draft, why: BaseException) -> None:
    """Removes a draft; what cannot be removed is told, and does not hide why it is to go."""
    try:
        draft.discard()
    except TargetError as error:
        why.add_note(f"{error} What is left of the backup is removed by the next run.")


async def _settled(task: asyncio.Future[T]) -> None:
    await asyncio.wait({task})
    task.exception()  # looked at, so that asyncio does not complain
