"""A validation as a stream of JSON lines: a disk as soon as it is done, and a summary when all is done."""

from __future__ import annotations

import json
from collections import Counter

from qmpnbd.report.model import DiskLine, DiskReport, Document, SummaryLine, ValidationReport


def disk_line(disk: DiskReport) -> str:
    """Returns the line of a disk, with its newline."""
    return _line(DiskLine(disk=disk))


def summary_line(report: ValidationReport) -> str:
    """Returns the last line, with its newline."""
    return _line(
        SummaryLine(
            monitor=report.monitor,
            qemu=report.qemu,
            guest=report.guest,
            started=report.started,
            verdict=report.verdict,
            disks=dict(Counter(disk.verdict for disk in report.disks)),
            left_behind=report.left_behind,
            stopped=report.stopped,
        )
    )


def _line(document: Document) -> str:
    # In ASCII, as `document_json` has it: names need not be valid UTF-8.
    return json.dumps(document.model_dump(mode="json"), separators=(",", ":")) + "\n"
