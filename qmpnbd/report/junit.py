"""A validation report as JUnit XML: a disk is a test case.

A discrepancy is a failure. A disk that could not be validated, not be judged in full, or whose turn did not come is an
error, not a skipped test: what has not been proven must not look green.
"""

from __future__ import annotations

from xml.etree import ElementTree as Xml

from qmpnbd.printable import printable
from qmpnbd.report.model import DiskReport, ErrorEntry, ValidationReport
from qmpnbd.report.text import disk_text


def validation_junit(report: ValidationReport) -> str:
    """Returns the XML document; foreign text in it has escapes for what XML cannot hold."""
    verdicts = [disk.verdict for disk in report.disks]
    stopped = report.stopped is not None
    counts = {
        "tests": str(len(verdicts) + stopped),
        "failures": str(verdicts.count("discrepancy")),
        "errors": str(sum(verdict not in ("agreed", "discrepancy") for verdict in verdicts) + stopped),
        "time": f"{sum(disk.seconds for disk in report.disks):.3f}",
    }
    suites = Xml.Element("testsuites", {"name": "qmpnbd", **counts})
    started = report.started.removesuffix("+00:00")
    suite = Xml.SubElement(
        suites, "testsuite", {"name": "qmpnbd validate", "timestamp": started, "skipped": "0", **counts}
    )
    _properties(suite, report)
    for disk in report.disks:
        _case(suite, report, disk)
    if report.stopped is not None:
        attributes = {"classname": printable(report.monitor), "name": "all disks were validated", "time": "0"}
        _error(Xml.SubElement(suite, "testcase", attributes), report.stopped)
    if report.left_behind:
        Xml.SubElement(suite, "system-err").text = "\n".join(map(printable, report.left_behind))
    Xml.indent(suites)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + Xml.tostring(suites, encoding="unicode") + "\n"


def _properties(suite: Xml.Element, report: ValidationReport) -> None:
    properties = Xml.SubElement(suite, "properties")
    for name in ("generator", "monitor", "qemu", "guest", "verdict"):
        Xml.SubElement(properties, "property", {"name": name, "value": printable(getattr(report, name))})


def _case(suite: Xml.Element, report: ValidationReport, disk: DiskReport) -> None:
    case = Xml.SubElement(
        suite,
        "testcase",
        {
            "classname": printable(report.monitor or disk.source),
            "name": printable(disk.name),
            "time": f"{disk.seconds:.3f}",
        },
    )
    if disk.error is not None:
        _error(case, disk.error)
    elif disk.verdict == "discrepancy":
        message = f"served and computed differ: {disk.discrepancy_count} runs, {disk.discrepancy_bytes} bytes"
        if disk.computed_size != disk.size:
            message = f"{disk.size} bytes served, {disk.computed_size} bytes computed"
        Xml.SubElement(case, "failure", {"type": "discrepancy", "message": message}).text = disk_text(disk)
    elif disk.verdict == "incomplete":
        message = f"{disk.set_aside_bytes} bytes could not be judged"
        Xml.SubElement(case, "error", {"type": "incomplete", "message": message}).text = disk_text(disk)
    elif disk.verdict == "not-judged":
        message = f"because of --{disk.not_judged_because}" if disk.not_judged_because else "its turn did not come"
        Xml.SubElement(case, "error", {"type": "not-judged", "message": message}).text = disk_text(disk)
    if disk.error is None:
        Xml.SubElement(case, "system-out").text = disk_text(disk)


def _error(case: Xml.Element, error: ErrorEntry) -> None:
    words = printable(f"{error.where}: {error.what}")
    Xml.SubElement(case, "error", {"type": error.type, "message": words}).text = printable(error.remedy) or words
