"""Runs over many disks that end early, or not because of one: fail-fast, cancellation, a guest that hangs."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from qmpnbd.cli.validate import exit_code
from qmpnbd.deadline import Deadline
from qmpnbd.errors import DeadlineError, ImageMissingError, MonitorSilentError
from qmpnbd.images.chain import LayerSpec
from qmpnbd.images.mapentries import Generation
from qmpnbd.nbd.uri import NbdUri
from qmpnbd.qmp.address import MonitorAddress
from qmpnbd.qmp.monitor import Monitor
from qmpnbd.report.model import DiskReport, ValidationReport
from qmpnbd.report.text import validation_text
from qmpnbd.validate import fleet, live
from qmpnbd.validate.fleet import Fleet, FleetOptions
from qmpnbd.validate.reading import Reading, read_chain
from qmpnbd.validate.still import Terms
from qmpnbd.validate.still_run import DaemonFacts, Prepared
from qmpnbd.validate.target import ImageTarget, MonitorTarget, Target
from tests.fleets import validated
from tests.servers import blockdev, storage_daemon

pytestmark = pytest.mark.real


def test_fail_fast_stops_what_is_under_way_and_takes_it_down(
    three_layers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest of three disks, one of which is done; the fault is an image elsewhere."""
    begun = threading.Event()
    reads = itertools.count()

    def read(specs: Sequence[LayerSpec], deadline: Deadline, generation: Generation | None) -> Reading:
        if next(reads) == 0:
            return read_chain(specs, deadline, generation)
        begun.set()
        while True:
            deadline.check("the test", "here")
            time.sleep(0.01)

    def missing(_target: ImageTarget, _terms: Terms) -> Prepared:
        assert begun.wait(60)
        raise ImageMissingError("by the test", where="here")

    monkeypatch.setattr(live, "read_chain", read)
    monkeypatch.setattr(fleet, "prepared", missing)
    names = ("a", "b", "c")
    nodes = [blockdev(three_layers / "top.qcow2", name, read_only=True) for name in names]
    with storage_daemon(*(word for node in nodes for word in ("--blockdev", node))) as server:
        targets: list[Target] = [MonitorTarget(str(server.qmp), names), ImageTarget("x"), ImageTarget("y")]
        report = validated(targets, FleetOptions(jobs=2, fail_fast=True))
        assert (server.exports(), server.nbd_server_runs()) == ([], False)
    told = [(disk.name, disk.verdict, disk.not_judged_because) for disk in report.disks]
    stopped = ("not-judged", "fail-fast")
    assert told == [("a", "agreed", ""), ("b", *stopped), ("c", *stopped), ("x", "error", ""), ("y", *stopped)]
    assert (report.verdict, report.left_behind) == ("error", ())
    assert "NOT JUDGED b (because of --fail-fast)" in validation_text(report)


def test_a_run_that_is_cancelled_cancels_each_target_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second time, when the first of them is done, would cut short how the others take down what they made."""
    ended: list[str] = []

    async def validate(name: str, *_: object, **__: object) -> ValidationReport:
        under_way.append(name)
        if len(under_way) == 2:
            runs[0].cancel()
        try:
            await asyncio.Event().wait()
        finally:
            for _turn in range(0 if name == "one" else 50):
                await asyncio.sleep(0)
            ended.append(name)
        raise AssertionError

    async def cancelled() -> None:
        runs.append(asyncio.ensure_future(tested.run()))
        with pytest.raises(asyncio.CancelledError):
            await runs[0]

    under_way: list[str] = []
    runs: list[asyncio.Future[ValidationReport]] = []
    monkeypatch.setattr(fleet, "validate_disks", validate)
    tested = Fleet([MonitorTarget("one"), MonitorTarget("two")], FleetOptions(jobs=2))
    asyncio.run(cancelled())
    assert ended == ["one", "two"]
    assert [disk.verdict for disk in tested.report().disks] == ["not-judged", "not-judged"]


def test_an_image_whose_time_is_over_is_told_what_took_it(three_layers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that there is no time left to take the export down: the daemon is not used any further."""

    def compare(_target: ImageTarget, _image: Prepared, _uri: NbdUri, _facts: DaemonFacts, terms: Terms) -> DiskReport:
        terms.deadline.stop()
        raise DeadlineError("timed out reading", where="by the test")

    monkeypatch.setattr(fleet, "compare_image", compare)
    (disk,) = validated([ImageTarget(str(three_layers / "top.qcow2"))]).disks
    assert disk.error is not None
    assert (disk.error.what, disk.error.where) == ("timed out reading", "by the test")


def test_an_empty_image_agrees(folder: Path) -> None:
    (folder / "empty.raw").touch()
    assert [disk.verdict for disk in validated([ImageTarget(str(folder / "empty.raw"))]).disks] == ["agreed"]


def test_one_guest_of_twenty_hangs_and_nineteen_agree(three_layers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only its own time is short here, so that a busy machine cannot be what the others fail on."""
    connect = Monitor.connect
    top = blockdev(three_layers / "top.qcow2", "top", read_only=True)
    with contextlib.ExitStack() as stack:
        guests = [stack.enter_context(storage_daemon("--blockdev", top)) for _ in range(20)]
        hanging = guests[7]

        async def connecting(where: MonitorAddress | str, deadline: Deadline) -> Monitor:
            return await connect(where, Deadline(1.0) if str(where) == str(hanging.qmp) else deadline)

        monkeypatch.setattr(Monitor, "connect", connecting)
        os.kill(hanging.pid, signal.SIGSTOP)
        stack.callback(os.kill, hanging.pid, signal.SIGCONT)
        report = validated([MonitorTarget(str(guest.qmp), ("top",)) for guest in guests], FleetOptions(jobs=4))
        assert [guest.exports() for guest in guests if guest is not hanging] == [[]] * 19
    assert [disk.verdict for disk in report.disks] == [*["agreed"] * 7, "error", *["agreed"] * 12]
    error = report.disks[7].error
    assert error is not None
    assert (error.type, error.where) == ("MonitorSilentError", str(hanging.qmp))
    assert exit_code(report) == MonitorSilentError.exit_code
