"""`qmpnbd export --point-in-time`: what is read is of one instant, whatever the guest writes meanwhile."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest

from tests.instants import write_line
from tests.qemu_versions import QemuBinaries, each_qemu
from tests.servers import qemu_img
from tests.test_cli import qmpnbd
from tests.test_export import disk, guest, running, told, uris

pytestmark = pytest.mark.real

__all__ = ["disk"]


@each_qemu
@pytest.mark.parametrize(
    ("wish", "recipe"), [("", "backup"), ("--protect-guest", "copy-before-write"), ("--exact-chain", "snapshot")]
)
def test_the_disk_is_read_as_it_was(binaries: QemuBinaries, disk: Path, folder: Path, wish: str, recipe: str) -> None:
    if recipe == "copy-before-write" and binaries.version < (8, 0):
        recipe = "backup"
    before, copied = folder / "before", folder / "copied"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", disk, before)
    options: list[str | Path] = ["--point-in-time", "--scratch", folder, "--json", *([wish] if wish else [])]
    with guest(binaries, disk) as server, running("--qmp", server.qmp, *options) as child:
        found = told(child)
        (uri,) = uris(found)
        assert isinstance(found["instant"], dict)
        assert (found["consistent"], found["instant"]["recipe"]) == (True, recipe)
        server.side("human-monitor-command", command_line=write_line(0, "write -P 7 0 3M"))
        subprocess.run(["nbdcopy", uri, copied], check=True, timeout=60)
        child.send_signal(signal.SIGTERM)
        _, complaint = child.communicate(timeout=60)
        assert (child.returncode, complaint) == (143, b"qmpnbd: SIGTERM\n")
        assert not server.side("query-jobs")
        assert not [node for node in server.nodes() if node.startswith("qmpnbd")]
    qemu_img("compare", "-f", "raw", "-F", "raw", copied, before)
    qemu_img("convert", "-f", "qcow2", "-O", "raw", disk, before)
    assert before.read_bytes()[: 3 << 20] == bytes([7]) * (3 << 20), "the guest's write is there"
    assert sorted(path.name for path in folder.glob("qmpnbd-*")) == []


def test_the_exact_chain_has_its_own_depths(binaries: QemuBinaries, disk: Path, folder: Path) -> None:
    options: list[str | Path] = ["--point-in-time", "--scratch", folder, "--exact-chain", "--json"]
    with guest(binaries, disk) as server, running("--qmp", server.qmp, *options) as child:
        (uri,) = uris(told(child))
        done = subprocess.run(
            ["nbdinfo", "--map=qemu:allocation-depth", "--json", uri], check=True, capture_output=True, timeout=60
        )
        depths = [(each["offset"], each["length"], each["type"]) for each in json.loads(done.stdout)]
        assert depths == [
            (0, 65536, 0),
            (65536, 131072, 1),
            (196608, 851968, 0),
            (1 << 20, 1 << 20, 2),
            (2 << 20, 2 << 20, 0),
        ]
        child.send_signal(signal.SIGTERM)
        child.communicate(timeout=60)


def test_a_dry_run_prints_the_commands_and_sends_none(binaries: QemuBinaries, disk: Path, folder: Path) -> None:
    with guest(binaries, disk) as server:
        before = server.side("query-named-block-nodes")
        done = qmpnbd("export", "--qmp", server.qmp, "--point-in-time", "--dry-run", "--runtime-dir", folder)
        assert (done.returncode, "recipe: backup" in done.stderr) == (0, True)
        names = [json.loads(line)["execute"] for line in done.stdout.splitlines()]
        assert names[-1] == "block-export-add"
        assert "transaction" in names
        assert server.side("query-named-block-nodes") == before
    assert not list(folder.glob("qmpnbd-*"))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--scratch", "/tmp"], "--scratch"),
        (["--protect-guest"], "--protect-guest"),
        (["--dry-run"], "--dry-run"),
        (["--point-in-time", "--writable"], "writable"),
    ],
)
def test_options_that_do_not_go_together(options: list[str], named: str) -> None:
    assert named in qmpnbd("export", "--qmp", "/nowhere", *options, code=2).stderr
