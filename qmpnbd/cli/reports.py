"""The report files of ``qmpnbd validate``, from the options to what is in them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

from qmpnbd.cli import output
from qmpnbd.cli.reportfile import ReportFile
from qmpnbd.errors import ReportFileError, UsageError

if TYPE_CHECKING:
    from qmpnbd.report.model import DiskReport, ValidationReport

FORMS = {
    "html": "one page with the picture of each disk, which needs no network",
    "junit": "JUnit XML, a disk a test case",
    "prometheus": "metrics for node_exporter's textfile collector",
    "ndjson": "a line of JSON for each disk as soon as it is done, and one at the end",
}


def add_reports(parser: argparse.ArgumentParser) -> None:
    """Adds an option for each form."""
    group = parser.add_argument_group(
        "report files",
        "each is written beside its place and renamed, so that it is whole or not there; one of them can be - for "
        "stdout, which it takes instead of the text",
    )
    for form, words in FORMS.items():
        group.add_argument(f"--{form}", metavar="FILE", help=f"write {words}")


class Reports:
    """The report files of a run.

    Attributes:
        disks: the reports of the disks that are done.
        failure: the first file that could not be written; None if all could.
    """

    def __init__(self, files: dict[str, ReportFile]) -> None:
        self._files = files
        self.disks: list[DiskReport] = []
        self.failure: ReportFileError | None = None

    @classmethod
    @contextmanager
    def of(cls, arguments: argparse.Namespace) -> Iterator[Reports]:
        """Opens the files that the options name; at the end removes what was not finished.

        Raises:
            ReportFileError: one of them cannot be written.
            UsageError: two are the same, or both want stdout.
        """
        names = {form: name for form in FORMS if (name := getattr(arguments, form)) is not None}
        if len(set(names.values())) < len(names) or (arguments.json and "-" in names.values()):
            raise UsageError("two reports in one place", where="report files", remedy="Give each a file of its own.")
        with ExitStack() as stack:
            yield cls({form: stack.enter_context(ReportFile.open(name)) for form, name in names.items()})

    @property
    def take_stdout(self) -> bool:
        """Whether one of them goes to stdout, so that nothing else may."""
        return any(file.name == "-" for file in self._files.values())

    def add(self, disk: DiskReport) -> None:
        """Takes note of a disk that is done, and writes its line."""
        from qmpnbd.report.ndjson import disk_line

        self.disks.append(disk)
        if "ndjson" in self._files:
            self._try("ndjson", partial(ReportFile.add, piece=disk_line(disk)))

    def finish(self, report: ValidationReport) -> None:
        """Writes all of them; one that cannot be written is told, and does not keep the others from being written."""
        for form in list(self._files):
            self._try(form, partial(ReportFile.finish, pieces=_content(form, report)))

    def _try(self, form: str, write: Callable[[ReportFile], None]) -> None:
        try:
            write(self._files[form])
        except ReportFileError as error:
            output.complain(error)
            self.failure = self.failure or error
            file = self._files.pop(form)
            kept = file.keep() if form == "ndjson" else None  # each of its lines says something by itself
            file.drop()
            if kept is not None:
                output.tell(f"{kept}: the lines of the disks that were done before that")


def _content(form: str, report: ValidationReport) -> Iterable[str]:
    if form == "html":
        from qmpnbd.report.html import validation_html

        return validation_html(report)
    if form == "junit":
        from qmpnbd.report.junit import validation_junit

        return [validation_junit(report)]
    if form == "prometheus":
        from qmpnbd.report.prometheus import validation_metrics

        return validation_metrics(report)
    from qmpnbd.report.ndjson import summary_line

    return [summary_line(report)]
