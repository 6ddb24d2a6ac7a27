"""``qmpnbd check``: what is wrong inside an image file."""

from __future__ import annotations

import argparse

from qmpnbd.cli import options, output
from qmpnbd.cli.exit_codes import CLEAN, CORRUPT, LEAKS

EXAMPLES = (("qmpnbd check disk.qcow2", "refcounts, leaks, overlaps"),)
"""Command lines, and what they are for."""


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "check",
        description="Counts what refers to each cluster of IMAGE and holds it against the refcounts, as qemu-img check "
        "does; also finds structures that overlap. Only reads, repairs nothing, and looks at no backing file. An image "
        "in use by a running QEMU is checked as the file is now: faults may mean nothing.",
        allow_abbrev=False,
    )
    parser.add_argument("image", metavar="IMAGE", help="a qcow2 file")
    parser.add_argument("--format", choices=("qcow2",), help="IMAGE's format (default: probed from its first bytes)")
    options.add_json(parser, "qmpnbd.check/1")
    options.add_timeout(parser, options.LONG_SECONDS)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from qmpnbd.deadline import Deadline
    from qmpnbd.images.check_file import check_image
    from qmpnbd.report.check import check_document, check_text
    from qmpnbd.report.jsontext import document_json

    deadline = Deadline(arguments.timeout)
    document = check_document(check_image(arguments.image, image_format=arguments.format, deadline=deadline))
    output.write([document_json(document) if arguments.json else check_text(document)])
    return {"clean": CLEAN, "leaks": LEAKS, "corrupt": CORRUPT}[document.verdict]
