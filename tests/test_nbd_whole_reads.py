"""Replies to reads recognised at one look: the same bytes as ever, however they come, whatever comes between."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpnbd.errors import NbdRequestError
from qmpnbd.nbd.channel import Channel, Pump
from qmpnbd.nbd.connection import Connection
from qmpnbd.nbd.constants import Command, TransmissionFlag
from qmpnbd.nbd.export import Export, Replies
from qmpnbd.nbd.messages import RequestHeader
from qmpnbd.nbd.requests import Batch, Request
from qmpnbd.nbd.transfer import Destination
from qmpnbd.nbd.whole_reads import HEADS, LARGE, SHORTEST, whole_read
from tests.hostile_nbd import To, pattern, simple, simple_read

FORMS: list[Replies] = ["simple", "structured", "extended"]
all_forms = pytest.mark.parametrize("replies", FORMS)
SIZES = [1, 300, LARGE - 1, LARGE, LARGE + 1000, 2 * LARGE]


def connected(replies: Replies) -> Connection:
    return Connection(Export("disk", 1 << 20, TransmissionFlag(1), minimum_block=1, replies=replies), "here")


def answer(replies: Replies, request: RequestHeader, kind: str) -> bytes:
    """Makes a reply: told whole, in halves, as a hole, or an error."""
    to, data = To(request), pattern(request.offset, request.length)
    if replies == "simple":
        return simple(request.cookie, 5) if kind == "error" else b"".join(simple_read(request, 0))
    half = request.length // 2
    told: dict[str, Iterable[bytes]] = {
        "whole": [to.data(request.offset, data, done=True)],
        "hole": [to.hole(request.offset, request.length), to.none()],
        "error": [to.failure(5)],
        "halves": [
            *([to.data(request.offset + half, data[half:])]),
            *([to.data(request.offset, data[:half])] if half else []),
            to.none(),
        ],
    }
    return b"".join(told[kind])


@all_forms
@given(data=st.data())
def test_replies_cut_anywhere_are_what_was_told(replies: Replies, data: st.DataObject) -> None:
    connection = connected(replies)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        channel = Channel(ours, "here")
        pump = Pump(connection, channel)
        asked: list[tuple[RequestHeader, str, Destination]] = []
        requests: list[Request] = []
        with connection.batch() as batch:
            for size in data.draw(st.lists(st.sampled_from(SIZES), min_size=1, max_size=4)):
                where = Destination(connection, 7, size, lambda _, length: memoryview(bytearray(length)))
                sent = connection.submit(batch, Command.READ, 7, size, where)
                requests.append(batch.pending[max(batch.pending)])
                kind = data.draw(st.sampled_from(["whole", "whole", "halves", "hole", "error"]))
                asked.append((RequestHeader.unpack(sent), kind, where))
            stream = b"".join(answer(replies, header, kind) for header, kind, _ in data.draw(st.permutations(asked)))
            cuts = sorted(
                data.draw(st.sets(st.integers(1, len(stream)), max_size=8)) | set(range(0, len(stream), LARGE))
            )
            for start, end in zip(cuts, [*cuts[1:], len(stream)], strict=True):
                theirs.sendall(stream[start:end])
                while pump.advance():
                    pass
            assert not batch.pending
        for (header, kind, where), request in zip(asked, requests, strict=True):
            assert (request.failure is not None) == (kind == "error")
            if kind != "error":
                hole = kind == "hole" and replies != "simple"
                assert where.view == (bytes(header.length) if hole else pattern(7, header.length))


def test_a_failure_between_whole_replies_is_that_of_its_request() -> None:
    connection = connected("structured")
    with connection.batch() as batch:
        headers = [RequestHeader.unpack(read_of(connection, batch, LARGE)) for _ in range(2)]
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            pump = Pump(connection, Channel(ours, "here"))
            theirs.sendall(answer("structured", headers[1], "error") + answer("structured", headers[0], "whole"))
            while batch.pending:
                assert pump.advance()
        bad, good = batch.finished
        connection.require_success(good)
        with pytest.raises(NbdRequestError, match="EIO"):
            connection.require_success(bad)


def read_of(connection: Connection, batch: Batch, size: int) -> bytes:
    return connection.submit(
        batch, Command.READ, 7, size, Destination(connection, 7, size, lambda *_: memoryview(bytearray(size)))
    )


@all_forms
def test_every_field_must_be_as_expected(replies: Replies) -> None:
    connection = connected(replies)
    with connection.batch() as batch:
        header = RequestHeader.unpack(read_of(connection, batch, 512))
        good = answer(replies, header, "whole")[: HEADS[replies]]
        found = whole_read(replies, memoryview(good), batch.pending)
        assert found is not None
        assert found[0] == header.cookie
        assert SHORTEST[replies] <= HEADS[replies]
        for at in range(len(good)):
            wrong = bytearray(good)
            wrong[at] ^= 1
            assert whole_read(replies, memoryview(wrong), batch.pending) is None, f"byte {at} is wrong"
            assert whole_read(replies, memoryview(good)[:at], batch.pending) is None, f"only {at} bytes"


@all_forms
def test_a_reply_that_was_begun_in_pieces_is_not_whole(replies: Replies) -> None:
    connection = connected(replies)
    with connection.batch() as batch:
        header = RequestHeader.unpack(read_of(connection, batch, 512))
        batch.pending[header.cookie].chunks = 1
        assert whole_read(replies, memoryview(answer(replies, header, "whole")), batch.pending) is None


def test_data_in_reply_to_what_is_no_read() -> None:
    connection = connected("simple")
    with connection.batch() as batch:
        header = RequestHeader.unpack(connection.submit(batch, Command.FLUSH))
        reply = struct.pack(">IIQ", 0x67446698, 0, header.cookie)
        assert whole_read("simple", memoryview(reply), batch.pending) is None
