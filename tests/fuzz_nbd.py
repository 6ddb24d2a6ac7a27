"""Servers made of chance: whatever bytes come, a program ends with its result or with a documented error.

Run it for longer than the tests do: ``python -m tests.fuzz_nbd COUNT [SEED]``. Input number N of a seed is always the
same; a finding names both. There are no sockets: the programs themselves are fed.
"""

from __future__ import annotations

import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from types import MappingProxyType
from typing import Any

from qmpnbd.extents import ExtentMap
from qmpnbd.nbd import commands, transfer
from qmpnbd.nbd.connection import Connection
from qmpnbd.nbd.constants import CommandFlag, TransmissionFlag
from qmpnbd.nbd.export import Export, Replies
from qmpnbd.nbd.messages import RequestHeader
from qmpnbd.nbd.quirks import Quirk
from qmpnbd.nbd.survey import Survey
from tests import fuzz_nbd_handshake, fuzz_nbd_recorded
from tests.hostile_nbd import BASE, DEPTH, To, acknowledged, honest_read, pattern, simple_read
from tests.memory_budget import memory_budget
from tests.nbd_line import Line, hurried, stopped
from tests.nbd_verdict import DOCUMENTED, MOST, ODD, FindingError, Verdict

SIZE = 8192
_PART = 20_000  # inputs between two words of progress; ten seconds
_MOST_SHOWN = 30


def mutated(chance: random.Random, data: bytes) -> bytes:
    """Returns an answer as a bad server might send it."""
    changed = bytearray(data)
    for _ in range(chance.choice((0, 1, 1, 1, 2, 4))):
        at = chance.randrange(len(changed) + 1)
        kind = chance.randrange(8)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            width = chance.choice((1, 2, 4, 8))
            changed[at : at + width] = (chance.choice(ODD) % (1 << 8 * width)).to_bytes(width, "big")
        elif kind == 2:
            del changed[at : at + chance.choice((1, 2, 4, 8, 20, 32))]
        elif kind == 3:
            changed[at:at] = chance.randbytes(chance.choice((1, 2, 4, 8, 20)))
        elif kind == 4:
            other = chance.randrange(len(changed) + 1)
            changed[at:at] = changed[min(at, other) : max(at, other)]
        elif kind == 5:
            del changed[at:]
        elif kind == 6:
            changed = changed[at:] + changed[:at]
        else:
            changed[at:] = chance.randbytes(chance.randrange(64))
    return bytes(changed)


def extents(chance: random.Random, length: int) -> list[tuple[int, int]]:
    """Returns extents for a range, perhaps not for all of it."""
    told: list[tuple[int, int]] = []
    left = length
    while left and len(told) < 8:
        size = left if chance.random() < 0.3 else min(left, 512 * chance.randint(1, 8))
        told.append((size, chance.randrange(4)))
        left -= size
    return told


def shuffled(chance: random.Random, chunks: Iterable[bytes]) -> bytes:
    """Returns chunks, sometimes in another order, twice, or not all of them."""
    chosen = list(chunks)
    if chance.random() < 0.1:
        chance.shuffle(chosen)
    if chance.random() < 0.1:
        chosen.insert(chance.randrange(len(chosen) + 1), chance.choice(chosen))
    if chance.random() < 0.1:
        chosen.pop(chance.randrange(len(chosen)))
    return b"".join(chosen)


class Server:
    """Answers honestly at bottom, and changes what it says."""

    def __init__(self, chance: random.Random, replies: Replies) -> None:
        self._chance = chance
        self._replies = replies
        self.told_truth = self.always_told_truth = True
        self._wicked = chance.random() < 0.9

    def __call__(self, request: RequestHeader) -> Iterable[bytes]:
        honest = b"".join(self._honest(request))
        said = honest
        if self._wicked:
            said = mutated(self._chance, shuffled(self._chance, self._honest(request)))
        self.told_truth &= said == honest
        self.always_told_truth &= said == honest
        return [said]

    def _honest(self, request: RequestHeader) -> list[bytes]:
        to = To(request)
        if request.command == 0:
            return list((simple_read if self._replies == "simple" else honest_read)(request, 0))
        if request.command == 7 and self._replies != "simple":
            state = self._chance.getstate()
            self._chance.seed(request.cookie)
            # Only BASE is ever asked for by itself; what is told of the length then is that of the payload.
            filtered = bool(request.flags & CommandFlag.PAYLOAD_LEN)
            length = SIZE - request.offset if filtered else request.length
            told = [to.status(id_, extents(self._chance, length)) for id_ in ((4,) if filtered else (7, 4))]
            self._chance.setstate(state)
            return [*told, to.none()]
        return [acknowledged(request)]


def attack(chance: random.Random) -> str:
    """Runs one session over a connection whose server is not to be trusted.

    Returns:
        How it ended.

    Raises:
        FindingError: with more than a result or a documented error.
    """
    replies: Replies = chance.choice(("simple", "structured", "structured", "extended", "extended"))
    contexts: dict[str, int] = {} if replies == "simple" else {DEPTH: 7, BASE: 4}
    flags = TransmissionFlag(0x1DED if replies == "extended" and chance.random() < 0.5 else 0x0DED)
    export = Export("disk", SIZE, flags, contexts=MappingProxyType(contexts), replies=replies)
    connection = Connection(export, "here")
    server = Server(chance, replies)
    line = Line(connection, server, most=MOST)
    ends = []
    for _ in range(3):
        name, job, judge = _job(chance, connection)
        verdict = Verdict(line)
        server.told_truth = True
        try:
            outcome = line.run(job)
        except DOCUMENTED as error:
            verdict.pieces()
            _require(not server.always_told_truth)
            ends.append(type(error).__name__)
            if not connection.live:
                break
        else:
            judge(outcome, verdict, server.told_truth)
            ends.append(name)
    return " ".join(ends)


def attack_empty(chance: random.Random) -> str:
    """Has a huge empty disk mapped, a few replies of which are not to be trusted.

    Raises:
        FindingError: with more than a map or a documented error.
    """
    size = 1100 << 32
    export = Export("disk", size, TransmissionFlag(0x058F), contexts=MappingProxyType({DEPTH: 7}))
    connection = Connection(export, "here")
    odd = {chance.randrange(1100) for _ in range(chance.choice((0, 1, 3)))}

    def tell(request: RequestHeader) -> Iterable[bytes]:
        said = To(request).status(7, [(request.length, 0)], done=True)
        return [mutated(chance, said) if request.offset >> 32 in odd else said]

    try:
        maps = Line(connection, tell, most=9 * MOST).run(Survey(export, "here", clock=hurried()).run(connection))
    except DOCUMENTED as error:
        return type(error).__name__
    _require(maps[DEPTH].size == size and (bool(odd) or len(maps[DEPTH]) == 1))
    return "huge"


def _job(chance: random.Random, connection: Connection) -> tuple[str, Any, Callable[[Any, Verdict, bool], None]]:
    """Chooses a call, and what must be true of its result, above all where the server told the truth."""
    export = connection.export
    kind = chance.choice(("read", "chunks", "maps", "maps", "once", "command"))
    if kind in ("maps", "once") and not export.contexts:
        kind = "read"
    if kind == "read":
        buffer = bytearray(b"\xaa" * 1024)
        reading = transfer.Reading(export, "here", 512, memoryview(buffer))

        def judge_read(_: Any, verdict: Verdict, truth: bool) -> None:
            verdict.read(512, buffer)
            _require(not truth or buffer == pattern(512, 1024))

        return kind, reading.run(connection), judge_read
    if kind == "chunks":
        plan = transfer.Chunks(export, "here", [(0, 4096), (5000, 10)], size=1024, in_flight=3)

        def judge_pieces(_: Any, verdict: Verdict, truth: bool) -> None:
            verdict.pieces()
            given = sorted(verdict.given)
            _require([offset for offset, _ in given] == [0, 1024, 2048, 3072, 5000])
            _require(not truth or all(data == pattern(offset, len(data)) for offset, data in given))

        return kind, plan.run(connection), judge_pieces
    if kind == "command":
        call = commands.trim(connection, 0, SIZE, fua=False) if chance.random() < 0.5 else commands.flush(connection)
        return kind, call, lambda _, verdict, __: verdict.done()
    lenient = frozenset(Quirk) if chance.random() < 0.2 else frozenset[Quirk]()
    wanted = [BASE] if chance.random() < 0.2 else None
    survey = Survey(export, "here", 0, SIZE, contexts=wanted, lenient=lenient, clock=stopped)
    once = kind == "once"

    def judge_maps(maps: dict[str, ExtentMap], verdict: Verdict, _: bool) -> None:
        verdict.maps(0, maps)
        _require(all(0 < made.size <= SIZE if once else made.size == SIZE for made in maps.values()))

    return kind, survey.once(connection, one=False) if once else survey.run(connection), judge_maps


def _require(truth: bool) -> None:
    if not truth:
        raise FindingError("a result that cannot be one")


def run(count: int, seed: int, first: int = 0) -> dict[str, int]:
    """Makes attacks; returns how often each ended how.

    Raises:
        FindingError: one ended as it must not.
    """
    ends: dict[str, int] = {}
    for number in range(first, first + count):
        chance = random.Random(f"{seed} {number}")
        try:
            if number % 500 == 7:
                end = attack_empty(chance)
            elif number % 5 == 3:
                end = fuzz_nbd_recorded.attack(chance)
            else:
                end = fuzz_nbd_handshake.attack(chance, mutated) if number % 5 == 4 else attack(chance)
        except Exception as error:
            raise FindingError(f"input {number} of seed {seed}: {traceback.format_exc()}") from error
        ends[end] = ends.get(end, 0) + 1
    return ends


def main(count: int, seed: int) -> None:
    """Makes attacks within the memory that the tests allow; says on stderr how far it is, and on stdout how they ended.

    Raises:
        FindingError: one ended as it must not.
    """
    ends: Counter[str] = Counter()
    began = time.monotonic()
    with memory_budget():
        for first in range(0, count, _PART):
            ends.update(run(min(_PART, count - first), seed, first))
            sys.stderr.write(f"{ends.total():,} of {count:,} inputs, {time.monotonic() - began:.0f} s\n")
    for ending, times in ends.most_common(_MOST_SHOWN):
        sys.stdout.write(f"{times:9,}  {ending}\n")
    rest = ends.total() - sum(times for _, times in ends.most_common(_MOST_SHOWN))
    recorded = sum(times for ending, times in ends.items() if ending.startswith("recorded"))
    sys.stdout.write(
        f"{rest:9,}  in {max(0, len(ends) - _MOST_SHOWN):,} other ways\n"
        f"{ends.total():,} inputs of seed {seed}, {recorded:,} of them recorded sessions: nothing found\n"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1)
