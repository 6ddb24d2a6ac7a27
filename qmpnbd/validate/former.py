"""A former report: what agreed then and is unchanged need not be judged again.

By this a run that was stopped is taken up again, and a nightly run over thousands of images reads only those that
changed. The verdict is taken over only where nothing is left to doubt: an image alone, everything that is compared
now was compared then, by the same version of QEMU, and each of its files is the same by device, inode, size and both
times, of which the last was at least two seconds old when the file was read.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from qmpnbd.errors import UsageError
from qmpnbd.report.model import DiskReport, ValidationReport
from qmpnbd.validate.choice import Choice
from qmpnbd.validate.stamps import unchanged
from qmpnbd.validate.target import ImageTarget, Target

MAX_REPORT = 1 << 30
"""Bytes of a report that is read: some hundred thousand disks with a sample each."""


class Former:
    """What a former report says.

    Args:
        report: the report.
    """

    def __init__(self, report: ValidationReport) -> None:
        self._started = report.started
        self._agreed = {disk.source: disk for disk in report.disks if disk.verdict == "agreed" and disk.files}

    @classmethod
    def load(cls, path: str) -> Former:
        """Reads the JSON document of ``qmpnbd validate --json``.

        Raises:
            UsageError: it cannot be read, or is no such document.
        """
        try:
            with Path(path).open("rb") as file:
                content = file.read(MAX_REPORT + 1)
        except OSError as error:
            what = f"the former report cannot be read: {error.strerror}"
            raise UsageError(what, where=path, remedy="Leave out --since to validate everything.") from error
        if len(content) > MAX_REPORT:
            raise UsageError(f"the former report has more than {MAX_REPORT} bytes", where=path)
        try:
            return cls(ValidationReport.model_validate_json(content))
        except ValidationError as error:
            remedy = "Give what 'qmpnbd validate --json' has written, or leave out --since."
            raise UsageError("it is no report of a validation", where=path, remedy=remedy) from error

    def unchanged(self, target: Target, choice: Choice, qemu: str) -> DiskReport | None:
        """Returns the former report of a target if it still holds; None if it has to be judged."""
        then = self._agreed.get(target.source) if isinstance(target, ImageTarget) else None
        if then is None or then.qemu != qemu:
            return None
        compared = Choice.parse(then.choice)
        if compared is None or not compared.covers(choice) or not unchanged(then.files):
            return None
        return then.model_copy(update={"agreed_in": then.agreed_in or self._started, "name": target.name})
