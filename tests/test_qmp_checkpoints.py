"""Checkpoints on real QEMUs: the cycle of a chain of backups, cut at every command, and what QEMU does to bitmaps."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmpnbd.deadline import Deadline
from qmpnbd.errors import BitmapError, CommandFailedError, DeadlineError, MonitorLostError, QmpnbdError, UsageError
from qmpnbd.qmp import checkpoints as module
from qmpnbd.qmp.bitmaps import REMEDIES, transact
from qmpnbd.qmp.checkpoint_plan import Operation
from qmpnbd.qmp.checkpoint_state import DiskCheckpoints
from qmpnbd.qmp.checkpoints import Change, Changed, change_checkpoints, list_checkpoints, plan_change, read_checkpoints
from qmpnbd.qmp.inventory import require_safe_moment
from qmpnbd.qmp.monitor import Monitor
from tests.guestwrites import Range, Writer, bitmaps_of, dirty, rounded, two_disks
from tests.qemu_versions import QemuBinaries, each_qemu
from tests.qmp_cutter import FAILURES, Failure, cutting
from tests.servers import Server, blockdev, qemu_img, wait_until

pytestmark = pytest.mark.real

GRANULE = 65536
MIB = 1 << 20
CREATE: Operation = "create"
DECISIONS: tuple[Operation, ...] = ("abort", "commit")


@pytest.fixture
def disks(folder: Path) -> list[str]:
    return two_disks(folder)


@pytest.fixture
def server(binaries: QemuBinaries, disks: list[str]) -> Iterator[Server]:
    with binaries.qemu(*disks) as running:
        yield running


def change(server: Server, operation: Operation, chain: str = "nightly", number: int | None = None) -> Changed:
    return change_checkpoints(str(server.qmp), Change(operation, chain, number=number))


def states(server: Server, chain: str = "nightly") -> dict[str, DiskCheckpoints]:
    return {disk.disk: disk for disk in list_checkpoints(str(server.qmp), chain=chain).disks}


def recorded(server: Server, disk: DiskCheckpoints, number: int) -> list[Range]:
    return dirty(server, disk.node_name, [each.bitmap for each in disk.since(number)])


def numbers(disk: DiskCheckpoints) -> list[int]:
    return [each.number for each in disk.checkpoints]


class Truth:
    """Writes to both disks, and checks what the bitmaps say of every checkpoint that is usable."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.writers = {"vd0": Writer(server, "vd0"), "vd1": Writer(server, "vd1")}
        self.marks: dict[str, int] = {}
        self._step = 0

    def write(self) -> None:
        for writer in self.writers.values():
            self._step += 1
            writer.write(self._step * 7 % 61 * MIB + self._step * 512, 1024)

    def begun(self, changed: dict[str, DiskCheckpoints]) -> None:
        """Notes the present moment for the checkpoints that are new."""
        for disk in changed.values():
            for each in disk.checkpoints:
                self.marks.setdefault(each.bitmap, self.writers[disk.disk].mark)

    def holds(self) -> dict[str, DiskCheckpoints]:
        """All that was written since each checkpoint is in its bitmaps, and nothing else."""
        found = states(self.server)
        for disk in found.values():
            assert disk.usable
            for each in disk.usable:
                truth = self.writers[disk.disk].since(self.marks[each.bitmap], each.granularity)
                assert recorded(self.server, disk, each.number) == truth, each
        return found


@each_qemu
def test_the_cycle_loses_nothing_on_any_qemu(binaries: QemuBinaries, server: Server) -> None:
    truth = Truth(server)
    truth.write()
    first = change(server, "create")
    assert [(disk.base, bool(disk.reason)) for disk in first.plan.disks] == [(None, True)] * 2
    truth.begun(states(server))
    truth.write()
    second = change(server, "create")
    assert [disk.base for disk in second.plan.disks] == [1, 1]
    truth.begun(states(server))
    truth.write()
    increment = second.plan.bitmaps("vd0")
    assert dirty(server, "a", increment) == rounded(truth.writers["vd0"].written[1:2], GRANULE)
    assert {disk.state for disk in truth.holds().values()} == {"pending"}
    change(server, "abort")
    assert [numbers(disk) for disk in truth.holds().values()] == [[1], [1]]
    truth.write()
    assert [disk.base for disk in change(server, "create").plan.disks] == [1, 1]
    truth.begun(states(server))
    truth.write()
    truth.holds()
    change(server, "commit")
    assert [numbers(disk) for disk in truth.holds().values()] == [[2], [2]]
    change(server, "remove")
    assert bitmaps_of(server, "a") == bitmaps_of(server, "b") == {}


@pytest.mark.timeout(300)
@each_qemu
@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_at_any_command_of_the_cycle_loses_nothing(
    binaries: QemuBinaries, server: Server, failure: Failure
) -> None:
    """The cycle is gone through again and again, cut one command later each time, until no command is left."""
    truth = Truth(server)
    change(server, "create")
    truth.begun(states(server))
    cut: set[str] = set()
    for number in range(1, 100):
        happened = []
        for decision in DECISIONS:
            for operation in CREATE, decision:
                truth.write()
                with cutting(server.qmp, number, failure) as (address, cutter):
                    try:
                        change_checkpoints(address, Change(operation, "nightly"))
                    except QmpnbdError:
                        assert cutter.happened
                happened.append(cutter.happened)
                cut.update(cutter.commands[number - 1 : number])
                if operation == "create":
                    if states(server)["vd0"].state == "recording":
                        change(server, "create")
                    truth.begun(states(server))
                truth.write()
                truth.holds()
            if states(server)["vd0"].state == "pending":
                change(server, decision)
            assert {disk.state for disk in truth.holds().values()} == {"recording"}
        if not any(happened):
            break
    assert not any(happened)
    assert "transaction" in cut
    assert len(cut) > 5


@each_qemu
def test_a_clean_end_of_qemu_keeps_what_can_be_stored(binaries: QemuBinaries, disks: list[str]) -> None:
    with binaries.qemu(*disks) as server:
        truth = Truth(server)
        change(server, "create")
        truth.write()
        after = change(server, "create").after
        assert [bool(disk.transient_because) for disk in after] == [False, True]
        truth.write()
        server.side("quit")
        wait_until(lambda: not Path(f"/proc/{server.pid}").exists() or _dead(server.pid), "the end of QEMU")
    with binaries.qemu(*disks) as again:
        found = states(again)
        assert found["vd0"].state == "pending"
        assert [each.persistent for each in found["vd0"].checkpoints] == [True, True]
        assert recorded(again, found["vd0"], 1) == truth.writers["vd0"].since(0, GRANULE)
        assert (found["vd1"].state, found["vd1"].checkpoints) == ("missing", ())
        change(again, "commit")
        created = change(again, "create")
        assert [disk.base for disk in created.plan.disks] == [2, None]
        assert "full backup" in created.plan.disks[1].remedy


def _dead(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


@each_qemu
def test_after_a_crash_the_disk_is_told_and_begins_anew(binaries: QemuBinaries, disks: list[str]) -> None:
    with binaries.qemu(*disks) as server:
        for chain in ("nightly", "nightly", "weekly"):
            change(server, "create", chain)
        server.side("quit")
        wait_until(lambda: _dead(server.pid), "the end of QEMU")
    with binaries.qemu(*disks) as server:
        server.side("cont")  # the image is opened for writing: from now on its bitmaps are in use
        Writer(server, "vd0").write(MIB, 512)
        os.kill(server.pid, signal.SIGKILL)
        wait_until(lambda: _dead(server.pid), "the end of QEMU")
    with binaries.qemu(*disks) as server:
        found = states(server)["vd0"]
        assert found.state == "inconsistent"
        assert [each.inconsistent for each in found.checkpoints] == [True, True]
        assert found.usable == found.since(2) == ()
        aborted = change(server, "abort", number=2)
        assert aborted.plan.actions == []
        assert "only be removed" in aborted.plan.disks[0].remedy
        lost = {each.bitmap for each in found.checkpoints}
        created = change(server, "create")
        assert "lost" in created.plan.disks[0].reason
        after = states(server)["vd0"]
        assert (after.state, numbers(after)) == ("recording", [3])
        assert not lost & set(bitmaps_of(server, "a"))
        assert states(server, "weekly")["vd0"].state == "inconsistent"
        change(server, "remove", "weekly")
        assert {name for name, each in bitmaps_of(server, "a").items() if each.get("inconsistent")} == set()


def bitmap(verb: str, node: str, name: str, **more: object) -> dict[str, object]:
    return {"type": f"block-dirty-bitmap-{verb}", "data": {"node": node, "name": name, **more}}


@each_qemu
def test_every_refusal_of_a_bitmap_has_a_remedy(binaries: QemuBinaries, disks: list[str], folder: Path) -> None:
    with binaries.qemu(*disks) as server:
        server.side("block-dirty-bitmap-add", node="a", name="lost", persistent=True)
        server.side("quit")
        wait_until(lambda: _dead(server.pid), "the end of QEMU")
    with binaries.qemu(*disks) as server:
        server.side("cont")
        Writer(server, "vd0").write(MIB, 512)
        os.kill(server.pid, signal.SIGKILL)
        wait_until(lambda: _dead(server.pid), "the end of QEMU")
    refused: dict[tuple[str, ...], str] = {}
    with binaries.qemu(*disks) as server:
        for name in ("kept", "read"):
            server.side("block-dirty-bitmap-add", node="a", name=name, persistent=name == "kept", disabled=True)
        server.side("nbd-server-start", addr={"type": "unix", "data": {"path": str(server.folder / "nbd")}})
        server.side("block-export-add", type="nbd", id="x", node_name="a", bitmaps=["read"])
        server.side("blockdev-add", driver="null-co", node_name="small", size=MIB)
        for node in ("b", "small"):
            server.side("block-dirty-bitmap-add", node=node, name="large")

        async def refuse(*actions: dict[str, object]) -> None:
            deadline = Deadline(20)
            async with await Monitor.connect(str(server.qmp), deadline) as monitor:
                for action in actions:
                    with pytest.raises(CommandFailedError) as caught:
                        await transact(monitor, [action], deadline)
                    (words,) = [words for words, remedy in REMEDIES if remedy == caught.value.remedy]
                    refused[words] = caught.value.description

        merged = {"node": "b", "target": "large", "bitmaps": [{"node": "small", "name": "large"}]}
        actions: list[dict[str, object]] = [
            bitmap("remove", "a", "read"),
            bitmap("enable", "a", "lost"),
            bitmap("add", "a", "kept"),
            bitmap("add", "b", "new", persistent=True),
            {"type": "block-dirty-bitmap-merge", "data": merged},
            bitmap("remove", "a", "missing"),
            bitmap("remove", "nowhere", "kept"),
        ]
        asyncio.run(refuse(*actions))
        server.side("block-export-del", id="x", mode="hard")
        server.side("block-dirty-bitmap-remove", node="a", name="lost")
        server.side(
            "blockdev-snapshot-sync", node_name="a", snapshot_file=str(folder / "over"), snapshot_node_name="over"
        )
        asyncio.run(refuse(bitmap("remove", "a", "kept")))
    assert sorted(refused) == sorted(words for words, _ in REMEDIES), refused


def test_the_documentation_lists_every_refusal_of_a_bitmap() -> None:
    text = (Path(__file__).parent.parent / "docs" / "controller.md").read_text()
    for words, remedy in REMEDIES:
        assert f"| … {' … or … '.join(words)} … | {remedy} |" in text


def test_a_bitmap_that_was_lost_and_made_anew_has_another_name(server: Server) -> None:
    """A catalog that goes by names never takes the new one for the old one, whatever the number."""
    first = change(server, "create").after[0].checkpoints[0]
    change(server, "remove")
    second = change(server, "create").after[0].checkpoints[0]
    assert (first.number, second.number) == (1, 1)
    assert first.bitmap != second.bitmap
    third = change_checkpoints(str(server.qmp), Change("create", "nightly", newest=41, keep=True))
    assert third.plan.number == 42


@each_qemu
def test_a_bitmap_that_is_read_is_neither_committed_nor_aborted(binaries: QemuBinaries, server: Server) -> None:
    change(server, "create")
    increment = change(server, "create").plan.bitmaps("vd0")
    server.side("nbd-server-start", addr={"type": "unix", "data": {"path": str(server.folder / "nbd")}})
    server.side("block-export-add", type="nbd", id="read", node_name="a", bitmaps=list(increment))
    operations: tuple[Operation, ...] = ("commit", "abort", "remove")
    for operation in operations:
        with pytest.raises(BitmapError, match=r"in use.*End the export"):
            change(server, operation)
    server.side("nbd-server-stop")
    change(server, "commit")


@each_qemu
def test_the_planner_need_not_be_right_about_what_is_in_use(binaries: QemuBinaries, server: Server) -> None:
    """What becomes busy after it was looked at is refused by QEMU, on all disks, with a remedy."""

    async def work() -> None:
        deadline = Deadline(20)
        async with await Monitor.connect(str(server.qmp), deadline) as monitor:
            plan = await plan_change(monitor, Change("commit", "nightly"), deadline)
            server.side("block-export-add", type="nbd", id="read", node_name="b", bitmaps=[second.bitmaps("vd1")[0]])
            with pytest.raises(CommandFailedError, match="End the export"):
                await transact(monitor, plan.actions, deadline)
            assert [numbers(disk) for disk in await read_checkpoints(monitor, deadline, chain="nightly")] == [
                [1, 2]
            ] * 2

    change(server, "create")
    second = change(server, "create").plan
    server.side("nbd-server-start", addr={"type": "unix", "data": {"path": str(server.folder / "nbd")}})
    asyncio.run(work())
    server.side("nbd-server-stop")


def test_a_disk_that_is_plugged_in_later_begins_with_the_next_checkpoint(server: Server, folder: Path) -> None:
    truth = Truth(server)
    change(server, "create")
    truth.begun(states(server))
    qemu_img("create", "-q", "-f", "qcow2", folder / "new.qcow2", "64M")
    server.side.execute("blockdev-add", json.loads(blockdev(folder / "new.qcow2", "new")))
    server.side("device_add", driver="virtio-blk-pci", id="vd2", drive="new")
    assert [disk.state for disk in states(server).values()] == ["recording", "recording", "missing"]
    created = change(server, "create")
    assert {disk.before.disk: disk.base for disk in created.plan.disks} == {"vd0": 1, "vd1": 1, "vd2": None}
    assert [numbers(disk) for disk in created.after] == [[1, 2], [1, 2], [2]]
    change(server, "abort")
    assert [numbers(disk) for disk in states(server).values()] == [[1], [1], []]


def test_a_disk_with_a_new_active_layer_is_told(server: Server, folder: Path) -> None:
    change(server, "create")
    server.side(
        "blockdev-snapshot-sync", node_name="a", snapshot_file=str(folder / "over.qcow2"), snapshot_node_name="over"
    )
    found = states(server)["vd0"]
    assert (found.state, found.node_name, numbers(found)) == ("displaced", "over", [])
    assert [each.node_name for each in found.displaced] == ["a"]
    created = change(server, "create")
    assert (created.plan.number, created.plan.disks[0].base) == (2, None)
    assert "new active layer" in created.plan.disks[0].reason
    removed = change(server, "remove")  # the layer below is read-only now
    assert "read-only" in removed.plan.disks[0].reason
    assert bitmaps_of(server, "over") == {}


def test_filters_are_seen_through(server: Server) -> None:
    server.side("object-add", **{"qom_type": "throttle-group", "id": "tg"})
    throttle = {"driver": "throttle", "node-name": "slow", "throttle-group": "tg", "file": "a"}
    server.side.execute("blockdev-add", throttle)
    change_checkpoints(str(server.qmp), Change("create", "nightly", ["slow"]))
    (name,) = bitmaps_of(server, "a")
    assert bitmaps_of(server, "a")[name]["persistent"]
    assert bitmaps_of(server, "slow") == {}


def test_chains_do_not_know_each_other(server: Server) -> None:
    truth = Truth(server)
    change(server, "create", "nightly")
    truth.write()
    change(server, "create", "weekly")
    truth.write()
    change(server, "create", "nightly")
    change(server, "commit", "nightly")
    weekly = states(server, "weekly")["vd0"]
    assert recorded(server, weekly, 1) == truth.writers["vd0"].since(1, GRANULE)
    everything = list_checkpoints(str(server.qmp)).disks
    assert [(each.chain, each.disk, numbers(each)) for each in everything] == [
        ("nightly", "vd0", [2]),
        ("nightly", "vd1", [2]),
        ("weekly", "vd0", [1]),
        ("weekly", "vd1", [1]),
    ]


def test_kept_checkpoints_are_bases_to_choose_from(server: Server) -> None:
    truth = Truth(server)
    for _ in range(3):
        change_checkpoints(str(server.qmp), Change("create", "nightly", keep=True))
        truth.begun(states(server))
        truth.write()
    assert [numbers(disk) for disk in truth.holds().values()] == [[1, 2, 3]] * 2
    change(server, "merge", number=2)
    assert [numbers(disk) for disk in truth.holds().values()] == [[1, 3]] * 2
    change(server, "remove", number=1)
    assert [numbers(disk) for disk in truth.holds().values()] == [[3]] * 2
    with pytest.raises(BitmapError, match=r"has no checkpoint 1.*It has 3"):
        change(server, "remove", number=1)


def test_a_granularity_is_chosen_once_and_kept(server: Server) -> None:
    change_checkpoints(str(server.qmp), Change("create", "nightly", granularity=4096))
    after = change(server, "create").after
    assert {each.granularity for disk in after for each in disk.checkpoints} == {4096}
    for wrong in (0, 256, 5000, 1 << 32):
        with pytest.raises(UsageError, match="power of two"):
            change_checkpoints(str(server.qmp), Change("create", "other", granularity=wrong))


def test_an_undecided_backup_is_decided_first(server: Server) -> None:
    change(server, "create")
    with pytest.raises(BitmapError, match="--number"):
        change(server, "abort")
    change(server, "create")
    with pytest.raises(BitmapError, match=r"vd0, vd1.*undecided.*Commit"):
        change(server, "create")
    with pytest.raises(BitmapError, match="not the newest"):
        change(server, "abort", number=1)


def test_a_bitmap_that_somebody_disabled_is_not_relied_on(server: Server) -> None:
    change(server, "create")
    (name,) = bitmaps_of(server, "a")
    server.side("block-dirty-bitmap-disable", node="a", name=name)
    assert states(server)["vd0"].state == "stopped"
    assert [disk.base for disk in change(server, "create").plan.disks] == [None, 1]
    assert name not in bitmaps_of(server, "a")


def test_a_dry_run_shows_the_commands_and_sends_none(server: Server) -> None:
    shown = change_checkpoints(str(server.qmp), Change("create", "nightly"), dry_run=True)
    assert bitmaps_of(server, "a") == {}
    for command in shown.commands:
        server.side.execute(str(command["execute"]), command["arguments"])  # type: ignore[arg-type]
    assert [numbers(disk) for disk in states(server).values()] == [[1], [1]]


def test_a_lost_connection_says_that_it_happened_everywhere_or_nowhere(server: Server) -> None:
    with cutting(server.qmp, 10**6, "lost") as (address, counted):
        change_checkpoints(address, Change("create", "nightly"))
    number = counted.commands.index("transaction") + 1
    with (
        cutting(server.qmp, number, "done and lost") as (address, _),
        pytest.raises(MonitorLostError, match="on all disks or on none: see `qmpnbd checkpoint list`"),
    ):
        change_checkpoints(address, Change("create", "nightly"))
    assert [numbers(disk) for disk in states(server).values()] == [[1, 2], [1, 2]]


def test_a_qemu_that_stands_still_does_all_of_it_or_nothing(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    async def stopped(monitor: Monitor, deadline: Deadline) -> str:
        status = await require_safe_moment(monitor, deadline)
        os.kill(server.pid, signal.SIGSTOP)
        return status

    monkeypatch.setattr(module, "require_safe_moment", stopped)
    try:
        with pytest.raises(DeadlineError, match="on all disks or on none"):
            change_checkpoints(str(server.qmp), Change("create", "nightly"), seconds=1)
    finally:
        os.kill(server.pid, signal.SIGCONT)
    # Which of the two depends on whether QEMU reads what was sent before it sees that we have left.
    assert [numbers(disk) for disk in states(server).values()] in ([[1], [1]], [[], []])


def test_what_is_no_chain_is_refused(server: Server) -> None:
    for wrong in ("", "a.b", "-x", "ä", "x" * 65, "a\n"):
        with pytest.raises(UsageError, match="not a chain id"):
            change(server, "create", wrong)
    with pytest.raises(UsageError, match="eight hexadecimal"):
        change_checkpoints(str(server.qmp), Change("create", "nightly", backup="today"))
    with pytest.raises(BitmapError, match="has no checkpoint"):
        change(server, "commit", number=1)
    with pytest.raises(BitmapError, match="has no checkpoint"):
        change(server, "merge", number=1)
    with pytest.raises(UsageError, match="--number"):
        change(server, "merge")
