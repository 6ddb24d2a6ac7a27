"""Maps as drawings: a strip from the first byte to the last, a colour a status."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files

from qmpnbd.extents import ExtentMap
from qmpnbd.printable import printable
from qmpnbd.report.contexts import ALLOCATION_DEPTH, BASE_ALLOCATION, DIRTY_BITMAP, UNREADABLE, describe
from qmpnbd.report.sizes import human_size
from qmpnbd.report.strip import bounded

_COLOURS = 8
_BASE = {0: "d1", 1: "d0", 2: "d5", 3: "d0"}
_DIRTY = {0: "d0", 1: "d2"}
STRIP_RUNS = 1000
"""Rectangles of a strip: about one a pixel."""

_LEGEND = 12
_LONGEST = 90  # characters of a name, so that it fits
_WIDTH, _MARGIN = 960, 24


def colour(context: str, value: int) -> str:
    """Returns the class of a status in ``page/palette.css``; from the ninth depth on colours come again."""
    if value == UNREADABLE:
        return "dx"
    if context == BASE_ALLOCATION:
        return _BASE.get(value, "d8")
    if context.startswith(DIRTY_BITMAP):
        return _DIRTY.get(value, "d8")
    return f"d{(value - 1) % _COLOURS + 1}" if value else "d0"


def depth_colour(depth: int) -> str:
    """Returns the class of an allocation depth."""
    return colour(ALLOCATION_DEPTH, depth)


def strip(
    context: str,
    extents: ExtentMap,
    *,
    x: float,
    y: float,
    width: float,
    height: float,
    runs: int = STRIP_RUNS,
) -> Iterator[str]:
    """Yields a map as rectangles, at most `runs`."""
    size = extents.size
    for run in bounded(extents, runs):
        left, right = (x + width * edge / size for edge in (run.offset, run.end))
        yield (
            f'<rect class="{colour(context, run.value)}" x="{left:.2f}" y="{y:g}" '
            f'width="{right - left:.2f}" height="{height:g}"/>\n'
        )


def marks(ranges: Sequence[tuple[int, int]], size: int, kind: str, *, y: float, width: float, height: float) -> str:
    """Returns marks on a strip, none too narrow to be seen."""
    return "".join(
        f'<rect class="{kind}" x="{width * offset / size:.2f}" y="{y:g}" '
        f'width="{max(width * (end - offset) / size, 2):.2f}" height="{height:g}"/>\n'
        for offset, end in ranges
    )


def palette() -> str:
    """Returns the style sheet with the colours, in light and in dark."""
    return files("qmpnbd.report").joinpath("page/palette.css").read_text("utf-8")


def maps_svg(title: str, maps: Mapping[str, ExtentMap], base: int = 0) -> Iterator[str]:
    """Yields maps of one size as an SVG document, a strip a context, each with its legend.

    Args:
        title: what is shown; foreign text.
        maps: context -> map.
        base: offset of the maps' first byte.
    """
    tops, height = [], 76
    for extents in maps.values():
        tops.append(height)
        height += 136 + 22 * min(len(extents.totals()), _LEGEND + 1)
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        f'role="img">\n<title>{_text(title)}</title>\n<style>\n{palette()}{_STYLE}</style>\n'
        f'<rect class="card" width="{_WIDTH}" height="{height}"/>\n'
        f'<text class="title" x="{_MARGIN}" y="44">{_text(title)}</text>\n'
    )
    for top, (context, extents) in zip(tops, maps.items(), strict=True):
        yield from _context(context, extents, base, top)
    yield "</svg>\n"


_STYLE = """\
text { font: 13px system-ui, "Segoe UI", "DejaVu Sans", sans-serif; fill: var(--ink); }
.card { fill: var(--card); } .title { font-size: 17px; font-weight: 650; } .soft { fill: var(--soft); }
.right { text-anchor: end; } .tick { fill: var(--line); }
"""


def _context(context: str, extents: ExtentMap, base: int, top: int) -> Iterator[str]:
    inner, size = _WIDTH - 2 * _MARGIN, extents.size
    words = f"{human_size(size)} in {len(extents):,} extents"
    if len(extents) > STRIP_RUNS:
        words += f"; a part of {human_size(size // STRIP_RUNS)} shows what most of its bytes are"
    yield f'<text x="{_MARGIN}" y="{top}">{_text(context)}</text>\n'
    yield f'<text class="soft right" x="{_WIDTH - _MARGIN}" y="{top}">{words}</text>\n'
    if not size:
        return
    yield from strip(context, extents, x=_MARGIN, y=top + 12, width=inner, height=44)
    for quarter in range(5):
        x, anchor = _MARGIN + inner * quarter / 4, (" right" if quarter == 4 else "")
        yield f'<rect class="tick" x="{x - (quarter == 4):.1f}" y="{top + 58}" width="1" height="5"/>\n'
        yield f'<text class="soft{anchor}" x="{x:.1f}" y="{top + 77}">{human_size(base + size * quarter // 4)}</text>\n'
    yield from _legend(context, extents, top + 104)


def _legend(context: str, extents: ExtentMap, y: int) -> Iterator[str]:
    totals = extents.totals()
    largest = sorted(sorted(totals, key=lambda value: -totals[value])[:_LEGEND])
    for value in largest:
        name = describe(context, value) or f"status {value}"
        share = 100 * totals[value] / extents.size
        yield (
            f'<rect class="{colour(context, value)}" x="{_MARGIN}" y="{y - 11}" width="13" height="13" rx="3"/>\n'
            f'<text x="{_MARGIN + 24}" y="{y}">{_text(name)}</text>\n'
            f'<text class="right" x="{_MARGIN + 280}" y="{y}">{human_size(totals[value])}</text>\n'
            f'<text class="soft right" x="{_MARGIN + 350}" y="{y}">{share:.1f} %</text>\n'
        )
        y += 22
    if len(totals) > _LEGEND:
        yield f'<text class="soft" x="{_MARGIN + 24}" y="{y}">{len(totals) - _LEGEND:,} more</text>\n'


def _text(text: str) -> str:
    shown = printable(text)
    return escape(shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST - 1]}…")
