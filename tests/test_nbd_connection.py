"""The transmission phase against bytes written by hand: every kind of chunk, and what must not be believed."""

from __future__ import annotations

from types import MappingProxyType

import pytest

from qmpnbd.errors import (
    NbdDisconnectedError,
    NbdProtocolError,
    NbdRequestError,
    NbdUnsupportedError,
    UsageError,
)
from qmpnbd.nbd import commands, constants
from qmpnbd.nbd.connection import Connection, State
from qmpnbd.nbd.constants import ChunkType, Command, TransmissionFlag
from qmpnbd.nbd.export import Export
from qmpnbd.nbd.messages import RequestHeader
from qmpnbd.nbd.requests import Job, Request, Sink, Status, Wait
from qmpnbd.nbd.wire import Send
from tests.hostile_nbd import BASE, DEPTH, chunk, failure, simple, status
from tests.nbd_line import Line

EXPORT = Export("disk", 1 << 20, TransmissionFlag(0x058F), contexts=MappingProxyType({DEPTH: 7, BASE: 4}))
GOOD = status(1, 7, [(512, 1)]) + status(1, 4, [(256, 0), (256, 3)], done=True)


class Talk(Sink):
    """A connection, and what it was told."""

    def __init__(self, export: Export = EXPORT) -> None:
        self.connection = Connection(export, "here")
        self.statuses: list[tuple[int, bytes]] = []

    def ask(self, data: bytes, command: Command = Command.BLOCK_STATUS, offset: int = 0, length: int = 512) -> bytes:
        return say(self.connection, self.connection.call(command, offset, length, self), data)

    def status(self, request: Request, told: Status) -> None:
        self.statuses.append((told.context_id, bytes(told.entries)))


def say(connection: Connection, job: Job[None], data: bytes) -> bytes:
    """Runs a call whose answer is known; returns what it sent."""
    line = Line(connection, data=data)
    line.run(job)
    assert not line.incoming, "bytes were left over"
    return line.sent


def test_a_request_and_its_chunks() -> None:
    talk = Talk()
    assert talk.ask(GOOD) == RequestHeader(7, 1, 0, 512).pack()
    assert [(id_, len(entries)) for id_, entries in talk.statuses] == [(7, 8), (4, 16)]
    assert talk.statuses[0][1] == bytes.fromhex("00000200 00000001")
    assert not talk.connection.busy
    assert talk.ask(status(2, 7, [(1, 1)], done=True), offset=512) == RequestHeader(7, 2, 512, 512).pack()


def test_the_end_may_come_in_a_chunk_of_its_own() -> None:
    talk = Talk()
    talk.ask(status(1, 7, [(512, 1)]) + chunk(1, ChunkType.NONE, done=True))
    assert len(talk.statuses) == 1


def test_an_end_of_the_stream_anywhere_leaves_the_connection_out_of_step() -> None:
    for length in range(len(GOOD)):
        talk = Talk()
        with pytest.raises(NbdDisconnectedError):
            talk.ask(GOOD[:length])
        assert not talk.connection.live
    with pytest.raises(AssertionError, match="left over"):
        Talk().ask(GOOD + b"\0")


@pytest.mark.parametrize(
    ("data", "wire_error", "match"),
    [
        (failure(1, 5, b"can't get block status"), 5, r"BLOCK_STATUS \[0x0, 0x200\) failed .*\(EIO: can't get"),
        (failure(1, 22, b"line\nbreak"), 22, r"EINVAL: line\\nbreak"),
        (failure(1, 5, kind=ChunkType.ERROR_OFFSET), 5, "EIO at 0x0"),
        (failure(1, 5, b"?", kind=0x8077), 5, "EIO"),
        (failure(1, 4711), 4711, "unknown error 4711"),
        (failure(1, 5, b"first", done=False) + failure(1, 1, b"second"), 5, "first"),
        (failure(1, 5, b"early", done=False) + status(1, 4, [(512, 0)], done=True), 5, "early"),
        (status(1, 7, [(512, 1)]) + failure(1, 12), 12, "ENOMEM"),
        (simple(1, 22), 22, "EINVAL"),
    ],
)
def test_a_request_that_failed_leaves_the_connection_usable(data: bytes, wire_error: int, match: str) -> None:
    talk = Talk()
    with pytest.raises(NbdRequestError, match=match) as caught:
        talk.ask(data)
    assert (caught.value.wire_error, caught.value.offset, caught.value.length) == (wire_error, 0, 512)
    talk.ask(status(2, 7, [(512, 1)], done=True))


def test_chunks_after_done_are_skipped_while_the_request_is_remembered() -> None:
    late = status(1, 4, [(512, 0)] * 500, done=True)
    talk = Talk()
    with pytest.raises(NbdRequestError):
        talk.ask(failure(1, 5))
    talk.ask(late + status(2, 7, [(512, 1)], done=True))
    assert [id_ for id_, _ in talk.statuses] == [7]
    with pytest.raises(NbdProtocolError, match="more than 18 chunks"):
        talk.ask(late * 18)


@pytest.mark.parametrize("requests", [constants.MAX_FINISHED_COOKIES // 2, 1300, 4000])
def test_half_of_the_cookies_that_are_remembered_at_most_are_remembered_always(requests: int) -> None:
    talk = Talk()
    for cookie in range(1, requests + 1):
        talk.ask(simple(cookie))
    for asked, back in enumerate((0, 1, constants.MAX_FINISHED_COOKIES // 2 - 3), start=requests + 1):
        talk.ask(status(requests - back, 7, [(512, 1)], done=True) + simple(asked))
    assert talk.statuses == []


def test_a_cookie_that_was_forgotten_is_unknown() -> None:
    talk = Talk()
    for cookie in range(1, 1026):
        talk.ask(simple(cookie))
    with pytest.raises(NbdProtocolError, match="unknown cookie 0x1"):
        talk.ask(simple(1))


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"\0\0\0\1", "begins with 0x00000001"),
        (simple(2), "unknown cookie"),
        (status(2, 7, [(512, 1)])[:20], "unknown cookie"),
        (chunk(1, ChunkType.NONE), "not the last"),
        (chunk(1, ChunkType.NONE, done=True, length=1), "with 1 bytes"),
        (chunk(1, ChunkType.OFFSET_DATA, length=100), "answers nothing"),
        (chunk(1, ChunkType.OFFSET_HOLE, length=12), "answers nothing"),
        (chunk(1, 6, length=12), "answers nothing"),
        (chunk(1, 0x77, length=0), "answers nothing"),
        (chunk(1, ChunkType.BLOCK_STATUS, length=4), "with 4 bytes"),
        (chunk(1, ChunkType.BLOCK_STATUS, length=13), "with 13 bytes"),
        (chunk(1, ChunkType.BLOCK_STATUS, length=0), "with 0 bytes"),
        (chunk(1, ChunkType.BLOCK_STATUS, length=4 + 8 * 2**20 + 8), "with 8388620 bytes"),
        (chunk(1, ChunkType.BLOCK_STATUS, length=2**32 - 4), "with 4294967292 bytes"),
        (chunk(1, ChunkType.ERROR, length=5), "with 5 bytes"),
        (chunk(1, ChunkType.ERROR_OFFSET, length=13), "with 13 bytes"),
        (chunk(1, 0x8077, length=2**32 - 1), "with 4294967295 bytes"),
        (chunk(1, ChunkType.ERROR, bytes.fromhex("00000005 0001")), "does not fit"),
        (chunk(1, ChunkType.ERROR, bytes.fromhex("00000000 0000")), "error 0"),
        (chunk(1, ChunkType.ERROR, bytes.fromhex("00000005 0000 00")), "1 bytes behind"),
        (chunk(1, ChunkType.ERROR_OFFSET, bytes.fromhex("00000005 0001 aa 00000000000000")), "7 bytes behind"),
        (chunk(1, ChunkType.ERROR_OFFSET, bytes.fromhex("00000005 0000 0000000000000200")), "error at 0x200"),
        (chunk(1, ChunkType.ERROR, bytes.fromhex("00000005 0000")) * 19, "more than 18 chunks"),
    ],
)
def test_what_breaks_the_protocol_kills_the_connection(data: bytes, match: str) -> None:
    talk = Talk()
    with pytest.raises(NbdProtocolError, match=match):
        talk.ask(data)
    assert talk.connection.state is State.DEAD
    with pytest.raises(NbdDisconnectedError, match="lost before"):
        talk.ask(b"", Command.FLUSH)
    assert talk.connection.disconnect() == b""


def test_structured_replies_that_were_not_agreed_on_are_refused() -> None:
    talk = Talk(Export("disk", 512, TransmissionFlag(0x058F), replies="simple"))
    with pytest.raises(NbdProtocolError, match="0x668e33ef"):
        talk.ask(chunk(1, ChunkType.NONE, done=True), Command.FLUSH)


def test_flush() -> None:
    connection = Connection(EXPORT, "here")
    assert say(connection, commands.flush(connection), simple(1)) == RequestHeader(Command.FLUSH, 1).pack()
    say(connection, commands.flush(connection), chunk(2, ChunkType.NONE, done=True))
    with pytest.raises(NbdRequestError, match=r"NBD_CMD_FLUSH failed at the server \(ENOSPC\)"):
        say(connection, commands.flush(connection), failure(3, 28))
    with pytest.raises(NbdProtocolError, match="in reply to NBD_CMD_FLUSH"):
        say(connection, commands.flush(connection), status(4, 7, [(512, 1)], done=True))


def test_flush_where_there_is_none() -> None:
    connection = Connection(Export("disk", 512, TransmissionFlag.HAS_FLAGS), "here")
    with pytest.raises(NbdUnsupportedError, match="no flush"):
        say(connection, commands.flush(connection), b"")
    assert connection.live
    assert not connection.busy


def test_a_server_that_shuts_down_is_asked_nothing_more_but_told_goodbye() -> None:
    talk = Talk()
    with pytest.raises(NbdDisconnectedError, match="shutting down"):
        talk.ask(failure(1, 108, b"bye"))
    with pytest.raises(NbdDisconnectedError, match="shutting down"):
        talk.ask(b"")
    assert talk.connection.disconnect() == RequestHeader(Command.DISC, 2).pack()
    with pytest.raises(UsageError, match="closed"):
        talk.ask(b"")


def test_what_arrives_for_a_call_that_was_given_up_is_dropped() -> None:
    talk = Talk()
    given_up = talk.connection.call(Command.BLOCK_STATUS, 0, 512, talk)
    assert isinstance(next(given_up), Send)
    assert isinstance(given_up.send(b""), Wait)
    given_up.close()
    assert talk.connection.busy
    talk.ask(GOOD + status(2, 7, [(512, 3)], done=True))
    assert talk.statuses == [(7, bytes.fromhex("00000200 00000003"))]
    assert not talk.connection.busy


def test_calls_that_are_given_up_do_not_pile_up_for_ever() -> None:
    connection = Connection(EXPORT, "here")
    for _ in range(constants.MAX_ABANDONED):
        given_up = connection.call(Command.FLUSH)
        next(given_up)
        given_up.close()
    with pytest.raises(NbdDisconnectedError, match="1024 requests were not answered"):
        next(connection.call(Command.FLUSH))
    assert not connection.live


def test_calls_that_somebody_waits_for_may_be_many() -> None:
    connection = Connection(EXPORT, "here")
    jobs = [connection.call(Command.FLUSH) for _ in range(3 * constants.MAX_ABANDONED)]
    for job in jobs:
        next(job)
        job.send(b"")
    for job in jobs[: constants.MAX_ABANDONED - 1]:
        job.close()
    line = Line(connection, data=b"".join(simple(cookie) for cookie in range(1, len(jobs) + 1)))
    assert connection.abandoned == constants.MAX_ABANDONED - 1
    while line.incoming:
        line.receive()
    assert connection.abandoned == 0
    for job in jobs[constants.MAX_ABANDONED - 1 :]:
        with pytest.raises(StopIteration):
            job.send(b"")


def test_replies_may_come_in_any_order() -> None:
    connection = Connection(EXPORT, "here")
    data = status(2, 7, [(512, 1)]) + status(1, 7, [(512, 2)], done=True) + chunk(2, ChunkType.NONE, done=True)
    line = Line(connection, data=data)
    with connection.batch() as batch:
        sent = [connection.submit(batch, Command.BLOCK_STATUS, offset, 512) for offset in (0, 512)]
        assert [RequestHeader.unpack(header).cookie for header in sent] == [1, 2]
        line.receive()
        assert not batch.finished
        line.receive()
        line.receive()
        assert [request.offset for request in batch.finished] == [0, 512]
    assert not connection.busy
    assert (connection.requests, connection.messages) == (2, 3)
