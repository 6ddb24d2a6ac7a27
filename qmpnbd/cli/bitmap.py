"""``qmpnbd bitmap populate``: fills a dirty bitmap, which QEMU itself has no command for."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from qmpnbd.cli import options, output
from qmpnbd.errors import UsageError

if TYPE_CHECKING:
    from qmpnbd.control.populate import Source


EXAMPLES = (
    ("qmpnbd bitmap populate --qmp /run/vm.qmp --disk vd0 --name clone --from-depth 1", "what the active layer holds"),
)
"""Command lines, and what they are for."""


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = commands.add_parser("bitmap", allow_abbrev=False)
    verbs = parser.add_subparsers(title="subcommands", required=True, metavar="SUBCOMMAND")
    populate = verbs.add_parser(
        "populate",
        help="fill a dirty bitmap from allocation depth, a list of extents, or the difference of two images",
        description="Marks extents in a dirty bitmap of a running QEMU, which need not be newer than 5.2. The guest "
        "may write meanwhile: nothing of that is lost. A bitmap that exists keeps what it marks; else it is made.",
        allow_abbrev=False,
    )
    options.add_monitor(populate)
    populate.add_argument("--disk", required=True, metavar="DISK", help="qdev id, QOM path or node-name")
    populate.add_argument("--name", required=True, metavar="BITMAP", help="the bitmap, on the disk's active layer")
    source = populate.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--from-depth", metavar="N[..[M]]", help="where the disk has this allocation depth: 1, 1..3, or 2.. and more"
    )
    source.add_argument(
        "--extents",
        metavar="FILE",
        help='a JSON list of {"offset": BYTES, "length": BYTES}, or what `qmpnbd chain --json` or qemu-img map print; '
        "- for stdin",
    )
    source.add_argument(
        "--difference", nargs=2, metavar=("IMAGE", "IMAGE"), help="where two images that nobody writes differ"
    )
    options.add_granularity(populate, "64 KiB")
    populate.add_argument("--transient", action="store_true", help="do not store a new bitmap in the image")
    options.add_sharing(populate)
    options.add_json(populate, "qmpnbd.populate/1")
    options.add_timeout(populate, options.LONG_SECONDS)
    populate.set_defaults(run=_populate)


def _populate(arguments: argparse.Namespace) -> int:
    from qmpnbd.cli import signals
    from qmpnbd.control.populate import Filling, populate_bitmap
    from qmpnbd.report.jsontext import document_json
    from qmpnbd.report.populate import populate_document, populate_text

    filling = Filling(
        disk=arguments.disk,
        bitmap=arguments.name,
        source=_source(arguments),
        granularity=arguments.granularity,
        transient=arguments.transient,
        seconds=arguments.timeout,
        nbd=arguments.nbd,
        runtime_dir=arguments.runtime_dir,
        allow_iothread=options.IOTHREAD in options.allowed(arguments),
    )
    document = populate_document(signals.run(populate_bitmap(arguments.qmp, filling)))
    output.write([document_json(document) if arguments.json else populate_text(document)])
    return 0


def _source(arguments: argparse.Namespace) -> Source:
    from qmpnbd.control.populate import ImageDifference, ListedExtents
    from qmpnbd.control.ranges import MAX_LIST, parse_depths, parse_ranges

    if arguments.from_depth is not None:
        return parse_depths(arguments.from_depth)
    if arguments.difference is not None:
        return ImageDifference(*arguments.difference)
    name = arguments.extents
    try:
        with open(sys.stdin.fileno() if name == "-" else Path(name), "rb", closefd=name != "-") as file:
            text = file.read(MAX_LIST + 1)
    except OSError as error:
        raise UsageError(
            f"cannot be read: {error.strerror}", where=name, remedy="Name a file, or - for stdin."
        ) from error
    if len(text) > MAX_LIST:
        raise UsageError(f"the list has more than {MAX_LIST} bytes", where=name, remedy="Fill the bitmap in parts.")
    return ListedExtents(parse_ranges(text, name), f"extents of {name}")
