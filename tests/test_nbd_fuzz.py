"""A share of `tests.fuzz_nbd` in every run; another one each day would be chance, so the seed is fixed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from qmpnbd.errors import DeadlineError, NbdError, NbdRequestError, QmpnbdError, UsageError
from qmpnbd.nbd import transfer
from qmpnbd.nbd.connection import Connection
from qmpnbd.nbd.constants import TransmissionFlag
from qmpnbd.nbd.export import Export
from tests import fuzz_nbd, fuzz_nbd_handshake, fuzz_nbd_recorded, nbd_recordings
from tests.hostile_nbd import honest_read
from tests.nbd_doors import Door, both_doors
from tests.nbd_line import Line
from tests.nbd_verdict import FindingError, Verdict
from tests.option_bytes import feed

within_budget = pytest.mark.usefixtures("memory_budget")


@within_budget
@pytest.mark.parametrize("part", range(4))
def test_servers_made_of_chance(part: int) -> None:
    ends = fuzz_nbd.run(5500, seed=1, first=part * 5500)
    assert sum(ends.values()) == 5500
    for expected in ("NbdProtocolError", "NbdDisconnectedError", "maps", "read", "export", "recorded: export"):
        assert any(expected in end for end in ends), f"no attack ended with {expected}"


def test_a_long_run_says_how_far_it_is_and_how_all_of_it_ended(capsys: pytest.CaptureFixture[str]) -> None:
    fuzz_nbd.main(1000, seed=5)
    progress = capsys.readouterr()
    *endings, last = progress.out.splitlines()
    assert last == "1,000 inputs of seed 5, 200 of them recorded sessions: nothing found"
    assert sum(int(line.split()[0].replace(",", "")) for line in endings) == 1000
    assert progress.err.startswith("1,000 of 1,000 inputs")


@pytest.mark.parametrize(("talk", "said"), fuzz_nbd_handshake.TALKS)
def test_negotiations_that_are_not_damaged_agree_on_the_export(talk: Any, said: bytes) -> None:
    export, _ = feed(talk(), said)
    assert (export.size, export.flags) == (fuzz_nbd_handshake.SIZE, fuzz_nbd_handshake.FLAGS)


# Recorded sessions.


@pytest.mark.parametrize("recording", fuzz_nbd_recorded.recordings(), ids=lambda recording: recording.name)
def test_a_recorded_session_that_is_not_damaged_goes_as_it_went(recording: nbd_recordings.Recording) -> None:
    export, *outcomes = fuzz_nbd_recorded.play(recording, recording.said)
    assert not isinstance(export, Exception)
    assert recording.name.endswith(f", {export.replies}") or export.replies == "structured"
    assert len(outcomes) == len(recording.steps)
    failures = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    assert all(isinstance(failure, NbdRequestError) for failure in failures)
    assert bool(failures) == ("error" in recording.name)


@pytest.mark.real
def test_sessions_recorded_now_are_like_those_recorded_before() -> None:
    names = []
    for recording, seen in nbd_recordings.everything():
        names.append(recording.name)
        _, *outcomes = fuzz_nbd_recorded.play(recording, recording.said)
        for outcome, expected in zip(outcomes, seen, strict=True):
            if isinstance(expected, QmpnbdError):
                assert isinstance(outcome, QmpnbdError)
                assert (type(outcome), outcome.what) == (type(expected), expected.what)
            else:
                assert outcome == expected
    assert names == [recording.name for recording in fuzz_nbd_recorded.recordings()]


@both_doors
@within_budget
def test_damaged_sessions_through_the_doors(door: Door, folder: Path) -> None:
    """The doors say what the programs say of the same bytes, or an error: they may have read further."""
    player = nbd_recordings.Player(folder)
    ends: dict[str, int] = {}
    for number in range(150):
        chance = random.Random(f"door {number}")
        recording = chance.choice(fuzz_nbd_recorded.recordings())
        said = fuzz_nbd_recorded.damaged(chance, recording)
        export, *expected = fuzz_nbd_recorded.play(recording, said)
        thread = player.play(nbd_recordings.in_turns(recording, said))
        found: list[Any]
        try:
            found = door(player.uri, *recording.steps, contexts=recording.contexts, seconds=1.0, best=recording.best)
        except (NbdError, DeadlineError) as error:
            found = [error]
        else:
            assert not isinstance(export, Exception), f"input {number}: {export}"
        thread.join(20)
        assert not thread.is_alive(), f"input {number}: the client did not close"
        for outcome, other in zip(found, expected, strict=False):
            ends[type(outcome).__name__] = ends.get(type(outcome).__name__, 0) + 1
            if isinstance(outcome, QmpnbdError):
                assert isinstance(outcome, (NbdError, DeadlineError, UsageError)), f"input {number}: {outcome!r}"
                if not isinstance(outcome, NbdRequestError):
                    break
            else:
                assert outcome == other, f"input {number}"
    player.close()
    assert {"bytearray", "list", "dict", "NbdProtocolError", "NbdRequestError"} <= set(ends)


# It finds what it is there to find.


@pytest.mark.parametrize("careless", ["gaps", "failures"])
def test_a_careless_client_is_found_out(careless: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does not look for bytes that were never told, and one that takes an error for a success."""
    if careless == "gaps":
        monkeypatch.setattr(transfer.Destination, "done", lambda self, request: None)
    else:
        monkeypatch.setattr(Connection, "require_success", lambda self, request: None)
    with pytest.raises(FindingError, match="input"):
        fuzz_nbd.run(3000, seed=2)


def test_a_byte_that_was_not_written_is_found_out() -> None:
    connection = Connection(Export("disk", 8192, TransmissionFlag(3)), "here")
    line = Line(connection, lambda request: honest_read(request, 0))
    verdict, buffer = Verdict(line), bytearray(b"\xaa" * 600)
    line.run(transfer.Reading(connection.export, "here", 512, memoryview(buffer)).run(connection))
    verdict.read(512, buffer)
    for index in range(len(buffer)):
        unwritten = buffer[:index] + b"\xaa" + buffer[index + 1 :]
        with pytest.raises(FindingError, match="not what the server told"):
            verdict.read(512, unwritten)
