"""The numbering of a chain inside QEMU, on graphs written by hand. The numbers were measured on QEMU 5.2 to 10.0."""

from __future__ import annotations

import json

import pytest

from qmpnbd.errors import DiskNotLocalError, GraphUnsupportedError, ImageUnsupportedError, NoSuchDiskError
from qmpnbd.qmp.disks import Disk, empty_drives, find_disk, list_disks, users_of
from qmpnbd.qmp.graph import BlockGraph, Link, Node, below, build_graph, chain_of, node_to_read
from qmpnbd.qmp.models import BlockDeviceInfo, BlockInfo, GraphReply


def node(name: str, driver: str, filename: str = "", **children: str) -> Node:
    return Node(name, driver, filename or f"/images/{name}", 1 << 20, True, children)


def graph(*nodes: Node) -> BlockGraph:
    used = {child for each in nodes for child in each.children.values()}
    return BlockGraph({each.name: each for each in nodes}, tuple(n.name for n in nodes if n.name not in used), {})


THREE = (
    node("top", "qcow2", file="top-f", backing="mid"),
    node("top-f", "file"),
    node("mid", "qcow2", file="mid-f", backing="base"),
    node("mid-f", "file"),
    node("base", "raw", file="base-f"),
    node("base-f", "file"),
)


def depths(chain: tuple[Link, ...]) -> list[tuple[str, int]]:
    return [(link.node_name, link.allocation_depth) for link in chain]


def replaced(name: str, **children: str) -> tuple[Node, ...]:
    return tuple(node(n.name, n.driver, **{**n.children, **children}) if n.name == name else n for n in THREE)


def test_a_plain_chain_counts_from_one() -> None:
    assert chain_of(graph(*THREE), "top") == (
        Link("top", "qcow2", "/images/top-f", 1),
        Link("mid", "qcow2", "/images/mid-f", 2),
        Link("base", "raw", "/images/base-f", 3),
    )


def test_what_may_be_written_inside_qemu_is_told() -> None:
    top = Node("top", "qcow2", "", 1 << 20, False, {"file": "top-f", "backing": "mid"})
    links = chain_of(graph(top, *THREE[1:]), "top")
    assert [link.writable for link in links] == [True, False, False]


def test_below_is_everything_a_node_depends_on() -> None:
    assert set(below(graph(*THREE, node("other", "file")), "mid")) == {"mid", "mid-f", "base", "base-f"}
    assert below(graph(*THREE), "gone") == {}


def test_users_of_a_node_are_all_disks_above_it() -> None:
    disks = [Disk("a", "a", "/machine/peripheral/a", "top"), Disk("b", "b", "/machine/peripheral/b", "other")]
    nodes = graph(*THREE, node("other", "qcow2", backing="base"))
    assert users_of("base", [*disks, Disk("top", "", "", "top")], nodes) == disks
    assert users_of("mid", disks, nodes) == disks[:1]


def test_an_export_counts_from_its_own_node() -> None:
    assert depths(chain_of(graph(*THREE), "mid")) == [("mid", 1), ("base", 2)]


def test_a_protocol_node_alone_is_a_raw_layer() -> None:
    assert chain_of(graph(*THREE), "base-f") == (Link("base-f", "raw", "/images/base-f", 1),)


def test_a_filter_above_shifts_all_but_its_own_child() -> None:
    above = graph(node("t", "throttle", file="top"), *THREE)
    assert depths(chain_of(above, "t")) == [("top", 1), ("mid", 3), ("base", 4)]


def test_a_disk_is_read_below_what_copies_on_read() -> None:
    copying = (node("cor", "copy-on-read", file="top"), node("lim", "throttle", file="cor"), *THREE)
    assert node_to_read(graph(*copying), "lim") == node_to_read(graph(*copying), "cor") == "top"
    below_copying = (node("cor", "copy-on-read", file="lim"), node("lim", "throttle", file="top"), *THREE)
    assert node_to_read(graph(*below_copying), "cor") == "lim"
    assert node_to_read(graph(*below_copying), "lim") == "lim"
    assert node_to_read(graph(*THREE), "top") == "top"
    assert node_to_read(graph(*THREE), "gone") == "gone"
    assert node_to_read(graph(node("cor", "copy-on-read", file="cor")), "cor") == "cor"


def test_two_filters_shift_by_two() -> None:
    above = graph(node("c", "copy-on-read", file="t"), node("t", "throttle", file="top"), *THREE)
    assert depths(chain_of(above, "c")) == [("top", 1), ("mid", 4), ("base", 5)]


def test_a_filter_over_mid_and_over_base() -> None:
    over_mid = graph(node("t", "throttle", file="mid"), *replaced("top", backing="t"))
    assert depths(chain_of(over_mid, "top")) == [("top", 1), ("mid", 2), ("base", 4)]
    over_base = graph(node("t", "throttle", file="base"), *replaced("mid", backing="t"))
    assert depths(chain_of(over_base, "top")) == [("top", 1), ("mid", 2), ("base", 3)]


def test_a_job_filter_stands_on_its_backing_child() -> None:
    above = graph(node("m", "mirror_top", backing="top"), *THREE)
    assert depths(chain_of(above, "m")) == [("top", 1), ("mid", 3), ("base", 4)]


def test_a_filter_between_format_and_file_does_not_count() -> None:
    between = graph(node("b", "blkdebug", file="top-f"), *replaced("top", file="b"))
    assert depths(chain_of(between, "top")) == [("top", 1), ("mid", 2), ("base", 3)]


def test_a_raw_window_is_told_by_the_json_name() -> None:
    name = "json:" + json.dumps({"driver": "raw", "offset": "4096", "size": 65536, "file": {}})
    window = graph(node("w", "raw", name, file="f"), node("f", "file", "/images/disk"))
    assert chain_of(window, "w") == (Link("w", "raw", "/images/disk", 1, 4096, 65536),)


def test_a_file_name_in_json_form() -> None:
    name = "json:" + json.dumps({"driver": "file", "filename": "/images/x", "locking": "off"})
    assert chain_of(graph(node("f", "file", name)), "f")[0].filename == "/images/x"


def test_an_external_data_file_is_no_layer() -> None:
    nodes = (node("w", "qcow2", file="f", **{"data-file": "t"}), node("t", "throttle", file="d"))
    (link,) = chain_of(graph(*nodes, node("f", "file", "/images/x"), node("d", "file", "/data/y")), "w")
    assert (link.filename, link.data_file, link.allocation_depth) == ("/images/x", "/data/y", 1)


@pytest.mark.parametrize(
    ("nodes", "error", "words"),
    [
        (
            (node("w", "raw", file="q"), node("q", "qcow2", file="f"), node("f", "file")),
            GraphUnsupportedError,
            "hidden",
        ),
        ((node("w", "quorum", file="f"), node("f", "file")), ImageUnsupportedError, "quorum"),
        ((node("w", "vmdk", file="f"), node("f", "file")), ImageUnsupportedError, "vmdk"),
        ((node("w", "raw", file="r"), node("r", "rbd")), DiskNotLocalError, "rbd"),
        ((node("w", "qcow2", file="r"), node("r", "nbd")), DiskNotLocalError, "nbd"),
        ((node("w", "null-co"),), DiskNotLocalError, "null-co"),
        (
            (node("w", "qcow2", file="f", **{"data-file": "d"}), node("f", "file"), node("d", "nbd")),
            DiskNotLocalError,
            "nbd",
        ),
        ((node("w", "throttle"),), GraphUnsupportedError, "no child"),
        ((node("w", "qcow2"),), GraphUnsupportedError, "no file"),
        ((node("w", "qcow2", file="gone"),), GraphUnsupportedError, "does not describe"),
        ((node("w", "throttle", file="w"),), GraphUnsupportedError, "256"),
        ((node("w", "raw", "json:{", file="f"), node("f", "file")), GraphUnsupportedError, "options"),
    ],
)
def test_what_is_not_known_for_certain_is_refused(nodes: tuple[Node, ...], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        chain_of(graph(*nodes), "w")


def info(name: str | None) -> BlockDeviceInfo:
    image = {"filename": f"/images/{name}", "format": "raw", "virtual-size": 512}
    return BlockDeviceInfo.model_validate(
        {"node-name": name, "drv": "raw", "ro": False, "image": image, "write_threshold": 0}
    )


def reply() -> GraphReply:
    kinds = {"vd0-backend": "block-backend", "top": "block-driver", "base": "block-driver", "job": "block-job"}
    return GraphReply.model_validate(
        {
            "nodes": [{"id": n, "type": kind, "name": name} for n, (name, kind) in enumerate(kinds.items())],
            "edges": [
                {"parent": 0, "child": 1, "name": "root", "perm": []},
                {"parent": 1, "child": 2, "name": "backing"},
                {"parent": 3, "child": 2, "name": "target"},
            ],
        }
    )


def test_build_graph_joins_nodes_and_edges() -> None:
    built = build_graph([info("top"), info("base"), info(None)], reply())
    assert built.nodes["top"].children == {"backing": "base"}
    assert built.roots == ("top",)
    assert built.backends == {"vd0-backend": "top"}
    assert built == build_graph([info("top"), info("base")], reply())


def block(qdev: str | None, node_name: str | None) -> BlockInfo:
    return BlockInfo(device="", qdev=qdev, inserted=info(node_name) if node_name else None)


def test_disks_are_devices_and_never_drives_without_one() -> None:
    free = graph(node("top", "file"), node("free", "file"), node("anon", "file"), node("sd", "file"))
    disks = list_disks(
        [
            block("/machine/peripheral/vd0/virtio-backend", "top"),
            block("/machine/peripheral-anon/device[3]/virtio-backend", "anon"),
            block("sd0", "sd"),
            block("cd0", None),
            block(None, "free"),
        ],
        free,
    )
    assert disks == [
        Disk("vd0", "vd0", "/machine/peripheral/vd0", "top"),
        Disk("/machine/peripheral-anon/device[3]", "", "/machine/peripheral-anon/device[3]", "anon"),
        Disk("sd0", "sd0", "/machine/peripheral/sd0", "sd"),
        Disk("free", "", "", "free"),
    ]


def test_the_id_of_a_usb_disk_is_that_of_its_device() -> None:
    disks = list_disks([block("/machine/peripheral/us/us.0/legacy[0]", "n")], graph(node("n", "file")))
    assert disks == [Disk("us", "us", "/machine/peripheral/us", "n")]


def test_a_drive_without_a_medium_is_said_to_be_empty() -> None:
    empty = empty_drives([block("cd0", None), block("sd0", "n"), block(None, None)])
    assert empty == ["cd0"]
    with pytest.raises(NoSuchDiskError, match="'cd0' has no medium"):
        find_disk("cd0", [], graph(), where="qmp", empty=empty)


def test_find_disk_prefers_the_device_over_a_node_of_the_same_name() -> None:
    disks = [Disk("a", "a", "/machine/peripheral/a", "b"), Disk("b", "b", "/machine/peripheral/b", "a")]
    nodes = graph(node("a", "file"), node("b", "file"), node("inner", "file"))
    assert find_disk("a", disks, nodes, where="qmp") is disks[0]
    assert find_disk("/machine/peripheral/b", disks, nodes, where="qmp") is disks[1]
    assert find_disk("inner", disks, nodes, where="qmp") == Disk("inner", "", "", "inner")


def test_an_unknown_disk_lists_those_that_exist() -> None:
    disks = [Disk("vd0", "vd0", "/machine/peripheral/vd0", "n"), Disk("free", "", "", "free")]
    with pytest.raises(NoSuchDiskError, match=r"no disk 'vd1'.*Disks: vd0; nodes without a device: free\."):
        find_disk("vd1", disks, graph(), where="qmp")


def test_a_name_that_means_two_disks_is_refused() -> None:
    disks = [Disk("x", "x", "/machine/peripheral/x", "n"), Disk("y", "y", "/machine/peripheral/y", "n")]
    with pytest.raises(NoSuchDiskError, match="several disks"):
        find_disk("n", disks, graph(), where="qmp")
