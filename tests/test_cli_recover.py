"""`qmpnbd status` and `qmpnbd recover`: what of ours is in a QEMU, whose it is, and the way back."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qmpnbd.qmp.held import held_point_in_time
from qmpnbd.qmp.plan import Recipe
from tests.dying import mortal
from tests.instants import Machine, machine
from tests.qemu_versions import QemuBinaries, each_qemu
from tests.servers import Side, blockdev
from tests.test_cli import qmpnbd
from tests.test_export import running as exporting
from tests.test_export import told as exported

pytestmark = pytest.mark.real

LAST_OF_TWO_DISKS = 14
"""Commands until a point in time of two disks is held: server, scratch (4), watch (4 and 2), instant, exports (2)."""


@pytest.fixture
def running(binaries: QemuBinaries, folder: Path) -> Iterator[Machine]:
    with machine(binaries, folder) as made:
        yield made


def killed(running: Machine) -> None:
    with mortal(running.server.qmp, running.folder, Recipe.BACKUP, running.disks) as controller:
        assert controller.dies_after(LAST_OF_TWO_DISKS)


def told(running: Machine, command: str, *options: str, code: int = 0) -> Any:
    where = ("--qmp", running.server.qmp, "--runtime-dir", running.folder)
    return json.loads(qmpnbd(command, *where, "--json", *options, code=code).stdout)


def test_a_qemu_with_nothing_of_ours(running: Machine) -> None:
    assert told(running, "status")["runs"] == []
    assert not told(running, "status")["nbd_server"]
    assert told(running, "recover")["taken_down"] == []
    text = qmpnbd("status", "--qmp", running.server.qmp).stdout
    assert "Nothing of qmpnbd is in it." in text
    assert "Nothing of a killed qmpnbd" in qmpnbd("recover", "--qmp", running.server.qmp).stdout


def test_a_killed_run_is_shown_as_dead_and_taken_down(running: Machine) -> None:
    before = running.state()
    killed(running)
    status = told(running, "status")
    (run,) = status["runs"]
    assert (run["state"], status["nbd_server"]) == ("dead", True)
    kinds = [thing["kind"] for thing in run["things"]]
    assert {kind: kinds.count(kind) for kind in kinds} == {"export": 2, "job": 2, "node": 6, "bitmap": 2}
    assert all(thing["name"].startswith(f"qmpnbd-{run['run']}-") for thing in run["things"])
    planned = told(running, "recover", "--dry-run")
    assert planned["dry_run"]
    assert told(running, "status") == status
    assert any(command["execute"] == "job-cancel" for each in planned["taken_down"] for command in each["commands"])
    done = told(running, "recover")
    assert [each["what"] for each in done["taken_down"]] == [each["what"] for each in planned["taken_down"]]
    assert running.state() == before
    assert told(running, "recover")["taken_down"] == []


def test_a_run_whose_directory_is_gone_is_taken_down_only_by_name(running: Machine) -> None:
    killed(running)
    (directory,) = [path for path in running.folder.glob("qmpnbd-????????") if path.is_dir()]
    shutil.rmtree(directory)
    (run,) = told(running, "status")["runs"]
    assert run["state"] == "unknown"
    assert f"recover --run {run['run']}" in qmpnbd("status", "--qmp", running.server.qmp).stdout
    left = told(running, "recover", code=3)
    assert (left["taken_down"], left["unknown"]) == ([], [run["run"]])
    planned = told(running, "recover", "--run", run["run"], "--dry-run")
    done = told(running, "recover", "--run", run["run"])
    assert done["taken_down"] == planned["taken_down"]
    assert done["taken_down"][-1]["what"] == f"NBD server at {directory}/nbd.sock"
    assert told(running, "status")["runs"] == []
    assert not told(running, "status")["nbd_server"]


@each_qemu
def test_a_server_is_known_by_its_socket_or_its_marker_when_the_directory_is_gone(
    binaries: QemuBinaries, folder: Path
) -> None:
    """And not stopped if it is not known where clients would be, or if others have exports in it."""
    disk = folder / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    with binaries.qemu("-blockdev", blockdev(disk, "n", "raw")) as server:
        recover = ("recover", "--qmp", server.qmp, "--runtime-dir", folder, "--json")
        for port, foreign in (("", False), ("", True), ("127.0.0.1:0", False)):
            options = ["--listen", port, "--insecure"] if port else []
            with exporting("--qmp", server.qmp, "--runtime-dir", folder, "--disk", "n", *options, "--json") as child:
                exported(child)
                child.kill()
            (directory,) = folder.glob("qmpnbd-????????")
            shutil.rmtree(directory)
            if foreign:
                server.side("block-export-add", type="nbd", id="theirs", node_name="n", name="theirs")
            run = directory.name.removeprefix("qmpnbd-")
            stays = foreign or (bool(port) and (7, 0) <= binaries.version < (10, 0))
            qmpnbd(*recover, "--run", run, code=16 if stays and not foreign else 0)
            assert server.nbd_server_runs() == stays
            assert server.exports() == (["theirs"] if foreign else [])
            if stays:
                server.side("nbd-server-stop")
                qmpnbd(*recover, "--run", run)
            assert not [each for each in server.side("qom-list", path="/objects") if each["name"].startswith("qmpnbd")]


def test_a_run_that_lives_is_left_alone(running: Machine) -> None:
    """Asked over the other monitor: the run that lives holds its own."""
    with held_point_in_time(str(running.server.qmp), ["vd0"], runtime_dir=str(running.folder)) as held:
        state = running.state()
        running.server.side.close()
        status = qmpnbd("status", "--qmp", running.server.folder / "side", "--runtime-dir", running.folder, "--json")
        (run,) = json.loads(status.stdout)["runs"]
        assert run["state"] == "alive"
        assert held.offers[0].export.startswith(f"qmpnbd-{run['run']}")
        done = qmpnbd("recover", "--qmp", running.server.folder / "side", "--runtime-dir", running.folder, "--json")
        assert json.loads(done.stdout)["alive"] == [run["run"]]
        assert json.loads(done.stdout)["taken_down"] == []
        again = dataclasses.replace(running.server, side=Side(running.server.folder / "side"))
        assert dataclasses.replace(running, server=again).state() == state
        again.side.close()


def test_a_run_id_that_is_none_is_refused(running: Machine) -> None:
    done = qmpnbd("recover", "--qmp", running.server.qmp, "--run", "../../etc", code=2)
    assert "is not a run id" in done.stderr
