"""A server that ends, or falls silent, after any byte of a session: told as what it is, in time, the socket closed."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import ssl
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import trustme

from qmpnbd.deadline import Deadline
from qmpnbd.errors import DeadlineError, NbdDisconnectedError, NbdError, NbdProtocolError, NbdTlsError
from qmpnbd.extents import ExtentMap
from qmpnbd.nbd import aio, constants
from qmpnbd.nbd.client import Client
from qmpnbd.nbd.constants import Option
from qmpnbd.nbd.tls import Tls
from qmpnbd.nbd.wire import Greeting
from tests.hostile_nbd import BASE, DEPTH, Script, pattern, serving, simple_read
from tests.nbd_doors import LONG, Door, both_doors
from tests.option_bytes import ack, unsupported
from tests.servers import wait_until

AT_ONCE: Final = 32
"""Sessions side by side. Most of them wait for a silent server, so together they take little longer than one."""

PATIENCE: Final = (0.1, 0.5, 2.5, LONG)
"""Seconds of each call's deadline: the next one where a busy machine did not come as far as it should have."""

MAPS = {DEPTH: ExtentMap.uniform(1 << 20, 1), BASE: ExtentMap.uniform(1 << 20, 0)}
READ, WRITE = ("read", 512, 40), ("write", 0, b"x" * 9)
IN_CLEAR: Final = len(Greeting.newstyle(3).pack()) + len(ack(Option.STARTTLS))
"""Bytes that a server says before TLS begins."""

EVERY: Final = int(os.environ.get("QMPNBD_EVERY_BYTE", "29"))
"""Of how many bytes of TLS one is tried: 1 for all of them, which takes minutes."""

PATIENCE_FOR_TLS: Final = (0.5, 2.5, 0.9 * constants.TLS_PATIENCE)
"""The same as `PATIENCE` for sessions whose beginning takes time to compute."""

every_version = pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
every_form = pytest.mark.parametrize("form", ["simple", "structured", "extended"])


@dataclass(frozen=True)
class Secret:
    """What a server encrypts with, and what a client needs to believe it."""

    server: ssl.SSLContext
    client: Tls


def secret(folder: Path, version: str) -> Secret:
    """Returns one whose server says as many bytes each time: signatures by RSA are all of one length."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    authority = trustme.CA()
    authority.issue_cert("localhost", key_type=trustme.KeyType.RSA).configure_cert(context)
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    return Secret(context, Tls(ca_file=str(folder / "ca.pem"), hostname="localhost"))


def session(form: str) -> tuple[Script, list[Any], list[Any], tuple[str, ...]]:
    """Returns a server for a form of replies, the calls to make, their results, and the contexts to ask for."""
    server = Script(size=1 << 20, flags=0x0DED, extended=form == "extended")
    if form == "simple":
        server.options[Option.STRUCTURED_REPLY] = unsupported(Option.STRUCTURED_REPLY)
        server.read = simple_read
        return server, [READ, "flush", WRITE], [pattern(512, 40), None, None], ()
    return server, [READ, "maps", "flush", WRITE], [pattern(512, 40), MAPS, None, None], (DEPTH, BASE)


def outcomes(
    door: Door,
    folder: Path,
    form: str,
    seconds: float,
    steps: list[Any] | None = None,
    end: str = "",
    byte: int = 0,
    secret: Secret | None = None,
) -> tuple[list[Any], Script]:
    """Runs one session, which a knob of the script may end after some bytes; an error of connecting is all there is."""
    server, every_step, _, contexts = session(form)
    server.tls = None if secret is None else secret.server
    if end:
        setattr(server, end, byte)
    folder.mkdir()
    with serving(folder, server) as uri:
        try:
            tls = None if secret is None else secret.client
            taken = every_step if steps is None else steps
            found = door(uri, *taken, contexts=contexts, seconds=seconds, tls=tls)
        except (NbdError, DeadlineError) as error:
            found = [error]
        if server.stall is not None:
            wait_until(lambda: server.left == server.came, "the client to close its end")
    return found, server


def at_every_byte(
    door: Door, folder: Path, form: str, end: str, secret: Secret | None = None, step: int = 1
) -> list[tuple[int, list[Any]]]:
    """Returns what became of sessions that end after each number of bytes, or some of them; all of these were sent.

    With extended headers the handshake is left out: it is that of structured replies with one answer less. With TLS it
    is what comes before TLS.
    """
    whole, honest = outcomes(door, folder / "whole", form, LONG, secret=secret)
    assert whole == session(form)[2]
    first = outcomes(door, folder / "handshake", form, LONG, [])[1].sent if form == "extended" else 0
    first = first if secret is None else IN_CLEAR
    waits: tuple[float, ...] = (LONG,)
    if end == "stall":
        waits = PATIENCE if secret is None else PATIENCE_FOR_TLS

    def one(byte: int) -> tuple[int, list[Any]]:
        for seconds in waits:
            at = folder / f"{byte}-{seconds}"
            found, server = outcomes(door, at, form, seconds, end=end, byte=byte, secret=secret)
            if server.sent == byte:
                break
        assert server.sent == byte
        return byte, found

    with ThreadPoolExecutor(AT_ONCE) as pool:
        sessions = list(pool.map(one, range(first, honest.sent, step)))
    assert len(sessions) > 200 // step
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


@both_doors
@every_version
def test_a_server_that_hangs_up_within_tls(door: Door, folder: Path, version: str) -> None:
    """First it is the handshake of TLS that failed, then the connection that ended, and never the other way round."""
    sessions = at_every_byte(door, folder, "simple", "cut", secret(folder, version), EVERY)
    ends = [next(type(outcome) for outcome in found if isinstance(outcome, NbdError)) for _, found in sessions]
    assert [kind for kind, _ in itertools.groupby(ends)] == [NbdTlsError, NbdDisconnectedError]
    gc.collect()


@both_doors
@every_version
def test_a_server_that_falls_silent_within_tls(door: Door, folder: Path, version: str) -> None:
    sessions = at_every_byte(door, folder, "simple", "stall", secret(folder, version), 2 * EVERY - 1)
    for byte, found in sessions:
        assert isinstance(found[-1], DeadlineError), f"silent after {byte} bytes: {found[-1]!r}"
    assert "the TLS handshake" in str(sessions[0][1][-1])
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
