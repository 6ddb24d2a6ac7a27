"""``qmpnbd graph``: the block graph, and what exports of its nodes would say."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from qmpnbd.cli import options, output

if TYPE_CHECKING:
    from qmpnbd.qmp.address import MonitorAddress
    from qmpnbd.report.model import GraphDocument


EXAMPLES = (
    ("qmpnbd graph --qmp /run/vm.qmp", "every node below the disks, as a tree"),
    ("qmpnbd graph --qmp /run/vm.qmp --svg > graph.svg", "the same as a picture"),
)
"""Command lines, and what they are for."""


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "graph",
        description="Shows every node below the guest's disks with its files, exports and bitmaps, and which numbers "
        "an NBD export of it would give as allocation depth: plain, shifted by a filter, or hiding backing files.",
        allow_abbrev=False,
    )
    options.add_monitor(parser)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON document (schema qmpnbd.graph/1)")
    form.add_argument("--svg", action="store_true", help="print a picture: one SVG file, for light and dark pages")
    options.add_timeout(parser, options.SHORT_SECONDS)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from qmpnbd.cli import signals
    from qmpnbd.report.graphsvg import graph_svg
    from qmpnbd.report.graphtext import graph_text
    from qmpnbd.report.jsontext import document_json

    document = signals.run(_document(arguments.qmp, arguments.timeout))
    if arguments.json:
        output.write([document_json(document)])
    else:
        output.write([graph_svg(document) if arguments.svg else graph_text(document)])
    return 0


async def _document(address: MonitorAddress, seconds: float) -> GraphDocument:
    from qmpnbd.deadline import Deadline
    from qmpnbd.qmp.inventory import (
        guest_status,
        read_abilities,
        read_device_types,
        read_exports,
        read_inventory,
    )
    from qmpnbd.qmp.monitor import Monitor
    from qmpnbd.report.graph import Seen, graph_document

    deadline = Deadline(seconds)
    async with await Monitor.connect(address, deadline) as monitor:
        status = await guest_status(monitor, deadline)
        abilities = await read_abilities(monitor, deadline)
        inventory = await read_inventory(monitor, deadline)
        devices = await read_device_types(monitor, inventory.disks, deadline)
        exports = await read_exports(monitor, deadline)
        return graph_document(Seen(monitor.where, status, abilities, inventory, devices, exports))
