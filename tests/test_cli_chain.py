"""``qmpnbd chain`` and ``qmpnbd check`` in all their forms, against the tools whose output they print."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from qmpnbd.images.chain import Format
from tests.chains import ChainRecipe, build, make_encrypted, recipes, run
from tests.damage import places
from tests.servers import process, tool, wait_until
from tests.test_cli import document, qmpnbd
from tests.test_images_blocks import REAL, made

pytestmark = pytest.mark.real

Info = dict[str, Any]
SMALL = [recipe for recipe in recipes() if recipe.layers[-1].format == "qcow2"][:16]


@pytest.mark.parametrize("recipe", SMALL, ids=lambda recipe: recipe.id)
def test_the_very_bytes_of_qemu_img_map_and_the_facts_of_info(recipe: ChainRecipe, here: Path) -> None:
    top = build(recipe, here)
    assert qmpnbd("chain", "--format", "qcow2", "--qemu-img", top).stdout == run(
        "qemu-img", "map", "-f", "qcow2", "--output=json", top
    )
    assert infos(str(top)) == infos_of_qemu(str(top))


def infos(top: str, *arguments: str) -> list[Info]:
    found = json.loads(qmpnbd("chain", "--info", *arguments, top).stdout)
    assert isinstance(found, list)
    return found


def infos_of_qemu(top: str, *arguments: str) -> list[Info]:
    """What qemu-img says; without what is documented as left out."""
    found: list[Info] = json.loads(run("qemu-img", "info", "--backing-chain", "--output=json", *arguments, top))
    for image in found:
        image.pop("children", None)
        if image["format"] != "qcow2":
            image.pop("format-specific", None)
        elif "encrypt" in image["format-specific"]["data"]:
            encryption = image["format-specific"]["data"]["encrypt"]
            image["format-specific"]["data"]["encrypt"] = {"format": encryption["format"]}
    return found


KINDS: dict[str, tuple[str, ...]] = {
    "old": ("-o", "compat=0.10"),
    "lazy": ("-o", "lazy_refcounts=on,refcount_bits=1,cluster_size=2M"),
    "extended": ("-o", "extended_l2=on,compression_type=zstd"),
    "outside": ("-o", "data_file=outside.raw"),
    "outside raw": ("-o", "data_file=outside.raw,data_file_raw=on"),
    "luks": (),
    "aes": (),
}


@pytest.mark.parametrize("kind", KINDS)
def test_facts_of_every_feature(kind: str, here: Path) -> None:
    if kind in ("luks", "aes"):
        make_encrypted("a.qcow2", kind, "cluster_size=4k", "4M")
    else:
        run("qemu-img", "create", "-q", "-f", "qcow2", *KINDS[kind], "a.qcow2", "4M")
    assert infos("a.qcow2") == infos_of_qemu("a.qcow2")


@pytest.mark.parametrize(("kind", "options", "size"), [*REAL, ("qed", "", 4 << 20), ("vmdk", "", 4 << 20)])
def test_facts_of_other_formats(kind: Format, options: str, size: int, here: Path) -> None:
    path = made(kind, options, size)
    if kind == "vmdk" and options:
        # QEMU adds up what all files take of the disk.
        (image,), (wanted,) = infos(str(path), "--format", kind), infos_of_qemu(str(path), "-f", kind)
        assert wanted.pop("actual-size") > image.pop("actual-size")
        assert image == wanted
    else:
        assert infos(str(path), "--format", kind) == infos_of_qemu(str(path), "-f", kind)


def test_facts_of_snapshots_and_bitmaps(here: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "4M")
    for name in ("one", "two"):
        run("qemu-img", "snapshot", "-c", name, "a.qcow2")
        run("qemu-img", "bitmap", "--add", *(["--disable"] if name == "two" else ["-g", "1M"]), "a.qcow2", name)
    assert infos("a.qcow2") == infos_of_qemu("a.qcow2")


@pytest.mark.parametrize("name", ["base.qcow2", "file:folder/base.qcow2", 'json:{"file.filename":"folder/base.qcow2"}'])
def test_facts_of_names(name: str, here: Path) -> None:
    (here / "folder").mkdir()
    run("qemu-img", "create", "-q", "-f", "qcow2", "folder/base.qcow2", "1M")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", name, "-F", "qcow2", "folder/top.qcow2", "1M")
    assert infos("folder/top.qcow2") == infos_of_qemu("folder/top.qcow2")


def test_an_empty_disk(here: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "0")
    assert qmpnbd("chain", "--qemu-img", "a.qcow2").stdout == run("qemu-img", "map", "--output=json", "a.qcow2")
    newer = qmpnbd("chain", "--qemu-img", "--qemu", "10.0", "a.qcow2").stdout
    assert newer.endswith('"data": false, "compressed": false}]\n')


def test_what_10_0_prints(here: Path) -> None:
    """The lines as qemu-img 10.0.2 printed them."""
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=64k", "a.qcow2", "1M")
    run("qemu-io", "-f", "qcow2", "-c", "write -q 0 64k", "-c", "write -q -c 64k 64k", "a.qcow2")
    assert qmpnbd("chain", "--qemu-img", "--qemu", "10.0", "a.qcow2").stdout == (
        '[{ "start": 0, "length": 65536, "depth": 0, "present": true, "zero": false, "data": true, '
        '"compressed": false, "offset": 327680},\n'
        '{ "start": 65536, "length": 65536, "depth": 0, "present": true, "zero": false, "data": true, '
        '"compressed": true},\n'
        '{ "start": 131072, "length": 917504, "depth": 0, "present": false, "zero": true, "data": false, '
        '"compressed": false}]\n'
    )


def test_what_5_2_prints(here: Path) -> None:
    """The lines as qemu-img 5.2 printed them: zero clusters and what nobody holds are one."""
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=64k", "a.qcow2", "1M")
    run("qemu-io", "-f", "qcow2", "-c", "write -q 0 64k", "-c", "write -q -z 64k 64k", "a.qcow2")
    assert qmpnbd("chain", "--qemu-img", "--qemu", "5.2", "a.qcow2").stdout == (
        '[{ "start": 0, "length": 65536, "depth": 0, "zero": false, "data": true, "offset": 327680},\n'
        '{ "start": 65536, "length": 983040, "depth": 0, "zero": true, "data": false}]\n'
    )


def served(context: str, folder: Path, *arguments: str) -> str:
    """What nbdinfo reads from qemu-nbd."""
    path = folder / "nbd"
    with process([tool("qemu-nbd"), "-r", "-t", "-A", "-k", str(path), *arguments], folder / "log"):
        wait_until(path.exists, "qemu-nbd to listen")
        return run("nbdinfo", f"--map={context}", "--json", f"nbd+unix:///?socket={path}")


def test_other_contexts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    run("qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "8M")
    run("qemu-img", "bitmap", "--add", "-g", "128k", "a.qcow2", "b")
    run("qemu-io", "-f", "qcow2", "-c", "write -q 1M 100k", "-c", "write -q -z 3M 64k", "a.qcow2")
    run("qemu-img", "bitmap", "--disable", "a.qcow2", "b")
    for context, more in (("base:allocation", ()), ("qemu:dirty-bitmap:b", ("-B", "b"))):
        wanted = served(context, folder, "-f", "qcow2", *more, "a.qcow2")
        assert qmpnbd("chain", "--nbdinfo", "--context", context, "a.qcow2").stdout == wanted
        found = document(qmpnbd("chain", "--json", "--context", context, "a.qcow2").stdout)
        assert found["context"] == context
        assert len(found["extents"]) == len(json.loads(wanted))  # type: ignore[arg-type]
        assert context in qmpnbd("chain", "--context", context, "a.qcow2").stdout


def test_bitmaps(here: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "8M")
    assert qmpnbd("chain", "--bitmaps", "a.qcow2").stdout == "no bitmaps\n"
    run("qemu-img", "bitmap", "--add", "-g", "128k", "a.qcow2", "one")
    run("qemu-img", "bitmap", "--add", "--disable", "a.qcow2", "two")
    run("qemu-io", "-f", "qcow2", "-c", "write -q 1M 100k", "a.qcow2")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", "top.qcow2")
    assert qmpnbd("chain", "--bitmaps", "top.qcow2").stdout == (
        "layer  granularity    dirty  state      bitmap\n"
        "    1      128 KiB  128 KiB  recording  one\n"
        "    1       64 KiB      0 B  disabled   two\n"
    )
    found = document(qmpnbd("chain", "--bitmaps", "--json", "top.qcow2").stdout)["bitmaps"]
    assert isinstance(found, list)
    assert [(each["name"], each["dirty_bytes"], each["recording"]) for each in found] == [
        ("one", 131072, True),
        ("two", 0, False),
    ]
    qmpnbd("chain", "--bitmaps", "--nbdinfo", "top.qcow2", code=2)


def test_a_snapshot(here: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "1M")
    run("qemu-io", "-f", "qcow2", "-c", "write -q 0 64k", "a.qcow2")
    run("qemu-img", "snapshot", "-c", "before", "a.qcow2")
    run("qemu-io", "-f", "qcow2", "-c", "write -q 64k 64k", "a.qcow2")
    extents = document(qmpnbd("chain", "--json", "--snapshot", "before", "a.qcow2").stdout)["extents"]
    assert extents == [{"offset": 0, "length": 65536, "value": 1}, {"offset": 65536, "length": 983040, "value": 0}]


def broken(folder: Path) -> Path:
    """An image with one L2 entry that leads inside a cluster."""
    path = folder / "broken.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    run("qemu-io", "-f", "qcow2", "-c", "write -q 0 256k", path)
    image = bytearray(path.read_bytes())
    at = places(image)["l2"][1]
    image[at : at + 8] = ((1 << 63) + 0x60200).to_bytes(8, "big")
    path.write_bytes(image)
    return path


def test_unreadable_ranges_are_shown_and_have_an_exit_code_of_their_own(here: Path) -> None:
    path = broken(here)
    text = qmpnbd("chain", path, code=47).stdout
    assert re.search(r"^ +65536 +65536 +- unreadable$", text, re.MULTILINE)
    assert "unreadable, 1 ranges:\n  [65536, 131072)  layer 0" in text
    assert "L2 entry at byte" in text
    found = document(qmpnbd("chain", path, "--json", code=47).stdout)
    assert isinstance(found["unreadable"], list)
    assert [(each["offset"], each["end"]) for each in found["unreadable"]] == [(65536, 131072)]
    flags = document(qmpnbd("chain", path, "--json", "--context", "base:allocation", code=47).stdout)
    assert flags["unreadable"] == found["unreadable"]
    for form in ("--nbdinfo", "--qemu-img"):
        done = qmpnbd("chain", path, form, code=43)
        assert done.stdout == ""
        assert "L2 entry at byte" in done.stderr


def test_check_says_what_is_wrong_and_how_bad_that_is(here: Path) -> None:
    path = broken(here)
    done = qmpnbd("check", path, code=1)
    assert done.stdout.startswith(f"{path}: CORRUPT\n")
    assert "corruption: points inside a cluster: 1\n    byte 0x" in done.stdout
    found = document(qmpnbd("check", "--json", path, code=1).stdout)
    assert found["verdict"] == "corrupt"
    image = bytearray(path.read_bytes())
    at = places(image)["l2"][1]
    image[at : at + 8] = bytes(8)
    path.write_bytes(image)
    assert "LEAKS\n" in qmpnbd("check", path, code=3).stdout
    assert document(qmpnbd("check", "--json", path, code=3).stdout)["leaks"] == 1
    run("qemu-img", "check", "-q", "-r", "leaks", path)
    assert qmpnbd("check", path).stdout.splitlines()[0] == f"{path}: CLEAN"
