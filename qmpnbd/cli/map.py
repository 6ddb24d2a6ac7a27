"""``qmpnbd map``: what an NBD server says of an export."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import TYPE_CHECKING

from qmpnbd.cli import options, output, terminal
from qmpnbd.errors import UsageError
from qmpnbd.nbd.constants import ALLOCATION_DEPTH

if TYPE_CHECKING:
    from qmpnbd.extents import ExtentMap


EXAMPLES = (
    ("qmpnbd map nbd+unix:///disk?socket=/run/vm.nbd", "allocation depth as the server tells it"),
    ("qmpnbd map nbd://host/disk --context base:allocation --totals", "how much is data, how much a hole"),
    ("qmpnbd map nbd+unix:///disk?socket=/run/vm.nbd --svg disk.svg", "the same as a picture"),
)
"""Command lines, and what they are for."""


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = commands.add_parser("map", allow_abbrev=False)
    options.add_uri(parser)
    parser.add_argument(
        "--context",
        action="append",
        metavar="NAME",
        help=f"metadata context, several side by side with several --context (default: {ALLOCATION_DEPTH})",
    )
    parser.add_argument("--offset", type=options.whole, default=0, metavar="BYTES", help="begin there (default: 0)")
    parser.add_argument(
        "--length", type=options.whole, metavar="BYTES", help="so many bytes (default: to the end of the export)"
    )
    parser.add_argument("--totals", action="store_true", help="how many bytes have each status, not where")
    form = options.add_nbdinfo(parser, "nbdinfo --map=NAME", "qmpnbd.map/1")
    form.add_argument("--svg", metavar="FILE", help="draw the map, a strip a context, as SVG; - for stdout")
    options.add_timeout(parser, options.LONG_SECONDS)
    options.add_tls(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from qmpnbd.cli.reportfile import ReportFile
    from qmpnbd.deadline import Deadline
    from qmpnbd.nbd.client import Client

    contexts = list(dict.fromkeys(arguments.context or [ALLOCATION_DEPTH]))
    compatible = arguments.nbdinfo or arguments.nbdinfo_text
    if compatible and (len(contexts) > 1 or arguments.offset or arguments.length is not None):
        raise UsageError(
            "several contexts or a part of the export", where="--nbdinfo", remedy="nbdinfo's form has no room for that."
        )
    if arguments.totals and arguments.json:
        raise UsageError("there is no such document", where="--totals --json", remedy="Add up the extents of --json.")
    if arguments.totals and arguments.svg is not None:
        raise UsageError("a drawing shows where", where="--totals --svg", remedy="Leave one of them out.")
    with contextlib.nullcontext() if arguments.svg is None else ReportFile.open(arguments.svg) as drawing:
        deadline = Deadline(arguments.timeout)
        with Client.connect(arguments.uri, contexts=contexts, deadline=deadline, tls=options.tls(arguments)) as client:
            found = client.maps(arguments.offset, arguments.length, deadline=deadline)
            size = client.export.size
        maps = {context: found[context] for context in contexts}
        # Each form brings its own renderer in: pydantic alone takes longer than reading most maps.
        if drawing is not None:
            from qmpnbd.report.svg import maps_svg

            drawing.finish(maps_svg(arguments.uri, maps, arguments.offset))
        elif compatible or arguments.totals:
            _write_as_nbdinfo(maps, as_json=arguments.nbdinfo, totals=arguments.totals)
        elif arguments.json:
            from qmpnbd.report import jsontext
            from qmpnbd.report.model import MapDocument

            head = MapDocument(uri=arguments.uri, size=size, offset=arguments.offset, maps=())
            output.write(jsontext.map_json(head, maps))
        else:
            from qmpnbd.report import maptext

            output.write(maptext.maps_text(maps, arguments.offset, terminal.width(sys.stdout)))
    return 0


def _write_as_nbdinfo(maps: dict[str, ExtentMap], *, as_json: bool, totals: bool) -> None:
    from qmpnbd.report import nbdinfo

    for context, extents in maps.items():
        if len(maps) > 1:  # not in nbdinfo's own forms
            output.write([f"{context}:\n"])
        if totals:
            output.write([(nbdinfo.totals_json if as_json else nbdinfo.totals_text)(context, extents)])
        else:
            output.write((nbdinfo.map_json if as_json else nbdinfo.map_text)(context, extents))
