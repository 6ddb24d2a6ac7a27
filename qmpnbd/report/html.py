"""A validation report as one HTML page that needs no network.

The page carries its style, its script and its data, and forbids itself everything else (Content-Security-Policy, with
the hashes of the two). Names come from outside: they stand in the page as escaped text only. Its size is bounded,
whatever the disks look like: a picture has a bounded number of runs, and all pictures together have as well.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from html import escape
from importlib.resources import files
from pathlib import PurePath

from qmpnbd.extents import ExtentMap
from qmpnbd.printable import printable
from qmpnbd.report.contexts import ALLOCATION_DEPTH, CONTENT, UNREADABLE, describe
from qmpnbd.report.instant import instant_text
from qmpnbd.report.model import DiscrepancyEntry, DiskReport, LayerEntry, Picture, ValidationReport, Verdict
from qmpnbd.report.picture import reduced
from qmpnbd.report.sizes import human_size
from qmpnbd.report.strip import PICTURE_RUNS
from qmpnbd.report.svg import STRIP_RUNS, depth_colour, marks, palette, strip
from qmpnbd.report.text import guest_words, was_judged

VERDICTS: dict[Verdict, str] = {
    "agreed": "Agrees",
    "discrepancy": "Discrepancy",
    "incomplete": "Not all judged",
    "error": "Not validated",
    "not-judged": "Not judged",
}
"""What a verdict is called on the page."""

MAX_RUNS = 1 << 18
"""Runs of all pictures of a page together: some 5 MB of it."""

MAX_SHOWN = 25
"""Discrepancies and ranges of a disk that are listed on the page; all are marked in the picture."""

_LIST_FROM = 4
_WIDTH = 1000


def validation_html(report: ValidationReport) -> Iterator[str]:
    """Yields the page piece by piece."""
    style, script = palette() + _resource("page.css"), _resource("page.js")
    policy = f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'"
    yield (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{VERDICTS[report.verdict]}: validation of {_text(report.monitor)}</title>\n"
        f"<style>{style}</style>\n</head>\n<body>\n<main>\n"
    )
    yield from _head(report)
    if len(report.disks) >= _LIST_FROM:
        yield from _list(report)
    runs = max(4, min(PICTURE_RUNS, MAX_RUNS // max(1, len(report.disks))))
    data: list[dict[str, object]] = []
    for number, disk in enumerate(report.disks):
        picture = None if disk.picture is None or not disk.picture.ends else reduced(disk.picture, runs)
        yield from _disk(number, disk, picture, runs)
        if picture is not None:
            data.append(_data(number, disk, picture))
    yield f"<footer>{_text(report.generator)}, run started {_text(report.started)}</footer>\n</main>\n"
    yield f'<script type="application/json" id="disks">{_json(data)}</script>\n'
    yield f"<script>{script}</script>\n</body>\n</html>\n"


def _resource(name: str) -> str:
    return files("qmpnbd.report").joinpath("page", name).read_text("utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _text(text: str) -> str:
    return escape(printable(text))


def _json(data: object) -> str:
    """Returns JSON that cannot end the element it stands in."""
    return json.dumps(data, separators=(",", ":")).replace("&", "\\u0026").replace("<", "\\u003c")


def _head(report: ValidationReport) -> Iterator[str]:
    qemu = f"QEMU {report.qemu}, {guest_words(report.guest)}, " if report.qemu else ""
    yield (
        '<header>\n<p class="kind">What is served over NBD against the image files</p>\n'
        f'<h1 class="{report.verdict}">{_headline(report)}</h1>\n'
    )
    if report.monitor:
        yield f'<p class="facts">{_text(qemu)}monitor <code>{_text(report.monitor)}</code></p>\n'
    if report.stopped is not None:
        words = f"{report.stopped.where}: {report.stopped.what}"
        yield f'<p class="note incomplete">The run ended before all disks were validated: {_text(words)}</p>\n'
    for line in report.left_behind:
        yield f'<p class="note error">{_text(line)}</p>\n'
    yield "</header>\n"


def _headline(report: ValidationReport) -> str:
    count = len(report.disks)
    same = sum(disk.verdict == report.verdict for disk in report.disks)
    disks = "1 disk" if count == 1 else f"{count:,} disks"
    if report.verdict == "agreed":
        return f"{disks}: every byte agrees"
    words = {
        "discrepancy": "served is not what the files hold",
        "incomplete": "not everything could be judged",
        "error": "could not be validated",
        "not-judged": "its turn did not come" if same == 1 else "their turn did not come",
    }[report.verdict]
    return f"{f'{same:,} of ' if count > 1 else ''}{disks}: {words}"


def _list(report: ValidationReport) -> Iterator[str]:
    yield (
        '<section class="card wide"><table>\n<tr><th>Disk</th><th>Verdict</th><th class="number">Size</th>'
        '<th class="number">Discrepancies</th><th class="number">Set aside</th></tr>\n'
    )
    for number, disk in enumerate(report.disks):
        yield (
            f'<tr><td class="file"><a href="#disk-{number}">{_text(disk.name)}</a></td>'
            f"<td>{_verdict(disk.verdict)}</td>"
            f'<td class="number">{human_size(disk.size) if disk.size else ""}</td>'
            f'<td class="number">{disk.discrepancy_count or ""}</td>'
            f'<td class="number">{human_size(disk.set_aside_bytes) if disk.set_aside_bytes else ""}</td></tr>\n'
        )
    yield "</table></section>\n"


def _verdict(verdict: Verdict) -> str:
    return f'<span class="verdict {verdict}">{VERDICTS[verdict]}</span>'


def _disk(number: int, disk: DiskReport, picture: Picture | None, runs: int) -> Iterator[str]:
    yield (
        f'<section class="card" id="disk-{number}">\n<div class="title"><h2>{_text(disk.name)}</h2>'
        f'{_verdict(disk.verdict)}</div>\n<p class="facts">{_facts(disk)}</p>\n'
    )
    if disk.error is not None:
        words = f"{disk.error.where}: {disk.error.what}. {disk.error.remedy}".rstrip()
        yield f'<p class="note error">{_text(words)}</p>\n'
    elif disk.not_judged_because:
        yield f'<p class="note incomplete">Not judged because of --{disk.not_judged_because}.</p>\n'
    elif disk.computed_size != disk.size:
        yield (
            f'<p class="note discrepancy">The disk has {disk.size:,} bytes as served, '
            f"{disk.computed_size:,} bytes according to its files.</p>\n"
        )
    if picture is not None:
        yield from _picture(number, disk, picture, runs)
    if was_judged(disk):
        yield from _layers(disk)
        yield from _compared(disk)
        yield from _discrepancies(number, disk)
        yield from _set_aside(disk)
    yield "</section>\n"


def _facts(disk: DiskReport) -> str:
    facts = [f"node {_text(disk.node_name)}"] if disk.node_name else []
    if was_judged(disk):
        facts += [
            human_size(disk.size),
            "1 extent" if disk.extents == 1 else f"{disk.extents:,} extents",
            f"{disk.seconds:.2f} s",
        ]
        if disk.rounds > 1:
            facts.append(f"read {disk.rounds} times")
        if not disk.files_verified:
            facts.append("whether QEMU has these very files open could not be told")
    return ", ".join(facts)


def _picture(number: int, disk: DiskReport, picture: Picture, runs: int) -> Iterator[str]:
    size = picture.ends[-1]
    hint = "Drag over the strip to zoom in, double-click for the whole disk."
    if picture.part:
        hint = f"Each part of {human_size(picture.part)} shows the depth that most of its bytes have. Drag to zoom in."
    yield (
        f'<div class="picture" id="picture-{number}">\n<div class="zoomed"></div>\n<div class="whole">'
        f'<svg class="overview" viewBox="0 0 {_WIDTH} 64" preserveAspectRatio="none" role="img" '
        f'aria-label="Allocation depth of {_text(disk.name)} from its first byte to its last">\n'
    )
    whole = ExtentMap(picture.ends, picture.depths)
    yield from strip(ALLOCATION_DEPTH, whole, x=0, y=0, width=_WIDTH, height=64, runs=min(STRIP_RUNS, runs // 4))
    yield marks(picture.set_aside[:runs], size, "open", y=52, width=_WIDTH, height=12)
    yield marks(picture.discrepancies[:runs], size, "bad", y=0, width=_WIDTH, height=26)
    yield (
        '</svg><div class="window"></div></div>\n'
        f'<div class="tools"><span class="words">{hint}</span>'
        '<button type="button" data-zoom="0.5" aria-label="Zoom out">−</button>'
        '<button type="button" data-zoom="2" aria-label="Zoom in">+</button>'
        '<button type="button" data-zoom="0">Whole disk</button></div>\n</div>\n'
    )


def _layers(disk: DiskReport) -> Iterator[str]:
    yield (
        '<h3>Layers</h3>\n<div class="wide"><table>\n<tr><th></th><th class="number">Depth</th><th>File</th>'
        '<th>Format</th><th class="number">Seen</th><th class="number">Share</th></tr>\n'
    )
    totals = {total.allocation_depth: total.bytes for total in disk.totals}
    for layer in disk.layers:
        seen = totals.pop(layer.allocation_depth, 0)
        yield _row(disk, layer.allocation_depth, _file(layer), _format(layer), seen)
    for depth, seen in list(totals.items())[:MAX_SHOWN]:
        name = {0: "in no layer", UNREADABLE: "unreadable"}.get(depth, "served, and no layer of the chain")
        yield _row(disk, depth, f'<span class="soft">{name}</span>', "", seen)
    yield "</table></div>\n"


def _row(disk: DiskReport, depth: int, file: str, kind: str, seen: int) -> str:
    share = f"{100 * seen / disk.size:.1f} %" if disk.size else ""
    number = "" if depth == UNREADABLE else depth
    return (
        '<tr><td><svg class="swatch" viewBox="0 0 1 1">'
        f'<rect class="{depth_colour(depth)}" width="1" height="1"/></svg></td>'
        f'<td class="number">{number}</td><td class="file">{file}</td>'
        f'<td class="soft place">{kind}</td><td class="number">{human_size(seen)}</td>'
        f'<td class="number soft">{share}</td></tr>\n'
    )


def _file(layer: LayerEntry) -> str:
    path = PurePath(layer.file)
    return f'{_text(path.name)}<span class="folder">{_text(str(path.parent))}</span>'


def _format(layer: LayerEntry) -> str:
    clusters = "" if layer.cluster_size is None else f", {human_size(layer.cluster_size)}"
    return _text(f"{layer.format}{'?' if layer.format_probed else ''}{clusters}")


def _compared(disk: DiskReport) -> Iterator[str]:
    if disk.instant is not None:
        yield "".join(f'<p class="facts">{_text(line)}</p>\n' for line in instant_text(disk.instant))
    if not disk.compared:
        return
    yield (
        '<h3>Compared</h3>\n<div class="wide"><table>\n<tr><th>What</th><th>Verdict</th>'
        '<th class="number">Discrepancies</th><th class="number">Not judged</th><th>Note</th></tr>\n'
    )
    for entry in disk.compared:
        yield (
            f'<tr><td class="place">{_text(entry.what)}</td><td>{_verdict(entry.verdict)}</td>'
            f'<td class="number">{human_size(entry.discrepancy_bytes) if entry.discrepancy_bytes else ""}</td>'
            f'<td class="number">{human_size(entry.set_aside_bytes) if entry.set_aside_bytes else ""}</td>'
            f'<td class="soft">{_text(entry.note)}</td></tr>\n'
        )
    yield "</table></div>\n"


def _discrepancies(number: int, disk: DiskReport) -> Iterator[str]:
    if not disk.discrepancy_count:
        return
    shown = disk.discrepancies[:MAX_SHOWN]
    more = f", the first {len(shown)} of {disk.discrepancy_count:,}" if disk.discrepancy_count > len(shown) else ""
    yield (
        f"<h3>Discrepancies, {human_size(disk.discrepancy_bytes)}{more}</h3>\n"
        '<div class="wide"><table>\n<tr><th>Bytes</th><th class="number">Length</th><th>What</th><th>Served</th>'
        "<th>Computed</th><th>Decided by</th></tr>\n"
    )
    for each in shown:
        yield (
            f'<tr><td class="place"><button type="button" class="go" data-disk="{number}" data-from="{each.offset}" '
            f'data-to="{each.end}">[{each.offset}, {each.end})</button></td>'
            f'<td class="number">{human_size(each.end - each.offset)}</td><td class="place">{_what(each)}</td>'
            f'<td class="place">{_value(each, each.served)}</td><td class="place">{_value(each, each.computed)}</td>'
            f'<td class="file">{_why(each)}</td></tr>\n'
        )
    yield "</table></div>\n"


def _what(each: DiscrepancyEntry) -> str:
    name = "depth" if each.compared == ALLOCATION_DEPTH else _text(each.compared)
    return name if each.finding == "differs" else f"{each.finding}: {name}"


def _value(each: DiscrepancyEntry, value: int) -> str:
    if each.compared == CONTENT:
        return f"byte {value:#04x}"
    return f"{value} {describe(each.compared, value) or ''}".rstrip()


def _why(each: DiscrepancyEntry) -> str:
    if not each.why:
        return ""
    decided = PurePath(each.file).name if each.file else "no layer holds it"
    steps = "".join(
        f"<li>layer {step.layer_index} {_text(PurePath(step.file).name)}: {_text(step.read)}</li>" for step in each.why
    )
    return f"{_text(decided)}<details><summary>What was read</summary><ol>{steps}</ol></details>"


def _set_aside(disk: DiskReport) -> Iterator[str]:
    if not disk.set_aside_bytes:
        return
    why = "the block graph changed all the time" if disk.unfinished == "graph" else "the guest wrote there all the time"
    if disk.instant is not None:
        why = "written just before the instant and since"
    runs = "".join(f"<li>[{run.offset}, {run.end})</li>" for run in disk.set_aside[:MAX_SHOWN])
    yield (
        f"<h3>Set aside, {human_size(disk.set_aside_bytes)}: {why}</h3>\n"
        f'<details><summary>Where</summary><ol class="place">{runs}</ol></details>\n'
    )


def _data(number: int, disk: DiskReport, picture: Picture) -> dict[str, object]:
    """Returns what the script draws."""
    depths = sorted(set(picture.depths))
    files_of = {layer.allocation_depth: PurePath(layer.file).name for layer in disk.layers}
    names = {0: "in no layer", UNREADABLE: "unreadable"} | files_of
    return {
        "number": number,
        "exact": not picture.part,
        "ends": picture.ends,
        "depths": picture.depths,
        "bad": picture.discrepancies,
        "open": picture.set_aside,
        "classes": {depth: depth_colour(depth) for depth in depths},
        "names": {depth: printable(names[depth]) for depth in depths if depth in names},
    }
