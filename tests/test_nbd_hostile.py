"""Both doors against a server that does everything wrong: each case ends with the documented error, in time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qmpnbd.errors import (
    DeadlineError,
    NbdConnectError,
    NbdContextError,
    NbdDisconnectedError,
    NbdProtocolError,
    NbdRefusedError,
    NbdRequestError,
    NbdUnsupportedError,
    QmpnbdError,
    UsageError,
)
from qmpnbd.extents import ExtentMap
from qmpnbd.nbd import constants, messages, wire
from qmpnbd.nbd.constants import ChunkType, Command, Option, OptionReplyType
from tests.hostile_nbd import (
    BASE,
    DEPTH,
    Script,
    chunk,
    failure,
    honest,
    serving,
    simple,
    status,
)
from tests.nbd_doors import SHORT, Door, both_doors
from tests.option_bytes import info, meta, option_reply
from tests.servers import wait_until

pytestmark = pytest.mark.usefixtures("memory_budget")

HONEST = {DEPTH: ExtentMap.uniform(8 << 20, 1), BASE: ExtentMap.uniform(8 << 20, 0)}


# A server that is honest, and one that is slow about it.


@both_doors
@pytest.mark.parametrize("drip", [False, True])
def test_maps_flush_and_leave(door: Door, folder: Path, drip: bool) -> None:
    script = Script(drip=drip)
    with serving(folder, script) as uri:
        assert door(uri, "maps", "flush", "maps") == [HONEST, None, HONEST]
        wait_until(lambda: len(script.requests) == 4, "the leave")
    assert [request.command for request in script.requests] == [
        Command.BLOCK_STATUS,
        Command.FLUSH,
        Command.BLOCK_STATUS,
        Command.DISC,
    ]
    assert len({request.cookie for request in script.requests}) == 4


@both_doors
def test_a_large_reply_arrives_whole(door: Door, folder: Path) -> None:
    extents = [(512, n % 3) for n in range(2**18)]

    def tell(request: messages.RequestHeader, count: int) -> Iterator[bytes]:
        yield status(request.cookie, 7, extents, done=True)

    with serving(folder, Script(size=2**27, answer=tell)) as uri:
        assert door(uri, "maps", contexts=[DEPTH]) == [{DEPTH: ExtentMap.of_extents(extents)}]


@both_doors
def test_without_contexts_there_are_no_maps_but_a_flush(door: Door, folder: Path) -> None:
    with serving(folder, Script()) as uri:
        refused, flushed = door(uri, "maps", "flush", contexts=())
    assert isinstance(refused, UsageError)
    assert flushed is None


@both_doors
def test_flush_where_there_is_none(door: Door, folder: Path) -> None:
    with serving(folder, Script(flags=0x0003)) as uri:
        refused, mapped = door(uri, "flush", "maps")
    assert isinstance(refused, NbdUnsupportedError)
    assert mapped == HONEST


# Servers with which no connection comes about.

HELLO = wire.Greeting.newstyle(3).pack()
SET, GO = Option.SET_META_CONTEXT, Option.GO
REFUSING: dict[str, tuple[Script, type[QmpnbdError]]] = {
    "qmp": (Script(greeting=b'{"QMP": {"version": {"qemu": {}}}}\r\n'), NbdProtocolError),
    "oldstyle": (Script(greeting=b"NBDMAGIC\0\0\x42\2\x81\x86\x12\x53" + bytes(136)), NbdUnsupportedError),
    "not fixed": (Script(greeting=wire.Greeting.newstyle(0).pack()), NbdUnsupportedError),
    "no greeting": (Script(cut=0), NbdDisconnectedError),
    "4 GiB reply": (Script(options={8: option_reply(8, 1, length=2**32 - 1)}), NbdProtocolError),
    "no structured replies": (Script(options={8: option_reply(8, OptionReplyType.ERR_UNSUP)}), NbdUnsupportedError),
    "no such export": (Script(options={SET: option_reply(SET, OptionReplyType.ERR_UNKNOWN)}), NbdRefusedError),
    "tls only": (Script(options={8: option_reply(8, OptionReplyType.ERR_TLS_REQD, b"no")}), NbdRefusedError),
    "no depth": (Script(contexts=[(0, BASE)]), NbdContextError),
    "unasked context": (Script(options={SET: meta(0, "x:y")}), NbdProtocolError),
    "endless contexts": (Script(options={SET: meta(0, DEPTH) * 10_000}), NbdProtocolError),
    "endless infos": (Script(options={GO: info(b"\0\x09") * 10_000}), NbdProtocolError),
    "2**63": (Script(size=2**63), NbdUnsupportedError),
    "2**64 - 1": (Script(size=2**64 - 1), NbdUnsupportedError),
    "blocks of 3": (Script(sizes=(3, 4096, 1 << 25)), NbdProtocolError),
}


@both_doors
@pytest.mark.parametrize("case", REFUSING)
def test_no_connection(door: Door, folder: Path, case: str) -> None:
    script, error = REFUSING[case]
    with serving(folder, script) as uri, pytest.raises(error) as caught:
        door(uri)
    assert str(caught.value).startswith("nbd+unix:///disk?socket=")


@both_doors
def test_leave_is_taken_of_a_server_without_the_context(door: Door, folder: Path) -> None:
    script = Script(contexts=())
    with serving(folder, script) as uri:
        with pytest.raises(NbdContextError, match="qemu-nbd -A"):
            door(uri)
        wait_until(lambda: Option.ABORT in script.asked, "the leave")


@both_doors
def test_silence_instead_of_a_greeting(door: Door, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(folder, Script(greeting=b"")) as uri:
        with pytest.raises(DeadlineError, match=r"the greeting.*connection limit"):
            door(uri, seconds=SHORT)
        monkeypatch.setattr(constants, "GREETING_PATIENCE", SHORT)
        with pytest.raises(NbdConnectError, match=r"no NBD greeting came within 0\.2 s.*connection limit"):
            door(uri)


@both_doors
def test_silence_after_the_greeting(door: Door, folder: Path) -> None:
    with serving(folder, Script(options={GO: b""})) as uri, pytest.raises(DeadlineError, match="reply to NBD_OPT_GO"):
        door(uri, seconds=SHORT)


# Servers that go wrong later.

Answer = Callable[[messages.RequestHeader, int], list[bytes]]


def first_only(wrong: Callable[[int], bytes]) -> Answer:
    """Answers the first request wrongly and the others honestly."""
    return lambda request, count: [wrong(request.cookie)] if count == 1 else list(honest(request, count))


USABLE: dict[str, Answer] = {
    "error": first_only(lambda c: failure(c, 5, b"can't get block status")),
    "error, then data": first_only(lambda c: failure(c, 5, done=False) + status(c, 4, [(9, 0)], done=True)),
    "chunk after done": first_only(lambda c: failure(c, 5) + status(c, 4, [(8 << 20, 0)], done=True)),
    "unknown error type": first_only(lambda c: failure(c, 5, kind=0x8077)),
    "simple error": first_only(lambda c: simple(c, 5)),
}


@both_doors
@pytest.mark.parametrize("case", USABLE)
def test_a_failed_request_leaves_the_client_usable(door: Door, folder: Path, case: str) -> None:
    with serving(folder, Script(answer=USABLE[case])) as uri:
        failed, mapped, flushed = door(uri, "maps", "maps", "flush")
    assert isinstance(failed, NbdRequestError)
    assert (failed.wire_error, failed.offset, failed.length) == (5, 0, 8 << 20)
    assert (mapped, flushed) == (HONEST, None)


FULL = [(8 << 20, 1)]
WRONG: dict[str, Callable[[int], bytes]] = {
    "zero length": lambda c: status(c, 7, [(0, 1)]),
    "zero length in the middle": lambda c: status(c, 7, [(512, 1), (0, 0), (512, 1)]),
    "past the end": lambda c: status(c, 7, [(9 << 20, 1)]),
    "3 x 4 GiB": lambda c: status(c, 7, [(2**32 - 512, 1)] * 3),
    "one extent more": lambda c: status(c, 7, [*FULL, (512, 1)]),
    "unknown context": lambda c: status(c, 99, FULL),
    "context twice": lambda c: status(c, 7, FULL) * 2,
    "context missing": lambda c: status(c, 7, FULL, done=True),
    "no status": lambda c: chunk(c, ChunkType.NONE, done=True),
    "simple success": simple,
    "wrong cookie": lambda c: status(c + 1, 7, FULL),
    "wrong magic": lambda c: b"\0" * 20,
    "unknown type": lambda c: chunk(c, 0x77),
    "data": lambda c: chunk(c, ChunkType.OFFSET_DATA, bytes(9)),
    "4 GiB chunk": lambda c: chunk(c, ChunkType.BLOCK_STATUS, length=2**32 - 4),
    "endless chunks": lambda c: failure(c, 5, done=False) * 10_000,
    "error 0": lambda c: failure(c, 0),
}


@both_doors
@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_true_ends_the_connection(door: Door, folder: Path, case: str) -> None:
    with serving(folder, Script(answer=first_only(WRONG[case]))) as uri:
        wrong, after = door(uri, "maps", "maps")
    assert isinstance(wrong, NbdProtocolError)
    assert isinstance(after, NbdDisconnectedError)


@both_doors
def test_extents_of_one_byte_end_in_time(door: Door, folder: Path) -> None:
    def tell(request: messages.RequestHeader, count: int) -> list[bytes]:
        return [status(request.cookie, 7, [(1, count % 2)]), status(request.cookie, 4, [(1, 0)], done=True)]

    with serving(folder, Script(size=65536, answer=tell)) as uri:
        (outcome,) = door(uri, "maps")
    assert isinstance(outcome, NbdProtocolError)


@both_doors
@pytest.mark.parametrize(
    ("said", "after"),
    [
        (b"", None),
        (status(1, 7, FULL), None),
        (status(1, 7, FULL)[:10], NbdProtocolError),
        (status(1, 7, FULL)[:25], NbdProtocolError),
    ],
)
def test_silence_in_the_middle(door: Door, folder: Path, said: bytes, after: type[QmpnbdError] | None) -> None:
    with serving(folder, Script(answer=lambda request, count: [said])) as uri:
        silent, flushed = door(uri, "maps", "flush", seconds=SHORT)
    assert isinstance(silent, DeadlineError)
    assert "a reply to NBD_CMD_BLOCK_STATUS [0x0, 0x800000)" in str(silent)
    assert flushed is None if after is None else isinstance(flushed, after)


@both_doors
def test_a_server_that_shuts_down(door: Door, folder: Path) -> None:
    script = Script(answer=lambda request, count: [failure(request.cookie, 108, b"bye")])
    with serving(folder, script) as uri:
        outcomes = door(uri, "maps", "flush")
        assert [type(outcome) for outcome in outcomes] == [NbdDisconnectedError] * 2
        wait_until(lambda: script.requests[-1].command == Command.DISC, "the leave")


@both_doors
def test_an_empty_export(door: Door, folder: Path) -> None:
    with serving(folder, Script(size=0)) as uri:
        assert door(uri, "maps") == [{DEPTH: ExtentMap([], []), BASE: ExtentMap([], [])}]


def test_the_memory_budget_of_these_tests_is_enforced() -> None:
    with pytest.raises(MemoryError):
        [bytearray(32 << 20) for _ in range(16)]
