"""``qmpnbd validate``: served against computed, on running guests, of exports and of image files."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from qmpnbd.cli import options, output
from qmpnbd.cli.exit_codes import AGREED, DISCREPANCY, INCOMPLETE, StoppedBySignal
from qmpnbd.cli.reports import Reports, add_reports
from qmpnbd.cli.validate_many import validate_many
from qmpnbd.cli.validate_targets import add_comparison, add_many, add_targets, choice_of, is_one_guest
from qmpnbd.errors import LeftBehindError, QmpnbdError

if TYPE_CHECKING:
    from qmpnbd.report.model import DiskReport, ValidationReport
    from qmpnbd.validate.run import Options

_ROUNDS = 5

EXAMPLES = (
    ("qmpnbd validate --qmp /run/vm.qmp", "all disks of a running guest"),
    ("qmpnbd validate --qmp /run/vm.qmp vd0 --html vd0.html", "one disk, with its picture"),
    ("qmpnbd validate --qmp /run/vm.qmp --junit qmpnbd.xml --ndjson -", "for a build server"),
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
    add_many(parser)
    options.add_tls(parser)
    add_reports(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from qmpnbd.report.jsontext import document_json
    from qmpnbd.report.text import validation_text
    from qmpnbd.validate.run import Options

    each = Options(
        seconds=arguments.timeout,
        rounds=arguments.rounds,
        nbd=arguments.nbd if arguments.image is None else None,
        runtime_dir=arguments.runtime_dir,
        allow_iothread=options.IOTHREAD in options.allowed(arguments),
    )
    with Reports.of(arguments) as reports:
        report, stopped = _validated(arguments, each, reports)
        if not reports.take_stdout:
            text = document_json(report) if arguments.json else validation_text(report, colours=output.colours())
            output.write([text])
        reports.finish(report)
        output.tell(*report.left_behind)
        code = exit_code(report) if stopped is None else stopped.exit_code
        return code if code or reports.failure is None else reports.failure.exit_code


def _validated(
    arguments: argparse.Namespace, each: Options, reports: Reports
) -> tuple[ValidationReport, StoppedBySignal | None]:
    """Validates; if that fails as a whole, there are report files nevertheless."""
    from qmpnbd.cli import signals
    from qmpnbd.validate.run import validate_disks

    started = datetime.now(UTC)
    if not is_one_guest(arguments):
        return validate_many(arguments, each, reports.add)
    (monitor,) = arguments.qmp
    try:
        chosen = replace(each, choice=choice_of(arguments))
        return signals.run(validate_disks(monitor, arguments.names, chosen, on_disk=reports.add)), None
    except (QmpnbdError, StoppedBySignal) as error:
        reports.finish(_partial(str(monitor), started, reports.disks, error))
        raise


def _partial(
    monitor: str, started: datetime, disks: Sequence[DiskReport], error: QmpnbdError | StoppedBySignal
) -> ValidationReport:
    """Returns the report of a run that was ended by `error`: an old one in its place would say what is no longer so."""
    from qmpnbd.report.model import ErrorEntry, ValidationReport
    from qmpnbd.validate.outcome import worst

    verdict = worst(disks)
    if isinstance(error, QmpnbdError):
        stopped = ErrorEntry.of(error)
        verdict = "discrepancy" if verdict == "discrepancy" else "error"
    else:
        words = f"ended by {error}, everything taken down"
        stopped = ErrorEntry(
            type=type(error).__name__, exit_code=error.exit_code, where=monitor, what=words, remedy="Run again."
        )
        verdict = "incomplete" if verdict == "agreed" else verdict
    return ValidationReport(
        monitor=monitor,
        qemu="",
        guest="",
        started=started.isoformat(timespec="seconds"),
        verdict=verdict,
        disks=tuple(disks),
        left_behind=tuple(getattr(error, "__notes__", ())),
        stopped=stopped,
    )


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
