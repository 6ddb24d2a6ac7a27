"""The block graph as a picture: one static SVG file, without scripts, fonts or links, for light and dark pages."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import PurePath

from qmpnbd.printable import printable
from qmpnbd.report.graphlayout import Grid, lay_out
from qmpnbd.report.graphtext import disk_words, node_words
from qmpnbd.report.model import GraphDiskEntry, GraphDocument, GraphNodeEntry
from qmpnbd.report.sizes import human_size
from qmpnbd.report.text import guest_words

_BOX_WIDTH, _BOX_HEIGHT = 248, 64
_COLUMN, _ROW = _BOX_WIDTH + 76, _BOX_HEIGHT + 44
_MARGIN, _HEAD = 28, 62
_FOOT = 72
_NAME_LETTERS, _SMALL_LETTERS = 23, 34
"""How many letters fit into a box, in the large and the small size."""

_STYLE = """
text { font-family: ui-sans-serif, system-ui, "Helvetica Neue", "DejaVu Sans", sans-serif; fill: #1f2328; }
.page { fill: #ffffff; }
.title { font-size: 17px; font-weight: 600; }
.sub, .small { fill: #59636e; font-size: 11.5px; }
.name { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 13px; font-weight: 600; }
.role { font-size: 11px; fill: #59636e; paint-order: stroke; stroke: #ffffff; stroke-width: 5px; }
.box { fill: #f6f8fa; stroke: #8c959f; stroke-width: 1.25; }
.disk { fill: #0969da; stroke: none; }
.free { fill: #6e7781; stroke: none; }
.on { fill: #ffffff; }
.format { fill: #ddf4ff; stroke: #54aeff; }
.filter { fill: #fff8c5; stroke: #d4a72c; stroke-dasharray: 5 3; }
.protocol { fill: #f6f8fa; stroke: #afb8c1; }
.edge { fill: none; stroke: #6e7781; stroke-width: 1.5; }
.head { fill: #6e7781; }
.plain { fill: #1a7f37; }
.shifted { fill: #9a6700; }
.hidden { fill: #cf222e; }
.unknown { fill: #6e7781; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; }
  .page { fill: #0d1117; }
  .sub, .small { fill: #9198a1; }
  .role { fill: #9198a1; stroke: #0d1117; }
  .box { fill: #161b22; stroke: #6e7681; }
  .disk { fill: #1f6feb; }
  .free { fill: #6e7681; }
  .on { fill: #ffffff; }
  .format { fill: #0c2d4a; stroke: #388bfd; }
  .filter { fill: #2e2503; stroke: #bb8009; }
  .protocol { fill: #161b22; stroke: #3d444d; }
  .edge { stroke: #8b949e; }
  .head { fill: #8b949e; }
  .plain { fill: #238636; }
  .shifted { fill: #9e6a03; }
  .hidden { fill: #da3633; }
}
"""

_LEGEND = (
    ("plain", "an export of this node counts 1, 2, 3, …"),
    ("shifted", "a filter shifts the numbers"),
    ("hidden", "it tells backing files as depth 0"),
    ("unknown", "what it tells is not known"),
)


def graph_svg(document: GraphDocument) -> str:
    """Returns the picture; the number in a corner is the allocation depth in an export of the disk above."""
    nodes = {node.node_name: node for node in document.nodes}
    grid = lay_out(document.disks, nodes)
    width = max(2 * _MARGIN + grid.columns * _COLUMN - (_COLUMN - _BOX_WIDTH), 860)
    height = _HEAD + grid.rows * _ROW + _FOOT
    return "\n".join(
        [
            *_head(document, width, height),
            *_edges(document, nodes, grid),
            *_boxes(document, nodes, grid),
            *_legend(height),
            "</svg>",
            "",
        ]
    )


def _head(document: GraphDocument, width: int, height: int) -> Iterator[str]:
    title = _text(f"Block graph of QEMU {document.qemu}")
    hazards = f"; does wrong: {', '.join(document.hazards)}" if document.hazards else ""
    about = f"{guest_words(document.guest)}, monitor {document.monitor}{hazards}"
    yield f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    yield '     role="img" aria-labelledby="title">'
    yield f'<title id="title">{title}</title>'
    yield f"<style>{_STYLE}</style>"
    yield '<defs><marker id="arrow" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7"'
    yield '  orient="auto-start-reverse"><path class="head" d="M0 0 10 5 0 10z"/></marker></defs>'
    yield f'<rect class="page" width="{width}" height="{height}"/>'
    yield f'<text class="title" x="{_MARGIN}" y="34">{title}</text>'
    yield f'<text class="sub" x="{_MARGIN}" y="53">{_text(about)}</text>'


def _corner(place: tuple[int, int]) -> tuple[int, int]:
    return _MARGIN + place[0] * _COLUMN, _HEAD + 14 + place[1] * _ROW


def _edges(document: GraphDocument, nodes: dict[str, GraphNodeEntry], grid: Grid) -> Iterator[str]:
    for disk, place in zip(document.disks, grid.disks, strict=True):
        if disk.node_name in grid.nodes:
            yield from _edge(place, grid.nodes[disk.node_name], "")
    for name, place in grid.nodes.items():
        for child in nodes[name].children:
            if child.node_name in grid.nodes:
                yield from _edge(place, grid.nodes[child.node_name], child.role)


def _edge(start: tuple[int, int], end: tuple[int, int], role: str) -> Iterator[str]:
    (left, top), (to_left, to_top) = _corner(start), _corner(end)
    middle, to_middle = left + _BOX_WIDTH // 2, to_left + _BOX_WIDTH // 2
    if end[0] > start[0] and end[1] - start[1] < 2:
        x, y, to_x, to_y = left + _BOX_WIDTH, top + _BOX_HEIGHT // 2, to_left, to_top + _BOX_HEIGHT // 2
        path = f"M{x} {y}C{x + 40} {y} {to_x - 40} {to_y} {to_x} {to_y}"
        label = (x + to_x) // 2 - 4, (y + to_y) // 2 - 7
    elif end[1] > start[1]:
        y = top + _BOX_HEIGHT
        path = f"M{middle} {y}C{middle} {y + 26} {to_middle} {to_top - 26} {to_middle} {to_top}"
        label = (middle + to_middle) // 2, (y + to_top) // 2 + 4
    else:  # back to something that another disk has shown already
        bend = max(left, to_left) + _BOX_WIDTH + 44
        x, y, to_y = left + _BOX_WIDTH, top + _BOX_HEIGHT * 3 // 4, to_top + _BOX_HEIGHT * 3 // 4
        path = f"M{x} {y}C{bend} {y} {bend} {to_y} {to_left + _BOX_WIDTH} {to_y}"
        label = bend - 16, (y + to_y) // 2
    yield f'<path class="edge" marker-end="url(#arrow)" d="{path}"/>'
    if role:
        yield f'<text class="role" x="{label[0]}" y="{label[1]}" text-anchor="middle">{_text(role)}</text>'


def _boxes(document: GraphDocument, nodes: dict[str, GraphNodeEntry], grid: Grid) -> Iterator[str]:
    depths: dict[str, int] = {}
    for disk, place in zip(document.disks, grid.disks, strict=True):
        yield from _disk(disk, place)
        root = nodes.get(disk.node_name)
        for layer in root.report.layers if root else ():
            depths.setdefault(layer.node_name, layer.allocation_depth)
    for name, place in grid.nodes.items():
        yield from _node(nodes[name], place, depths.get(name))


def _disk(disk: GraphDiskEntry, place: tuple[int, int]) -> Iterator[str]:
    x, y = _corner(place)
    middle = x + _BOX_WIDTH // 2
    second = disk.device or disk.qom_path if disk.attached else "no device"
    yield f"<g><title>{_text(disk_words(disk))}</title>"
    yield _rect("disk" if disk.attached else "free", (x, y + 6), (_BOX_WIDTH, _BOX_HEIGHT - 12), 26)
    yield _line("name on", (middle, y + 29), disk.name, _NAME_LETTERS + 3, anchor="middle")
    yield _line("small on", (middle, y + 45), second, _SMALL_LETTERS, anchor="middle")
    yield "</g>"


def _node(node: GraphNodeEntry, place: tuple[int, int], depth: int | None) -> Iterator[str]:
    x, y = _corner(place)
    size = human_size(node.size)
    second = f"{node.driver}, {size}, {'read-only' if node.read_only else 'writable'}"
    third = PurePath(node.file).name if node.file else ", ".join([*node.exports, *node.bitmaps])
    yield f"<g><title>{_text(f'{node.node_name}: {node_words(node, depth)}. {node.report.note}')}</title>"
    yield _rect(f"box {node.kind}", (x, y), (_BOX_WIDTH, _BOX_HEIGHT), 7)
    yield _line("name", (x + 12, y + 21), node.node_name, _NAME_LETTERS)
    yield _line("small", (x + 12, y + 38), second, _SMALL_LETTERS)
    yield _line("small", (x + 12, y + 54), third, _SMALL_LETTERS)
    if node.kind != "protocol" or depth is not None:
        yield _rect(node.report.numbering, (x + _BOX_WIDTH - 34, y + 8), (26, 18), 9)
        number = "-" if depth is None else str(depth)
        yield _line("small on", (x + _BOX_WIDTH - 21, y + 21), number, 4, anchor="middle")
    yield "</g>"


def _rect(kind: str, corner: tuple[int, int], size: tuple[int, int], radius: int) -> str:
    return f'<rect class="{kind}" x="{corner[0]}" y="{corner[1]}" width="{size[0]}" height="{size[1]}" rx="{radius}"/>'


def _line(kind: str, at: tuple[int, int], text: str, letters: int, *, anchor: str = "start") -> str:
    shown = printable(text)
    if len(shown) > letters:
        shown = f"{shown[: letters // 2]}…{shown[-((letters - 1) // 2) :]}"
    return f'<text class="{kind}" x="{at[0]}" y="{at[1]}" text-anchor="{anchor}">{escape(shown)}</text>'


def _legend(height: int) -> Iterator[str]:
    x, y = _MARGIN, height - 24
    about = "The number is the allocation depth of what the node holds, in an export of the disk above it; the colour:"
    yield f'<text class="small" x="{x}" y="{y - 20}">{about}</text>'
    for kind, words in _LEGEND:
        yield _rect(kind, (x, y - 11), (18, 13), 6)
        yield f'<text class="small" x="{x + 24}" y="{y}">{words}</text>'
        x += 50 + 6 * len(words)


def _text(words: str) -> str:
    return escape(printable(words))
