"""Both doors reading and writing data over a real socket, with a server that does everything wrong."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qmpnbd.deadline import Deadline
from qmpnbd.errors import (
    DeadlineError,
    NbdDisconnectedError,
    NbdProtocolError,
    NbdRequestError,
    NbdUnsupportedError,
    QmpnbdError,
    UsageError,
)
from qmpnbd.extents import ExtentMap
from qmpnbd.nbd import aio
from qmpnbd.nbd.client import Client
from qmpnbd.nbd.constants import Command
from qmpnbd.nbd.messages import RequestHeader
from qmpnbd.nbd.quirks import Quirk
from qmpnbd.nbd.reconnect import Reconnect
from qmpnbd.nbd.transfer import READ_PIECE
from tests.hostile_nbd import BASE, DEPTH, Script, To, acknowledged, honest, honest_read, pattern, serving, simple_read
from tests.nbd_doors import LONG, SHORT, Door, both_doors
from tests.option_bytes import unsupported
from tests.servers import wait_until

pytestmark = pytest.mark.usefixtures("memory_budget")

HONEST = {DEPTH: ExtentMap.uniform(8 << 20, 1), BASE: ExtentMap.uniform(8 << 20, 0)}
FORMS = ["structured", "extended"]
both_forms = pytest.mark.parametrize("form", FORMS)
WRITABLE = 0x0DED


def script(form: str = "structured", **knobs: Any) -> Script:
    return Script(extended=form == "extended", **knobs)


@both_doors
@both_forms
@pytest.mark.parametrize("drip", [False, True])
def test_everything_with_an_honest_server(door: Door, folder: Path, form: str, drip: bool) -> None:
    server = script(form, flags=WRITABLE, drip=drip)
    with serving(folder, server) as uri:
        outcomes = door(
            uri,
            ("read", 1000, 2000),
            ("chunks", [(512, 1024), (4096, 100)], {"size": 512}),
            ("write", 512, b"x" * 1000, {"fua": True}),
            ("write_zeroes", 0, 4096, {"no_hole": True, "fast": True}),
            ("trim", 4096, 8192),
            ("cache", 0, 512),
            "flush",
            ("maps", 1 << 20, 512),
            ("block_status", 0, 4096),
        )
        assert sorted(outcomes[1]) == [(512, pattern(512, 512)), (1024, pattern(1024, 512)), (4096, pattern(4096, 100))]
        assert outcomes[0] == pattern(1000, 2000)
        assert outcomes[2:7] == [None] * 5
        assert outcomes[7] == {DEPTH: ExtentMap.uniform(512, 1), BASE: ExtentMap.uniform(512, 0)}
        assert outcomes[8] == {DEPTH: ExtentMap.uniform(4096, 1), BASE: ExtentMap.uniform(4096, 0)}
    assert server.payloads[4] == b"x" * 1000
    assert [request.command for request in server.requests[4:9]] == [1, 6, 4, 5, 3]


@both_doors
def test_a_server_with_simple_replies_only(door: Door, folder: Path) -> None:
    server = Script(options={8: unsupported(8)}, read=simple_read)
    with serving(folder, server) as uri:
        assert door(uri, ("read", 3, 70000), "flush", contexts=()) == [pattern(3, 70000), None]


FAULTS: dict[str, Callable[[To, RequestHeader], list[bytes]]] = {
    "half": lambda to, r: [to.data(r.offset, pattern(r.offset, r.length // 2), done=True)],
    "none": lambda to, r: [to.none()],
    "outside": lambda to, r: [to.data(r.offset + r.length, bytes(512)), to.none()],
    "before": lambda to, r: [to.data(r.offset - 512, bytes(512)), to.none()],
    "twice": lambda to, r: [to.data(r.offset, pattern(r.offset, r.length))] * 2,
    "hole of 4 GiB": lambda to, r: [to.hole(r.offset, 2**32 - 1), to.none()],
    "too long": lambda to, r: [to.chunk(1, length=2**32 - 1)],
    "flood of holes": lambda to, r: [to.hole(r.offset, 1)] * 100_000,
    "flood of errors": lambda to, r: [to.failure(5, done=False)] * 100_000,
    "status": lambda to, r: [to.status(7, [(512, 1)], done=True)],
    "garbage": lambda to, r: [b"\xa5" * 64],
}


@both_doors
@both_forms
@pytest.mark.parametrize("fault", FAULTS)
def test_data_that_cannot_be_true_ends_the_connection(door: Door, folder: Path, form: str, fault: str) -> None:
    with serving(folder, script(form, read=lambda request, _: FAULTS[fault](To(request), request))) as uri:
        wrong, after = door(uri, ("read", 1024, 4096), ("read", 0, 512))
        assert isinstance(wrong, NbdProtocolError)
        assert isinstance(after, NbdDisconnectedError)
        (wrong,) = door(uri, ("chunks", [(1024, 1 << 20)], {"size": 4096}))
        assert isinstance(wrong, NbdProtocolError)


@both_doors
@both_forms
def test_a_read_error_is_one_of_its_request_only(door: Door, folder: Path, form: str) -> None:
    def tell(request: RequestHeader, count: int) -> Iterator[bytes]:
        yield from [To(request).failure(5)] if request.offset == 1 << 20 else honest_read(request, count)

    with serving(folder, script(form, read=tell)) as uri:
        failed, read = door(uri, ("read", 0, 4 << 20), ("read", 5, 512))
    assert isinstance(failed, NbdRequestError)
    assert (failed.offset, failed.length, failed.wire_error) == (1 << 20, READ_PIECE, 5)
    assert read == pattern(5, 512)


@both_doors
@both_forms
def test_pieces_interleaved_and_out_of_order(door: Door, folder: Path, form: str) -> None:
    held: list[RequestHeader] = []

    def tell(request: RequestHeader, count: int) -> Iterator[bytes]:
        held.append(request)
        if len(held) < 4:
            return
        halves = [list(honest_read(each, 0)) for each in reversed(held)]
        held.clear()
        yield from (half[0] for half in halves)
        yield from (half[1] for half in reversed(halves))

    with serving(folder, script(form, read=tell)) as uri:
        (read,) = door(uri, ("read", 0, 8 << 20))
    assert read == pattern(0, 8 << 20)


@both_doors
@both_forms
@pytest.mark.parametrize("stall", [0, 4, 28, 31, 100])
def test_a_read_that_stalls_at_some_byte(door: Door, folder: Path, form: str, stall: int) -> None:
    def tell(request: RequestHeader, count: int) -> Iterator[bytes]:
        yield To(request).data(request.offset, pattern(request.offset, request.length))[:stall]

    with serving(folder, script(form, read=tell)) as uri:
        for options, deadline in (({}, Deadline(0.05)), ({"request_seconds": 0.05}, None)):
            (outcome,) = door(uri, ("read", 0, 4096, {"deadline": deadline}), **options)
            assert isinstance(outcome, DeadlineError)
            assert "after 0.05 s waiting for a reply to NBD_CMD_READ [0x0, 0x1000)" in str(outcome)


@both_doors
def test_a_server_that_does_not_read_while_it_has_something_to_say(door: Door, folder: Path) -> None:
    """Both sides would wait for ever if we did not receive while we cannot send."""

    def tell(request: RequestHeader, count: int) -> Iterator[bytes]:
        yield To(request).data(request.offset, bytes(8 << 20), done=True)

    def slow_write(request: RequestHeader, count: int) -> Iterator[bytes]:
        yield acknowledged(request)

    with serving(folder, Script(size=1 << 30, flags=WRITABLE, read=tell, others=slow_write)) as uri:
        (pieces,) = door(uri, ("chunks", [(0, 64 << 20)], {"size": 8 << 20, "in_flight": 8}))
        assert sum(len(data) for _, data in pieces) == 64 << 20
        assert door(uri, ("write", 0, bytes(32 << 20))) == [None]


@both_doors
def test_after_a_deadline_late_data_is_dropped_and_the_client_goes_on(door: Door, folder: Path) -> None:
    late: list[RequestHeader] = []

    def tell(request: RequestHeader, count: int) -> Iterator[bytes]:
        if not late:
            late.append(request)
            yield To(request).data(request.offset, b"x" * 1000)
            return
        yield To(late[0]).data(late[0].offset + 1000, b"x" * (late[0].length - 1000), done=True)
        yield from honest_read(request, count)

    with serving(folder, Script(read=tell)) as uri:
        silent, read = door(uri, ("read", 0, 65536, {"deadline": Deadline(SHORT)}), ("read", 512, 512))
    assert isinstance(silent, DeadlineError)
    assert read == pattern(512, 512)


def test_a_buffer_is_left_alone_after_its_call(folder: Path) -> None:
    go = threading.Event()

    def tell(request: RequestHeader, count: int) -> Iterator[bytes]:
        yield To(request).data(request.offset, b"x" * 4096)[:2000]
        go.wait(LONG)
        yield To(request).data(request.offset, b"x" * 4096)[2000:] + To(request).none()

    buffer = bytearray(4096)
    with serving(folder, Script(read=tell)) as uri, Client.connect(uri) as client:
        with pytest.raises(DeadlineError):
            client.read_into(0, buffer, deadline=Deadline(SHORT))
        buffer[:] = bytes(4096)
        go.set()
        client.flush(Deadline(LONG))
    assert buffer == bytes(4096)


# Many at once.


def test_many_calls_at_once(folder: Path) -> None:
    async def main() -> None:
        async with await aio.Client.connect(uri, contexts=[DEPTH, BASE]) as client:
            reads = [client.read(offset, 3000) for offset in range(0, 100_000, 1000)]
            data, mapped, _ = await asyncio.gather(asyncio.gather(*reads), client.maps(), client.flush())
            assert list(map(bytes, data)) == [pattern(offset, 3000) for offset in range(0, 100_000, 1000)]
            assert mapped == HONEST
            assert client.statistics.requests == 102
        assert asyncio.all_tasks() == {asyncio.current_task()}

    with serving(folder, Script()) as uri:
        asyncio.run(main(), debug=True)


def test_more_calls_at_once_than_a_socket_takes(folder: Path) -> None:
    """More requests than may be given up, and more pieces to send than the kernel takes at a time (IOV_MAX)."""
    offsets = range(0, 1_000_000, 500)
    go = threading.Event()

    def patient(request: RequestHeader, count: int) -> Iterator[bytes]:
        go.wait(LONG)
        yield acknowledged(request)

    async def release() -> None:
        go.set()

    async def main() -> None:
        async with await aio.Client.connect(uri) as client:
            writes = [client.write(offset, pattern(offset, 500)) for offset in offsets]
            await asyncio.gather(*writes, release())  # when all of them have begun
            data = await asyncio.gather(*(client.read(offset, 500) for offset in offsets))
        assert list(map(bytes, data)) == [pattern(offset, 500) for offset in offsets]

    server = Script(flags=WRITABLE, others=patient)
    with serving(folder, server) as uri:
        asyncio.run(main())
    assert server.payloads[: len(offsets)] == [pattern(offset, 500) for offset in offsets]


def test_cancelling_some_of_many_calls_harms_no_other(folder: Path) -> None:
    held: list[RequestHeader] = []
    go = threading.Event()

    def tell(request: RequestHeader, count: int) -> Iterator[bytes]:
        held.append(request)
        if len(held) == 20:
            yield To(held[0]).data(held[0].offset, pattern(held[0].offset, 4000))[:1000]
            go.wait(LONG)
            yield To(held[0]).data(held[0].offset, pattern(held[0].offset, 4000), done=True)[1000:]
            for each in held[1:]:
                yield from honest_read(each, 0)

    async def main() -> None:
        async with await aio.Client.connect(uri) as client:
            tasks = [asyncio.create_task(client.read(offset * 1000, 4000)) for offset in range(20)]
            await asyncio.to_thread(wait_until, lambda: len(held) == 20, "the requests")
            for task in tasks[::3]:
                task.cancel()
            go.set()
            outcomes: list[Any] = await asyncio.gather(*tasks, return_exceptions=True)
            for offset, outcome in enumerate(outcomes):
                if offset % 3:
                    assert outcome == pattern(offset * 1000, 4000)
                else:
                    assert isinstance(outcome, asyncio.CancelledError)
            held.clear()
            await client.flush()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    with serving(folder, Script(read=tell)) as uri:
        asyncio.run(main(), debug=True)


def test_a_broken_protocol_is_told_to_all_who_wait(folder: Path) -> None:
    def tell(request: RequestHeader, count: int) -> Iterator[bytes]:
        if count == 5:
            yield b"\0" * 32

    async def main() -> None:
        async with await aio.Client.connect(uri) as client:
            outcomes = await asyncio.gather(*(client.read(n, 1) for n in range(5)), return_exceptions=True)
            assert [type(outcome) for outcome in outcomes] == [NbdProtocolError] * 5
            assert len({id(outcome) for outcome in outcomes}) == 5
            with pytest.raises(NbdDisconnectedError):
                await client.read(0, 1)

    with serving(folder, Script(read=tell)) as uri:
        asyncio.run(main(), debug=True)


def test_a_write_that_is_cancelled_may_have_its_buffer_back(folder: Path) -> None:
    """What is not sent yet is sent from a copy, so that the stream stays in step."""
    reading = threading.Event()

    def tell(request: RequestHeader, count: int) -> Iterator[bytes]:
        reading.wait(LONG)
        yield from honest_read(request, count)

    server = Script(flags=WRITABLE, read=tell)

    async def main() -> None:
        async with await aio.Client.connect(uri) as client:
            first = asyncio.create_task(client.read(0, 512))
            await asyncio.to_thread(wait_until, lambda: bool(server.requests), "the read")
            buffer = bytearray(b"a" * (1 << 20))
            task = asyncio.create_task(client.write(0, buffer))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            buffer[:] = bytes(1 << 20)
            reading.set()
            assert await first == pattern(0, 512)
            await client.flush()

    with serving(folder, server) as uri:
        asyncio.run(main(), debug=True)
    assert server.payloads[1] == b"a" * (1 << 20)


def test_one_thread_at_a_time_uses_a_blocking_client(folder: Path) -> None:
    server = Script(read=lambda request, count: [])
    with serving(folder, server) as uri, Client.connect(uri) as client:
        deadline = Deadline(LONG)
        failures: list[QmpnbdError] = []

        def other() -> None:
            wait_until(lambda: bool(server.requests), "the read")
            try:
                client.flush()
            except QmpnbdError as error:
                failures.append(error)
            deadline.stop()

        thread = threading.Thread(target=other)
        thread.start()
        with pytest.raises(DeadlineError, match="stopped"):
            client.read(0, 512, deadline=deadline)
        thread.join()
    assert isinstance(failures[0], UsageError)


def test_other_calls_between_pieces_and_leaving_early(folder: Path) -> None:
    with serving(folder, Script()) as uri, Client.connect(uri) as client:
        pieces = client.chunks([(0, 1 << 20)], size=4096)
        for offset, data in pieces:
            assert bytes(data) == pattern(offset, 4096)
            assert client.read(offset, 100) == pattern(offset, 100)
            if offset > 100_000:
                break
        pieces.close()  # type: ignore[attr-defined]
        client.flush()


def test_leaving_early_in_asyncio(folder: Path) -> None:
    async def main() -> None:
        async with await aio.Client.connect(uri) as client:
            async with contextlib.aclosing(client.chunks([(0, 1 << 20)], size=4096)) as pieces:  # type: ignore[type-var]
                async for offset, data in pieces:
                    assert bytes(data) == pattern(offset, 4096)
                    if offset > 100_000:
                        break
            await client.flush()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    with serving(folder, Script()) as uri:
        asyncio.run(main(), debug=True)


# Losses.


@both_doors
@both_forms
def test_reads_go_on_after_losses_if_that_is_wanted(door: Door, folder: Path, form: str) -> None:
    server = script(form, size=8 << 20, cut=3 << 20)
    again = {"reconnect": Reconnect(attempts=3, delay=0.0)}
    with serving(folder, server) as uri:
        (lost,) = door(uri, ("read", 0, 8 << 20))
        assert isinstance(lost, NbdDisconnectedError)
        assert door(uri, ("read", 0, 8 << 20), "maps", **again) == [pattern(0, 8 << 20), HONEST]
        (pieces,) = door(uri, ("chunks", [(0, 8 << 20)]), **again)
        assert sorted(pieces) == [(n * READ_PIECE, pattern(n * READ_PIECE, READ_PIECE)) for n in range(32)]


@both_doors
@pytest.mark.parametrize("call", [("read", 0, 512), "maps", ("chunks", [(0, 4096)])])
@pytest.mark.parametrize("begun", [0, 4, 20, 30])
def test_a_server_that_hangs_up_every_time_is_given_up(door: Door, folder: Path, call: Any, begun: int) -> None:
    """It accepts and agrees to everything, so that each connection alone looks well."""
    server = Script()
    with serving(folder, server) as uri:
        assert door(uri) == []
    server = Script(cut=server.sent + begun)
    with serving(folder, server) as uri:
        (lost,) = door(uri, call, reconnect=Reconnect(attempts=3, delay=0.0))
    assert isinstance(lost, NbdDisconnectedError)
    assert server.came == 4


@both_doors
def test_writes_are_never_done_twice(door: Door, folder: Path) -> None:
    server = Script(flags=WRITABLE, others=lambda request, count: _hang_up())
    with serving(folder, server) as uri:
        (lost,) = door(uri, ("write", 0, b"x"), reconnect=Reconnect(3, 0.0))
    assert isinstance(lost, NbdDisconnectedError)
    assert [request.command for request in server.requests] == [Command.WRITE]


def _hang_up() -> Iterator[bytes]:
    raise EOFError


@both_doors
def test_after_a_loss_the_export_must_be_the_same(door: Door, folder: Path) -> None:
    server = Script()
    with serving(folder, server) as uri:
        reads = 0

        def tell(request: RequestHeader, count: int) -> Iterator[bytes]:
            nonlocal reads
            reads += 1
            server.size = 4 << 20
            raise EOFError

        server.read = tell
        (lost,) = door(uri, ("read", 0, 512), reconnect=Reconnect(3, 0.0))
        assert isinstance(lost, NbdDisconnectedError)
        assert "another one now" in str(lost)
        assert reads == 1


def test_faults_that_are_borne(folder: Path) -> None:
    def tell(request: RequestHeader, count: int) -> Iterator[bytes]:
        yield To(request).status(99, [(1, 1)])
        yield from honest(request, count)

    with serving(folder, Script(answer=tell)) as uri:
        with Client.connect(uri, contexts=[DEPTH, BASE]) as client, pytest.raises(NbdProtocolError):
            client.maps()
        with Client.connect(uri, contexts=[DEPTH, BASE], lenient=frozenset({Quirk.UNKNOWN_CONTEXT})) as client:
            assert client.maps() == HONEST


@both_doors
def test_a_read_only_export(door: Door, folder: Path) -> None:
    server = Script()
    with serving(folder, server) as uri:
        outcomes = door(uri, ("write", 0, b"x"), ("trim", 0, 1), ("write_zeroes", 0, 1), ("read", 0, 1 << 40))
    assert [type(outcome) for outcome in outcomes] == [NbdUnsupportedError] * 3 + [UsageError]
    assert [request.command for request in server.requests] in ([], [Command.DISC])


@both_doors
def test_a_server_that_is_gone_when_something_is_sent(door: Door, folder: Path) -> None:
    """Found out while sending, not while receiving; then it is a loss like any other."""
    server = Script(flags=WRITABLE, others=lambda request, count: _hang_up())
    with serving(folder, server) as uri:
        outcomes = door(uri, ("write", 0, bytes(8 << 20)), ("read", 0, 512), "flush")
        assert [type(outcome) for outcome in outcomes] == [NbdDisconnectedError] * 3
        assert "lost before" in str(outcomes[2])
        server.others = lambda request, count: [acknowledged(request)]
        again = {"reconnect": Reconnect(3, 0.0)}
        server.flush = lambda request, count: _hang_up()
        lost, read = door(uri, "flush", ("read", 0, 512), **again)
        assert isinstance(lost, NbdDisconnectedError)
        assert read == pattern(0, 512)
