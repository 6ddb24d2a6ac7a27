"""``qmpnbd status``: what of ours is in a QEMU, and which run it belongs to."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from qmpnbd.cli import options, output

if TYPE_CHECKING:
    from qmpnbd.qmp.address import MonitorAddress
    from qmpnbd.report.model import StatusDocument


EXAMPLES = (("qmpnbd status --qmp /run/vm.qmp", "what is there, and whether the runs that made it live"),)
"""Command lines, and what they are for."""


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = commands.add_parser("status", allow_abbrev=False)
    options.add_monitor(parser)
    options.add_json(parser, "qmpnbd.status/1")
    options.add_timeout(parser, options.SHORT_SECONDS)
    options.add_runtime_dir(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from qmpnbd.cli import signals
    from qmpnbd.report.jsontext import document_json
    from qmpnbd.report.runs import status_text

    document = signals.run(_document(arguments.qmp, arguments.runtime_dir, arguments.timeout))
    output.write([document_json(document) if arguments.json else status_text(document)])
    return 0


async def _document(address: MonitorAddress, base: str | None, seconds: float) -> StatusDocument:
    from qmpnbd.deadline import Deadline
    from qmpnbd.qmp.inventory import guest_status
    from qmpnbd.qmp.monitor import Monitor
    from qmpnbd.qmp.recover import read_runs
    from qmpnbd.qmp.server import nbd_server_runs
    from qmpnbd.report.model import StatusDocument
    from qmpnbd.report.runs import run_entry

    deadline = Deadline(seconds)
    async with await Monitor.connect(address, deadline) as monitor:
        runs = await read_runs(monitor, base, deadline)
        return StatusDocument(
            monitor=monitor.where,
            qemu=str(monitor.version),
            guest=await guest_status(monitor, deadline),
            nbd_server=await nbd_server_runs(monitor, deadline),
            runs=tuple(run_entry(each.run, each.state, each.things) for each in runs),
        )
