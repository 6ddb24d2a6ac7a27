"""``qmpnbd validate``: served against computed, on a running guest."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from qmpnbd.cli import options, output
from qmpnbd.cli.exit_codes import AGREED, DISCREPANCY, INCOMPLETE, StoppedBySignal
from qmpnbd.cli.reports import Reports, add_reports
from qmpnbd.errors import LeftBehindError, QmpnbdError

if TYPE_CHECKING:
    from qmpnbd.report.model import DiskReport, ValidationReport

_ROUNDS = 5

EXAMPLES = (
    ("qmpnbd validate --qmp /run/vm.qmp", "all disks of a running guest"),
    ("qmpnbd validate --qmp /run/vm.qmp vd0 --html vd0.html", "one disk, with its picture"),
    ("qmpnbd validate --qmp /run/vm.qmp --junit qmpnbd.xml --ndjson -", "for a build server"),
)
"""Command lines, and what they are for."""


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
    add_reports(parser)
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
    started = datetime.now(UTC)
    with Reports.of(arguments) as reports:
        try:
            work = validate_disks(arguments.qmp, arguments.disks, choice, on_disk=reports.add)
            report = signals.run(work)
        except (QmpnbdError, StoppedBySignal) as error:
            reports.finish(_partial(str(arguments.qmp), started, reports.disks, error))
            raise
        if not reports.take_stdout:
            text = document_json(report) if arguments.json else validation_text(report, colours=output.colours())
            output.write([text])
        reports.finish(report)
        output.tell(*report.left_behind)
        code = exit_code(report)
        return code if code or reports.failure is None else reports.failure.exit_code


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
    could not be judged in full.
    """
    if report.verdict == "error":
        return next(disk.error.exit_code for disk in report.disks if disk.error is not None)
    if report.verdict != "discrepancy" and report.left_behind:
        return LeftBehindError.exit_code
    return {"agreed": AGREED, "discrepancy": DISCREPANCY, "incomplete": INCOMPLETE}[report.verdict]
