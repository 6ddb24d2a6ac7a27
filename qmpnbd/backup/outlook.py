"""What a backup would do now: the dry run, which changes nothing anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qmpnbd.backup.begin import BeginOptions
from qmpnbd.backup.catalog import shelf_of
from qmpnbd.backup.plan import Decision, decide
from qmpnbd.backup.repository import Repository
from qmpnbd.backup.scout import Scouted, scout
from qmpnbd.deadline import Deadline
from qmpnbd.qmp.address import MonitorAddress
from qmpnbd.qmp.inventory import guest_status
from qmpnbd.qmp.monitor import Monitor


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a backup would do.

    Attributes:
        monitor: the QMP address.
        qemu: QEMU's version.
        guest: the guest's status.
        number: that the backup would have, if nothing is undecided.
        disks: each disk with what would be made of it.
        left_out: disk -> why it would not be part of this.
        damaged: what in the chain is damaged.
    """

    monitor: str
    qemu: str
    guest: str
    number: int
    disks: tuple[tuple[Scouted, Decision], ...]
    left_out: Mapping[str, str]
    damaged: tuple[str, ...]


async def look(
    address: MonitorAddress | str,
    repository: Path,
    chain: str,
    disks: Sequence[str] = (),
    options: BeginOptions | None = None,
) -> Outlook:
    """Finds out what `qmpnbd.backup.run.back_up` would do, with the same arguments; the repository is not locked.

    Raises:
        QmpnbdError: see `qmpnbd.errors`.
    """
    choice = options or BeginOptions()
    opened = Repository.open(repository)
    shelf, wish = shelf_of(opened, chain), choice.wish
    if wish.type == "differential":
        wish = replace(wish, since=opened.find(chain, wish.since or "latest").manifest.id)
    deadline = Deadline(choice.seconds)
    async with await Monitor.connect(address, deadline) as monitor:
        guest = await guest_status(monitor, deadline)
        scouted, left_out = await scout(monitor, chain, disks, deadline)
        return Outlook(
            monitor=monitor.where,
            qemu=str(monitor.version),
            guest=guest,
            number=shelf.catalog.newest + 1,
            disks=tuple((each, decide(each.now, shelf.catalog, wish)) for each in scouted if not each.is_flash),
            left_out=left_out,
            damaged=shelf.faults,
        )
