"""A guest agent that misbehaves on command; how a real one behaves is in test_guest_agent."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from qmpnbd.deadline import Deadline
from qmpnbd.errors import (
    AgentError,
    AgentRefusedError,
    AgentSilentError,
    DeadlineError,
    MonitorConnectError,
    UsageError,
)
from qmpnbd.qmp import agent as agent_module
from qmpnbd.qmp import quiesce
from qmpnbd.qmp.agent import MAX_STALE, Agent
from qmpnbd.qmp.agent_journal import AgentJournal
from qmpnbd.qmp.quiesce import at_rest, thaw_leftovers

SOON = Deadline(None)  # pytest bounds each test


class FakeAgent:
    """Speaks the agent's protocol over a channel that, like virtio-serial, survives its clients.

    Attributes:
        frozen: how many filesystems are frozen.
        filesystems: how many can be.
        stale: bytes that are in the channel before the next client's first reply.
        odd: command -> what is said instead of the reply; None for nothing at all.
        held: commands that wait until `release` is set; `reached` tells that one does.
        overtaken: whether somebody else freezes just before a freeze.
        heard: the commands so far.
    """

    def __init__(self) -> None:
        self.frozen = 0
        self.filesystems = 2
        self.stale = b""
        self.odd: dict[str, bytes | None] = {}
        self.held: set[str] = set()
        self.release = asyncio.Event()
        self.reached = asyncio.Event()
        self.overtaken = False
        self.heard: list[str] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            await self._serve(reader, writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(self.stale)
        self.stale = b""
        decoder, text = json.JSONDecoder(), ""
        while data := await reader.read(4096):
            text += data.rpartition(b"\xff")[2].decode()
            while text.strip():
                try:
                    request, end = decoder.raw_decode(text := text.lstrip())
                except ValueError:
                    break
                text = text[end:]
                await self._answer(request, writer)

    async def _answer(self, request: dict[str, object], writer: asyncio.StreamWriter) -> None:
        command = str(request["execute"])
        self.heard.append(command)
        if command in self.held:
            self.reached.set()
            await self.release.wait()
        reply = self._carry_out(command, request)
        if command in self.odd:
            writer.write(self.odd[command] or b"")
            return
        mark = b"\xff" if command == "guest-sync-delimited" else b""
        number = {"id": request["id"]} if "id" in request else {}
        writer.write(mark + json.dumps({**reply, **number}).encode() + b"\n")

    def _carry_out(self, command: str, request: dict[str, object]) -> dict[str, object]:
        match command:
            case "guest-sync-delimited":
                return {"return": request["arguments"]["id"]}  # type: ignore[index]
            case "guest-fsfreeze-status":
                return {"return": "frozen" if self.frozen else "thawed"}
            case "guest-fsfreeze-freeze" if self.overtaken:
                self.frozen = 1
            case "guest-fsfreeze-freeze" if not self.frozen:
                self.frozen = self.filesystems
                return {"return": self.frozen}
            case "guest-fsfreeze-thaw":
                thawed, self.frozen = self.frozen, 0
                return {"return": thawed}
        what = f"Command {command} has been disabled: the agent is in frozen state"
        return {"error": {"class": "GenericError", "desc": what}}


Work = Callable[[FakeAgent, str, AgentJournal], Awaitable[None]]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for an agent that says nothing has to be waited for in full."""
    monkeypatch.setattr(agent_module, "SYNC_SECONDS", 0.3)
    monkeypatch.setattr(quiesce, "SYNC_SECONDS", 0.3)
    monkeypatch.setattr(quiesce, "FREEZE_SECONDS", 0.3)
    monkeypatch.setattr(quiesce, "THAW_SECONDS", 1.0)


def run(folder: Path, work: Work) -> None:
    async def session() -> None:
        async with serving(folder) as fake:
            await work(fake, str(folder / "ga"), AgentJournal(folder / "journal"))

    asyncio.run(session())


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[FakeAgent]:
    fake = FakeAgent()
    server = await asyncio.start_unix_server(fake.serve, folder / "ga")
    try:
        yield fake
    finally:
        server.close()
        clients = asyncio.all_tasks() - {asyncio.current_task()}
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)


def entries(folder: Path) -> list[Path]:
    return list((folder / "journal").iterdir())


def test_what_others_left_in_the_channel_is_not_taken_for_ours(folder: Path) -> None:
    async def work(fake: FakeAgent, address: str, journal: AgentJournal) -> None:
        late = b'{"return": {}}\n{"return": 1, "id": "__qmp#00001"}\n'
        for stale in (late, b'{"return": "half', b"\xff" + b'{"return": 5}\n', b"\0\x80garbage\n" * 1000, b"\xff\xff"):
            fake.stale = stale
            async with await Agent.connect(address, SOON) as agent:
                assert await agent.status(SOON) == "thawed"

    run(folder, work)


@pytest.mark.parametrize("flood", [b"x" * (MAX_STALE + 1), b"\xff{" * (MAX_STALE // 2 + 1)])
def test_what_floods_the_channel_is_no_agent(folder: Path, flood: bytes) -> None:
    async def work(fake: FakeAgent, address: str, journal: AgentJournal) -> None:
        fake.stale = flood
        with pytest.raises(AgentRefusedError, match="not a guest agent"):
            await Agent.connect(address, SOON)

    run(folder, work)


def test_nobody_answers(folder: Path) -> None:
    async def work(fake: FakeAgent, address: str, journal: AgentJournal) -> None:
        fake.odd["guest-sync-delimited"] = None
        with pytest.raises(AgentSilentError, match=r"within 0\.3 s.*No guest agent runs.*another client.*paused"):
            await Agent.connect(address, SOON)

    run(folder, work)


def test_there_is_nothing_to_connect_to(folder: Path) -> None:
    async def work(fake: FakeAgent, address: str, journal: AgentJournal) -> None:
        for wrong in (folder / "missing", folder / "journal"):
            with pytest.raises(MonitorConnectError, match=r"org\.qemu\.guest_agent\.0"):
                await Agent.connect(str(wrong), SOON)

    run(folder, work)


def test_a_peer_that_hangs_up_is_no_agent(folder: Path) -> None:
    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async def work(fake: FakeAgent, address: str, journal: AgentJournal) -> None:
        async with await asyncio.start_unix_server(hang_up, folder / "other"):
            with pytest.raises(AgentError):
                await Agent.connect(str(folder / "other"), SOON)

    run(folder, work)


@pytest.mark.parametrize(
    "said",
    [b"", b"[]\n", b'{"return": 5, "id": "another"}\n', b"no JSON\n", b'{"return": "cold", "id": "__qmp#00001"}\n'],
)
def test_odd_answers_are_told_as_such(folder: Path, said: bytes) -> None:
    async def work(fake: FakeAgent, address: str, journal: AgentJournal) -> None:
        fake.odd["guest-fsfreeze-status"] = said
        async with await Agent.connect(address, SOON) as agent:
            with pytest.raises(AgentError):
                await agent.status(Deadline(0.3))

    run(folder, work)


def test_at_rest_is_what_it_says(folder: Path) -> None:
    async def work(fake: FakeAgent, address: str, journal: AgentJournal) -> None:
        async with at_rest(address, journal, SOON) as rest:
            (entry,) = entries(folder)
            assert json.loads(entry.read_text())["agent"] == address
            assert stat.S_IMODE(entry.stat().st_mode) == 0o600
            assert fake.frozen == 2
        assert (fake.frozen, entries(folder)) == (0, [])
        assert (rest.consistency.kind, rest.consistency.filesystems, rest.consistency.reason) == ("frozen", 2, "")
        assert rest.consistency.window_ms > 0

    run(folder, work)


def test_it_is_written_down_before_it_is_frozen(folder: Path) -> None:
    async def work(fake: FakeAgent, address: str, journal: AgentJournal) -> None:
        (folder / "journal").rmdir()
        (folder / "journal").write_text("no folder any more")
        with pytest.raises(UsageError, match="journal of frozen guests"):
            async with at_rest(address, journal, SOON):
                pass
        assert "guest-fsfreeze-freeze" not in fake.heard

    run(folder, work)


@pytest.mark.parametrize("required", [True, False])
def test_frozen_by_somebody_else_is_left_alone(folder: Path, required: bool) -> None:
    async def work(fake: FakeAgent, address: str, journal: AgentJournal) -> None:
        fake.frozen = 1
        if required:
            with pytest.raises(AgentRefusedError, match="not by us"):
                async with at_rest(address, journal, SOON):
                    pass
        else:
            async with at_rest(address, journal, SOON, required=False) as rest:
                assert rest.consistency.kind == "crash-consistent"
            assert "not by us" in rest.consistency.reason
            assert rest.consistency.remedy
        assert (fake.frozen, entries(folder)) == (1, [])
        assert "guest-fsfreeze-thaw" not in fake.heard

    run(folder, work)


@pytest.mark.parametrize("required", [True, False])
def test_somebody_who_freezes_just_before_us_is_left_alone(folder: Path, required: bool) -> None:
    async def work(fake: FakeAgent, address: str, journal: AgentJournal) -> None:
        fake.overtaken = True
        if required:
            with pytest.raises(AgentRefusedError, match="frozen state"):
                async with at_rest(address, journal, SOON):
                    pass
        else:
            async with at_rest(address, journal, SOON, required=False) as rest:
                pass
            assert "frozen state" in rest.consistency.reason
        assert (fake.frozen, entries(folder)) == (1, [])

    run(folder, work)


@pytest.mark.parametrize("required", [True, False])
def test_no_agent_is_an_error_or_a_statement(folder: Path, required: bool) -> None:
    async def work(fake: FakeAgent, address: str, journal: AgentJournal) -> None:
        fake.odd["guest-sync-delimited"] = None
        if required:
            with pytest.raises(AgentSilentError):
                async with at_rest(address, journal, SOON):
                    pass
        else:
            async with at_rest(address, journal, SOON, required=False) as rest:
                pass
            assert (rest.consistency.kind, rest.consistency.window_ms) == ("crash-consistent", 0)
            assert "no reply" in rest.consistency.reason

    run(folder, work)


@pytest.mark.parametrize("required", [True, False])
def test_a_freeze_that_comes_too_late_is_thawed_too(folder: Path, required: bool) -> None:
    """The reply does not come in time, the freeze itself comes later: the thaw stands in line behind it."""

    async def work(fake: FakeAgent, address: str, journal: AgentJournal) -> None:
        fake.held.add("guest-fsfreeze-freeze")
        asyncio.get_running_loop().call_later(0.5, fake.release.set)
        if required:
            with pytest.raises(AgentSilentError, match="guest-fsfreeze-freeze"):
                async with at_rest(address, journal, SOON):
                    pytest.fail("it was not frozen")
        else:
            async with at_rest(address, journal, SOON, required=False) as rest:
                assert fake.frozen == 0  # no freeze is on its way any more that would hold this up
            assert rest.consistency.kind == "crash-consistent"
        assert fake.heard[-2:] == ["guest-fsfreeze-freeze", "guest-fsfreeze-thaw"]
        assert (fake.frozen, entries(folder)) == (0, [])

    run(folder, work)


def test_a_guest_that_nothing_can_freeze(folder: Path) -> None:
    async def work(fake: FakeAgent, address: str, journal: AgentJournal) -> None:
        fake.filesystems = 0
        with pytest.raises(AgentRefusedError, match="no filesystem"):
            async with at_rest(address, journal, SOON):
                pass
        async with at_rest(address, journal, SOON, required=False) as rest:
            pass
        assert (rest.consistency.kind, rest.consistency.window_ms) == ("crash-consistent", 0)

    run(folder, work)


def test_thawed_too_early_is_no_rest(folder: Path) -> None:
    async def work(fake: FakeAgent, address: str, journal: AgentJournal) -> None:
        async with at_rest(address, journal, SOON) as rest:
            fake.frozen = 0
        assert (rest.consistency.kind, rest.consistency.filesystems) == ("crash-consistent", 0)
        assert "thawed" in rest.consistency.reason

    run(folder, work)


def test_what_takes_too_long_is_ended_and_thawed(folder: Path) -> None:
    async def work(fake: FakeAgent, address: str, journal: AgentJournal) -> None:
        with pytest.raises(DeadlineError, match="while the guest is frozen"):
            async with at_rest(address, journal, SOON, seconds=0.05):
                await asyncio.Event().wait()
        assert (fake.frozen, entries(folder)) == (0, [])
        with pytest.raises(TimeoutError, match="of its own"):
            async with at_rest(address, journal, SOON):
                raise TimeoutError("of its own")
        assert fake.frozen == 0

    run(folder, work)


@pytest.mark.parametrize("moment", ["guest-fsfreeze-status", "guest-fsfreeze-freeze", "body", "guest-fsfreeze-thaw"])
def test_cancelled_at_any_moment_it_is_thawed(folder: Path, moment: str) -> None:
    async def work(fake: FakeAgent, address: str, journal: AgentJournal) -> None:
        async def job() -> None:
            async with at_rest(address, journal, SOON):
                if moment == "body":
                    fake.reached.set()
                    await asyncio.Event().wait()

        fake.held.add(moment)
        task = asyncio.ensure_future(job())
        await fake.reached.wait()
        task.cancel()
        await asyncio.sleep(0)
        fake.release.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (fake.frozen, entries(folder)) == (0, [])

    run(folder, work)


def test_a_thaw_that_fails_is_told_and_tried_again_at_the_next_start(folder: Path) -> None:
    async def work(fake: FakeAgent, address: str, journal: AgentJournal) -> None:
        fake.held.add("guest-fsfreeze-thaw")
        with pytest.raises(AgentSilentError, match=r"may still be frozen.*guest-fsfreeze-thaw"):
            async with at_rest(address, journal, SOON):
                pass
        assert (fake.frozen, len(entries(folder))) == (2, 1)
        fake.held.clear()
        told: list[str] = []
        assert await thaw_leftovers(journal, told.append) == [address]
        assert (fake.frozen, entries(folder), told) == (0, [], [])

    run(folder, work)


def test_a_lost_connection_is_made_again_for_the_thaw(folder: Path) -> None:
    async def work(fake: FakeAgent, address: str, journal: AgentJournal) -> None:
        async with at_rest(address, journal, SOON) as rest:
            assert rest.agent is not None
            await rest.agent.close()
        assert rest.consistency.kind == "crash-consistent"  # nobody could say that it was frozen until the end
        assert (fake.frozen, entries(folder)) == (0, [])

    run(folder, work)


def test_leftovers_of_the_living_and_of_others_are_left_alone(folder: Path) -> None:
    async def work(fake: FakeAgent, address: str, journal: AgentJournal) -> None:
        alive = journal.write_down(address)
        (folder / "journal/frozen-00000000.json").symlink_to("/etc/passwd")
        (folder / "journal/frozen-00000001.json").write_text("[" * 5000)
        (folder / "journal/frozen-00000002.json").write_text('{"agent": 7}')
        os.mkfifo(folder / "journal/frozen-00000003.json")
        fake.frozen = 1
        assert await thaw_leftovers(journal, pytest.fail) == []
        assert fake.frozen == 1
        alive.let_go()
        assert await thaw_leftovers(journal, pytest.fail) == [address]
        gone = journal.write_down(str(folder / "gone"))
        gone.let_go()
        told: list[str] = []
        assert await thaw_leftovers(journal, told.append) == []
        assert len(told) == 1
        assert not gone.path.exists()

    run(folder, work)
