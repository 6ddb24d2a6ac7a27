"""`qmpnbd export --point-in-time`: what is read is of one instant, whatever the guest writes meanwhile."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from qmpnbd.cli.main import main
from qmpnbd.deadline import Deadline
from qmpnbd.qmp.checkpoints import list_checkpoints
from qmpnbd.qmp.commands import what_tells
from qmpnbd.qmp.listeners import free_port
from qmpnbd.qmp.monitor import Monitor
from qmpnbd.qmp.server import PROBE_ADDRESS
from tests.instants import write_line
from tests.qemu_versions import QemuBinaries, each_qemu
from tests.servers import Server, blockdev, qemu_img
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
        (["--checkpoint", "nightly"], "--checkpoint"),
        (["--point-in-time", "--keep"], "--keep"),
        (["--allocation-depth", "/tmp"], "--allocation-depth"),
        (["--point-in-time", "--allocation-depth", "/tmp", "--tls", "/x"], "--allocation-depth"),
        (["--tls-certificates", "/x"], "--tls-certificates"),
    ],
)
def test_options_that_do_not_go_together(options: list[str], named: str) -> None:
    assert named in qmpnbd("export", "--qmp", "/nowhere", *options, code=2).stderr


def checkpoints(server: Server) -> list[tuple[str, list[int]]]:
    """State and numbers of the checkpoints of each disk."""
    found = list_checkpoints(str(server.qmp), chain="nightly").disks
    return [(disk.state, [each.number for each in disk.checkpoints]) for disk in found]


def test_the_exit_code_of_the_command_decides_about_the_checkpoint(
    binaries: QemuBinaries, disk: Path, folder: Path
) -> None:
    options: list[str | Path] = ["--point-in-time", "--runtime-dir", folder, "--checkpoint", "nightly", "--exec"]
    with guest(binaries, disk) as server:
        seen = folder / "seen"
        done = qmpnbd("export", "--qmp", server.qmp, *options, "sh", "-c", f"echo $QMPNBD_EXPORTS > {seen}")
        assert "checkpoint 1 of chain nightly is committed" in done.stderr
        (entry,) = json.loads(seen.read_text())["checkpoint"]["disks"]
        assert (entry["base"], entry["increment"], "full backup" in entry["remedy"]) == (None, [], True)
        server.side("human-monitor-command", command_line=write_line(0, "write -P 7 1M 64k"))
        context = "qemu:dirty-bitmap:$(echo $QMPNBD_EXPORTS | grep -o 'qmpnbd.nightly.c1.[0-9a-f]*' | head -1)"
        copy = f'nbdinfo --map={context} --json "$QMPNBD_URI" > {seen}; exit 3'
        done = qmpnbd("export", "--qmp", server.qmp, *options, "sh", "-c", copy, code=3)
        assert "is merged back: the command ended with 3" in done.stderr
        marked = [(each["offset"], each["length"]) for each in json.loads(seen.read_text()) if each["type"]]
        assert marked == [(1 << 20, 65536)]
        assert checkpoints(server) == [("recording", [1])]
        qmpnbd("export", "--qmp", server.qmp, *options, "true")
        assert checkpoints(server) == [("recording", [2])]
        assert not [name for name in server.nodes() if name.startswith("qmpnbd")]


def test_without_a_command_the_checkpoint_is_left_pending(binaries: QemuBinaries, disk: Path, folder: Path) -> None:
    options: list[str | Path] = ["--point-in-time", "--runtime-dir", folder, "--checkpoint", "nightly"]
    with guest(binaries, disk) as server:
        for state, numbers in (("recording", [1]), ("pending", [1, 2])):
            with running("--qmp", server.qmp, *options, "--json") as child:
                found = told(child)
                assert isinstance(found["checkpoint"], dict)
                assert found["checkpoint"]["number"] == numbers[-1]
                child.send_signal(signal.SIGTERM)
                _, complaint = child.communicate(timeout=60)
                assert child.returncode == 143
                assert f"checkpoint {numbers[-1]} is pending".encode() in complaint
            assert checkpoints(server) == [(state, numbers)]
        again = qmpnbd("export", "--qmp", server.qmp, *options, code=26)
        assert "undecided" in again.stderr
        qmpnbd("checkpoint", "abort", "--qmp", server.qmp, "--chain", "nightly", "--number", "2")
        assert checkpoints(server) == [("recording", [1])]


def test_a_point_in_time_that_was_lost_leaves_no_checkpoint_to_commit(
    binaries: QemuBinaries, disk: Path, folder: Path
) -> None:
    options: list[str | Path] = ["--point-in-time", "--runtime-dir", folder, "--checkpoint", "nightly", "--json"]
    with guest(binaries, disk) as server:
        qmpnbd("checkpoint", "create", "--qmp", server.qmp, "--chain", "nightly")
        with running("--qmp", server.qmp, *options) as child:
            told(child)
            (job,) = server.side("query-jobs")
            server.side("job-cancel", id=job["id"])
            _, complaint = child.communicate(timeout=60)
            assert (child.returncode, b"pending" in complaint) == (17, False)
        assert checkpoints(server) == [("recording", [1])]


def test_a_dry_run_shows_the_checkpoint_in_the_transaction(binaries: QemuBinaries, disk: Path, folder: Path) -> None:
    options: list[str | Path] = ["--point-in-time", "--runtime-dir", folder, "--checkpoint", "nightly", "--dry-run"]
    with guest(binaries, disk) as server:
        done = qmpnbd("export", "--qmp", server.qmp, *options)
        (transaction,) = [
            each for line in done.stdout.splitlines() if (each := json.loads(line))["execute"] == "transaction"
        ]
        kinds = [action["type"] for action in transaction["arguments"]["actions"]]
        assert kinds == ["block-dirty-bitmap-add", "block-dirty-bitmap-add", "blockdev-backup"]
        assert checkpoints(server) == [("missing", [])]


def test_a_hazard_that_is_allowed_by_name_is_told(binaries: QemuBinaries, disk: Path, folder: Path) -> None:
    options = ["--point-in-time", "--protect-guest", "--allow", "snapshot-access", "--json"]
    with guest(binaries, disk) as server, running("--qmp", server.qmp, "--runtime-dir", folder, *options) as child:
        instant = told(child)["instant"]
        assert isinstance(instant, dict)
        assert instant["recipe"] == ("backup" if binaries.version < (7, 1) else "copy-before-write")
        assert ("would be corrupt" in instant["why"]) == ((7, 1) <= binaries.version < (8, 0))
        child.send_signal(signal.SIGTERM)
        child.communicate(timeout=60)


@each_qemu
def test_a_monitor_on_tcp_passes_no_descriptors_and_serves_all_the_same(
    binaries: QemuBinaries, disk: Path, folder: Path
) -> None:
    """QEMU makes the socket itself then; the marker tells whose server it is, since nobody tells which process."""
    port = free_port("127.0.0.1")
    before = folder / "before"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", disk, before)
    with guest(binaries, disk, "-qmp", f"tcp:127.0.0.1:{port},server=on,wait=off") as server:
        address = ("--qmp", f"127.0.0.1:{port}", "--runtime-dir", folder)
        for end in (signal.SIGTERM, signal.SIGKILL):
            with running(*address, "--point-in-time", "--checkpoint", "nightly", "--keep", "--json") as child:
                (uri,) = uris(told(child))
                subprocess.run(["nbdcopy", uri, folder / "copied"], check=True, timeout=60)
                qemu_img("compare", "-f", "raw", "-F", "raw", folder / "copied", before)
                child.send_signal(end)
                child.communicate(timeout=60)
            recovered = qmpnbd("recover", *address, "--json")
            assert bool(json.loads(recovered.stdout)["taken_down"]) == (end == signal.SIGKILL)
            assert (server.exports(), server.nbd_server_runs(), server.side("query-jobs")) == ([], False, [])
            assert checkpoints(server) == [("recording", [1])]
            assert not [name for name in server.nodes() if name.startswith("qmpnbd")]
    assert not list(folder.glob("qmpnbd-*"))


@each_qemu
@pytest.mark.parametrize("wish", ["--json", "--protect-guest", "--exact-chain"])
def test_a_filter_of_somebodys_stays_below_its_device(
    binaries: QemuBinaries, disk: Path, folder: Path, wish: str
) -> None:
    """The limits of a throttled disk go on, whatever we put under its device meanwhile."""
    limits = json.dumps({"driver": "throttle", "node-name": "limited", "throttle-group": "limits", "file": "n"})
    more = ["-object", "throttle-group,id=limits", "-blockdev", blockdev(disk, "n"), "-blockdev", limits]
    with binaries.qemu(*more, "-device", "virtio-blk-pci,id=vd0,drive=limited") as server:

        def under_the_device() -> list[str]:
            return [drive["inserted"]["node-name"] for drive in server.side("query-block") if "inserted" in drive]

        before, nodes = under_the_device(), server.nodes()
        options: list[str | Path] = ["--point-in-time", wish, "--scratch", folder, "--exec", "true"]
        qmpnbd("export", "--qmp", server.qmp, *options)
        assert (under_the_device(), server.nodes()) == (before, nodes)


class Recording(Monitor):
    """A monitor that notes what it changes."""

    changed: list[str]

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        deadline: Deadline,
        fd: int | None = None,
    ) -> object:
        probes = (arguments or {}).get("addr") == PROBE_ADDRESS
        if (what_tells(command) or fd is not None) and not probes:
            self.changed.append(without_run({"execute": command, **({"arguments": arguments} if arguments else {})}))
        return await super().execute(command, arguments, deadline=deadline, fd=fd)


def without_run(command: object) -> str:
    return re.sub(r"qmpnbd-[0-9a-f]{8}|(?<=[.])[0-9a-f]{8}", "RUN", json.dumps(command))


@each_qemu
@pytest.mark.parametrize(
    "more", [[], ["--protect-guest"], ["--exact-chain"], ["--listen", "127.0.0.1:0", "--insecure"]]
)
def test_a_dry_run_prints_what_is_done(
    binaries: QemuBinaries, disk: Path, folder: Path, more: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Command by command, as the run itself sends them until everything is up."""
    size = str(1 << 29)  # else it depends on what is free at the moment
    options: list[str | Path] = ["--point-in-time", "--scratch", folder, "--scratch-size", size, *more]
    with guest(binaries, disk) as server:
        server.side("cont")
        command: list[str | Path] = ["export", "--qmp", server.qmp, *options, "--runtime-dir", folder]
        command += ["--checkpoint", "nightly"]
        planned = [without_run(json.loads(line)) for line in qmpnbd(*command, "--dry-run").stdout.splitlines()]
        Recording.changed = []
        monkeypatch.setattr(Monitor, "connect", Recording.connect)
        assert main([*map(str, command), "--exec", "true"]) == 0
        assert Recording.changed[: len(planned)] == planned
        assert "block-export-add" in planned[-1]
        assert not [each for each in Recording.changed[len(planned) :] if "-add" in each.partition(",")[0]]
