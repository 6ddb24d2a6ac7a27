"""Requests of the transmission phase, and the programs that make and answer them.

Answers arrive in any order and in pieces, so there are two kinds of programs::

    a call                                            the connection
       header = connection.submit(batch, ...)            receives one message after the other, whoever it is for,
       yield Send(header)                                gives what it brings to the Sink of its request,
       yield Wait(batch, ...)                            and puts a request that is finished into its Batch
       batch.finished.popleft()

A `Batch` is the requests of one call. When the call ends before its requests, for whatever reason, they are abandoned:
what still arrives for them is received and dropped, and the connection stays in step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeAlias, TypeVar

from qmpnbd.nbd.constants import Command
from qmpnbd.nbd.wire import Receive, Received, Send


@dataclass(slots=True, eq=False)
class ReceiveInto:
    """Receive exactly `count` bytes into `buffer`, or drop them if there is none. What comes back is empty.

    The buffer may be taken away while bytes arrive, by setting it to None: the rest is dropped.

    Attributes:
        buffer: as long as `count`, or None.
        count: bytes.
        what: what is being waited for, for messages.
        skip: bytes before these that were looked at, and are done with.
    """

    buffer: memoryview | None
    count: int
    what: object
    skip: int = 0


@dataclass(frozen=True, slots=True)
class Look:
    """Receive at least `count` bytes. What comes back is a view of all that arrived; it stays there to be received.

    Attributes:
        count: bytes needed.
        what: what is being waited for, for messages.
        most: bytes to receive at most, so that what follows them can go straight to where it is wanted.
    """

    count: int
    what: object
    most: int


@dataclass(frozen=True, slots=True)
class Wait:
    """Wait until a request of the batch is finished. What comes back is empty."""

    batch: Batch
    what: object


@dataclass(slots=True)
class Give:
    """Hand out one of several results, perhaps thousands in a second. What comes back is empty."""

    result: Any


_T = TypeVar("_T")
Job: TypeAlias = Generator[Send | Wait | Give, Received, _T]
"""The program of a call."""

Reception: TypeAlias = Generator[Receive | ReceiveInto | Look, Any, None]
"""The program that receives one message."""


@dataclass(frozen=True, slots=True)
class Status:
    """A BLOCK_STATUS or BLOCK_STATUS_EXT chunk.

    Attributes:
        context_id: the metadata context, by its id.
        entries: big-endian pairs of length and status, at least one.
        wide: whether the numbers have 64 bits; otherwise they have 32.
    """

    context_id: int
    entries: memoryview
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Failure:
    """An error chunk, or a simple reply that says no.

    Attributes:
        wire_error: the error number as sent.
        message: the server's words, printable; may be empty.
        offset: the byte it is about, if the server told.
    """

    wire_error: int
    message: str = ""
    offset: int | None = None


class Sink:
    """Who is given what a request brings. This one wants nothing; the connection has checked kinds and bounds."""

    __slots__ = ()

    def status(self, request: Request, told: Status) -> None:
        """Takes the status of some extents for one context."""

    def room(self, request: Request, offset: int, length: int) -> memoryview | None:
        """Returns where the data of these bytes of the export goes; None to have it dropped."""

    def hole(self, request: Request, offset: int, length: int) -> None:
        """Learns that these bytes of the export read as zeroes."""

    def done(self, request: Request) -> None:
        """Learns that nothing more comes; `request.failure` tells whether it was carried out."""


NOWHERE: Final = Sink()


@dataclass(slots=True, eq=False)
class Request:
    """A request on its way.

    Attributes:
        command: what was asked.
        offset: first byte.
        length: bytes.
        batch: the call it belongs to.
        sink: who is given what it brings.
        most_chunks: more are not believed.
        chunks: how many came so far, late ones included.
        contents: how many of them brought data.
        failure: the first error the server sent.
        whole: whether the data must come in one chunk.
    """

    command: Command
    offset: int
    length: int
    batch: Batch
    sink: Sink
    most_chunks: int
    whole: bool = False
    chunks: int = 0
    contents: int = 0
    failure: Failure | None = None

    def __str__(self) -> str:
        at = f" [{self.offset:#x}, {self.offset + self.length:#x})" if self.length else ""
        return f"NBD_CMD_{self.command.name}{at}"


@dataclass(slots=True, eq=False)
class Batch:
    """The requests of one call.

    Attributes:
        pending: those that are not finished, by cookie.
        finished: those that are, in the order in which they finished; the call takes them out.
        wake: called when a request finishes.
    """

    pending: dict[int, Request] = field(default_factory=dict)
    finished: deque[Request] = field(default_factory=deque)
    wake: Callable[[], None] | None = None


class Volley(Protocol):
    """Many requests made at once that are likely to be answered alike, so that they are booked all together.

    Attributes:
        first: the first of their consecutive cookies.
        count: how many there are.
        request: stands for all of them; finished when each is answered, or became one by itself.
    """

    first: int
    count: int
    request: Request

    def take(self, arrived: memoryview) -> int:
        """Books the answers at the beginning of what arrived that are as expected; returns how many bytes they have."""
        ...

    def single(self, cookie: int) -> Request | None:
        """Returns one of the requests to be booked by itself; None if it was answered."""
        ...

    def answered(self, cookie: int) -> Request:
        """Returns what stands for a request that was answered already, so that what comes late is dropped."""
        ...

    @property
    def open(self) -> int:
        """How many are not answered and did not become requests by themselves."""
        ...


class Due:
    """What is due from the server, for messages: put into words only when somebody reads it."""

    __slots__ = ("_pending",)

    def __init__(self, pending: dict[int, Request]) -> None:
        self._pending = pending

    def __str__(self) -> str:
        first = [str(request) for request, _ in zip(self._pending.values(), range(3), strict=False)]
        more = f" and {len(self._pending) - 3} more" if len(self._pending) > 3 else ""
        return "a reply" + (" to " + ", ".join(first) + more if first else "")
