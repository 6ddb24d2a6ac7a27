"""``qmpnbd validate``: served against computed, on running guests, of exports and of image files."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from qmpnbd.cli import options, output
from qmpnbd.cli.exit_codes import AGREED, DISCREPANCY, INCOMPLETE
from qmpnbd.cli.validate_many import validate_many
from qmpnbd.cli.validate_targets import add_comparison, add_many, add_targets, choice_of, is_one_guest
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
        "the image files, and compares the two. Everything made in QEMU is taken down again, whatever happens. Images "
        "that no QEMU runs are served by a storage daemon that is started for it.",
        allow_abbrev=False,
    )
    add_targets(parser)
    options.add_json(parser, "qmpnbd.validate/1")
    options.add_timeout(parser, options.LONG_SECONDS, "for each guest or image")
    parser.add_argument(
        "--rounds",
        type=options.at_least_two,
        default=_ROUNDS,
        metavar="N",
        help=f"read a disk that is being written at most N times, 2 or more (default: {_ROUNDS})",
    )
    parser.add_argument(
        "--runtime-dir",
        metavar="DIR",
        help="make the private directory with the NBD socket in DIR (default: $TMPDIR or /tmp); "
        "QEMU must be able to write to it",
    )
    parser.add_argument(
        "--allow-iothread",
        action="store_true",
        help="work on disks in an iothread although QEMU 7.x and 8.x may abort when an NBD client is lost",
    )
    add_comparison(parser)
    add_many(parser)
    options.add_tls(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from qmpnbd.cli import signals
    from qmpnbd.report.jsontext import document_json
    from qmpnbd.report.text import validation_text
    from qmpnbd.validate.run import Options, validate_disks

    each = Options(
        seconds=arguments.timeout,
        rounds=arguments.rounds,
        nbd=arguments.nbd if arguments.image is None else None,
        runtime_dir=arguments.runtime_dir,
        allow_iothread=arguments.allow_iothread,
    )
    stopped = None
    if is_one_guest(arguments):
        each = replace(each, choice=choice_of(arguments))
        report = signals.run(validate_disks(arguments.qmp[0], arguments.names, each))
    else:
        report, stopped = validate_many(arguments, each)
    output.write([document_json(report) if arguments.json else validation_text(report)])
    output.tell(*report.left_behind)
    return exit_code(report) if stopped is None else stopped.exit_code


def exit_code(report: ValidationReport) -> int:
    """Returns the exit code of a report.

    In this order: a discrepancy, a disk that could not be validated (its error's), something left behind, a disk that
    could not be judged in full or whose turn did not come.
    """
    if report.verdict == "error":
        return next(disk.error.exit_code for disk in report.disks if disk.error is not None)
    if report.verdict != "discrepancy" and report.left_behind:
        return LeftBehindError.exit_code
    return {"agreed": AGREED, "discrepancy": DISCREPANCY}.get(report.verdict, INCOMPLETE)
