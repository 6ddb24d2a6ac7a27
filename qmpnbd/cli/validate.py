"""``qmpnbd validate``: served against computed, on running guests, of exports and of image files."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from qmpnbd.cli import options, output, terminal
from qmpnbd.cli.exit_codes import AGREED, DISCREPANCY, INCOMPLETE, StoppedBySignal
from qmpnbd.cli.reports import Reports, add_reports
from qmpnbd.cli.validate_many import validate_many
from qmpnbd.cli.validate_targets import (
    add_comparison,
    add_instant,
    add_many,
    add_targets,
    choice_of,
    instant_of,
    is_one_guest,
)
from qmpnbd.errors import LeftBehindError, QmpnbdError

if TYPE_CHECKING:
    from qmpnbd.report.model import ErrorEntry, ValidationReport
    from qmpnbd.validate.run import Options

_ROUNDS = 5

EXAMPLES = (
    ("qmpnbd validate --qmp /run/vm.qmp", "all disks of a running guest"),
    ("qmpnbd validate --qmp /run/vm.qmp vd0 --html vd0.html", "one disk, with its picture"),
    ("qmpnbd validate --qmp /run/vm.qmp --junit qmpnbd.xml --ndjson -", "for a build server"),
    ("qmpnbd validate --qmp /run/vm.qmp --point-in-time", "at one instant, while the guest goes on"),
    ("qmpnbd validate /srv/images --json > report.json", "a folder of images that no QEMU runs"),
)
"""Command lines, and what they are for."""


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "validate",
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
    options.add_exporting(parser)
    add_comparison(parser)
    add_instant(parser)
    add_many(parser)
    options.add_tls(parser)
    add_reports(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from qmpnbd.report.jsontext import document_json
    from qmpnbd.validate.run import Options

    each = Options(
        seconds=arguments.timeout,
        rounds=arguments.rounds,
        nbd=arguments.nbd if arguments.image is None else None,
        runtime_dir=arguments.runtime_dir,
        allow_iothread=options.IOTHREAD in options.allowed(arguments),
        instant=instant_of(arguments),
        change_seconds=arguments.bitmap_change,
        fail_fast=arguments.fail_fast,
    )
    with Reports.of(arguments) as reports:
        report, stopped = _validated(arguments, each, reports)
        if not reports.take_stdout:
            output.write([document_json(report) if arguments.json else _text(report)])
        reports.finish(report)
        output.tell(*report.left_behind)
        code = exit_code(report) if stopped is None else stopped.exit_code
        return code if code or reports.failure is None else reports.failure.exit_code


def _validated(
    arguments: argparse.Namespace, each: Options, reports: Reports
) -> tuple[ValidationReport, StoppedBySignal | None]:
    """Validates; if that fails as a whole, there are report files nevertheless."""
    from qmpnbd.cli import progress, signals
    from qmpnbd.report.model import ErrorEntry
    from qmpnbd.validate.run import SoFar, validate_disks

    if not is_one_guest(arguments):
        return validate_many(arguments, each, reports.add)
    (monitor,) = arguments.qmp
    so_far = SoFar(str(monitor))
    try:
        chosen = replace(each, choice=choice_of(arguments))
        work = validate_disks(monitor, arguments.names, chosen, on_disk=reports.add, so_far=so_far)
        return signals.run(progress.shown(work, so_far.progress)), None
    except StoppedBySignal as stopped:
        return so_far.report(_notes(stopped), _stopped(str(monitor), stopped)), stopped
    except QmpnbdError as error:
        reports.finish(so_far.report(_notes(error), ErrorEntry.of(error), failed=True))
        raise


def _notes(error: BaseException) -> Sequence[str]:
    return getattr(error, "__notes__", ())


def _stopped(monitor: str, stopped: StoppedBySignal) -> ErrorEntry:
    from qmpnbd.report.model import ErrorEntry

    words = f"ended by {stopped}, everything taken down"
    return ErrorEntry(
        type=type(stopped).__name__, exit_code=stopped.exit_code, where=monitor, what=words, remedy="Run again."
    )


def _text(report: ValidationReport) -> str:
    import sys

    from qmpnbd.report.text import validation_text

    return validation_text(report, colours=output.colours(), width=terminal.width(sys.stdout))


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
