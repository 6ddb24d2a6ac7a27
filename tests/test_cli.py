"""The command line as its users meet it: output, bytes, exit codes, signals, and nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmpnbd.cli.exit_codes import exit_codes
from qmpnbd.printable import printable
from qmpnbd.report.model import DOCUMENTS
from tests.schemas import FOLDER, schemas
from tests.servers import Server, blockdev, listening, process, qemu, qemu_img, storage_daemon, tool, wait_until

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "qmpnbd"]
MODELS = {document.model_fields["schema_"].default: document for document in DOCUMENTS}


def qmpnbd(*arguments: str | Path, code: int = 0, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)], check=False, capture_output=True, text=True, timeout=60, cwd=cwd
    )
    assert done.returncode == code, f"{done.returncode}: {done.stderr}{done.stdout}"
    assert "Traceback" not in done.stderr
    return done


def document(text: str) -> dict[str, object]:
    """Reads a JSON document and holds it against the model of its schema."""
    found = json.loads(text)
    assert isinstance(found, dict)
    model = MODELS[found["schema"]].model_validate_json(text)
    assert json.loads(model.model_dump_json()) == found
    return found


def nbdinfo(*arguments: str) -> str:
    done = subprocess.run(
        [tool("nbdinfo"), "--map=qemu:allocation-depth", "--json", *arguments],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout


@pytest.fixture(scope="module")
def guest(three_layers: Path) -> Iterator[Server]:
    node = blockdev(three_layers / "top.qcow2", "top", read_only=True)
    with qemu("-blockdev", node, "-device", "virtio-blk-pci,id=vd0,drive=top") as server:
        yield server


@contextlib.contextmanager
def served(image: Path, folder: Path) -> Iterator[str]:
    path = folder / "nbd"
    with process([tool("qemu-nbd"), "-r", "-t", "-A", "-f", "qcow2", "-k", str(path), str(image)], folder / "log"):
        wait_until(lambda: listening(path), "qemu-nbd to listen")
        yield f"nbd+unix:///?socket={path}"


@pytest.mark.real
def test_validate_agrees(guest: Server) -> None:
    done = qmpnbd("validate", "--qmp", guest.qmp, "vd0")
    assert "disk vd0 (node top): AGREED" in done.stdout
    assert done.stderr == ""
    report = document(qmpnbd("validate", "--qmp", guest.qmp, "--json").stdout)
    assert report["verdict"] == "agreed"
    assert guest.exports() == []


@pytest.mark.real
def test_disks(guest: Server) -> None:
    text = qmpnbd("disks", "--qmp", guest.qmp).stdout
    assert "disk vd0: 16 MiB, read-only, node top" in text
    listed = document(qmpnbd("disks", "--qmp", f"unix:{guest.qmp}", "--json").stdout)
    assert isinstance(listed["disks"], list)
    assert [disk["name"] for disk in listed["disks"]] == ["vd0"]
    assert [layer["allocation_depth"] for layer in listed["disks"][0]["layers"]] == [1, 2, 3]


@pytest.mark.real
def test_map_and_chain_say_the_very_bytes_of_nbdinfo(three_layers: Path, folder: Path) -> None:
    top = three_layers / "top.qcow2"
    with served(top, folder) as uri:
        wanted = nbdinfo(uri)
        assert qmpnbd("map", uri, "--nbdinfo").stdout == wanted
        for context in ("base:allocation", "qemu:allocation-depth"):
            ours = qmpnbd("map", uri, "--nbdinfo", "--context", context).stdout
            other = subprocess.run(
                [tool("nbdinfo"), f"--map={context}", "--json", uri], check=True, capture_output=True, text=True
            )
            assert ours == other.stdout
    assert qmpnbd("chain", top, "--nbdinfo").stdout == wanted
    assert len(json.loads(wanted)) > 5


@pytest.mark.real
def test_an_empty_disk_in_the_bytes_of_nbdinfo(folder: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", folder / "empty.qcow2", "0")
    assert qmpnbd("chain", folder / "empty.qcow2", "--nbdinfo").stdout == "[\n\n]\n"
    assert document(qmpnbd("chain", folder / "empty.qcow2", "--json").stdout)["extents"] == []


@pytest.mark.real
def test_map_and_chain_as_documents_and_text(three_layers: Path, folder: Path) -> None:
    top = three_layers / "top.qcow2"
    chain = document(qmpnbd("chain", top, "--json").stdout)
    with served(top, folder) as uri:
        both = ("--context", "base:allocation", "--context", "qemu:allocation-depth")
        maps = document(qmpnbd("map", uri, "--json", *both).stdout)["maps"]
        text = qmpnbd("map", uri).stdout
        refused = qmpnbd("map", uri, "--nbdinfo", *both, code=2)
    assert isinstance(maps, list)
    assert [each["context"] for each in maps] == ["base:allocation", "qemu:allocation-depth"]
    assert maps[1]["extents"] == chain["extents"]
    assert text in qmpnbd("chain", top).stdout
    assert re.search(r"^ +1048576 +1048576 +2 backing depth 2$", text, re.MULTILINE)
    assert "--nbdinfo" in refused.stderr


@pytest.mark.real
def test_a_discrepancy_ends_with_one(folder: Path, three_layers: Path) -> None:
    for name in ("base.raw", "mid.qcow2", "top.qcow2"):
        (folder / name).write_bytes((three_layers / name).read_bytes())
    with storage_daemon("--blockdev", blockdev(folder / "top.qcow2", "top", read_only=True)) as server:
        qmpnbd("validate", "--qmp", server.qmp, "top")
        with (folder / "mid.qcow2").open("r+b") as file:
            file.seek(4 << 16)  # the first L2 table, as qemu-img lays it out
            assert int.from_bytes(file.read(16 * 8 + 8)[-8:], "big")
            file.seek((4 << 16) + 16 * 8)
            file.write(bytes(8))
        done = qmpnbd("validate", "--qmp", server.qmp, "top", code=1)
        report = document(qmpnbd("validate", "--qmp", server.qmp, "top", "--json", code=1).stdout)
    assert "DISCREPANCY" in done.stdout
    assert "[1048576, 1114112)  served depth 2 (backing depth 2), computed 3 (backing depth 3)" in done.stdout
    assert "L2 entry" in done.stdout
    assert report["verdict"] == "discrepancy"


def big_image(folder: Path) -> Path:
    """An empty disk so large that reading its served map takes seconds: QEMU answers 4 GiB at a time at most."""
    path = folder / "big.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", path, "512T")
    return path


@contextlib.contextmanager
def validating(server: Server, folder: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    """A validation in its middle: the export is there and its map is being read."""
    arguments = ["validate", "--qmp", str(server.qmp), "--runtime-dir", str(folder), *more, "big"]
    with subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            wait_until(lambda: bool(server.exports()), "the export")
            assert child.poll() is None
            yield child
        finally:
            child.kill()


@pytest.fixture
def big(folder: Path) -> Iterator[Server]:
    with storage_daemon("--blockdev", blockdev(big_image(folder), "big", read_only=True)) as server:
        yield server


@pytest.mark.real
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)], ids=str
)
def test_a_signal_in_the_middle_takes_everything_down(
    big: Server, folder: Path, number: signal.Signals, code: int
) -> None:
    nodes = big.nodes()
    (folder / "run").mkdir()
    with validating(big, folder / "run") as child:
        child.send_signal(number)
        child.send_signal(number)  # an impatient user changes nothing
        output, complaints = child.communicate(timeout=30)
    assert child.returncode == code
    assert (big.exports(), big.nodes(), big.nbd_server_runs()) == ([], nodes, False)
    assert list((folder / "run").iterdir()) == []
    assert "disk big (node big): NOT JUDGED" in output
    assert "Traceback" not in complaints


@pytest.mark.real
def test_after_kill_9_the_next_run_takes_everything_down(big: Server, folder: Path) -> None:
    (folder / "run").mkdir()
    with validating(big, folder / "run") as child:
        child.kill()
        child.wait(30)
    assert (len(big.exports()), big.nbd_server_runs()) == (1, True)
    done = qmpnbd("validate", "--qmp", big.qmp, "--runtime-dir", folder / "run", "--timeout", "0.5", "big", code=50)
    assert done.stderr.count("took down what a killed run had left") == 2
    assert (big.exports(), big.nbd_server_runs(), list((folder / "run").iterdir())) == ([], False, [])


@pytest.mark.real
def test_a_deadline_in_the_middle_takes_everything_down(big: Server, folder: Path) -> None:
    done = qmpnbd("validate", "--qmp", big.qmp, "--timeout", "0.7", "--json", "big", code=50)
    assert "timed out after 0.7 s" in done.stderr
    assert document(done.stdout)["schema"] == "qmpnbd.error/1"
    assert (big.exports(), big.nbd_server_runs()) == ([], False)


@pytest.mark.real
def test_a_qemu_that_dies_in_the_middle(folder: Path) -> None:
    with storage_daemon("--blockdev", blockdev(big_image(folder), "big", read_only=True)) as server:
        (folder / "run").mkdir()
        with validating(server, folder / "run") as child:
            os.kill(server.pid, signal.SIGKILL)
            _, complaints = child.communicate(timeout=30)
    # Lost monitor, lost NBD connection, or none to be had any more: whichever is met first.
    assert child.returncode in (13, 30, 36), complaints
    assert "Traceback" not in complaints
    assert list((folder / "run").iterdir()) == []


BAD = {
    "no such socket": (["disks", "--qmp", "nothing"], 10, "no such socket"),
    "not a socket": (["disks", "--qmp", "image.raw"], 10, "image.raw"),
    "not a monitor": (["disks", "--qmp", "nbd"], 11, "not a QMP monitor"),
    "bad address": (["disks", "--qmp", "host:port"], 2, "HOST:PORT"),
    "no such disk": (["validate", "--qmp", "qmp", "vd9"], 20, "Disks: vd0"),
    "no NBD server": (["map", "nbd+unix:///?socket=nothing"], 30, "nothing"),
    "a monitor is no NBD server": (["map", "nbd+unix:///?socket=side"], 31, "side"),
    "no such export": (["map", "nbd+unix:///wrong?socket=nbd"], 32, "wrong"),
    "no such context": (["map", "nbd+unix:///?socket=nbd", "--context", "qemu:dirty-bitmap:none"], 33, "none"),
    "TLS": (["map", "nbds+unix:///?socket=nbd", "--tls-no-verify"], 37, "TLS"),
    "TLS without a name": (["map", "nbds+unix:///?socket=nbd"], 2, "tls-hostname"),
    "bad URI": (["map", "http://localhost/"], 2, "http"),
    "missing image": (["chain", "gone.qcow2"], 40, "gone.qcow2"),
    "missing backing file": (["chain", "orphan.qcow2"], 40, "orphan.qcow2"),
    "a folder": (["chain", "."], 41, "."),
    "truncated": (["chain", "cut.qcow2"], 42, "cut.qcow2"),
    "corrupt": (["chain", "corrupt.qcow2"], 43, "header field cluster_bits"),
    "another format": (["chain", "disk.hds"], 44, "parallels"),
    "nothing to check": (["check", "image.raw"], 44, "raw has no refcounts"),
    "nothing to compute": (["chain", "base.qcow2", "--context", "x"], 2, "cannot be computed"),
    "no such bitmap": (["chain", "base.qcow2", "--context", "qemu:dirty-bitmap:x"], 2, "no bitmap 'x'"),
    "no such format": (["chain", "base.qcow2", "--format", "x"], 44, "the format x is not read here"),
    "a feature not known": (["chain", "future.qcow2"], 44, "unknown incompatible features 0x20"),
    "a loop": (["chain", "loop.qcow2"], 45, "loop.qcow2"),
    "remote backing file": (["chain", "remote.qcow2"], 46, "nbd://"),
}


@pytest.fixture(scope="module")
def bad_things(tmp_path_factory: pytest.TempPathFactory, guest: Server) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("bad")
    qemu_img("create", "-q", "-f", "raw", folder / "image.raw", "1M")
    qemu_img("create", "-q", "-f", "qcow2", folder / "base.qcow2", "1M")
    (folder / "cut.qcow2").write_bytes((folder / "base.qcow2").read_bytes()[:60])
    (folder / "disk.hds").write_bytes(b"WithoutFreeSpace".ljust(512, b"\0"))
    future = bytearray((folder / "base.qcow2").read_bytes())
    future[79] = 0x20
    (folder / "future.qcow2").write_bytes(future)
    for name, backing in (("orphan", "gone.raw"), ("loop", "loop.qcow2"), ("remote", "nbd://192.0.2.1/x")):
        qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", "qcow2", folder / f"{name}.qcow2", "1M")
    data = bytearray((folder / "base.qcow2").read_bytes())
    data[23] = 30
    (folder / "corrupt.qcow2").write_bytes(data)
    (folder / "qmp").symlink_to(guest.qmp)
    server = [tool("qemu-nbd"), "-r", "-t", "-e", "10", "-A", "-f", "raw", "-k", str(folder / "nbd")]
    with (
        process([*server, str(folder / "image.raw")], folder / "log"),
        socket.socket(socket.AF_UNIX) as side,
    ):
        wait_until(lambda: listening(folder / "nbd"), "qemu-nbd to listen")
        # What a monitor that nobody holds would say to an NBD client.
        side.bind(str(folder / "side"))
        side.listen()
        child = os.fork()
        if not child:
            while True:
                peer, _ = side.accept()
                peer.sendall(b'{"QMP": {"version": {}, "capabilities": []}}\r\n')
        try:
            yield folder
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


@pytest.mark.real
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, bad_things: Path) -> None:
    arguments, code, words = BAD[case]
    done = qmpnbd(*arguments, code=code, cwd=bad_things)
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("qmpnbd: ")
    assert words in lines[0]
    error = document(qmpnbd(*arguments, "--json", code=code, cwd=bad_things).stdout)["error"]
    assert isinstance(error, dict)
    assert error["exit_code"] == code


@pytest.mark.real
def test_a_monitor_that_another_client_holds(guest: Server) -> None:
    held = guest.folder / "qmp"
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(str(held))
        assert other.recv(10)
        done = qmpnbd("disks", "--qmp", held, "--timeout", "1", code=12)
    assert "Another client holds this monitor" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["disks"],
        ["map"],
        ["chain", "x", "--json", "--nbdinfo"],
        ["disks", "--qmp", "x", "--timeout", "-1"],
        ["disks", "--qmp", "x", "--timeout", "nan"],
        ["validate", "--qmp", "x", "--rounds", "x"],
        ["disks", "--qm", "x"],
        ["disks", "--qmp", "x", "--domain", "vm"],
        ["graph", "--libvirt", "qemu:///system"],
        ["graph", "--qmp", "x", "--json", "--svg"],
    ],
)
def test_usage(arguments: list[str]) -> None:
    done = qmpnbd(*arguments, code=2)
    assert done.stdout == ""
    assert "usage: qmpnbd" in done.stderr


def test_whoever_reads_the_output_may_go_away(tmp_path: Path) -> None:
    (tmp_path / "x.raw").write_bytes(bytes(1 << 20))
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as pipe:
        done = subprocess.run(
            [*COMMAND, "chain", str(tmp_path / "x.raw")], check=False, stdout=pipe, stderr=subprocess.PIPE, timeout=60
        )
    assert (done.returncode, done.stderr) == (141, b"")


def test_foreign_text_does_not_reach_the_terminal_as_commands(tmp_path: Path) -> None:
    done = qmpnbd("chain", tmp_path / "\x1b[31mred\x07", code=40)
    assert "\x1b" not in done.stderr
    assert "\\x1b[31mred\\x07" in done.stderr
    assert printable("plain\nümlaut\udcff\x9b\xad") == "plain\\nümlaut\\udcff\\x9b\\xad"


@pytest.mark.parametrize("name", ["soft\xadhyphen", "next\x85line", "tag\U000e0041", "line\nforged", b"not utf-8 \xff"])
def test_any_name_of_a_file_gives_valid_json_and_whole_lines(name: str | bytes, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(name)
    path.write_bytes(bytes(65536))
    found = json.loads(qmpnbd("chain", path, "--json").stdout)
    assert found["image"] == found["layers"][0]["file"] == str(path)
    text = qmpnbd("chain", path).stdout
    assert len(text.splitlines()) == 6
    path.unlink()
    done = qmpnbd("chain", path, "--json", code=40)
    assert len(done.stderr.splitlines()) == 1
    assert json.loads(done.stdout)["error"]["where"]


def test_a_check_of_any_name_has_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "line\nforged\x1b[31m.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    lines = qmpnbd("check", path).stdout.splitlines()
    assert lines[0].endswith("line\\nforged\\x1b[31m.qcow2: CLEAN")
    assert len(lines) == 3


def test_a_monitor_of_any_name(tmp_path: Path) -> None:
    for name in ("line\nforged", os.fsdecode(b"\xff")):
        done = qmpnbd("disks", "--qmp", tmp_path / name, code=10)
        assert len(done.stderr.splitlines()) == 1


def test_a_fault_of_our_own_is_no_verdict() -> None:
    code = "import qmpnbd.cli.chain as c, sys; from qmpnbd.cli import main; c.run = lambda _: 1 // 0; "
    run = "sys.exit(main.main(['chain', 'x']))"
    done = subprocess.run([sys.executable, "-c", code + run], check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 70
    assert "ZeroDivisionError" in done.stderr
    assert "please report it" in done.stderr


@pytest.mark.real
def test_a_qemu_that_falls_silent_in_the_middle_is_not_waited_for_step_by_step(big: Server, folder: Path) -> None:
    (folder / "run").mkdir()
    with validating(big, folder / "run", "--timeout", "1") as child:
        os.kill(big.pid, signal.SIGSTOP)
        _, complaints = child.communicate(timeout=16)  # 1 s, 10 s for the first step, and little more
        os.kill(big.pid, signal.SIGCONT)
    assert child.returncode == 50
    assert complaints.count("left behind in QEMU") == 2
    done = qmpnbd("validate", "--qmp", big.qmp, "--runtime-dir", folder / "run", "--timeout", "0.5", "big", code=50)
    assert "took down what a killed run had left" in done.stderr
    assert (big.exports(), big.nbd_server_runs(), list((folder / "run").iterdir())) == ([], False, [])


def test_the_table_of_exit_codes_is_in_help_and_readme() -> None:
    shown = qmpnbd("--help").stdout
    readme = (ROOT / "README.md").read_text()
    for code, meaning in exit_codes().items():
        assert re.search(rf"^ +{code}  {re.escape(meaning)}$", shown, re.MULTILINE)
        assert f"| {code} | {meaning} |" in readme
    assert sorted(exit_codes()) == sorted(int(code) for code in re.findall(r"^\| (\d+) \|", readme, re.MULTILINE))


def test_version() -> None:
    assert re.fullmatch(r"qmpnbd \d+\.\d+\.\d+\n", qmpnbd("--version").stdout)


def test_the_committed_schemas_are_those_of_the_models() -> None:
    assert {path.name: path.read_text() for path in FOLDER.iterdir()} == schemas()
