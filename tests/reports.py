"""Validation reports made by hand, for the tests of what is made from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qmpnbd.errors import ImageMissingError
from qmpnbd.extents import ExtentMap
from qmpnbd.report.model import (
    ComparedEntry,
    DepthTotal,
    DiscrepancyEntry,
    DiskReport,
    ErrorEntry,
    LayerEntry,
    RangeEntry,
    StepEntry,
    ValidationReport,
    Verdict,
)
from qmpnbd.report.picture import picture_of
from qmpnbd.report.strip import STRIP_CELLS, dominant
from qmpnbd.validate.outcome import worst

MIB = 1 << 20
HOSTILE = (
    "</script><script>document.title='owned'</script>\"'><img src=x onerror=\"document.title='owned'\">"
    "<!--<script>\u202e\n\x1b[31m"
)
"""A name that would be a command for a browser, a terminal, and a reader of lines."""


def layers(*files: str) -> tuple[LayerEntry, ...]:
    return tuple(
        LayerEntry(
            layer_index=index,
            allocation_depth=index + 1,
            file=file,
            format="qcow2",
            format_probed=False,
            node_name=f"node{index}",
            size=64 * MIB,
            cluster_size=65536,
        )
        for index, file in enumerate(files)
    )


def disk(
    name: str,
    served: ExtentMap,
    chain: Sequence[LayerEntry],
    *,
    verdict: Verdict = "agreed",
    bad: Sequence[DiscrepancyEntry] = (),
    aside: Sequence[RangeEntry] = (),
    **more: Any,
) -> DiskReport:
    """The report of a disk; what can be counted is counted."""
    return DiskReport(
        name=name,
        qom_path=f"/machine/peripheral/{name}",
        node_name="node0",
        verdict=verdict,
        size=served.size,
        computed_size=served.size,
        layers=tuple(chain),
        totals=tuple(DepthTotal(allocation_depth=depth, bytes=total) for depth, total in served.totals().items()),
        extents=len(served),
        strip=dominant(served, STRIP_CELLS),
        picture=picture_of(served, _marks(served.size, bad), _marks(served.size, aside)),
        rounds=1,
        discrepancies=tuple(bad),
        discrepancy_count=len(bad),
        discrepancy_bytes=sum(each.end - each.offset for each in bad),
        set_aside=tuple(aside),
        set_aside_bytes=sum(each.end - each.offset for each in aside),
        files_verified=True,
        seconds=0.25,
        **more,
    )


def _marks(size: int, ranges: Sequence[DiscrepancyEntry | RangeEntry]) -> ExtentMap:
    marks = np.zeros(size // 65536, dtype=np.uint64)
    for each in ranges:
        marks[each.offset // 65536 : each.end // 65536] = 1
    return ExtentMap(np.arange(1, marks.size + 1) * 65536, marks)


def failed(name: str) -> DiskReport:
    error = ImageMissingError("no such file", where=f"/images/{name}", remedy="It was removed under QEMU.")
    return DiskReport(name=name, qom_path="", node_name=f"node of {name}", verdict="error", error=ErrorEntry.of(error))


def waiting(name: str) -> DiskReport:
    return DiskReport(name=name, qom_path="", node_name="", verdict="not-judged")


def report(*disks: DiskReport, **more: Any) -> ValidationReport:
    settings = {"monitor": "/run/vm.qmp", "qemu": "7.2.0", "guest": "running", "started": "2025-03-04T05:06:07+00:00"}
    return ValidationReport(**{**settings, "verdict": worst(disks), "disks": disks, **more})


def sample(*, hostile: str = "") -> ValidationReport:
    """One disk of each verdict; `hostile` is part of every name that comes from outside."""
    chain = layers(f"/images/top{hostile}", "/images/middle", f"/images/{hostile}/base")
    served = ExtentMap.of_extents([(8 * MIB, 1), (16 * MIB, 2), (8 * MIB, 0), (32 * MIB, 3)])
    steps = tuple(StepEntry(layer_index=each.layer_index, file=each.file, read="L2 entry is 0") for each in chain)
    found = DiscrepancyEntry(
        offset=4 * MIB, end=5 * MIB, served=1, computed=2, file=f"/images/middle{hostile}", why=steps
    )
    bitmap = f"qemu:dirty-bitmap:{hostile}"
    missed = DiscrepancyEntry(
        offset=5 * MIB,
        end=6 * MIB,
        served=0,
        computed=1,
        file=None,
        why=(),
        compared=bitmap,
        finding="bitmap-misses-change",
    )
    compared = ComparedEntry(what=bitmap, verdict="discrepancy", bytes=64 * MIB, discrepancy_bytes=MIB, note=hostile)
    return report(
        disk(f"vd0{hostile}", served, chain),
        disk("vd1", served, chain, verdict="discrepancy", bad=[found, missed], compared=(compared,)),
        disk(
            "vd2",
            served,
            chain,
            verdict="incomplete",
            unfinished="written",
            aside=[RangeEntry(offset=40 * MIB, end=48 * MIB)],
        ),
        failed(f"vd3{hostile}"),
        waiting(f"vd4{hostile}"),
        monitor=f"/run/{hostile}",
        left_behind=(f"left {hostile}",),
    )
