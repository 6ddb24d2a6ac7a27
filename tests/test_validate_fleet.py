"""Many disks in one run: images, folders, plans, guests; one verdict each, whatever happens to the others."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from qmpnbd.errors import ImageChangedError, ImageUnreadableError, UsageError
from qmpnbd.report.model import DiskReport, ValidationReport
from qmpnbd.validate import still
from qmpnbd.validate.daemon import Daemon
from qmpnbd.validate.fleet import Fleet, FleetOptions
from qmpnbd.validate.folders import images_in
from qmpnbd.validate.former import Former
from qmpnbd.validate.run import Options
from qmpnbd.validate.target import ImageTarget, MonitorTarget, Target
from tests.chains import ChainRecipe, build, recipes
from tests.fleets import WHOLE, judged, overwritten, validated
from tests.qemu_versions import QemuBinaries, each_qemu
from tests.servers import Server, blockdev, listening, qemu_img, qemu_io, storage_daemon, wait_until

pytestmark = pytest.mark.real

COMMAND = [sys.executable, "-m", "qmpnbd", "validate"]


@pytest.fixture
def copies(three_layers: Path, folder: Path) -> Path:
    for name in ("base.raw", "mid.qcow2", "top.qcow2"):
        shutil.copy(three_layers / name, folder)
    return folder


def verdicts(report: ValidationReport) -> dict[str, str]:
    return {Path(disk.name).name: disk.verdict for disk in report.disks}


def qmpnbd(*arguments: str | Path, code: int = 0) -> ValidationReport:
    """Runs the command with --json."""
    command = [*COMMAND, "--json", *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr + done.stdout
    return ValidationReport.model_validate_json(done.stdout)


@each_qemu
def test_all_that_is_compared_agrees_over_the_matrix(binaries: QemuBinaries, tmp_path: Path) -> None:
    """Allocation depth, base:allocation of this very release, and every byte; one storage daemon for all images."""
    targets = []
    for recipe in recipes(30, seed=78):
        (tmp_path / recipe.id).mkdir()
        targets.append(ImageTarget(str(build(recipe, tmp_path / recipe.id)), "qcow2", recipe.id))
    options = FleetOptions(choice=WHOLE, storage_daemon=binaries.storage_daemon)
    for disk in validated(targets, options).disks:
        if disk.error is not None:
            assert "compression type" in disk.error.what, disk.error  # zstd is not built into every QEMU 5.2
            continue
        assert disk.verdict == "agreed", (disk.name, disk.compared, disk.discrepancies[:2])
        what = [entry.what for entry in disk.compared]
        bitmaps = [each for each in what if each.startswith("qemu:dirty-bitmap:")]
        assert what == ["qemu:allocation-depth", "base:allocation", *bitmaps, "content"]
        assert disk.qemu.startswith(".".join(map(str, binaries.version)))


def test_persistent_bitmaps_are_compared_and_inconsistent_ones_are_not(copies: Path) -> None:
    top = copies / "top.qcow2"
    qemu_img("bitmap", "--add", top, "daily")
    qemu_img("bitmap", "--add", "-g", "128k", top, "weekly")
    qemu_io(top, "write -P 9 2M 128k")
    with storage_daemon("--blockdev", blockdev(top, "top")) as server:
        server.side("block-dirty-bitmap-add", node="top", name="torn", persistent=True)
        os.kill(server.pid, signal.SIGKILL)  # all of them are in use now, for ever
    disk = judged(ImageTarget(str(top)))
    assert [entry.what for entry in disk.compared] == ["qemu:allocation-depth", "base:allocation", "content"]
    for name in ("daily", "weekly"):
        qemu_img("bitmap", "--remove", top, name)
    qemu_img("bitmap", "--add", top, "again")
    qemu_io(top, "write -P 9 3M 64k")
    disk = judged(ImageTarget(str(top)))
    assert "qemu:dirty-bitmap:again" in [entry.what for entry in disk.compared]
    assert disk.verdict == "agreed"


def test_a_folder_and_the_rules_for_what_is_an_image(copies: Path) -> None:
    (copies / "below").mkdir()
    shutil.copy(copies / "mid.qcow2", copies / "below" / "named-otherwise")
    shutil.copy(copies / "base.raw", copies / "below")
    (copies / "notes.txt").write_text("no image")
    (copies / ".hidden.qcow2").write_bytes(b"")
    (copies / "wrong.qcow2").write_text("not what it is called")
    (copies / "link.qcow2").symlink_to("top.qcow2")
    found = {Path(each.image).relative_to(copies).as_posix(): each.format for each in images_in(str(copies))}
    assert found == {
        "base.raw": "raw",
        "below/base.raw": "raw",
        "below/named-otherwise": "qcow2",
        "mid.qcow2": "qcow2",
        "top.qcow2": "qcow2",
        "wrong.qcow2": "qcow2",
    }
    report = qmpnbd(copies, code=44)
    assert verdicts(report)["wrong.qcow2"] == "error"
    assert sorted(verdicts(report).values()) == ["agreed"] * 4 + ["error"]  # two are called base.raw


def test_folders_that_are_nested_deeper_than_calls_and_in_the_order_of_names(tmp_path: Path) -> None:
    deep = "/".join(["d"] * 1100)
    subprocess.run(["mkdir", "-p", tmp_path / deep], check=True)
    for name in ("z.raw", "a.raw", f"{deep}/b.raw"):
        (tmp_path / name).write_bytes(bytes(512))
    found = [os.path.relpath(each.image, tmp_path) for each in images_in(str(tmp_path))]
    assert found == ["a.raw", f"{deep}/b.raw", "z.raw"]
    subprocess.run(["rm", "-r", tmp_path / "d"], check=True)


def test_a_folder_that_cannot_be_read_is_no_empty_one(tmp_path: Path) -> None:
    with pytest.raises(ImageUnreadableError):
        list(images_in(str(tmp_path / "missing")))


def test_a_discrepancy_outweighs_an_error_and_that_is_the_exit_code(copies: Path) -> None:
    (copies / "cut.qcow2").write_bytes((copies / "top.qcow2").read_bytes()[:50])
    qmpnbd(copies / "top.qcow2", copies / "missing.qcow2", code=40)
    report = qmpnbd(copies / "missing.qcow2", copies / "cut.qcow2", code=40)
    assert [disk.error.exit_code for disk in report.disks if disk.error] == [40, 42]
    with storage_daemon("--blockdev", blockdev(copies / "top.qcow2", "top", read_only=True)) as server:
        server.side("nbd-server-start", addr={"type": "unix", "data": {"path": str(copies / "s")}})
        server.side("block-export-add", type="nbd", id="x", node_name="top", name="x", allocation_depth=True)
        plan = copies / "plan.toml"
        export = f'[[export]]\nuri = "nbd+unix:///x?socket={copies}/s"\nimage = "mid.qcow2"\n'
        plan.write_text(f'{export}[[image]]\npath = "missing"\n')
        assert sorted(verdicts(qmpnbd("--plan", plan, code=1)).values()) == ["discrepancy", "error"]


def test_fail_fast_begins_nothing_new(copies: Path) -> None:
    targets = [ImageTarget(str(copies / name)) for name in ("top.qcow2", "missing", "mid.qcow2", "base.raw")]
    report = validated(targets, FleetOptions(fail_fast=True))
    assert [disk.verdict for disk in report.disks] == ["agreed", "error", "not-judged", "not-judged"]
    assert report.verdict == "error"


def test_fail_fast_does_not_wait_for_a_guest_that_hangs(copies: Path, silent: str) -> None:
    targets: list[Target] = [MonitorTarget(silent), ImageTarget(str(copies / "missing"))]
    report = validated(targets, FleetOptions(jobs=2, fail_fast=True, each=Options(seconds=None)))
    assert [(disk.verdict, disk.not_judged_because) for disk in report.disks] == [
        ("not-judged", "fail-fast"),
        ("error", ""),
    ]


@pytest.mark.parametrize("several", [False, True], ids=["one guest", "several"])
def test_fail_fast_begins_no_other_disk_of_a_guest(copies: Path, *, several: bool) -> None:
    """Also where a single guest is validated, which is no fleet."""
    nodes = [blockdev(copies / "top.qcow2", "a", read_only=True), '{"driver":"null-co","node-name":"b","size":65536}']
    nodes.append(blockdev(copies / "base.raw", "c", "raw", read_only=True))
    with storage_daemon(*(word for node in nodes for word in ("--blockdev", node))) as server:
        if several:
            (copies / "plan.toml").write_text(f'[[vm]]\nqmp = "{server.qmp}"\ndisks = ["a", "b", "c"]\n')
            named: list[str | Path] = ["--plan", copies / "plan.toml"]
        else:
            named = ["--qmp", server.qmp, "a", "b", "c"]
        lines = copies / "lines"
        report = qmpnbd(*named, "--fail-fast", "--ndjson", lines, code=21)
        assert [(disk.name, disk.verdict) for disk in report.disks] == [
            ("a", "agreed"),
            ("b", "error"),
            ("c", "not-judged"),
        ]
        assert [disk.not_judged_because for disk in report.disks] == ["", "", "fail-fast"]
        assert len(lines.read_text().splitlines()) == 3  # two disks, and the run
        assert [disk.verdict for disk in qmpnbd(*named, code=21).disks] == ["agreed", "error", "agreed"]


def test_what_another_process_writes_is_refused_and_said(copies: Path) -> None:
    with storage_daemon("--blockdev", blockdev(copies / "top.qcow2", "top")) as server:
        server.side("nbd-server-start", addr={"type": "unix", "data": {"path": str(copies / "s")}})
        server.side("block-export-add", type="nbd", id="guest", node_name="top", name="guest", writable=True)
        disk = judged(ImageTarget(str(copies / "top.qcow2")))
    assert disk.error is not None
    assert disk.error.type == ImageUnreadableError.__name__
    assert "--qmp" in disk.error.remedy


@pytest.mark.parametrize("change", ["written", "replaced"])
def test_an_image_that_is_changed_while_it_is_read_is_noticed(
    copies: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    top = copies / "top.qcow2"
    original = still.StillDisk.contexts

    def contexts(self: still.StillDisk) -> list[str]:
        if change == "written":
            os.utime(top)
            overwritten(top, top.stat().st_size - 1, b"\1")
        else:
            shutil.copy(top, copies / "new")
            (copies / "new").rename(top)
        return original(self)

    monkeypatch.setattr(still.StillDisk, "contexts", contexts)
    disk = judged(ImageTarget(str(top)))
    assert disk.error is not None
    assert disk.error.type == ImageChangedError.__name__
    assert disk.error.where == str(top)


def settle(folder: Path) -> None:
    """Waits until the files are so old that a change would be seen in their times."""
    newest = max(path.stat().st_ctime for path in folder.iterdir())
    wait_until(lambda: time.time() - newest > 2.1, "the files to settle")


def test_what_agreed_and_is_unchanged_is_not_judged_again(copies: Path, tmp_path: Path) -> None:
    former = tmp_path / "report.json"
    made = {path: path.stat() for path in copies.iterdir()}
    for path, status in made.items():  # however long the run takes, they are too young to be sure
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 3600 * 10**9))
    early = qmpnbd(copies)
    assert not any(entry.settled for disk in early.disks for entry in disk.files)
    former.write_text(early.model_dump_json())
    again = qmpnbd(copies, "--since", former)
    assert [disk.agreed_in for disk in again.disks] == [""] * 3
    for path, status in made.items():
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    settle(copies)
    again = qmpnbd(copies, "--since", former)
    assert [disk.agreed_in for disk in again.disks] == [""] * 3  # they have changed
    former.write_text(again.model_dump_json())
    third = qmpnbd(copies, "--since", former)
    assert [disk.agreed_in for disk in third.disks] == [again.started] * 3
    assert [entry.settled for disk in third.disks for entry in disk.files] == [True] * 6
    whole = qmpnbd(copies, "--since", former, "--content", "whole")
    assert [disk.agreed_in for disk in whole.disks] == [""] * 3  # more is compared than was then
    with (copies / "base.raw").open("r+b") as file:
        before = os.fstat(file.fileno())
        file.write(b"x")
    os.utime(copies / "base.raw", ns=(before.st_atime_ns, before.st_mtime_ns))  # only ctime tells
    fourth = qmpnbd(copies, "--since", former)
    assert [disk.agreed_in for disk in fourth.disks] == [""] * 3  # it lies below all of them
    assert fourth.verdict == "agreed"


def test_a_former_report_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(json.dumps({"schema": "qmpnbd.map/1"}))
    for name in ("other.json", "missing.json"):
        with pytest.raises(UsageError):
            Former.load(str(tmp_path / name))


@pytest.fixture
def silent(folder: Path) -> Iterator[str]:
    """A monitor that never says a word, as that of a stopped QEMU."""
    path = folder / "silent"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(8)
        yield str(path)


def test_one_guest_that_hangs_has_its_own_deadline_and_the_others_go_on(copies: Path, silent: str) -> None:
    with storage_daemon("--blockdev", blockdev(copies / "top.qcow2", "top", read_only=True)) as server:
        targets: list[Target] = [MonitorTarget(silent), *(ImageTarget(str(copies / "mid.qcow2")) for _ in range(5))]
        options = FleetOptions(jobs=2, each=Options(seconds=4.0))
        report = validated([*targets, MonitorTarget(str(server.qmp), ("top",))], replace(options, each=Options()))
        hasty = validated(targets, options)
    assert [disk.verdict for disk in report.disks] == ["error", *["agreed"] * 6]
    assert [disk.verdict for disk in hasty.disks] == ["error", *["agreed"] * 5]
    assert report.disks[-1].source == str(server.qmp)


def test_a_storage_daemon_that_hangs_is_replaced(copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image that it hung on is an error; the next one gets a new daemon."""
    started: list[Daemon] = []
    original = Daemon.start.__func__  # type: ignore[attr-defined]

    async def start(cls: type[Daemon], program: str, runtime_dir: str | None) -> Daemon:
        daemon: Daemon = await original(cls, program, runtime_dir)
        started.append(daemon)
        if len(started) == 1:
            assert daemon.monitor.peer is not None
            os.kill(daemon.monitor.peer.pid, signal.SIGSTOP)
        return daemon

    monkeypatch.setattr(Daemon, "start", classmethod(start))
    targets = [ImageTarget(str(copies / name)) for name in ("top.qcow2", "mid.qcow2")]
    report = validated(targets, FleetOptions(each=Options(seconds=2.0)))
    assert [disk.verdict for disk in report.disks] == ["error", "agreed"]
    assert len(started) == 2
    for daemon in started:
        assert daemon.monitor.peer is not None
        assert daemon.monitor.peer.has_ended()


def test_guests_and_images_in_one_plan(copies: Path) -> None:
    top = blockdev(copies / "top.qcow2", "top", read_only=True)
    with storage_daemon("--blockdev", top) as one, storage_daemon("--blockdev", top) as two:
        plan = copies / "plan.toml"
        plan.write_text(
            f"""
            content = "whole"
            [[vm]]
            qmp = "{one.qmp}"
            disks = ["top"]
            [[vm]]
            qmp = "{two.qmp}"
            disks = ["top"]
            [[image]]
            path = "mid.qcow2"
            [[folder]]
            path = "."
            """
        )
        report = qmpnbd("--plan", plan)
        assert (one.exports(), two.exports()) == ([], [])
    assert [(disk.name, disk.verdict) for disk in report.disks][:3] == [
        ("top", "agreed"),
        ("top", "agreed"),
        ("mid.qcow2", "agreed"),
    ]
    assert len(report.disks) == 6
    assert report.monitor == ""
    assert {disk.choice for disk in report.disks[2:]} == {"depth,base,bitmaps,content=whole"}


def test_ctrl_c_gives_a_partial_report_that_can_be_taken_up_again(copies: Path, tmp_path: Path) -> None:
    for number in range(300):
        shutil.copy(copies / "mid.qcow2", copies / f"copy{number:03}.qcow2")
    settle(copies)
    command = [*COMMAND, "--json", "--jobs", "1", str(copies)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        wait_until(lambda: _served_by(child.pid) or child.poll() is not None, "the storage daemon")
        child.send_signal(signal.SIGINT)
        output, complaints = child.communicate(timeout=30)
    assert child.returncode == 130, complaints
    partial = ValidationReport.model_validate_json(output)
    assert partial.stopped is not None
    assert partial.stopped.exit_code == 130
    assert len(partial.disks) == 303
    assert [disk.verdict for disk in partial.disks].count("not-judged") > 0
    assert partial.verdict == "not-judged"
    (tmp_path / "partial.json").write_text(output)
    rest = qmpnbd(copies, "--since", tmp_path / "partial.json")
    assert rest.verdict == "agreed"
    done = [disk.name for disk in partial.disks if disk.verdict == "agreed"]
    assert [disk.name for disk in rest.disks if disk.agreed_in] == done


def _served_by(pid: int) -> bool:
    """Whether a process has a child: the storage daemon."""
    return bool(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


def test_a_daemon_dies_with_a_run_that_is_killed(copies: Path) -> None:
    for number in range(300):
        shutil.copy(copies / "mid.qcow2", copies / f"copy{number:03}.qcow2")
    with subprocess.Popen([*COMMAND, "--jobs", "1", str(copies)], stdout=subprocess.PIPE) as child:
        wait_until(lambda: _served_by(child.pid), "the storage daemon")
        (daemon,) = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
        wait_until(lambda: b"storage-daemon" in Path(f"/proc/{daemon}/cmdline").read_bytes()[:60], "its program")
        child.kill()
        child.wait(10)
    wait_until(lambda: not Path(f"/proc/{daemon}").exists() or _is_zombie(daemon), "the daemon's end")


def _is_zombie(pid: str) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"


def test_progress_counts_what_is_done(copies: Path) -> None:
    seen: list[DiskReport] = []
    fleet = Fleet([ImageTarget(str(copies / "top.qcow2"))] * 3, FleetOptions(choice=WHOLE), seen.append)
    asyncio.run(fleet.run())
    assert (fleet.progress.done, fleet.progress.fraction, len(seen)) == (3, 1.0, 3)
    assert fleet.progress.bytes == 3 * (16 << 20)


def test_progress_is_shown_in_place_on_a_terminal_and_is_gone_afterwards(copies: Path) -> None:
    for number in range(200):
        shutil.copy(copies / "mid.qcow2", copies / f"copy{number:03}.qcow2")
    leader, follower = os.openpty()
    with subprocess.Popen([*COMMAND, "--jobs", "1", str(copies)], stdout=subprocess.DEVNULL, stderr=follower) as child:
        os.close(follower)
        shown = b""
        with contextlib.suppress(OSError):  # the terminal has no other end any more
            while piece := os.read(leader, 4096):
                shown += piece
    os.close(leader)
    assert child.returncode == 0
    assert b"/203 disks" in shown
    assert b" left" in shown
    assert shown.endswith(b"\r\x1b[K")


def test_there_is_no_storage_daemon(copies: Path) -> None:
    disk = judged(ImageTarget(str(copies / "top.qcow2")), storage_daemon="no-such-program")
    assert disk.error is not None
    assert disk.error.exit_code == 2
    (copies / "fails").write_text("#!/bin/sh\necho cannot start >&2\nexit 3\n")
    (copies / "fails").chmod(0o755)
    disk = judged(ImageTarget(str(copies / "top.qcow2")), storage_daemon=str(copies / "fails"))
    assert disk.error is not None
    assert "cannot start" in disk.error.what


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--image", "x"],
        ["--nbd", "nbd://h/e", "x"],
        ["--format", "raw", "x"],
        ["--qmp", "a", "--qmp", "b", "vd0"],
        ["--plan", "p", "x"],
        ["--compare", "dpeth", "x"],
        ["--compare", "", "--content", "none", "x"],
        ["--jobs", "0", "x"],
    ],
)
def test_arguments_that_make_no_sense(arguments: list[str]) -> None:
    done = subprocess.run([*COMMAND, *arguments], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("recipe", recipes(3, seed=5), ids=lambda recipe: recipe.id)
def test_an_export_of_any_server_against_its_image(recipe: ChainRecipe, tmp_path: Path, folder: Path) -> None:
    top = build(recipe, tmp_path)
    path = folder / "nbd"
    with subprocess.Popen(["qemu-nbd", "-r", "-A", "-f", "qcow2", "-e", "2", "-t", "-k", str(path), str(top)]) as child:
        wait_until(lambda: listening(path), "qemu-nbd")
        report = qmpnbd("--nbd", f"nbd+unix:///?socket={path}", "--image", top, "--content", "whole")
        child.terminate()
    assert report.disks[0].source.startswith("nbd+unix:")
    assert [entry.verdict for entry in report.disks[0].compared] == ["agreed"] * 3


def test_a_read_only_server_is_left_as_it_was(copies: Path) -> None:
    def state(server: Server) -> object:
        return server.exports(), server.nodes(), server.nbd_server_runs()

    with storage_daemon("--blockdev", blockdev(copies / "top.qcow2", "top", read_only=True)) as server:
        before = state(server)
        assert validated([MonitorTarget(str(server.qmp), ("top",))]).verdict == "agreed"
        assert state(server) == before
