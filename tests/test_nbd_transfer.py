"""Reads and writes without a socket: every byte told exactly once, and nothing half done called a success."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpnbd.errors import (
    NbdDisconnectedError,
    NbdProtocolError,
    NbdRequestError,
    NbdUnsupportedError,
    UsageError,
)
from qmpnbd.nbd import transfer
from qmpnbd.nbd.connection import Connection
from qmpnbd.nbd.constants import Command, CommandFlag, TransmissionFlag
from qmpnbd.nbd.export import Export, Replies
from qmpnbd.nbd.messages import RequestHeader
from qmpnbd.nbd.requests import Look, ReceiveInto
from qmpnbd.nbd.wire import Send
from tests.hostile_nbd import To, acknowledged, honest_read, pattern, simple, simple_read
from tests.nbd_line import Line, Tell

SIZE = 16 << 20
WRITABLE = TransmissionFlag(0x0DED)
FORMS: list[Replies] = ["structured", "extended"]
both_forms = pytest.mark.parametrize("replies", FORMS)


def connected(
    replies: Replies = "structured", flags: int = WRITABLE, block: int = 1, payload: int = 1 << 25
) -> Connection:
    export = Export(
        "disk", SIZE, TransmissionFlag(flags), minimum_block=block, maximum_payload=payload, replies=replies
    )
    return Connection(export, "here")


def read(connection: Connection, tell: Tell, offset: int, length: int, *, unfragmented: bool = False) -> bytes:
    buffer = transfer.new_buffer(connection.export, "here", offset, length)
    reading = transfer.Reading(connection.export, "here", offset, memoryview(buffer), unfragmented=unfragmented)
    line = Line(connection, tell)
    line.run(reading.run(connection))
    assert not line.incoming, "bytes were left over"
    return bytes(buffer)


def honest(request: RequestHeader) -> Iterable[bytes]:
    return honest_read(request, 0)


@pytest.mark.parametrize(("offset", "length"), [(0, 0), (0, 1), (1, 1), (511, 1026), (SIZE - 7, 7), (5, 9 << 20)])
@pytest.mark.parametrize("replies", ["simple", "structured", "extended"])
def test_what_was_read_is_what_is_there(replies: Replies, offset: int, length: int) -> None:
    tell = (lambda request: simple_read(request, 0)) if replies == "simple" else honest
    assert read(connected(replies), tell, offset, length) == pattern(offset, length)


@both_forms
@given(data=st.data())
def test_a_read_may_be_told_in_any_pieces_and_any_order(replies: Replies, data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 5000))
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=6))) if length > 1 else []
    pieces = list(zip([0, *cuts], [*cuts, length], strict=True))
    holes = data.draw(st.lists(st.booleans(), min_size=len(pieces), max_size=len(pieces)))

    def tell(request: RequestHeader) -> Iterator[bytes]:
        to = To(request)
        for index in data.draw(st.permutations(range(len(pieces)))):
            start, end = pieces[index]
            hole = holes[index]
            yield to.hole(100 + start, end - start) if hole else to.data(100 + start, pattern(100 + start, end - start))
        yield to.none()

    expected = b"".join(
        bytes(end - start) if hole else pattern(100 + start, end - start)
        for (start, end), hole in zip(pieces, holes, strict=True)
    )
    assert read(connected(replies), tell, 100, length) == expected


WRONG: dict[str, tuple[Callable[[To, int], list[bytes]], str]] = {
    "half of it": (lambda to, o: [to.data(o, bytes(512), done=True)], "nothing about the byte at 0x600"),
    "the second half": (lambda to, o: [to.data(o + 512, bytes(512), done=True)], "nothing about the byte at 0x400"),
    "the middle missing": (lambda to, o: [to.data(o, b"1"), to.data(o + 2, bytes(1022)), to.none()], "byte at 0x401"),
    "nothing": (lambda to, o: [to.none()], "nothing about the byte at 0x400"),
    "past the end": (lambda to, o: [to.data(o + 1024, b"1")], r"\[0x800, 0x801\) in reply to NBD_CMD_READ"),
    "over the end": (lambda to, o: [to.data(o + 1023, b"12")], r"\[0x7ff, 0x801\) in reply"),
    "before": (lambda to, o: [to.data(o - 512, bytes(512))], r"\[0x200, 0x400\) in reply"),
    "too much": (lambda to, o: [to.chunk(1, bytes(8), length=8 + 1025)], "with 1033 bytes"),
    "4 GiB": (lambda to, o: [to.chunk(1, length=2**32 - 1)], "with 4294967295 bytes"),
    "no data": (lambda to, o: [to.data(o, b"")], "with 8 bytes"),
    "twice": (lambda to, o: [to.data(o, bytes(1024)), to.data(o + 7, b"1")], r"\[0x407, 0x408\) twice"),
    "hole twice": (lambda to, o: [to.hole(o, 512), to.data(o + 511, b"12")], "twice"),
    "hole of 4 GiB": (lambda to, o: [to.hole(o, 2**32 - 1)], "a hole for"),
    "hole past the end": (lambda to, o: [to.hole(o + 1023, 2)], "a hole for"),
    "hole of nothing": (lambda to, o: [to.hole(o, 0)], "a hole of no length"),
    "hole of 11 bytes": (lambda to, o: [to.chunk(2, bytes(11))], "with 11 bytes"),
    "status": (lambda to, o: [to.status(7, [(1024, 1)])], "answers nothing that was asked"),
    "flood": (lambda to, o: [to.data(o + n, b"1") for n in range(30)], "more than 20 chunks"),
    "flood of errors": (lambda to, o: [to.failure(5, done=False)] * 30, "more than 20 chunks"),
}


@both_forms
@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_true_is_not_believed(replies: Replies, case: str) -> None:
    tell, match = WRONG[case]
    connection = connected(replies)
    with pytest.raises(NbdProtocolError, match=match):
        read(connection, lambda request: tell(To(request), request.offset), 1024, 1024)
    assert not connection.live


@both_forms
def test_a_failure_is_one_whatever_else_was_told(replies: Replies) -> None:
    for also in (b"", b"data", b"all"):

        def tell(request: RequestHeader, also: bytes = also) -> list[bytes]:
            to = To(request)
            told = {b"": [], b"data": [to.data(request.offset, b"1")], b"all": [to.data(request.offset, bytes(9))]}
            return [*told[also], to.failure(5)]

        connection = connected(replies)
        with pytest.raises(NbdRequestError, match="EIO"):
            read(connection, tell, 0, 9)
        assert read(connection, honest, 0, 9) == pattern(0, 9)


def test_a_simple_error_has_no_data_behind_it() -> None:
    connection = connected("simple")
    with pytest.raises(NbdRequestError, match="EINVAL"):
        read(connection, lambda request: [simple(request.cookie, 22)], 0, 512)
    assert read(connection, lambda request: simple_read(request, 0), 0, 5) == pattern(0, 5)


def test_a_simple_reply_where_chunks_were_agreed_on_says_nothing() -> None:
    with pytest.raises(NbdProtocolError, match="must be answered in chunks"):
        read(connected(), lambda request: simple_read(request, 0), 0, 512)
    with pytest.raises(NbdProtocolError, match="begins with 0x67446698"):
        read(connected("extended"), lambda request: simple_read(request, 0), 0, 512)


def test_an_extended_chunk_tells_the_offset_of_its_request() -> None:
    with pytest.raises(NbdProtocolError, match="a chunk that tells the offset 0x200 in reply to"):
        read(connected("extended"), lambda request: [To(request).chunk(0, done=True, offset=512)], 0, 512)


def test_unfragmented() -> None:
    flagged: list[int] = []

    def tell(request: RequestHeader) -> Iterable[bytes]:
        flagged.append(request.flags)
        return [To(request).data(request.offset, bytes(request.length), done=True)]

    assert read(connected(), tell, 0, 65536, unfragmented=True) == bytes(65536)
    assert flagged == [CommandFlag.DF]
    with pytest.raises(NbdProtocolError, match="more than one piece"):
        read(connected(), honest, 0, 512, unfragmented=True)
    with pytest.raises(NbdUnsupportedError, match="NBD_FLAG_SEND_DF"):
        read(connected(flags=1), honest, 0, 512, unfragmented=True)


@pytest.mark.parametrize(("offset", "length"), [(-512, 512), (0, SIZE + 512), (SIZE, 512), (0, -512)])
def test_a_range_outside_the_export(offset: int, length: int) -> None:
    with pytest.raises(UsageError, match="not inside"):
        transfer.new_buffer(connected().export, "here", offset, length)


def test_requests_keep_to_the_sizes_of_the_export() -> None:
    asked: list[int] = []

    def tell(request: RequestHeader) -> Iterable[bytes]:
        asked.append(request.length)
        return honest_read(request, 0)

    read(connected(block=4096, payload=8191), tell, 4096, 12288)
    assert asked == [4096, 4096, 4096]
    for offset, length in ((1, 4096), (0, 4095)):
        with pytest.raises(UsageError, match="in blocks of 4096"):
            transfer.new_buffer(connected(block=4096).export, "here", offset, length)


@pytest.mark.parametrize("come", [16, 27, 28])
def test_a_read_that_is_given_up_writes_nothing_more_into_the_buffer(come: int) -> None:
    connection = connected()
    buffer = bytearray(1024)
    job = transfer.Reading(connection.export, "here", 0, memoryview(buffer)).run(connection)
    assert isinstance(next(job), Send)
    reception = connection.receive()
    header = To(RequestHeader(Command.READ, 1, 0, 1024)).data(0, bytes(1024), done=True)[:28]
    assert isinstance(next(reception), Look)
    operation = reception.send(memoryview(header[:come]))
    for part in () if come == 28 else (header[:4], header[4:20], header[20:28]):
        operation = reception.send(bytearray(part))
    assert isinstance(operation, ReceiveInto)
    buffers = [operation.buffer]
    job.close()
    buffers.append(operation.buffer)
    assert [found is None for found in buffers] == [False, True]
    with pytest.raises(StopIteration):
        reception.send(b"")
    assert not connection.busy


# Many ranges.


def chunks(connection: Connection, tell: Tell, *ranges: tuple[int, int], size: int = 4096, in_flight: int = 3) -> Line:
    line = Line(connection, tell)
    plan = transfer.Chunks(connection.export, "here", ranges, size=size, in_flight=in_flight)
    line.run(plan.run(connection))
    assert not line.incoming, "bytes were left over"
    return line


@both_forms
def test_pieces_of_ranges(replies: Replies) -> None:
    line = chunks(connected(replies), honest, (0, 10_000), (1 << 20, 4096), (7, 0), (5, 3))
    assert sorted(line.given) == [
        (offset, pattern(offset, length))
        for offset, length in [(0, 4096), (5, 3), (4096, 4096), (8192, 1808), (1 << 20, 4096)]
    ]


def test_pieces_come_in_the_order_of_the_answers_and_few_are_in_flight() -> None:
    waiting: list[RequestHeader] = []
    most = 0

    def tell(request: RequestHeader) -> Iterator[bytes]:
        nonlocal most
        waiting.append(request)
        most = max(most, len(waiting))
        if len(waiting) == 4 or request.offset == 9 * 4096:
            for late in reversed(waiting):
                yield from honest_read(late, 0)
            waiting.clear()

    line = chunks(connected(), tell, (0, 10 * 4096), in_flight=4)
    assert [offset // 4096 for offset, _ in line.given] == [3, 2, 1, 0, 7, 6, 5, 4, 9, 8]
    assert most == 4
    assert all(data == pattern(offset, 4096) for offset, data in line.given)


def test_a_piece_that_fails_ends_it() -> None:
    connection = connected()
    with pytest.raises(NbdRequestError, match=r"\[0x1000, 0x2000\)"):
        chunks(connection, lambda r: [To(r).failure(5)] if r.offset == 4096 else honest_read(r, 0), (0, 65536))
    assert connection.live


def test_after_a_loss_the_pieces_not_given_are_read_over_another_connection() -> None:
    first, second = connected(), connected()
    plan = transfer.Chunks(first.export, "here", [(0, 10 * 4096)], size=4096, in_flight=3)
    line = Line(first, lambda request: honest_read(request, 0) if request.offset < 4 * 4096 else [])
    with pytest.raises(NbdDisconnectedError):
        line.run(plan.run(first))
    rest = Line(second, honest)
    rest.run(plan.run(second))
    assert sorted(offset // 4096 for offset, _ in line.given + rest.given) == list(range(10))
    assert len(line.given) == 4


def test_after_a_loss_the_rest_of_a_read_is_read_over_another_connection() -> None:
    first, second = connected(), connected()
    buffer = bytearray(3 << 20)
    reading = transfer.Reading(first.export, "here", 0, memoryview(buffer))
    with pytest.raises(NbdDisconnectedError):
        Line(first, lambda request: honest_read(request, 0) if request.offset else []).run(reading.run(first))
    rest = Line(second, honest)
    rest.run(reading.run(second))
    assert [request.offset for request in rest.requests] == [0]
    assert buffer == pattern(0, 3 << 20)


def test_nothing_is_left_out_where_the_connection_was_lost_before() -> None:
    dead, good = connected(), connected()
    dead.lose()
    buffer = bytearray(3 << 20)
    reading = transfer.Reading(dead.export, "here", 0, memoryview(buffer))
    plan = transfer.Chunks(dead.export, "here", [(0, 3 << 20)], size=1 << 20, in_flight=2)
    for job in (reading.run(dead), plan.run(dead)):
        with pytest.raises(NbdDisconnectedError, match="lost before"):
            Line(dead, honest).run(job)
    line = Line(good, honest)
    line.run(reading.run(good))
    line.run(plan.run(good))
    assert buffer == b"".join(data for _, data in sorted(line.given)) == pattern(0, 3 << 20)


@pytest.mark.parametrize(("size", "in_flight"), [(0, 8), (-1, 8), (100, 8), (512, 0), (512, 65)])
def test_pieces_that_make_no_sense(size: int, in_flight: int) -> None:
    with pytest.raises(UsageError):
        transfer.Chunks(connected(block=512).export, "here", [], size=size, in_flight=in_flight)


# Writes.


@pytest.mark.parametrize("replies", ["simple", "structured", "extended"])
def test_a_write_is_sent_in_pieces(replies: Replies) -> None:
    connection = connected(replies)
    data = pattern(512, (2 << 20) + 5)
    line = Line(connection, lambda request: [acknowledged(request)])
    line.run(transfer.write(connection, 512, memoryview(data), fua=True))
    assert b"".join(line.payloads) == data
    expected = CommandFlag.FUA | (CommandFlag.PAYLOAD_LEN if replies == "extended" else 0)
    assert [(request.command, request.offset, request.length, request.flags) for request in line.requests] == [
        (Command.WRITE, 512, 1 << 20, expected),
        (Command.WRITE, 512 + (1 << 20), 1 << 20, expected),
        (Command.WRITE, 512 + (2 << 20), 5, expected),
    ]


def test_a_write_that_fails_waits_for_its_other_pieces_and_sends_no_more() -> None:
    connection = connected()
    line = Line(connection, lambda r: [simple(r.cookie, 28 if r.offset == 1 << 20 else 0)])
    with pytest.raises(NbdRequestError, match=r"\[0x100000, 0x200000\) failed at the server \(ENOSPC\)"):
        line.run(transfer.write(connection, 0, memoryview(bytes(12 << 20)), fua=False))
    assert len(line.requests) == transfer.IN_FLIGHT + 1
    assert not connection.busy


def test_writes_that_are_not_possible() -> None:
    data = memoryview(bytes(512))
    with pytest.raises(NbdUnsupportedError, match="NBD_FLAG_READ_ONLY"):
        next(transfer.write(connected(flags=0x058F), 0, data, fua=False))
    with pytest.raises(NbdUnsupportedError, match="NBD_FLAG_SEND_FUA"):
        next(transfer.write(connected(flags=1), 0, data, fua=True))
    with pytest.raises(UsageError, match="not inside"):
        next(transfer.write(connected(), SIZE - 511, data, fua=False))
    with pytest.raises(UsageError, match="cannot be written to"):
        transfer.writable_view(b"read-only", "here")
    for buffer in ("text", memoryview(bytes(10))[::2]):
        with pytest.raises(UsageError, match="not a contiguous buffer"):
            transfer.readable_view(buffer, "here")


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 10)), max_size=30))
def test_coverage_is_what_a_set_of_bytes_is(runs: list[tuple[int, int]]) -> None:
    coverage, told = transfer.Coverage(50), set[int]()
    for start, length in runs:
        cells = set(range(start, start + length))
        assert coverage.add(start, start + length) == (not cells & told)
        if not cells & told:
            told |= cells
    gap = next((cell for cell in range(50) if cell not in told), None)
    assert coverage.gap == gap
