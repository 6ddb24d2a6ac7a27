"""A validation report as metrics, in Prometheus' text format for node_exporter's textfile collector.

https://github.com/prometheus/docs/blob/main/docs/instrumenting/exposition_formats.md: a line is a value of a metric, a
label's value has backslash, quote and newline escaped, all lines of a metric stand together below its HELP and TYPE.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import get_args

from qmpnbd.printable import printable
from qmpnbd.report.model import DiskReport, ValidationReport, Verdict
from qmpnbd.report.text import was_judged

MAX_LAYERS = 64
"""Layers of a disk that get a time series each; a metric must not grow with what is on a disk."""

_OF_A_DISK: dict[str, tuple[str, Callable[[DiskReport], float]]] = {
    "size_bytes": ("Size of the disk as served.", lambda disk: disk.size),
    "extents": ("Runs of equal allocation depth in the served map.", lambda disk: disk.extents),
    "discrepancies": ("Runs for which served and computed differ.", lambda disk: disk.discrepancy_count),
    "discrepancy_bytes": ("Bytes for which served and computed differ.", lambda disk: disk.discrepancy_bytes),
    "set_aside_bytes": ("Bytes that could not be judged.", lambda disk: disk.set_aside_bytes),
    "rounds": ("How often served and computed were read.", lambda disk: disk.rounds),
    "duration_seconds": ("Time the validation took.", lambda disk: disk.seconds),
}


def validation_metrics(report: ValidationReport) -> Iterator[str]:
    """Yields the metrics of a report, a metric at a time."""
    monitor = {"monitor": report.monitor}
    started = datetime.fromisoformat(report.started).timestamp()
    yield _metric("start_time_seconds", "When the validation began, as UNIX time.", [(monitor, started)])
    yield _metric(
        "complete", "1 if the run validated all disks, 0 if it was stopped.", [(monitor, report.stopped is None)]
    )
    yield _metric("left_behind", "Things that could not be taken down in QEMU.", [(monitor, len(report.left_behind))])
    # Of many targets the names alone may be the same, and a file with a time series twice is refused as a whole.
    disks = [({"monitor": report.monitor or disk.source, "disk": disk.name}, disk) for disk in report.disks]
    yield _metric(
        "verdict",
        "1 for the verdict over the disk, 0 for the others.",
        [
            ({**labels, "verdict": verdict}, disk.verdict == verdict)
            for labels, disk in disks
            for verdict in get_args(Verdict)
        ],
    )
    for name, (words, value_of) in _OF_A_DISK.items():
        judged = [(labels, value_of(disk)) for labels, disk in disks if was_judged(disk)]
        yield _metric(f"disk_{name}", words, judged)
    yield _metric(
        "layer_seen_bytes",
        "Bytes of the disk that come from the layer.",
        [({**labels, **layer}, seen) for labels, disk in disks for layer, seen in _layers(disk)],
    )


def _layers(disk: DiskReport) -> Iterator[tuple[dict[str, str], int]]:
    totals = {total.allocation_depth: total.bytes for total in disk.totals}
    for layer in disk.layers[:MAX_LAYERS]:
        seen = totals.get(layer.allocation_depth, 0)
        yield {"depth": str(layer.allocation_depth), "file": layer.file}, seen


def _metric(name: str, words: str, samples: Iterable[tuple[dict[str, str], float]]) -> str:
    whole = f"qmpnbd_validate_{name}"
    lines = [f"# HELP {whole} {words}", f"# TYPE {whole} gauge"]
    for labels, value in samples:
        pairs = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
        lines.append(f"{whole}{{{pairs}}} {+value}")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return printable(text).replace("\\", "\\\\").replace('"', '\\"')
