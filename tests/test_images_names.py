"""Backing names. What stands in the tables as accepted was tried with QEMU 7.2 and opened the same file."""

from __future__ import annotations

import json

import pytest

from qmpnbd.errors import BackingNotLocalError, ImageError, ImageUnsupportedError
from qmpnbd.images.names import Reference, protocol_of, resolve, resolve_data_file

OVERLAY = "/images/vm/top.qcow2"
WORKING_DIRECTORY = "/run/qemu"


def resolved(name: str, recorded_format: str = "", overlay: str = OVERLAY) -> Reference:
    return resolve(name, recorded_format, overlay, overlay, WORKING_DIRECTORY)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("/base", "/base"),
        ("base", "/images/vm/base"),
        ("sub/base", "/images/vm/sub/base"),
        ("../base", "/images/vm/../base"),
        ("./b:c", "/images/vm/./b:c"),
        ("d/b:c", "/images/vm/d/b:c"),
        ("/b:c", "/b:c"),
        ("file:base", "/run/qemu/base"),
        ("file:/base", "/base"),
        ("file:///base", "///base"),
        ("host_device:/dev/sdx", "/dev/sdx"),
        ("file:nbd:x", "/run/qemu/nbd:x"),
    ],
)
def test_a_plain_name(name: str, path: str) -> None:
    assert resolved(name) == Reference(path, None)
    assert resolved(name, "raw") == Reference(path, "raw")


def test_a_relative_overlay_keeps_its_backing_file_relative() -> None:
    assert resolved("base", overlay="top").path == "base"
    assert resolved("base", overlay="./vm/top").path == "./vm/base"
    assert resolve("file:base", "", "vm/top", "vm/top").path == "base"


@pytest.mark.parametrize("name", ["nbd://host/x", "c:base", "nbd:unix:/s", "rbd:pool/x", ":x", "https://host/x"])
def test_another_protocol(name: str) -> None:
    with pytest.raises(BackingNotLocalError, match=f"{OVERLAY}: its backing file {name} is not a local file"):
        resolved(name)


@pytest.mark.parametrize("recorded", ["dmg", "QCOW2", "nbd", "\\xff"])
def test_another_format(recorded: str) -> None:
    with pytest.raises(ImageUnsupportedError, match="format"):
        resolved("base", recorded)


FILE = {"driver": "file", "filename": "base"}
PATH = "/run/qemu/base"


@pytest.mark.parametrize(
    ("options", "recorded", "reference"),
    [
        ({"driver": "qcow2", "file": FILE}, "", Reference(PATH, "qcow2")),
        ({"driver": "qcow2", "file": FILE}, "raw", Reference(PATH, "raw")),
        ({"driver": "raw", "file": FILE}, "qcow2", Reference(PATH, "qcow2")),
        ({"driver": "throttle", "file": FILE}, "raw", Reference(PATH, "raw")),
        ({"file": FILE}, "", Reference(PATH, None)),
        (FILE, "", Reference(PATH, "raw")),
        ({"driver": "raw", "file.filename": "/x"}, "", Reference("/x", "raw")),
        ({"driver": "raw", "file.driver": "host_device", "file.filename": "/x"}, "", Reference("/x", "raw")),
        ({"driver": "raw", "file": {"filename": "file:x"}}, "", Reference("/run/qemu/file:x", "raw")),
        ({"driver": "qcow2", "file": FILE, "backing": None}, "", Reference(PATH, "qcow2", is_last=True)),
        ({"driver": "raw", "offset": 512, "size": "1024", "file": FILE}, "", Reference(PATH, "raw", 512, 1024)),
        (
            {"driver": "qcow2", "node-name": "n", "file": {**FILE, "locking": "off", "cache": {"direct": True}}},
            "",
            Reference(PATH, "qcow2"),
        ),
    ],
)
def test_a_json_name(options: dict[str, object], recorded: str, reference: Reference) -> None:
    assert resolved("json:" + json.dumps(options), recorded) == reference


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "1",
        "null",
        "{}",
        "{'driver':'qcow2'}",
        "[" * 1000,
        '{"a":' * 200 + "1" + "}" * 200,
        '{"driver":"qcow2","driver":"raw","file.filename":"x"}',
        '{"driver":"qcow2","file":{"filename":"x"},"file.filename":"x"}',
        '{"driver":"qcow2","file":"node"}',
        '{"driver":"qcow2","file":{}}',
        '{"driver":"qcow2","filename":"x"}',
        '{"filename":"x"}',
        '{"driver":1,"file.filename":"x"}',
        '{"driver":["qcow2"],"file.filename":"x"}',
        '{"driver":"qcow2","file.filename":1}',
        '{"driver":"qcow2","file.filename":""}',
        '{"driver":"qcow2","file.driver":"raw","file.file.filename":"x"}',
        '{"driver":"qcow2","file.driver":["file"],"file.filename":"x"}',
        '{"driver":"qcow2","file.driver":"throttle","file.file.filename":"x"}',
        '{"driver":"qcow2","file.filename":"x","backing":"node"}',
        '{"driver":"qcow2","file.filename":"x","backing":{"driver":"raw","file.filename":"y"}}',
        '{"driver":"qcow2","file.filename":"x","data-file":{"driver":"file","filename":"y"}}',
        '{"driver":"qcow2","file.filename":"x","offset":0}',
        '{"driver":"raw","file.filename":"x","offset":-1}',
        '{"driver":"raw","file.filename":"x","offset":true}',
        '{"driver":"raw","file.filename":"x","offset":1.5}',
        '{"driver":"raw","file.filename":"x","size":"64k"}',
        '{"driver":"throttle","file":{"driver":"qcow2","file.filename":"x"}}',
        '{"driver":"dmg","file.filename":"x"}',
        "{'driver':'qcow2','file.filename':'x\\'}",
        "{'driver':'qcow2',\"file.filename':'x'}",
    ],
)
def test_a_json_name_that_is_not_understood(text: str) -> None:
    with pytest.raises(ImageUnsupportedError, match=r"its backing file is (named by|read by)"):
        resolved("json:" + text)


@pytest.mark.parametrize(
    "text",
    [
        '{"driver":"qcow2","file":{"driver":"nbd","host":"h"}}',
        '{"driver":"raw","file.driver":"https","file.url":"https://h/x"}',
        '{"driver":"nbd","server":{"type":"unix","path":"/s"}}',
        '{"driver":"null-co"}',
    ],
)
def test_a_json_name_that_is_not_local(text: str) -> None:
    with pytest.raises(BackingNotLocalError, match="driver"):
        resolved("json:" + text)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("{'driver':'qcow2','file':{'filename':'base'}}", "base"),
        ("{'driver':\"qcow2\",\"file.filename\":'it\\'s'}", "it's"),
        ("{'driver':'qcow2','file.filename':'say \"x\"'}", 'say "x"'),
        ('{"driver":"qcow2","file.filename":"it\'s"}', "it's"),
    ],
)
def test_json_in_single_quotes(text: str, path: str) -> None:
    assert resolved("json:" + text) == Reference(f"/run/qemu/{path}", "qcow2")


def test_a_protocol_as_recorded_format_reads_bytes_as_they_are() -> None:
    assert resolved("base", "file") == Reference("/images/vm/base", "raw")


def test_names_of_data_files_are_beside_qemus_working_directory() -> None:
    assert resolve_data_file("d.raw", OVERLAY, WORKING_DIRECTORY) == "/run/qemu/d.raw"
    assert resolve_data_file("/d.raw", OVERLAY, WORKING_DIRECTORY) == "/d.raw"
    assert resolve_data_file("file:d.raw", OVERLAY, WORKING_DIRECTORY) == "/run/qemu/d.raw"
    assert resolve_data_file('json:{"driver":"file","filename":"x"}', OVERLAY, "") == "x"
    with pytest.raises(BackingNotLocalError, match="its data file nbd://h/x is not a local file"):
        resolve_data_file("nbd://h/x", OVERLAY, "")


def test_json_cut_anywhere_raises_documented_errors_only() -> None:
    whole = 'json:{"driver":"raw","offset":512,"file":{"driver":"file","filename":"\\ud800x"},"backing":null}'
    for length in range(1, len(whole)):
        try:
            resolved(whole[:length])
        except ImageError:
            continue


def test_protocols() -> None:
    assert [protocol_of(name) for name in ("a:b", "a/b:c", ":", "abc", "")] == ["a", None, "", None, None]
