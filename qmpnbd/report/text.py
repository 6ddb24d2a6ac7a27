"""Documents as text for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import TypeAlias

from qmpnbd.printable import printable as shown
from qmpnbd.report.columns import folded, table
from qmpnbd.report.contexts import ALLOCATION_DEPTH, CONTENT, UNREADABLE, describe
from qmpnbd.report.instant import instant_text
from qmpnbd.report.maptext import status_mark, strip_rows
from qmpnbd.report.model import (
    DiscrepancyEntry,
    DiskReport,
    DisksDocument,
    LayerEntry,
    UnreadableEntry,
    ValidationReport,
    Verdict,
)
from qmpnbd.report.sizes import human_size

_SHOWN = 10
_HEADLINES = {
    "agreed": "AGREED",
    "discrepancy": "DISCREPANCY",
    "incomplete": "NOT EVERYTHING COULD BE JUDGED",
    "error": "NOT VALIDATED",
    "not-judged": "NOT JUDGED",
}

_COLOURS: dict[Verdict, str] = {
    "agreed": "\x1b[1;32m{}\x1b[0m",
    "discrepancy": "\x1b[1;31m{}\x1b[0m",
    "incomplete": "\x1b[1;33m{}\x1b[0m",
    "error": "\x1b[1;31m{}\x1b[0m",
    "not-judged": "\x1b[1;33m{}\x1b[0m",
}
"""Bold green, red, yellow (ECMA-48, SGR)."""


def validation_text(report: ValidationReport, *, colours: bool = False, width: int | None = None) -> str:
    """Returns a validation report.

    Args:
        report: the report.
        colours: whether it is for a terminal that shows colours.
        width: columns of the terminal; None for as many as it takes.
    """
    told = []
    for line, verdict in _one(report, width) if report.monitor else _many(report, width):
        paint = _COLOURS[verdict].format if colours and verdict else str
        told += [paint(piece) for piece in folded(shown(line), width)]
    return "\n".join(told) + "\n"


_Line: TypeAlias = tuple[str, Verdict | None]
"""A line, and the verdict if it is the headline of a disk."""


def _one(report: ValidationReport, width: int | None) -> Iterator[_Line]:
    """Yields a report on one guest."""
    yield f"QEMU {report.qemu}, {guest_words(report.guest)}, monitor {shown(report.monitor)}", None
    for disk in report.disks:
        yield "", None
        yield from _headed(disk, _disk(disk, width=width))
    if report.stopped is not None:
        what = shown(f"stopped before all disks were validated: {report.stopped.where}: {report.stopped.what}")
        yield from (("", None), (what, None))


def _headed(disk: DiskReport, lines: Iterator[str]) -> Iterator[_Line]:
    yield next(lines), disk.verdict
    yield from ((line, None) for line in lines)


def disk_text(disk: DiskReport) -> str:
    """Returns the part of a validation report that tells of one disk."""
    return "".join(f"{shown(line)}\n" for line in _disk(disk))


def was_judged(disk: DiskReport) -> bool:
    """Returns whether there is more to say of a disk than why it was not looked at."""
    return disk.verdict not in ("error", "not-judged")


def guest_words(status: str) -> str:
    """Returns the guest's status, in words."""
    return status if status == "storage daemon" else f"guest {shown(status)}"


def _many(report: ValidationReport, width: int | None) -> Iterator[_Line]:
    """Yields a report on many disks: what needs to be looked at in full, last, and a line for each of the others."""
    counts = Counter(disk.verdict for disk in report.disks)
    noun = "disk" if len(report.disks) == 1 else "disks"
    yield f"{len(report.disks):,} {noun}: " + ", ".join(f"{n:,} {verdict}" for verdict, n in counts.items()), None
    if report.stopped is not None:
        yield shown(f"stopped before all disks were validated: {report.stopped.what}. {report.stopped.remedy}"), None
    quiet = ("agreed", "not-judged") if len(report.disks) > 1 else ()
    for disk in report.disks:
        if disk.verdict in quiet:
            again = f" (unchanged since {disk.agreed_in})" if disk.agreed_in else ""
            yield shown(f"{_HEADLINES[disk.verdict]} {disk.name}{again}{_because(disk)}"), None
    for disk in report.disks:
        if disk.verdict not in quiet:
            yield "", None
            yield from _headed(disk, _disk(disk, disk.source, width))


def _disk(disk: DiskReport, source: str = "", width: int | None = None) -> Iterator[str]:
    node = f" (node {disk.node_name})" if disk.node_name else ""
    at = "" if source.endswith(disk.name) or not source else f" at {source}"
    yield shown(f"disk {disk.name}{node}{at}: {_HEADLINES[disk.verdict]}{_because(disk)}")
    if disk.error is not None:
        yield "  " + shown(f"{disk.error.where}: {disk.error.what}. {disk.error.remedy}".rstrip())
    if not was_judged(disk):
        return
    again = f", read {disk.rounds} times" if disk.rounds > 1 else ""
    extents = "1 extent" if disk.extents == 1 else f"{disk.extents:,} extents"
    yield f"  {human_size(disk.size)} in {extents}{again}, {disk.seconds:.2f} s"
    if disk.computed_size != disk.size:
        yield f"  size: served {disk.size} bytes, computed {disk.computed_size} bytes from the files"
    if disk.instant is not None:
        yield from (f"  {line}" for line in instant_text(disk.instant))
    totals = {total.allocation_depth: total.bytes for total in disk.totals}
    inside = None if width is None else max(width - 2, 1)
    yield from (f"  {line}" for line in layer_table(disk.layers, totals, inside))
    yield from (f"  {row}" for row in strip_rows(_strip(disk), inside))
    yield from _compared(disk)
    yield from _discrepancies(disk)
    if not disk.files_verified:
        yield "  (whether these files are the ones that QEMU has open cannot be told from here)"
    if disk.instant is not None and disk.set_aside_bytes:
        yield f"  set aside, written just before the instant and since: {disk.set_aside_bytes} bytes"
    elif disk.unfinished == "graph":
        yield f"  not judged, the block graph changed all the time: {disk.set_aside_bytes} bytes"
    elif disk.set_aside_bytes:
        yield f"  set aside, the guest wrote there all the time: {disk.set_aside_bytes} bytes"
    yield from (f"    [{run.offset}, {run.end})" for run in disk.set_aside[:_SHOWN])


def _because(disk: DiskReport) -> str:
    return f" (because of --{disk.not_judged_because})" if disk.not_judged_because else ""


def _compared(disk: DiskReport) -> Iterator[str]:
    """Yields what else was compared than the allocation depth, and why something was not."""
    for entry in disk.compared:
        if entry.what == ALLOCATION_DEPTH and not entry.note:
            continue
        amount = f", {human_size(entry.bytes)}" if entry.what == CONTENT and entry.bytes else ""
        aside = f", {human_size(entry.set_aside_bytes)} not judged" if entry.set_aside_bytes else ""
        note = f" ({shown(entry.note)})" if entry.note else ""
        yield f"  {shown(entry.what)}: {_HEADLINES[entry.verdict].lower()}{amount}{aside}{note}"
    if disk.content_hashes:
        total, hashed = len(disk.content_hashes), sum(each.sha256 is not None for each in disk.content_hashes)
        of = f"{total:,}" if hashed == total else f"{hashed:,} of {total:,}"
        yield f"    SHA-256 of {of} {'range' if total == 1 else 'ranges'} of it: content_hashes in --json"


def _discrepancies(disk: DiskReport) -> Iterator[str]:
    if not disk.discrepancy_count:
        return
    noun = "discrepancy" if disk.discrepancy_count == 1 else "discrepancies"
    yield f"  {disk.discrepancy_count:,} {noun}, {disk.discrepancy_bytes} bytes:"
    for each in disk.discrepancies[:_SHOWN]:
        yield from _discrepancy(each)
    if disk.discrepancy_count > _SHOWN:
        yield f"    … {disk.discrepancy_count - _SHOWN:,} more (--json lists {len(disk.discrepancies)})"


def _discrepancy(each: DiscrepancyEntry) -> Iterator[str]:
    if each.compared == CONTENT:
        yield f"    [{each.offset}, {each.end})  content, from byte {each.served:#04x} against {each.computed:#04x} on"
        yield f"      served    SHA-256 {each.served_sha256}"
        yield f"      computed  SHA-256 {each.computed_sha256}"
        return
    if each.finding == "bitmap-misses-change":
        yield f"    [{each.offset}, {each.end})  {each.finding}: changed, and clean in {shown(each.compared)}"
        return
    name = "depth" if each.compared == ALLOCATION_DEPTH else shown(each.compared)
    yield (
        f"    [{each.offset}, {each.end})  served {name} {_meaning(each.compared, each.served)}, "
        f"computed {_meaning(each.compared, each.computed)}"
    )
    if each.why:
        yield f"      decided by {shown(each.file)}" if each.file else "      no layer holds it"
    for step in each.why:
        yield f"      layer {step.layer_index} {shown(PurePath(step.file).name)}: {step.read}"


def _meaning(context: str, value: int) -> str:
    words = describe(context, value)
    return str(value) if words is None else f"{value} ({words})"


def unreadable_lines(ranges: Sequence[UnreadableEntry]) -> Iterator[str]:
    """Yields what cannot be read, and why."""
    if ranges:
        yield ""
        yield f"unreadable, {len(ranges):,} ranges:"
    for each in ranges[:_SHOWN]:
        yield f"  [{each.offset}, {each.end})  layer {each.layer_index} {shown(each.file)}: {each.reason}"
    if len(ranges) > _SHOWN:
        yield f"  … {len(ranges) - _SHOWN:,} more (--json lists them)"


def layer_table(
    layers: Sequence[LayerEntry], totals: Mapping[int, int] | None, width: int | None = None
) -> Iterator[str]:
    """Yields the layers of a chain with the bytes seen in each.

    Args:
        layers: active layer first.
        totals: allocation depth -> bytes; None where that is not known.
        width: columns of the terminal; None for as many as it takes.
    """
    rows = [("depth", "bytes seen", "format", "clusters", "file")]
    for layer in layers:
        clusters = "-" if layer.cluster_size is None else human_size(layer.cluster_size)
        kind = f"{layer.format}?" if layer.format_probed else layer.format
        seen = "-" if totals is None else human_size(totals.get(layer.allocation_depth, 0))
        rows.append((str(layer.allocation_depth), seen, kind, clusters, shown(layer.file)))
    if totals is not None and totals.get(0):
        rows.append(("0", human_size(totals[0]), "-", "-", "(in no layer)"))
    if totals is not None and totals.get(UNREADABLE):
        rows.append(("-", human_size(totals[UNREADABLE]), "-", "-", "(unreadable)"))
    yield from table(rows, right=(0, 1), width=width)


def _strip(disk: DiskReport) -> str:
    """Returns the picture of a disk, with a mark where something differs."""
    cells = [status_mark(depth) for depth in disk.strip]
    for each in disk.discrepancies:
        first = each.offset * len(cells) // disk.size
        last = (each.end - 1) * len(cells) // disk.size
        cells[first : last + 1] = ["!"] * (last + 1 - first)
    return "".join(cells)


def disks_text(document: DisksDocument, width: int | None = None) -> str:
    """Returns the list of disks.

    Args:
        document: the list.
        width: columns of the terminal; None for as many as it takes.
    """
    inside = None if width is None else max(width - 2, 1)
    lines = [f"QEMU {document.qemu}, {guest_words(document.guest)}, monitor {shown(document.monitor)}"]
    for disk in document.disks:
        kind = f"disk {shown(disk.name)}" if disk.attached else f"node {shown(disk.name)} (no device)"
        mode = "read-only" if disk.read_only else "writable"
        lines += ["", f"{kind}: {human_size(disk.size)}, {mode}, node {shown(disk.node_name)}"]
        about = [disk.device, disk.qom_path if disk.qom_path != disk.name else "", disk.drive and f"drive {disk.drive}"]
        if any(about):
            lines.append("  " + ", ".join(shown(each) for each in about if each))
        if disk.problem is not None:
            lines.append("  " + shown(f"{disk.problem.where}: {disk.problem.what}. {disk.problem.remedy}".rstrip()))
        if disk.layers:
            rows = [("depth", "format", "node", "file")]
            rows += [
                (str(layer.allocation_depth), layer.format, shown(layer.node_name), shown(layer.file))
                for layer in disk.layers
            ]
            lines += [f"  {line}" for line in table(rows, right=(0,), width=inside)]
    if not document.disks:
        lines += ["", "no disks"]
    return "".join(f"{piece}\n" for line in lines for piece in folded(shown(line), width))
