"""The exact allocation depth of an instant, for users of the library and of the command line."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qmpnbd.cli.depthfiles import PRESUMED
from qmpnbd.deadline import Deadline
from qmpnbd.errors import NbdContextError, NbdProtocolError, UsageError
from qmpnbd.export import blocking
from qmpnbd.export.lasting import LastingClients
from qmpnbd.export.options import Options
from qmpnbd.export.session import exporting
from qmpnbd.extents import ExtentMap
from qmpnbd.nbd.client import Client
from qmpnbd.nbd.constants import ALLOCATION_DEPTH as DEPTH
from qmpnbd.nbd.export import Export
from qmpnbd.nbd.negotiation import Haggling
from qmpnbd.nbd.tls import Tls
from qmpnbd.nbd.wire import Program
from qmpnbd.qmp.address import TcpAddress
from qmpnbd.qmp.credentials import ServerTls
from qmpnbd.qmp.exports import ExportOptions
from qmpnbd.qmp.plan import Recipe
from qmpnbd.qmp.planning import Wishes
from tests.instants import Machine, Truth, commands, machine
from tests.qemu_versions import QemuBinaries, each_qemu
from tests.test_cli import qmpnbd
from tests.test_export import running as running_export
from tests.test_export import told
from tests.test_pointintime import RECIPES, SOON, wishes_for
from tests.tls_files import Authority

pytestmark = pytest.mark.real

WISH = {Recipe.BACKUP: [], Recipe.COPY_BEFORE_WRITE: ["--protect-guest"], Recipe.SNAPSHOT: ["--exact-chain"]}


@contextmanager
def unharmed(binaries: QemuBinaries, folder: Path, *arguments: str, device: str = "") -> Iterator[Machine]:
    """A machine that is at the end as it was."""
    with machine(binaries, folder, *arguments, device=device) as running:
        before = running.state()
        yield running
        assert running.state() == before


def written(running: Machine) -> list[Truth]:
    """Returns what the disks are, and has them written to."""
    truth = running.truth()
    for number in range(2):
        running.write(number, *commands(300 + number, 25))
    return truth


@each_qemu
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_session_tells_the_depth_of_the_chain_and_offers_no_other(
    binaries: QemuBinaries, recipe: Recipe, folder: Path
) -> None:
    wishes = wishes_for(recipe, folder)
    with unharmed(binaries, folder) as running:
        with blocking.exporting(str(running.server.qmp), [], Options(instant=wishes)) as session:
            truth = written(running)
            exports = list(session.exports)
            found = [session.allocation_depth(export, Deadline(20)).depth for export in exports]
            if not wishes.exact_chain:
                with pytest.raises(NbdContextError):
                    Client.connect(exports[0].uri, contexts=[DEPTH])
            session.release()
            with pytest.raises(UsageError, match="allocation depth"):
                session.allocation_depth(exports[0], SOON)
        assert found == [known.depth for known in truth]
        assert found != [known.depth for known in running.truth()]


def test_a_depth_that_was_not_wished_for_cannot_be_told(binaries: QemuBinaries, folder: Path) -> None:
    choices = (Options(instant=Wishes(), composed_depth=False), Options(instant=Wishes(depth=False)), Options())
    with unharmed(binaries, folder) as running:
        for choice in choices:
            with (
                blocking.exporting(str(running.server.qmp), ["vd0"], choice) as session,
                pytest.raises(UsageError, match="allocation depth"),
            ):
                session.allocation_depth(session.exports[0], SOON)


@each_qemu
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_command_writes_it_to_files_that_outlast_it(binaries: QemuBinaries, recipe: Recipe, folder: Path) -> None:
    depths = folder / "depths"
    depths.mkdir()
    options: list[str | Path] = [
        "--point-in-time",
        *WISH[recipe],
        "--scratch",
        folder,
        "--allocation-depth",
        depths,
        "--json",
    ]
    with unharmed(binaries, folder) as running:
        truth = running.truth()
        with running_export("--qmp", running.server.qmp, *options) as child:
            found: Any = told(child)["exports"]
            written(running)
            assert [each["allocation_depth"] for each in found] == [f"{depths}/vd0.json", f"{depths}/vd1.json"]
            assert [DEPTH in each["contexts"] for each in found] == [recipe is Recipe.SNAPSHOT] * 2
            child.send_signal(signal.SIGTERM)
            child.communicate(timeout=60)
            assert child.returncode == 143
        for entry, known in zip(found, truth, strict=True):
            document = json.loads(Path(entry["allocation_depth"]).read_text())
            assert (document["schema"], document["size"]) == ("qmpnbd.map/1", known.depth.size)
            depth, presumed = (
                ExtentMap.of_extents((extent["length"], extent["value"]) for extent in each["extents"])
                for each in document["maps"]
            )
            assert depth == known.depth
            assert presumed.totals() == {0: known.depth.size}
            assert [each["context"] for each in document["maps"]] == [DEPTH, PRESUMED]


def test_files_of_a_point_in_time_that_was_lost_are_removed(binaries: QemuBinaries, folder: Path) -> None:
    options: list[str | Path] = ["--point-in-time", "--allocation-depth", folder, "--json", "--runtime-dir", folder]
    with unharmed(binaries, folder) as running, running_export("--qmp", running.server.qmp, *options) as child:
        told(child)
        assert (folder / "vd0.json").exists()
        running.server.side("job-cancel", id=running.server.side("query-jobs")[0]["id"])
        child.communicate(timeout=60)
        assert child.returncode == 17
        assert not list(folder.glob("*.json"))


def test_a_folder_that_is_none_is_told_before_anything_is_done(folder: Path) -> None:
    options: list[str | Path] = ["--point-in-time", "--allocation-depth", folder / "nothing"]
    assert "not a folder" in qmpnbd("export", "--qmp", "/nowhere", *options, code=51).stderr


@each_qemu
def test_through_tls_it_is_read_with_certificates(binaries: QemuBinaries, folder: Path, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    tls, client = ServerTls(str(authority.server())), Tls(certificates=str(authority.client()))
    listen = TcpAddress("localhost", 0)
    with unharmed(binaries, folder) as running:
        choice = Options(instant=Wishes(), tls=tls, listen=listen)
        with pytest.raises(UsageError, match="let in"), blocking.exporting(str(running.server.qmp), ["vd0"], choice):
            pytest.fail("it could not read the depth")
        choice = Options(instant=Wishes(), tls=tls, listen=listen, client_tls=client)
        with blocking.exporting(str(running.server.qmp), ["vd0"], choice) as session:
            truth = written(running)
            assert session.allocation_depth(session.exports[0], SOON).depth == truth[0].depth
        command: list[str | Path] = ["--point-in-time", "--allocation-depth", folder, "--listen", "localhost:0"]
        command += ["--tls", tls.folder]
        qmpnbd("export", "--qmp", running.server.qmp, *command, "--exec", "true", code=2)
        certificates = ["--tls-certificates", client.certificates]
        qmpnbd("export", "--qmp", running.server.qmp, *command, *certificates, "--exec", "true")
        assert json.loads((folder / "vd1.json").read_text())["schema"] == "qmpnbd.map/1"


IN_THREAD = ("-object", "iothread,id=io")


@each_qemu
@pytest.mark.parametrize("ending", [NbdProtocolError("made up", where="here"), asyncio.CancelledError()], ids=repr)
def test_a_handshake_that_fails_at_its_end_harms_no_guest_in_an_iothread(
    binaries: QemuBinaries, folder: Path, ending: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For QEMU the client is one of the export's then, although there is none here yet."""
    go = Haggling.go

    def chosen_and_failed(haggling: Haggling, name: str) -> Program[Export]:
        yield from go(haggling, name)
        raise ending

    async def work(address: str) -> None:
        choice = Options(allow=["iothread"], export=ExportOptions(iothread="io"))
        async with exporting(address, ["free"], choice) as session:
            (export,) = session.exports
            clients = LastingClients(session.monitor)
            monkeypatch.setattr(Haggling, "go", chosen_and_failed)
            with pytest.raises(type(ending)):
                await clients.connect(export.uri, [DEPTH], SOON)
            await session.node_of(export, SOON)
            await session.remove(export, SOON)
            await clients.close()

    free = json.dumps({"driver": "null-co", "node-name": "free", "size": 1 << 20})
    with unharmed(binaries, folder, *IN_THREAD, "-blockdev", free) as running:
        asyncio.run(work(str(running.server.qmp)))
