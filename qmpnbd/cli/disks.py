"""``qmpnbd disks``: the guest's disks and their backing chains."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from qmpnbd.cli import options, output, terminal

if TYPE_CHECKING:
    from qmpnbd.qmp.address import MonitorAddress
    from qmpnbd.report.model import DisksDocument


EXAMPLES = (
    ("qmpnbd disks --qmp /run/vm.qmp", "the disks of a running guest"),
    ("qmpnbd disks --qmp localhost:4444 --json", "the same as one JSON document, over TCP"),
)
"""Command lines, and what they are for."""


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = commands.add_parser("disks", allow_abbrev=False)
    options.add_monitor(parser)
    options.add_json(parser, "qmpnbd.disks/1")
    options.add_timeout(parser, options.SHORT_SECONDS)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from qmpnbd.cli import signals
    from qmpnbd.report.jsontext import document_json
    from qmpnbd.report.text import disks_text

    document = signals.run(_document(arguments.qmp, arguments.timeout))
    width = terminal.width(sys.stdout)
    output.write([document_json(document) if arguments.json else disks_text(document, width)])
    return 0


async def _document(address: MonitorAddress, seconds: float) -> DisksDocument:
    from qmpnbd.deadline import Deadline
    from qmpnbd.qmp.inventory import guest_status, read_device_types, read_inventory
    from qmpnbd.qmp.monitor import Monitor
    from qmpnbd.report.disks import disks_document

    deadline = Deadline(seconds)
    async with await Monitor.connect(address, deadline) as monitor:
        status = await guest_status(monitor, deadline)
        inventory = await read_inventory(monitor, deadline)
        devices = await read_device_types(monitor, inventory.disks, deadline)
        return disks_document(
            monitor.where, str(monitor.version), status, inventory.disks, inventory.graph, devices=devices
        )
