"""``qmpnbd validate``: served against computed, on a running guest."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from qmpnbd.cli import options, output
from qmpnbd.cli.exit_codes import AGREED, DISCREPANCY, INCOMPLETE
from qmpnbd.errors import LeftBehindError

if TYPE_CHECKING:
    from qmpnbd.report.model import ValidationReport

_ROUNDS = 5


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "validate",
        help="prove that the served allocation depth is what the image files hold",
        description="Exports each disk from the running QEMU, reads its allocation depth over NBD, computes it from "
        "the image files, and compares the two. Everything made in QEMU is taken down again, whatever happens.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "disks", nargs="*", metavar="DISK", help="qdev id, QOM path or node-name (default: all disks of the guest)"
    )
    options.add_monitor(parser)
    options.add_json(parser, "qmpnbd.validate/1")
    options.add_timeout(parser, options.LONG_SECONDS)
    parser.add_argument(
        "--rounds",
        type=options.at_least_two,
        default=_ROUNDS,
        metavar="N",
        help=f"read a disk that is being written at most N times, 2 or more (default: {_ROUNDS})",
    )
    options.add_sharing(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from qmpnbd.cli import signals
    from qmpnbd.report.jsontext import document_json
    from qmpnbd.report.text import validation_text
    from qmpnbd.validate.run import Options, validate_disks

    choice = Options(
        seconds=arguments.timeout,
        rounds=arguments.rounds,
        nbd=arguments.nbd,
        runtime_dir=arguments.runtime_dir,
        allow_iothread=arguments.allow_iothread,
    )
    report = signals.run(validate_disks(arguments.qmp, arguments.disks, choice))
    output.write([document_json(report) if arguments.json else validation_text(report)])
    output.tell(*report.left_behind)
    return exit_code(report)


def exit_code(report: ValidationReport) -> int:
    """Returns the exit code of a report.

    In this order: a discrepancy, a disk that could not be validated (its error's), something left behind, a disk that
    could not be judged in full.
    """
    if report.verdict == "error":
        return next(disk.error.exit_code for disk in report.disks if disk.error is not None)
    if report.verdict != "discrepancy" and report.left_behind:
        return LeftBehindError.exit_code
    return {"agreed": AGREED, "discrepancy": DISCREPANCY, "incomplete": INCOMPLETE}[report.verdict]
