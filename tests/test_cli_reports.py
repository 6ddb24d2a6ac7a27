"""Report files of the command line: whole or not there, and none lost because another one was."""

from __future__ import annotations

import fcntl
import json
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import xml.etree.ElementTree as Xml
from collections.abc import Iterator
from pathlib import Path

import junitparser
import pytest
from prometheus_client.parser import text_string_to_metric_families

from qmpnbd.cli import stream
from qmpnbd.cli.reportfile import ReportFile
from qmpnbd.errors import ReportFileError
from qmpnbd.report.model import DiskLine, SummaryLine
from tests.servers import Server, blockdev, listening, process, qemu, qemu_img, storage_daemon, tool, wait_until

COMMAND = [sys.executable, "-m", "qmpnbd"]
FORMS = ("html", "junit", "prometheus", "ndjson")


def run(*arguments: str | Path, code: int = 0, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [*before, *COMMAND, *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, f"{done.returncode}: {done.stderr}{done.stdout}"
    assert "Traceback" not in done.stderr
    return done


def all_forms(folder: Path) -> list[str]:
    return [word for form in FORMS for word in (f"--{form}", str(folder / f"report.{form}"))]


@pytest.fixture(scope="module")
def guest(three_layers: Path) -> Iterator[Server]:
    top, raw = three_layers / "top.qcow2", three_layers / "base.raw"
    arguments = ["-blockdev", blockdev(top, "top", read_only=True), "-device", "virtio-blk-pci,id=vd0,drive=top"]
    other = f"driver=raw,node-name=other,read-only=on,file.driver=file,file.filename={raw},file.locking=off"
    with qemu(*arguments, "-blockdev", other, "-device", "virtio-blk-pci,id=vd1,drive=other") as server:
        yield server


class TestReportFile:
    def test_what_was_there_stays_until_the_new_one_is_whole(self, tmp_path: Path) -> None:
        place = tmp_path / "report"
        place.write_text("old")
        place.chmod(0o640)
        with ReportFile.open(str(place)) as file:
            file.add("new ")
            assert place.read_text() == "old"
            file.finish(["and whole"])
        assert place.read_text() == "new and whole"
        assert stat.S_IMODE(place.stat().st_mode) == 0o640
        assert list(tmp_path.iterdir()) == [place]

    def test_one_that_is_not_finished_leaves_nothing(self, tmp_path: Path) -> None:
        with ReportFile.open(str(tmp_path / "report")) as file:
            file.add("half")
            assert len(list(tmp_path.iterdir())) == 1
        assert list(tmp_path.iterdir()) == []

    def test_where_there_is_no_room_the_old_one_stays(self, tmp_path: Path) -> None:
        place = tmp_path / "report"
        place.write_text("old")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            with ReportFile.open(str(place)) as file, pytest.raises(ReportFileError, match="cannot write the report"):
                file.finish(["x" * 3000, "x" * 3000])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert [each.read_text() for each in tmp_path.iterdir()] == ["old"]

    def test_what_a_killed_run_left_goes_and_nothing_else_does(self, tmp_path: Path) -> None:
        """Not of a process that lives, not what somebody has locked, not of other reports, and no links."""
        with subprocess.Popen([sys.executable, "-c", ""]) as child:
            child.wait(30)
        dead, mine = child.pid, os.getpid()
        alive = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        names = [f".report.{dead}.part", f".report.{alive.pid}.part", ".report.x.part", f".other.{dead}.part"]
        names += [f".report.{dead}.html.{dead}.part", f"report.{dead}.part"]
        for name in names:
            (tmp_path / name).write_text(name)
        try:
            with (tmp_path / names[0]).open() as locked:
                fcntl.flock(locked, fcntl.LOCK_EX)
                with ReportFile.open(str(tmp_path / "report")):
                    assert (tmp_path / names[0]).exists()
            with ReportFile.open(str(tmp_path / "report")) as file:
                assert sorted(each.name for each in tmp_path.iterdir()) == sorted([*names[1:], f".report.{mine}.part"])
                file.finish(["x"])
            (tmp_path / names[0]).symlink_to("report")
            with ReportFile.open(str(tmp_path / "report")):
                assert (tmp_path / names[0]).is_symlink()
        finally:
            alive.communicate(b"\n", timeout=30)

    def test_a_fifo_that_somebody_reads(self, tmp_path: Path) -> None:
        """The reader may come later, and the report may be larger than what a FIFO holds."""
        os.mkfifo(tmp_path / "fifo")
        command = ["sh", "-c", 'sleep 0.2; wc -c < "$1"', "sh", str(tmp_path / "fifo")]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as reader:
            with ReportFile.open(str(tmp_path / "fifo")) as file:
                file.finish(["x" * (1 << 20)])
            assert int(reader.communicate(timeout=30)[0]) == 1 << 20

    def test_a_fifo_that_nobody_reads_is_told_in_time(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(stream, "READER_SECONDS", 0.2)
        os.mkfifo(tmp_path / "fifo")
        with pytest.raises(ReportFileError, match="nobody reads it"):
            ReportFile(str(tmp_path / "fifo"))
        reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
        with ReportFile.open(str(tmp_path / "fifo")) as file:
            with pytest.raises(ReportFileError, match="nobody takes what is written"):
                file.add("x" * (1 << 20))
            os.close(reader)
            with pytest.raises(ReportFileError, match="its reader is gone"):
                file.add("x")

    def test_a_block_device_is_refused_by_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(stat, "S_ISBLK", lambda _: True)
        (tmp_path / "report").write_text("x")
        with pytest.raises(ReportFileError, match="that is a block device"):
            ReportFile(str(tmp_path / "report"))

    def test_a_link_is_followed(self, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        (tmp_path / "link").symlink_to("folder/report")
        (tmp_path / "folder/report").write_text("old")
        with ReportFile.open(str(tmp_path / "link")) as file:
            file.finish(["new"])
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "folder/report").read_text() == "new"

    @pytest.mark.parametrize("name", ["", ".", "no/such/folder/report", "/dev/full"])
    def test_what_cannot_be_written_is_told(self, name: str) -> None:
        with pytest.raises(ReportFileError) as told, ReportFile.open(name) as file:
            file.finish(["x"])
        assert told.value.exit_code == 51
        assert told.value.where == name


@pytest.mark.real
def test_all_forms_of_one_run_say_the_same(guest: Server, tmp_path: Path) -> None:
    done = run("validate", "--qmp", guest.qmp, *all_forms(tmp_path), "--verbose")
    assert "disk vd0 (node top): AGREED" in done.stdout
    assert done.stderr.count("wrote ") == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"report.{form}" for form in FORMS)
    (suite,) = junitparser.JUnitXml.fromfile(str(tmp_path / "report.junit"))
    assert [(case.name, case.is_passed) for case in suite] == [("vd0", True), ("vd1", True)]
    families = {
        each.name: each for each in text_string_to_metric_families((tmp_path / "report.prometheus").read_text())
    }
    sizes = [each.value for each in families["qmpnbd_validate_disk_size_bytes"].samples]
    lines = (tmp_path / "report.ndjson").read_text().splitlines()
    assert sizes == [DiskLine.model_validate_json(line).disk.size for line in lines[:-1]] == [16 << 20, 8 << 20]
    assert SummaryLine.model_validate_json(lines[-1]).disks == {"agreed": 2}
    page = (tmp_path / "report.html").read_text()
    assert "2 disks: every byte agrees" in page
    assert "mid.qcow2" in page


@pytest.mark.real
@pytest.mark.parametrize(("variable", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_colours_are_for_terminals_that_show_them(guest: Server, variable: dict[str, str], coloured: bool) -> None:
    ours, theirs = os.openpty()
    environment = {**{name: value for name, value in os.environ.items() if name != "NO_COLOR"}, "TERM": "xterm"}
    command = [*COMMAND, "validate", "--qmp", str(guest.qmp), "vd0"]
    subprocess.run(command, check=True, stdout=theirs, env=environment | variable, timeout=60)
    os.close(theirs)
    text = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert ("\x1b[1;32mdisk vd0 (node top): AGREED\x1b[0m" in text) is coloured
    assert ("\x1b" in text) is coloured


@pytest.mark.real
def test_a_discrepancy_is_marked_where_it_is(folder: Path, three_layers: Path) -> None:
    for name in ("base.raw", "mid.qcow2", "top.qcow2"):
        shutil.copy(three_layers / name, folder)
    with storage_daemon("--blockdev", blockdev(folder / "top.qcow2", "top", read_only=True)) as server:
        run("validate", "--qmp", server.qmp, "top")  # by which QEMU has read the tables
        with (folder / "mid.qcow2").open("r+b") as file:
            file.seek((4 << 16) + 16 * 8)  # in the first L2 table, as qemu-img lays it out: the entry of 1 MiB
            file.write(bytes(8))
        files: list[str | Path] = [
            "--compare",
            "depth",
            "--content",
            "none",
            "--html",
            "-",
            "--junit",
            folder / "junit.xml",
        ]
        done = run("validate", "--qmp", server.qmp, "top", *files, code=1)
    (data,) = re.findall(r'<script type="application/json" id="disks">(.*)</script>', done.stdout)
    (drawn,) = json.loads(data)
    assert (drawn["bad"], drawn["open"], drawn["exact"]) == ([[1 << 20, (1 << 20) + 65536]], [], True)
    assert drawn["names"]["2"] == "mid.qcow2"
    (suite,) = junitparser.JUnitXml.fromfile(str(folder / "junit.xml"))
    ((failure,),) = [case.result for case in suite]
    assert failure.message == "served and computed differ: 1 runs, 65536 bytes"
    assert "L2 entry" in failure.text


@pytest.mark.real
def test_a_form_can_have_stdout_for_itself(guest: Server) -> None:
    lines = run("validate", "--qmp", guest.qmp, "--ndjson", "-").stdout.splitlines()
    assert [json.loads(line)["schema"] for line in lines] == ["qmpnbd.validate-disk/1"] * 2 + [
        "qmpnbd.validate-summary/1"
    ]
    for more in (["--json"], ["--html", "-"]):
        run("validate", "--qmp", guest.qmp, "--ndjson", "-", *more, code=2)


@pytest.mark.real
def test_a_folder_that_cannot_be_written_to_is_told_before_the_guest_is_touched(guest: Server, folder: Path) -> None:
    (folder / "closed").mkdir(mode=0o555)
    arguments = ["validate", "--qmp", str(guest.qmp), "--html", str(folder / "closed/report.html")]
    # root as well may only if it keeps its capabilities.
    before = ("setpriv", "--bounding-set=-all", "--inh-caps=-all") if os.geteuid() == 0 else ()
    done = run(*arguments, code=51, before=before)
    assert "closed/report.html: cannot write the report: Permission denied. Choose another place" in done.stderr
    assert done.stdout == ""


@pytest.mark.real
def test_a_full_disk_loses_one_report_and_not_the_others(guest: Server, tmp_path: Path) -> None:
    done = run("validate", "--qmp", guest.qmp, "--html", "/dev/full", "--junit", tmp_path / "junit.xml", code=51)
    assert "AGREED" in done.stdout
    assert "/dev/full: cannot write the report: No space left on device" in done.stderr
    assert len(Xml.parse(tmp_path / "junit.xml").getroot().findall(".//testcase")) == 2


@pytest.mark.real
def test_a_disk_that_gets_full_keeps_the_lines_of_what_was_done(guest: Server, tmp_path: Path) -> None:
    """They are no whole report, so they are not in its place, where there may be an old one."""
    whole, place = tmp_path / "whole", tmp_path / "report.ndjson"
    run("validate", "--qmp", guest.qmp, "--ndjson", whole)
    first, second, _ = whole.read_bytes().splitlines(keepends=True)
    place.write_text("of yesterday")
    room = ("prlimit", f"--fsize={len(first) + len(second) // 2}")
    done = run("validate", "--qmp", guest.qmp, "--ndjson", place, code=51, before=room)
    assert f"{place}: cannot write the report: File too large" in done.stderr
    assert f"{place}.partial: the lines of the disks that were done before that" in done.stderr
    assert done.stdout.count("AGREED") == 2
    assert place.read_text() == "of yesterday"
    (line,) = (tmp_path / "report.ndjson.partial").read_text().splitlines()
    assert DiskLine.model_validate_json(line).disk.verdict == "agreed"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.ndjson", "report.ndjson.partial", "whole"]


@pytest.mark.real
def test_a_signal_leaves_reports_of_what_was_done(folder: Path, three_layers: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", folder / "big.qcow2", "512T")
    nodes = [blockdev(three_layers / "top.qcow2", "top", read_only=True), blockdev(folder / "big.qcow2", "big")]
    (folder / "reports").mkdir()
    (folder / "reports/report.junit").write_text("of yesterday")
    with storage_daemon(*[word for node in nodes for word in ("--blockdev", node)]) as server:
        command = [*COMMAND, "validate", "--qmp", str(server.qmp), *all_forms(folder / "reports"), "top", "big"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
            try:
                wait_until(
                    lambda: any("schema" in path.read_text() for path in parts(folder, "ndjson")), "the first disk"
                )
                child.send_signal(signal.SIGINT)
                told, complaints = child.communicate(timeout=30)
            finally:
                child.kill()
        assert (child.returncode, server.exports()) == (130, []), complaints
    lines = (folder / "reports/report.ndjson").read_text().splitlines()
    assert [DiskLine.model_validate_json(line).disk.verdict for line in lines[:-1]] == ["agreed"]
    summary = SummaryLine.model_validate_json(lines[-1])
    assert summary.stopped is not None
    counted = {"agreed": 1, "not-judged": 1}
    assert (summary.verdict, summary.disks, summary.stopped.exit_code) == ("not-judged", counted, 130)
    (suite,) = junitparser.JUnitXml.fromfile(str(folder / "reports/report.junit"))
    passed = [("top", True), ("big", False), ("all disks were validated", False)]
    assert [(case.name, case.is_passed) for case in suite] == passed
    assert "disk top (node top): AGREED" in told
    assert "disk big (node big): NOT JUDGED" in told
    assert "stopped before all disks were validated" in told
    assert "ended before all disks" in (folder / "reports/report.html").read_text()
    assert "_complete{" in (folder / "reports/report.prometheus").read_text()
    assert len(list((folder / "reports").iterdir())) == 4


@pytest.mark.real
def test_a_guest_shows_how_far_it_is_and_ctrl_c_ends_it_with_what_is_known(folder: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", folder / "big.qcow2", "512T")
    leader, terminal = os.openpty()
    with storage_daemon("--blockdev", blockdev(folder / "big.qcow2", "big")) as server:
        command = [*COMMAND, "validate", "--qmp", str(server.qmp), "--json", "big"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=terminal, text=True) as child:
            os.close(terminal)
            shown = b""
            while b"0/1 disks" not in shown:
                shown += os.read(leader, 4096)
            child.send_signal(signal.SIGINT)
            told, _ = child.communicate(timeout=30)
        os.close(leader)
        assert (child.returncode, server.exports()) == (130, [])
    document = json.loads(told)
    assert (document["verdict"], document["stopped"]["exit_code"]) == ("not-judged", 130)
    assert [(disk["name"], disk["verdict"]) for disk in document["disks"]] == [("big", "not-judged")]


def parts(folder: Path, form: str) -> list[Path]:
    return list((folder / "reports").glob(f".report.{form}.*.part"))


@pytest.mark.real
def test_after_kill_9_the_lines_of_what_was_done_are_beside(folder: Path, three_layers: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", folder / "big.qcow2", "512T")
    nodes = [blockdev(three_layers / "top.qcow2", "top", read_only=True), blockdev(folder / "big.qcow2", "big")]
    (folder / "reports").mkdir()
    with storage_daemon(*[word for node in nodes for word in ("--blockdev", node)]) as server:
        place = folder / "reports/report.ndjson"
        command = [*COMMAND, "validate", "--qmp", str(server.qmp), "--ndjson", str(place), "top", "big"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as child:
            wait_until(lambda: any("schema" in path.read_text() for path in parts(folder, "ndjson")), "the first disk")
            child.kill()
    assert not place.exists()
    (beside,) = parts(folder, "ndjson")
    assert [DiskLine.model_validate_json(line).disk.name for line in beside.read_text().splitlines()] == ["top"]
    with ReportFile.open(str(place)):
        assert not beside.exists()


def test_a_run_that_never_began_is_no_green_report(tmp_path: Path) -> None:
    run("validate", "--qmp", tmp_path / "nothing", *all_forms(tmp_path), code=10)
    (suite,) = junitparser.JUnitXml.fromfile(str(tmp_path / "report.junit"))
    assert [(case.name, case.is_passed) for case in suite] == [("all disks were validated", False)]
    assert "no such socket" in (tmp_path / "report.html").read_text()


@pytest.mark.real
def test_a_map_as_a_drawing(three_layers: Path, folder: Path) -> None:
    server = [tool("qemu-nbd"), "-r", "-t", "-A", "-f", "qcow2", "-k", str(folder / "nbd")]
    with process([*server, str(three_layers / "top.qcow2")], folder / "log"):
        wait_until(lambda: listening(folder / "nbd"), "qemu-nbd to listen")
        uri = f"nbd+unix:///?socket={folder}/nbd"
        both = ("--context", "qemu:allocation-depth", "--context", "base:allocation")
        assert run("map", uri, "--svg", folder / "map.svg", *both).stdout == ""
        root = Xml.parse(folder / "map.svg").getroot()
        assert run("map", uri, "--svg", "-", *both).stdout == (folder / "map.svg").read_text()
        run("map", uri, "--svg", "-", "--json", code=2)
        run("map", uri, "--svg", "-", "--totals", code=2)
    texts = [each.text for each in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"qemu:allocation-depth", "base:allocation", "backing depth 3", "16 MiB in 8 extents"} <= set(texts)
    if shutil.which("xmllint"):
        subprocess.run(["xmllint", "--noout", folder / "map.svg"], check=True)
