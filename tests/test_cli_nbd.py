"""``qmpnbd map`` and ``qmpnbd info`` against nbdinfo's own bytes, and what they can do beyond it."""

from __future__ import annotations

import contextlib
import json
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import listening, process, tool, wait_until
from tests.test_cli import document, qmpnbd

pytestmark = pytest.mark.real

DEPTH, BASE = "qemu:allocation-depth", "base:allocation"


def nbdinfo(*arguments: str, code: int = 0) -> str:
    done = subprocess.run([tool("nbdinfo"), *arguments], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    return done.stdout


def is_1_14() -> bool:
    """Whether the nbdinfo here prints servers as ours does; maps are the same in all releases."""
    return " 1.14." in nbdinfo("--version")


@contextlib.contextmanager
def running(folder: Path, *command: str) -> Iterator[str]:
    path = folder / "s"
    arguments = [part.format(socket=path) for part in command]
    with process([tool(arguments[0]), *arguments[1:]], folder / "log") as child:
        wait_until(lambda: listening(path) or child.poll() is not None, "the server")
        assert child.poll() is None, (folder / "log").read_text()
        yield f"nbd+unix:///{{}}?socket={path}"


@pytest.fixture
def disk(folder: Path, three_layers: Path) -> Iterator[str]:
    image = str(three_layers / "top.qcow2")
    options = ("-A", "-r", "-t", "-e", "5", "-x", "disk", "-D", 'a "description"', "-f", "qcow2")
    with running(folder, "qemu-nbd", *options, "-k", "{socket}", image) as uri:
        yield uri.format("disk")


@pytest.mark.parametrize("context", [DEPTH, BASE])
def test_maps(disk: str, context: str) -> None:
    ours, theirs = ("map", disk, "--context", context), (f"--map={context}", disk)
    assert qmpnbd(*ours, "--nbdinfo").stdout == nbdinfo(*theirs, "--json")
    assert qmpnbd(*ours, "--nbdinfo-text").stdout == nbdinfo(*theirs)
    assert qmpnbd(*ours, "--nbdinfo", "--totals").stdout == nbdinfo(*theirs, "--json", "--totals")
    assert qmpnbd(*ours, "--nbdinfo-text", "--totals").stdout == nbdinfo(*theirs, "--totals")
    assert qmpnbd(*ours, "--totals").stdout == nbdinfo(*theirs, "--totals")


SIZES = ("blocksize-minimum=512", "blocksize-preferred=64K", "blocksize-maximum=1M")
SERVERS = {
    "nbdkit": ("nbdkit", "-f", "-U", "{socket}", "memory", "1500K"),
    "read-only": ("nbdkit", "-f", "-r", "-U", "{socket}", "pattern", "3G"),
    "no structured replies": ("nbdkit", "-f", "--no-sr", "-U", "{socket}", "memory", "1M"),
    "newstyle": ("nbdkit", "-f", "--mask-handshake=0", "-U", "{socket}", "memory", "1M"),
    "oldstyle": ("nbdkit", "-f", "-o", "-U", "{socket}", "memory", "1M"),
    "block sizes": (*("nbdkit", "-f", "-U", "{socket}", "--filter=blocksize-policy", "memory", "1M"), *SIZES),
    "empty": ("nbdkit", "-f", "-U", "{socket}", "memory", "0"),
    "odd": ("nbdkit", "-f", "-U", "{socket}", "memory", "1000"),
}


@pytest.mark.parametrize("server", SERVERS)
def test_descriptions_of_servers(folder: Path, server: str) -> None:
    if not is_1_14():
        pytest.skip("this nbdinfo describes servers in another form than 1.14, which ours has")
    with running(folder, *SERVERS[server]) as address:
        uri = address.format("")
        assert qmpnbd("info", uri, "--nbdinfo").stdout == nbdinfo("--no-content", "--json", uri)
        assert qmpnbd("info", uri, "--nbdinfo-text").stdout == nbdinfo("--no-content", uri)
        assert qmpnbd("info", uri, "--size").stdout == nbdinfo("--size", uri)


def test_a_description_and_a_list_of_exports(disk: str, folder: Path, three_layers: Path) -> None:
    if not is_1_14():
        pytest.skip("this nbdinfo describes servers in another form than 1.14, which ours has")
    assert qmpnbd("info", disk, "--nbdinfo").stdout == nbdinfo("--no-content", "--json", disk)
    assert qmpnbd("info", disk, "--nbdinfo-text").stdout == nbdinfo("--no-content", disk)
    (folder / "two").mkdir()
    file = f"driver=file,node-name=f,read-only=on,filename={three_layers / 'base.raw'}"
    exports = ["--export", 'type=nbd,id=x0,node-name=f,name=a"b', "--export", "type=nbd,id=x1,node-name=f,name=ü"]
    server = ("qemu-storage-daemon", "--blockdev", file, "--nbd-server", "addr.type=unix,addr.path={socket}", *exports)
    with running(folder / "two", *server) as address:
        uri = address.format("ignored")
        assert qmpnbd("info", uri, "--list", "--nbdinfo").stdout == nbdinfo("--list", "--no-content", "--json", uri)
        assert qmpnbd("info", uri, "--list", "--nbdinfo-text").stdout == nbdinfo("--list", uri)
        listed = document(qmpnbd("info", uri, "--list", "--json").stdout)["exports"]
        refused = qmpnbd("info", uri, code=32)
    assert isinstance(listed, list)
    assert [export["name"] for export in listed] == ['a"b', "ü"]
    assert "ignored" in refused.stderr


def test_a_list_that_says_something_else_of_an_export_than_the_export(folder: Path) -> None:
    if not is_1_14():
        pytest.skip("this nbdinfo describes servers in another form than 1.14, which ours has")
    listed = "list_exports=echo INTERLEAVED; echo a; echo 'by the list'; echo b; echo"
    script = ("get_size=echo 1M", "pread=exit 1", listed, "export_description=echo 'by itself'")
    with running(folder, "nbdkit", "-f", "-U", "{socket}", "eval", *script) as address:
        uri = address.format("a")
        assert qmpnbd("info", uri, "--list", "--nbdinfo").stdout == nbdinfo("--list", "--no-content", "--json", uri)
        assert qmpnbd("info", uri, "--list", "--nbdinfo-text").stdout == nbdinfo("--list", uri)
        assert qmpnbd("info", uri, "--nbdinfo").stdout == nbdinfo("--no-content", "--json", uri)
        exports = json.loads(qmpnbd("info", uri, "--list", "--json").stdout)["exports"]
    assert [export["description"] for export in exports] == ["by itself", "by itself"]


ABILITIES = ("connect", "read", "write", "cache", "df", "flush", "fua", "multi-conn", "trim", "zero", "fast-zero")


@pytest.mark.parametrize("ability", [*ABILITIES, "tls", "read-only", "rotational", "structured-reply"])
def test_abilities(disk: str, ability: str) -> None:
    done = subprocess.run([tool("nbdinfo"), "--can", ability, disk], check=False, capture_output=True, timeout=60)
    assert done.returncode in (0, 2)
    qmpnbd("info", disk, "--nbdinfo", "--can", ability, code=done.returncode)
    qmpnbd("info", disk, "--is", ability.upper().replace("-", "_"), code=1 if done.returncode else 0)


@pytest.mark.parametrize("words", ["structured", "Structured Replies", "STRUCTURED_REPLY"])
def test_an_ability_has_all_the_names_that_nbdinfo_has_for_it(disk: str, words: str) -> None:
    nbdinfo("--is", words, disk)
    qmpnbd("info", disk, "--has", words)  # which nbdinfo has since 1.20


def test_a_shared_secret_is_named_beside_the_uri(folder: Path) -> None:
    (folder / "keys").write_text("alice:0123456789abcdef\nbob:00112233445566778899aabbccddeeff\n")
    secret = ("--tls-psk-file", str(folder / "keys"))
    server = ("nbdkit", "-f", "-U", "{socket}", "--tls=require", f"--tls-psk={folder}/keys", "memory", "1M")
    with running(folder, *server) as address:
        uri = address.format("").replace("nbd+unix://", "nbds+unix://bob@")
        if getattr(ssl, "HAS_PSK", False):
            assert qmpnbd("info", uri, "--size", *secret).stdout == "1048576\n"
        else:
            assert "Use Python 3.13" in qmpnbd("info", uri, "--size", *secret, code=35).stderr
        assert (
            "either certificates or a shared secret"
            in qmpnbd("info", uri, "--tls-certificates", str(folder), *secret, code=2).stderr
        )


def test_an_ability_nobody_has_heard_of(disk: str) -> None:
    assert "is none of: connect" in qmpnbd("info", disk, "--can", "fly", code=2).stderr


def test_a_description_as_a_document(disk: str) -> None:
    described = document(qmpnbd("info", disk, "--json").stdout)
    assert isinstance(described["exports"], list)
    (export,) = described["exports"]
    assert (export["name"], export["size"], export["contexts"]) == ("disk", 16 << 20, [BASE, DEPTH])
    assert export["description"] == 'a "description"'


def test_a_part_of_a_map(disk: str) -> None:
    whole = json.loads(qmpnbd("map", disk, "--json").stdout)["maps"][0]["extents"]
    found = document(qmpnbd("map", disk, "--json", "--offset", "1000000", "--length", "2000000").stdout)
    assert found["offset"] == 1000000
    assert isinstance(found["maps"], list)
    cut = []
    for extent in whole:
        start = max(extent["offset"], 1000000)
        end = min(extent["offset"] + extent["length"], 3000000)
        if start < end:
            cut.append({"offset": start, "length": end - start, "value": extent["value"]})
    assert found["maps"][0]["extents"] == cut
    qmpnbd("map", disk, "--nbdinfo", "--offset", "512", code=2)
    qmpnbd("map", disk, "--json", "--totals", code=2)
    qmpnbd("map", disk, "--offset", "-1", code=2)
    assert "0 bytes at 16777217 are not inside" in qmpnbd("map", disk, "--offset", "16777217", code=2).stderr
    assert qmpnbd("map", disk, "--offset", "16777216").stdout.split() == ["offset", "length", DEPTH]


def test_totals_of_several_contexts_say_whose_they_are(disk: str) -> None:
    depth, base = (qmpnbd("map", disk, "--context", context, "--totals").stdout for context in (DEPTH, BASE))
    both = qmpnbd("map", disk, "--context", DEPTH, "--context", BASE, "--totals").stdout
    assert both == f"{DEPTH}:\n{depth}{BASE}:\n{base}"


def test_several_contexts_side_by_side(disk: str) -> None:
    text = qmpnbd("map", disk, "--context", DEPTH, "--context", BASE).stdout.splitlines()
    assert [line.split()[0] for line in text[:3]] == [DEPTH, BASE, "offset"]
    assert len(text[0]) == len(text[1]) == len(DEPTH) + 1 + 66
    assert text[2].split() == ["offset", "length", DEPTH, BASE]
    # Where the template's hole begins is the host file system's affair; what the layers above hold is not.
    assert ["65536", "131072", "1", "local", "0", "data"] in [line.split() for line in text[3:]]
