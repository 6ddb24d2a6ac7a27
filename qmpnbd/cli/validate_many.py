"""``qmpnbd validate`` for more than one guest: images, exports, several guests, a plan."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from qmpnbd.cli import options
from qmpnbd.cli.exit_codes import StoppedBySignal
from qmpnbd.cli.validate_targets import wanted

if TYPE_CHECKING:
    from qmpnbd.report.model import DiskReport, ValidationReport
    from qmpnbd.validate.run import Options


def validate_many(
    arguments: argparse.Namespace, each: Options, on_disk: Callable[[DiskReport], None] | None = None
) -> tuple[ValidationReport, StoppedBySignal | None]:
    """Validates what the arguments name.

    Args:
        arguments: the parsed command line.
        each: how each guest is validated.
        on_disk: is handed the report of each disk as soon as there is one.

    Returns:
        The report, and the signal that ended the run early; what was done before it is in the report.

    Raises:
        UsageError: the arguments or the plan make no sense, or there is no storage daemon.
        ImageUnreadableError: a folder cannot be read.
    """
    from qmpnbd.cli import progress, signals
    from qmpnbd.report.model import ErrorEntry
    from qmpnbd.validate.fleet import Fleet, FleetOptions, usable_cpus
    from qmpnbd.validate.former import Former

    targets, choice = wanted(arguments)
    choices = FleetOptions(
        each=each,
        choice=choice,
        jobs=arguments.jobs or usable_cpus(),
        fail_fast=arguments.fail_fast,
        former=None if arguments.since is None else Former.load(arguments.since),
        storage_daemon=arguments.storage_daemon,
        tls=options.tls(arguments),
    )
    fleet = Fleet(targets, choices, on_disk)
    try:
        return signals.run(progress.shown(fleet.run(), fleet.progress)), None
    except StoppedBySignal as stopped:
        entry = ErrorEntry(
            type=type(stopped).__name__,
            exit_code=stopped.exit_code,
            where="qmpnbd validate",
            what=f"ended by {stopped}, everything taken down",
            remedy="Go on with --since and the JSON report.",
        )
        return fleet.report(entry), stopped
