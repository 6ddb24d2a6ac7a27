"""The block graph as a document, a text and a picture."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpnbd.qmp.capabilities import Abilities, Capability
from qmpnbd.qmp.disks import Disk
from qmpnbd.qmp.graph import BlockGraph, Node
from qmpnbd.qmp.inventory import Inventory
from qmpnbd.qmp.models import BlockExportInfo, VersionInfo
from qmpnbd.qmp.numbering import report_of
from qmpnbd.report.graph import Seen, graph_document
from qmpnbd.report.graphlayout import lay_out
from qmpnbd.report.graphsvg import graph_svg
from qmpnbd.report.graphtext import graph_text
from qmpnbd.report.model import GraphDocument
from tests.servers import blockdev, qemu
from tests.test_cli import document, qmpnbd

SVG = "{http://www.w3.org/2000/svg}"
DRIVERS = ("qcow2", "raw", "file", "throttle", "copy-before-write", "snapshot-access", "quorum", "nbd", "x")
ROLES = ("file", "backing", "target", "data-file", "children.0")


def node(name: str, driver: str, filename: str = "", bitmaps: Sequence[str] = (), **children: str) -> Node:
    return Node(name, driver, filename, 1 << 20, False, children, tuple(bitmaps))


def described(nodes: Sequence[Node], disks: Sequence[Disk], exports: Sequence[tuple[str, str]] = ()) -> GraphDocument:
    graph = BlockGraph({each.name: each for each in nodes}, (), {})
    version = VersionInfo.model_validate({"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""})
    listed = [BlockExportInfo.model_validate({"id": name, "type": "nbd", "node-name": at}) for name, at in exports]
    abilities = Abilities(version, frozenset({Capability.SNAPSHOT_ACCESS, Capability.BLOCK_EXPORT}))
    kinds = {"/machine/peripheral/vd0": "virtio-blk-pci"}
    return graph_document(Seen("vm.qmp", "running", abilities, Inventory(graph, tuple(disks)), kinds, listed))


def on(name: str, node_name: str) -> Disk:
    return Disk(name, name, f"/machine/peripheral/{name}", node_name)


NODES = (
    node("t", "throttle", file="top"),
    node("top", "qcow2", bitmaps=["c1"], file="top-f", backing="base"),
    node("top-f", "file", "/images/top.qcow2"),
    node("base", "raw", file="base-f"),
    node("base-f", "file", "/images/base.raw"),
    node("over", "raw", file="free"),
    node("free", "qcow2", file="free-f", backing="base"),
    node("free-f", "nbd", "nbd://far/disk"),
)
EXAMPLE = described(NODES, [on("vd0", "t"), Disk("over", "", "", "over", "loose")], [("x0", "top")])


def test_the_text_is_a_tree_with_the_numbers() -> None:
    assert graph_text(EXAMPLE).splitlines() == [
        "QEMU 7.2.0, guest running, monitor vm.qmp",
        "can: block-export, snapshot-access",
        "does wrong: iothread, server-stop, snapshot-access",
        "",
        "disk vd0: virtio-blk-pci, /machine/peripheral/vd0",
        "  t  throttle (filter), 1 MiB, writable",
        "  └─ file: top  qcow2, 1 MiB, writable, depth 1, export x0, bitmap c1",
        "     ├─ file: top-f  file, /images/top.qcow2",
        "     └─ backing: base  raw, 1 MiB, writable, depth 3",
        "        └─ file: base-f  file, /images/base.raw",
        "",
        "node over (no device, drive loose)",
        "  over  raw, 1 MiB, writable, depth 1",
        "  └─ file: free  qcow2, 1 MiB, writable",
        "     ├─ file: free-f  nbd, nbd://far/disk",
        "     └─ backing: base  (see above)",
        "",
        "an export of a node would say:",
        "  node  numbering  allocation depth",
        "  t     shifted    top 1, base 3",
        "  top   plain      top 1, base 2",
        "  base  plain      base 1",
        "  over  hidden     raw (node over) tells data of the backing files below it as depth 0",
        "  free  plain      free 1, base 2",
    ]


@pytest.mark.parametrize(
    ("nodes", "numbering", "note"),
    [
        ((node("n", "nbd"),), "plain", ""),
        ((node("n", "raw", file="f"), node("f", "file")), "plain", ""),
        ((node("n", "quorum", **{"children.0": "f"}), node("f", "file")), "unknown", "quorum"),
        ((node("n", "throttle", file="n"),), "unknown", "256 nodes"),
        ((node("n", "throttle"),), "unknown", "has no child"),
        ((node("n", "qcow2", backing="gone"),), "unknown", "does not describe"),
        (
            (
                node("n", "snapshot-access", file="c"),
                node("c", "copy-before-write", file="q", target="s"),
                node("q", "qcow2", file="f", backing="b"),
                node("s", "raw", file="f"),
                node("f", "file"),
                node("b", "raw", file="f"),
            ),
            "hidden",
            "snapshot-access (node n)",
        ),
    ],
)
def test_what_an_export_would_say(nodes: tuple[Node, ...], numbering: str, note: str) -> None:
    report = report_of(BlockGraph({each.name: each for each in nodes}, (), {}), "n")
    assert report.numbering == numbering
    assert note in report.note
    assert bool(report.note) == (numbering != "plain")


def test_the_picture_is_one_static_file_for_both_colour_schemes() -> None:
    picture = graph_svg(EXAMPLE)
    root = ET.fromstring(picture)
    assert root.tag == f"{SVG}svg"
    tags = {element.tag.removeprefix(SVG) for element in root.iter()}
    assert tags == {"svg", "title", "style", "defs", "marker", "path", "rect", "text", "g"}
    assert "prefers-color-scheme: dark" in picture
    assert picture.count("http") == 1  # the name space; nothing is fetched


def test_the_picture_shows_each_disk_node_and_edge_once() -> None:
    root = ET.fromstring(graph_svg(EXAMPLE))
    boxes = [element for element in root.iter(f"{SVG}rect") if element.get("class", "").startswith("box")]
    edges = [element for element in root.iter(f"{SVG}path") if element.get("class") == "edge"]
    assert len(boxes) == len(NODES)
    assert len(edges) == 2 + sum(len(each.children) for each in NODES)
    assert {box.get("class") for box in boxes} == {"box filter", "box format", "box protocol"}


def test_names_of_strangers_do_no_harm() -> None:
    name = "<script>alert('&\"')</script>\n\x1b[2J\udc80]]>\u202e"
    spiteful = described([node(name, "qcow2", name, [name], file="f"), node("f", name, name)], [on(name, name)])
    texts = [element.text or "" for element in ET.fromstring(graph_svg(spiteful)).iter()]
    assert not any(letter in text for text in texts[2:] for letter in "\x1b\udc80\u202e")
    assert "<script" not in graph_svg(spiteful)
    told = graph_text(spiteful)
    assert not any(letter in told for letter in "\x1b\udc80\u202e")
    assert len(told.splitlines()) == 12


def test_a_qemu_without_disks() -> None:
    empty = described([node("f", "file", "/f")], [])
    assert graph_text(empty).splitlines()[2:] == ["does wrong: iothread, server-stop, snapshot-access"]
    assert ET.fromstring(graph_svg(empty)).tag == f"{SVG}svg"


@st.composite
def graphs(draw: st.DrawFn) -> GraphDocument:
    """Any graph at all, with shared nodes, loops and children that are not described."""
    names = [f"n{number}" for number in range(draw(st.integers(1, 12)))]
    children = st.dictionaries(st.sampled_from(ROLES), st.sampled_from([*names, "gone"]), max_size=4)
    nodes = [Node(name, draw(st.sampled_from(DRIVERS)), "", 512, True, draw(children)) for name in names]
    tops = draw(st.lists(st.sampled_from(names), max_size=6))
    return described(nodes, [on(f"d{number}", top) for number, top in enumerate(tops)])


@given(graphs())
def test_any_graph_is_laid_out_and_drawn_without_two_things_in_one_place(document: GraphDocument) -> None:
    nodes = {each.node_name: each for each in document.nodes}
    grid = lay_out(document.disks, nodes)
    places = [*grid.disks, *grid.nodes.values()]
    assert len(set(places)) == len(places)
    assert all(column < grid.columns and row < grid.rows for column, row in places)
    reached: set[str] = set()
    waiting = [disk.node_name for disk in document.disks]
    while waiting:
        if (name := waiting.pop()) in nodes and name not in reached:
            reached.add(name)
            waiting += [child.node_name for child in nodes[name].children]
    assert grid.nodes.keys() == reached
    ET.fromstring(graph_svg(document))
    assert graph_text(document)


def test_a_chain_as_long_as_any_is_drawn() -> None:
    chain = [
        node(f"n{number}", "qcow2", file=f"n{number + 1}", **{"data-file": f"n{number}"}) for number in range(5000)
    ]
    long = described(chain, [on("vd0", "n0")])
    assert len(lay_out(long.disks, {each.node_name: each for each in long.nodes}).nodes) == 5000


@pytest.mark.real
def test_the_command_gives_all_three_forms(three_layers: Path) -> None:
    nodes = ["-object", "throttle-group,id=g", "-blockdev", blockdev(three_layers / "top.qcow2", "top", read_only=True)]
    filtered = {"driver": "throttle", "node-name": "t", "throttle-group": "g", "file": "top", "read-only": True}
    nodes += ["-blockdev", json.dumps(filtered), "-device", "virtio-blk-pci,id=vd0,drive=t"]
    with qemu(*nodes) as server:
        text = qmpnbd("graph", "--qmp", server.qmp).stdout
        assert "  └─ file: top  qcow2, 16 MiB, read-only, depth 1" in text.splitlines()
        found = document(qmpnbd("graph", "--qmp", server.qmp, "--json").stdout)
        assert GraphDocument.model_validate(found).disks[0].device == "virtio-blk-pci"
        numbering = {each.node_name: each.report.numbering for each in GraphDocument.model_validate(found).nodes}
        assert (numbering["t"], numbering["top"]) == ("shifted", "plain")
        assert ET.fromstring(qmpnbd("graph", "--qmp", server.qmp, "--svg").stdout).tag == f"{SVG}svg"
