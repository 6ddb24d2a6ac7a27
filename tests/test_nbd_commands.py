"""Commands without data: what is sent for them, and what is refused before anything is sent."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from qmpnbd.errors import NbdProtocolError, NbdRequestError, NbdUnsupportedError, UsageError
from qmpnbd.nbd import commands
from qmpnbd.nbd.connection import Connection
from qmpnbd.nbd.constants import Command, CommandFlag, TransmissionFlag
from qmpnbd.nbd.export import Export, Replies
from qmpnbd.nbd.messages import RequestHeader
from qmpnbd.nbd.requests import Job
from tests.hostile_nbd import To, acknowledged, simple
from tests.nbd_line import Line

SIZE = 1 << 40
FUA, NO_HOLE, FAST = CommandFlag.FUA, CommandFlag.NO_HOLE, CommandFlag.FAST_ZERO
Begin = Callable[[Connection], Job[None]]


def connected(flags: int = 0x0DED, replies: Replies = "structured", block: int = 1) -> Connection:
    return Connection(Export("disk", SIZE, TransmissionFlag(flags), minimum_block=block, replies=replies), "here")


def asked(connection: Connection, begin: Begin) -> list[tuple[int, int, int, int]]:
    line = Line(connection, lambda request: [acknowledged(request)])
    line.run(begin(connection))
    return [(request.command, request.flags, request.offset, request.length) for request in line.requests]


def zeroes(offset: int, length: int, *, no_hole: bool = False, fast: bool = False, fua: bool = False) -> Begin:
    return lambda connection: commands.write_zeroes(connection, offset, length, no_hole=no_hole, fast=fast, fua=fua)


def trim(offset: int, length: int, *, fua: bool = False) -> Begin:
    return lambda connection: commands.trim(connection, offset, length, fua=fua)


def cache(offset: int, length: int) -> Begin:
    return lambda connection: commands.cache(connection, offset, length)


def test_what_is_sent() -> None:
    assert asked(connected(), commands.flush) == [(Command.FLUSH, 0, 0, 0)]
    assert asked(connected(), trim(512, 1024)) == [(Command.TRIM, 0, 512, 1024)]
    assert asked(connected(), trim(512, 1024, fua=True)) == [(Command.TRIM, FUA, 512, 1024)]
    assert asked(connected(), cache(1, 2)) == [(Command.CACHE, 0, 1, 2)]
    assert asked(connected(), zeroes(1, 2)) == [(Command.WRITE_ZEROES, 0, 1, 2)]
    every = asked(connected(), zeroes(1, 2, no_hole=True, fast=True, fua=True))
    assert every == [(Command.WRITE_ZEROES, FUA | NO_HOLE | FAST, 1, 2)]
    assert asked(connected(), trim(512, 0)) == []


def test_what_is_too_long_for_one_request_is_sent_in_several() -> None:
    longest = 2**32 - 4096
    assert asked(connected(block=4096), trim(0, 10 << 30)) == [
        (Command.TRIM, 0, 0, longest),
        (Command.TRIM, 0, longest, longest),
        (Command.TRIM, 0, 2 * longest, (10 << 30) - 2 * longest),
    ]
    assert asked(connected(replies="extended"), zeroes(0, SIZE)) == [(Command.WRITE_ZEROES, 0, 0, SIZE)]
    assert len(asked(connected(), cache(0, 1 << 30))) == 32
    assert len(asked(connected(), trim(0, SIZE))) == 257


@pytest.mark.parametrize(
    ("flags", "begin", "missing"),
    [
        (0x01, commands.flush, "SEND_FLUSH"),
        (0x01, trim(0, 1), "SEND_TRIM"),
        (0x23, trim(0, 1), "READ_ONLY"),
        (0x21, trim(0, 1, fua=True), "SEND_FUA"),
        (0x01, cache(0, 1), "SEND_CACHE"),
        (0x01, zeroes(0, 1), "SEND_WRITE_ZEROES"),
        (0x43, zeroes(0, 1), "READ_ONLY"),
        (0x41, zeroes(0, 1, fua=True), "SEND_FUA"),
        (0x41, zeroes(0, 1, fast=True), "SEND_FAST_ZERO"),
    ],
)
def test_what_the_export_does_not_offer_is_not_sent(flags: int, begin: Begin, missing: str) -> None:
    connection = connected(flags)
    with pytest.raises(NbdUnsupportedError, match=f"NBD_FLAG_{missing}"):
        asked(connection, begin)
    assert not connection.requests


@pytest.mark.parametrize("begin", [trim, cache, zeroes])
def test_ranges_that_do_not_do_are_not_sent(begin: Callable[[int, int], Begin]) -> None:
    for offset, length in ((-512, 512), (SIZE, 512), (0, SIZE + 512), (512, -512)):
        with pytest.raises(UsageError, match="not inside"):
            asked(connected(), begin(offset, length))
    for offset, length in ((1, 512), (512, 1)):
        with pytest.raises(UsageError, match="in blocks of 512"):
            asked(connected(block=512), begin(offset, length))


def test_a_failure_ends_it_and_names_the_first_piece_that_failed() -> None:
    connection = connected()
    line = Line(connection, lambda request: [simple(request.cookie, 95 if request.offset else 0)])
    with pytest.raises(NbdRequestError, match="ENOTSUP") as caught:
        line.run(zeroes(0, SIZE, fast=True)(connection))
    assert (caught.value.wire_error, caught.value.offset) == (95, 2**32 - 512)
    assert len(line.requests) == 9
    assert asked(connection, commands.flush)


@pytest.mark.parametrize("begin", [commands.flush, trim(0, 512), cache(0, 512), zeroes(0, 512)])
def test_content_where_there_can_be_none(begin: Begin) -> None:
    wrongs: list[Callable[[To], bytes]] = [
        lambda to: to.data(0, b"1"),
        lambda to: to.hole(0, 1),
        lambda to: to.status(7, [(512, 0)]),
    ]
    forms: list[Replies] = ["structured", "extended"]
    for replies in forms:
        for wrong in wrongs:
            connection = connected(replies=replies)

            def tell(request: RequestHeader, wrong: Callable[[To], bytes] = wrong) -> list[bytes]:
                return [wrong(To(request))]

            with pytest.raises(NbdProtocolError, match="answers nothing that was asked"):
                Line(connection, tell).run(begin(connection))
