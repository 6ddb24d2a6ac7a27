"""A server that ends, or falls silent, after any byte of a session: told as what it is, in time, the socket closed."""

from __future__ import annotations

import asyncio
import gc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import pytest

from qmpnbd.deadline import Deadline
from qmpnbd.errors import DeadlineError, NbdDisconnectedError, NbdError, NbdProtocolError
from qmpnbd.extents import ExtentMap
from qmpnbd.nbd import aio
from qmpnbd.nbd.client import Client
from qmpnbd.nbd.constants import Option
from tests.hostile_nbd import BASE, DEPTH, Script, pattern, serving, simple_read
from tests.nbd_doors import LONG, Door, both_doors
from tests.option_bytes import unsupported
from tests.servers import wait_until

AT_ONCE: Final = 32
"""Sessions side by side. Most of them wait for a silent server, so together they take little longer than one."""

PATIENCE: Final = (0.1, 0.5, 2.5, LONG)
"""Seconds of each call's deadline: the next one where a busy machine did not come as far as it should have."""

MAPS = {DEPTH: ExtentMap.uniform(1 << 20, 1), BASE: ExtentMap.uniform(1 << 20, 0)}
READ, WRITE = ("read", 512, 40), ("write", 0, b"x" * 9)
every_form = pytest.mark.parametrize("form", ["simple", "structured", "extended"])


def session(form: str) -> tuple[Script, list[Any], list[Any], tuple[str, ...]]:
    """Returns a server for a form of replies, the calls to make, their results, and the contexts to ask for."""
    server = Script(size=1 << 20, flags=0x0DED, extended=form == "extended")
    if form == "simple":
        server.options[Option.STRUCTURED_REPLY] = unsupported(Option.STRUCTURED_REPLY)
        server.read = simple_read
        return server, [READ, "flush", WRITE], [pattern(512, 40), None, None], ()
    return server, [READ, "maps", "flush", WRITE], [pattern(512, 40), MAPS, None, None], (DEPTH, BASE)


def outcomes(
    door: Door, folder: Path, form: str, seconds: float, steps: list[Any] | None = None, end: str = "", byte: int = 0
) -> tuple[list[Any], Script]:
    """Runs one session, which a knob of the script may end after some bytes; an error of connecting is all there is."""
    server, every_step, _, contexts = session(form)
    if end:
        setattr(server, end, byte)
    folder.mkdir()
    with serving(folder, server) as uri:
        try:
            found = door(uri, *(every_step if steps is None else steps), contexts=contexts, seconds=seconds)
        except (NbdError, DeadlineError) as error:
            found = [error]
        if server.stall is not None:
            wait_until(lambda: server.left == server.came, "the client to close its end")
    return found, server


def at_every_byte(door: Door, folder: Path, form: str, end: str) -> list[tuple[int, list[Any]]]:
    """Returns what became of sessions that end after each number of bytes, all of which were sent.

    With extended headers the handshake is left out: it is that of structured replies with one answer less.
    """
    whole, honest = outcomes(door, folder / "whole", form, LONG)
    assert whole == session(form)[2]
    first = outcomes(door, folder / "handshake", form, LONG, [])[1].sent if form == "extended" else 0

    def one(byte: int) -> tuple[int, list[Any]]:
        for seconds in PATIENCE if end == "stall" else (LONG,):
            found, server = outcomes(door, folder / f"{byte}-{seconds}", form, seconds, end=end, byte=byte)
            if server.sent == byte:
                break
        assert server.sent == byte
        return byte, found

    with ThreadPoolExecutor(AT_ONCE) as pool:
        sessions = list(pool.map(one, range(first, honest.sent)))
    assert len(sessions) > 200
    return sessions


@both_doors
@every_form
def test_a_server_that_hangs_up_after_any_byte(door: Door, folder: Path, form: str) -> None:
    results = session(form)[2]
    sessions = at_every_byte(door, folder, form, "cut")
    good = 0
    for byte, found in sessions:
        ends = [isinstance(outcome, NbdDisconnectedError) for outcome in found]
        first = ends.index(True)
        assert all(ends[first:]), f"cut after {byte} bytes: {found}"
        assert found[:first] == results[:first], f"cut after {byte} bytes"
        assert first >= good, "an answer was there, and then it was not"
        good = first
    assert good == len(results) - 1
    gc.collect()  # a socket that was not closed would be told now, and fail this test


@both_doors
@every_form
def test_a_server_that_falls_silent_after_any_byte(door: Door, folder: Path, form: str) -> None:
    results = session(form)[2]
    sessions = at_every_byte(door, folder, form, "stall")
    for byte, found in sessions:
        assert isinstance(found[-1], DeadlineError), f"silent after {byte} bytes: {found[-1]!r}"
        for outcome, result in zip(found[:-1], results, strict=False):
            assert outcome == result or isinstance(outcome, DeadlineError), f"silent after {byte} bytes: {outcome!r}"
    assert max(len(found) for _, found in sessions) == len(results)
    gc.collect()


def test_the_socket_is_closed_with_the_error_not_with_the_client(folder: Path) -> None:
    server = Script(read=lambda request, count: [b"\xa5" * 64])

    async def awaited() -> None:
        async with await aio.Client.connect(uri, deadline=Deadline(LONG)) as client:
            with pytest.raises(NbdProtocolError):
                await client.read(0, 512, deadline=Deadline(LONG))
            await asyncio.to_thread(wait_until, lambda: server.left == 2, "the client to close its end")

    with serving(folder, server) as uri:
        with Client.connect(uri, deadline=Deadline(LONG)) as client:
            with pytest.raises(NbdProtocolError):
                client.read(0, 512, deadline=Deadline(LONG))
            wait_until(lambda: server.left == 1, "the client to close its end")
        asyncio.run(awaited())
