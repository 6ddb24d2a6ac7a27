"""Whether a result is what the server's bytes say, and nothing else: no byte made up, none left as it was before."""

from __future__ import annotations

from collections.abc import Mapping

from qmpnbd.errors import (
    NbdContextError,
    NbdDisconnectedError,
    NbdProtocolError,
    NbdRefusedError,
    NbdRequestError,
    NbdUnsupportedError,
)
from qmpnbd.extents import ExtentMap
from qmpnbd.nbd.constants import Command
from tests.nbd_line import Line
from tests.nbd_oracle import Asked, Told, heard

DOCUMENTED = (NbdProtocolError, NbdRequestError, NbdDisconnectedError, NbdUnsupportedError)
DOCUMENTED_OF_HANDSHAKE = (*DOCUMENTED, NbdRefusedError, NbdContextError)
MOST = 1 << 20
"""Bytes that no honest answer of a fuzzed server comes near, so that nobody may have room made for more."""

ODD = [0, 1, 2, 3, 5, 6, 7, 127, 128, 255, 256, 511, 512, 4096, 8192, 2**15 + 1, 2**15 + 2, 2**16 - 1, 2**31, 2**32 - 1]
ODD += [2**32, 2**63 - 1, 2**63, 2**64 - 512, 2**64 - 1, 0x67446698, 0x668E33EF, 0x6E8A278C, 108]


class FindingError(Exception):
    """Something that must not happen."""


class Verdict:
    """Judges the calls made over a line, one after the other; make it before a call, ask it afterwards.

    Raises:
        FindingError: a result that the server's bytes do not say.
    """

    def __init__(self, line: Line) -> None:
        self._line = line
        self._asked = len(line.requests)
        self._given = len(line.given)

    @property
    def given(self) -> list[tuple[int, bytes]]:
        """The pieces given since."""
        return self._line.given[self._given :]

    def read(self, offset: int, buffer: bytes | bytearray) -> None:
        """Judges a read that succeeded."""
        covered = 0
        for told in self._told(Command.READ):
            at = told.offset - offset
            _require_whole(told, bytes(buffer[at : at + len(told.data)]))
            covered += len(told.data)
        _require(covered == len(buffer), "bytes that were never asked for")

    def pieces(self) -> None:
        """Judges the pieces given so far, whether the call succeeded or not."""
        told = self._told(Command.READ)
        for offset, data in self.given:
            found = [each for each in told if (each.offset, len(each.data)) == (offset, len(data))]
            _require(len(found) == 1, "a piece that was not asked for")
            _require_whole(found[0], data)

    def done(self) -> None:
        """Judges that something was carried out."""
        for told in self._told():
            _require(told.done and not told.failed, "a success that the server did not tell")

    def maps(self, offset: int, maps: Mapping[str, ExtentMap]) -> None:
        """Judges maps that begin at `offset`, at each sector."""
        told = [each for each in self._told(Command.BLOCK_STATUS) if each.done and not each.failed]
        for name, found in maps.items():
            id_ = self._line.connection.export.contexts[name]
            statuses = [extent for each in told for extent in each.statuses if extent[0] == id_]
            for run in found:
                for byte in range(run.offset, run.offset + run.length, 512):
                    _require(
                        any(
                            at <= offset + byte < at + length and run.value == value
                            for _, at, length, value in statuses
                        ),
                        f"{name} {run.value} at {offset + byte:#x}, which the server did not tell",
                    )

    def _told(self, command: Command | None = None) -> list[Told]:
        """Returns what was told in reply to the requests of this call."""
        asked = [Asked(r.cookie, r.offset, r.length, r.command == Command.READ) for r in self._line.requests]
        told = heard(self._line.taken, asked)
        return [told[r.cookie] for r in self._line.requests[self._asked :] if command in (None, r.command)]


def _require_whole(told: Told, data: bytes) -> None:
    _require(told.done and not told.failed, "data of a reply that is not complete, or an error")
    _require(told.times.count(1) == len(told.times), "a byte that was not told, or told twice")
    _require(told.data == data, "data that is not what the server told")


def _require(truth: bool, what: str) -> None:
    if not truth:
        raise FindingError(what)
