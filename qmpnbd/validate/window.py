"""Exports of a running QEMU that are ours, each with an NBD client on it, called windows.

Windows are closed export first: QEMU 7.2 aborts when a client of a disk in an iothread leaves before its export.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial

from qmpnbd.deadline import Deadline
from qmpnbd.export.lasting import LastingClients
from qmpnbd.nbd.aio import Client
from qmpnbd.nbd.uri import NbdUri
from qmpnbd.qmp.exports import ExportOptions, add_export, remove_export
from qmpnbd.qmp.inventory import require_safe_moment
from qmpnbd.qmp.monitor import Monitor
from qmpnbd.qmp.naming import export_id
from qmpnbd.qmp.teardown import TakeDown


def _nobody_asked(_count: int, _total: int) -> None:
    """Takes note of nothing."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run works: everything that its disks share.

    Attributes:
        monitor: the QEMU.
        server: its NBD server; the export name is filled in.
        run: the run id.
        numbers: gives every export and bitmap of the run a number of its own.
        take_down: takes everything down.
        deadline: for everything but taking down.
        on_bytes: told how many more bytes of a disk's content have been compared, and how many there are.
    """

    monitor: Monitor
    server: NbdUri
    run: str
    numbers: Iterator[int]
    take_down: TakeDown
    deadline: Deadline
    on_bytes: Callable[[int, int], None] = _nobody_asked


@dataclass(frozen=True, slots=True)
class Window:
    """An export of ours, and a client that looks through it."""

    export: str
    client: Client


async def open_window(
    place: Place, stack: AsyncExitStack, node_name: str, contexts: Sequence[str], bitmaps: Sequence[str] = ()
) -> Window:
    """Exports a node and connects to it; `stack` closes both, the export first.

    Raises:
        MonitorError: QEMU refused.
        NbdError: the export cannot be used.
        DeadlineError: the time is over.
    """
    name = export_id(place.run, next(place.numbers))
    clients = LastingClients(place.monitor)
    stack.push_async_callback(clients.close)
    stack.push_async_callback(place.take_down.step, f"export {name}", partial(remove_export, place.monitor, name))
    await require_safe_moment(place.monitor, place.deadline)
    await add_export(place.monitor, node_name, name, place.deadline, ExportOptions(bitmaps=bitmaps))
    uri = replace(place.server, export=name)
    return Window(name, await clients.connect(uri, contexts, place.deadline))
