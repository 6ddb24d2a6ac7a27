"""Recorded sessions with real servers, damaged, and played to the client again: a part of `tests.fuzz_nbd`."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

from qmpnbd.errors import UsageError
from qmpnbd.nbd.connection import Connection
from tests.nbd_doors import Step
from tests.nbd_line import Line
from tests.nbd_oracle import fields_of
from tests.nbd_recordings import SIZE, Recording, begin, job, load
from tests.nbd_verdict import DOCUMENTED, DOCUMENTED_OF_HANDSHAKE, MOST, ODD, Verdict

HUGE = [2**16 - 1, 2**20, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]

recordings = cache(load)


@cache
def fields(name: str) -> list[tuple[int, int]]:
    """Returns offset and width of the numbers that frame a session."""
    return next(fields_of(recording.said) for recording in recordings() if recording.name == name)


def damaged(chance: random.Random, recording: Recording) -> bytes:
    """Returns a session as it was not: bits flipped, bytes lost, added or doubled, cut, or another's from here on."""
    said = bytearray(recording.said)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        at = chance.randrange(len(said) + 1)
        kind = chance.randrange(10)
        if kind < 4 and (framing := [field for field in fields(recording.name) if sum(field) <= len(said)]):
            start, width = chance.choice(framing)
            number = int.from_bytes(said[start : start + width], "big")
            odd = chance.choice((number + 1, number - 1, number ^ 1 << chance.randrange(8 * width), *ODD[:2]))
            number = chance.choice(HUGE) if kind == 0 else chance.choice(ODD) if kind == 1 else odd
            said[start : start + width] = (number % (1 << 8 * width)).to_bytes(width, "big")
        elif kind == 4 and at < len(said):
            said[at] ^= 1 << chance.randrange(8)
        elif kind == 5:
            del said[at : at + chance.choice((1, 2, 4, 8, 20, 32, 512))]
        elif kind == 6:
            said[at:at] = chance.randbytes(chance.choice((1, 2, 4, 8, 20)))
        elif kind == 7:
            length = chance.choice((4, 16, 20, 32, 512))
            said[at:at] = said[at : at + length]
        elif kind == 8:
            del said[at:]
        else:
            other = chance.choice(recordings()).said
            said[at:] = other[chance.randrange(len(other)) :] if chance.random() < 0.5 else other[at:]
    return bytes(said)


def play(recording: Recording, said: bytes) -> list[Any]:
    """Plays what a server said to the client, and judges every result by it.

    Args:
        recording: the calls to make.
        said: what the server says this time.

    Returns:
        The export agreed on and the outcome of each call, or the error in its place.

    Raises:
        FindingError: with a result that the server did not tell.
    """
    incoming = bytearray(said)
    try:
        export = begin(recording, incoming, MOST)
    except DOCUMENTED_OF_HANDSHAKE as error:
        return [error]
    connection = Connection(export, "here")
    line = Line(connection, data=bytes(incoming), most=MOST)
    outcomes: list[Any] = [export]
    for step in recording.steps:
        outcomes.append(_outcome(line, connection, step))
        if not connection.live:
            break
    return outcomes


def _outcome(line: Line, connection: Connection, step: Step) -> Any:
    """Makes one call; an export that is not the recorded one may not have its ranges."""
    verdict = Verdict(line)
    name, *arguments = (step,) if isinstance(step, str) else step
    try:
        program, buffer = job(connection, step, fill=0xAA)
        outcome = line.run(program)
    except DOCUMENTED as error:
        verdict.pieces()
        return error
    except UsageError as error:
        if connection.export.size >= SIZE and connection.export.minimum_block == 1:
            raise
        return error
    if name == "read":
        verdict.read(arguments[0], buffer)
        return buffer
    if name == "chunks":
        verdict.pieces()
        return verdict.given
    if name in {"maps", "block_status"}:
        verdict.maps(arguments[0] if arguments else 0, outcome)
    else:
        verdict.done()
    return outcome


def attack(chance: random.Random) -> str:
    """Damages a session and plays it.

    Returns:
        How it ended.

    Raises:
        FindingError: with more than results that the server told, or documented errors.
    """
    recording = chance.choice(recordings())
    export, *outcomes = play(recording, damaged(chance, recording))
    ends = [type(outcome).__name__ for outcome in outcomes if isinstance(outcome, Exception)]
    first = type(export).__name__ if isinstance(export, Exception) else "export"
    return f"recorded: {' '.join([first, *ends])}"
