"""The transmission phase: requests go out, chunks come back, and each is matched by its cookie.

::

                 submit()                         receive()                    receive()
    cookie 1   ------------->  the ledger   <-- BLOCK_STATUS chunk  ...   <-- chunk with DONE   ---> finished
                                                                                                       |
                                            <-- a late chunk of cookie 1: skipped by its length  <-----+
                                            <-- a cookie nobody knows: the connection is dead

The connection is the one place that knows what state the conversation is in: who asked for what is in its ledger, what
arrives is judged by its receiver. What its programs yield is for a door to do (see `qmpnbd.nbd.requests`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum, auto
from typing import Final

from qmpnbd.errors import NbdDisconnectedError, NbdProtocolError, UsageError
from qmpnbd.nbd import constants
from qmpnbd.nbd.chunk_rules import request_failed
from qmpnbd.nbd.constants import Command, CommandFlag
from qmpnbd.nbd.export import Export
from qmpnbd.nbd.ledger import Ledger
from qmpnbd.nbd.limits import DEFAULT_LIMITS, Limits
from qmpnbd.nbd.messages import pack_request
from qmpnbd.nbd.receiver import Receiver
from qmpnbd.nbd.requests import (
    NOWHERE,
    Batch,
    Due,
    Job,
    Reception,
    Request,
    Sink,
    Volley,
    Wait,
)
from qmpnbd.nbd.wire import Buffer, Send


class State(Enum):
    """What may still be said."""

    OPEN = auto()
    DRAINING = auto()  # the server is shutting down: take leave, nothing else
    CLOSED = auto()  # we took leave
    DEAD = auto()  # the stream cannot be trusted or is gone


_NEXT: Final = {
    State.OPEN: {State.DRAINING, State.CLOSED, State.DEAD},
    State.DRAINING: {State.DRAINING, State.CLOSED, State.DEAD},
    State.CLOSED: {State.CLOSED, State.DEAD},
    State.DEAD: {State.DEAD},
}

_LIVE: Final = {State.OPEN, State.DRAINING}


class Connection:
    """The conversation about one export after the handshake.

    Args:
        export: what was agreed.
        where: server and export, for messages.
        limits: how much the server may answer.
    """

    def __init__(self, export: Export, where: str, limits: Limits = DEFAULT_LIMITS) -> None:
        self.export = export
        self.where = where
        self._limits = limits
        self._extended = export.replies == "extended"
        self._state = State.OPEN
        self._ledger = Ledger()
        self._receiver = Receiver(export, self._ledger, limits.memory, self.violation, self._drain)

    @property
    def requests(self) -> int:
        """How many were made."""
        return self._ledger.made

    @property
    def messages(self) -> int:
        """How many were received."""
        return self._receiver.messages

    @property
    def answered(self) -> int:
        """How many requests, or many at once, got all of their answer."""
        return self._ledger.answered

    @property
    def state(self) -> State:
        """What may still be said."""
        return self._state

    @property
    def live(self) -> bool:
        """Whether the server is there and can be believed."""
        return self._state in _LIVE

    @property
    def busy(self) -> bool:
        """Whether an answer is still to come, though perhaps nobody waits for it any more."""
        return bool(self._ledger.pending or self._ledger.volleys)

    @property
    def abandoned(self) -> int:
        """How many requests nobody waits for any more, and are not answered."""
        return self._ledger.abandoned

    def lose(self) -> None:
        """Declares the connection dead, for instance because the socket is gone."""
        self._become(State.DEAD)

    def closed(self) -> None:
        """Books that we closed, with leave taken or without."""
        if self._state is not State.DEAD:
            self._become(State.CLOSED)

    def violation(self, what: str) -> NbdProtocolError:
        """Declares the connection dead because the server broke the protocol, and makes the error that says how."""
        self._become(State.DEAD)
        return NbdProtocolError(what, where=self.where)

    # Requests.

    @contextmanager
    def batch(self) -> Iterator[Batch]:
        """Makes a batch; what is pending of it at the end is abandoned."""
        batch = Batch()
        try:
            yield batch
        finally:
            for request in batch.pending.values():
                self._receiver.drop(request)
            self._ledger.abandon(batch)
            batch.finished.clear()
            batch.wake = None

    def submit(
        self,
        batch: Batch,
        command: Command,
        offset: int = 0,
        length: int = 0,
        sink: Sink = NOWHERE,
        *,
        flags: int = 0,
        payload: int | None = None,
    ) -> bytes:
        """Books a request and returns its header, which must be sent before anything else is.

        Args:
            batch: the call it belongs to.
            command: what to ask.
            offset: first byte.
            length: bytes it is about.
            sink: who is given what it brings.
            flags: how to do it.
            payload: bytes that follow the header, if they are not `length` bytes of data to write.

        Raises:
            UsageError: the connection is closed.
            NbdDisconnectedError: the server is shutting down, or the connection was lost before.
        """
        self._require_open()
        if self._ledger.abandoned >= constants.MAX_ABANDONED:
            self.lose()
            raise NbdDisconnectedError(f"{constants.MAX_ABANDONED} requests were not answered", where=self.where)
        most = self._limits.extra_chunks
        if command == Command.READ:
            most += length // constants.SECTOR + 2  # and two at unaligned ends
            self._receiver.expect_read(length)
        elif command == Command.BLOCK_STATUS:
            most += len(self.export.contexts)
        whole = bool(command == Command.READ and flags & _DF)
        cookie = self._ledger.add(Request(command, offset, length, batch, sink, most, whole))
        if self._extended and (payload is not None or command == Command.WRITE):
            flags |= CommandFlag.PAYLOAD_LEN
        told = length if payload is None else payload
        return pack_request(command, cookie, offset, told, flags, extended=self._extended)

    def submit_volley(self, batch: Batch, volley: Volley) -> int:
        """Books many requests, whose headers must be sent before anything else is; returns the first of their cookies.

        Raises:
            UsageError: the connection is closed.
            NbdDisconnectedError: the server is shutting down, or the connection was lost before.
        """
        self._require_open()
        return self._ledger.add_volley(batch, volley)

    def call(
        self,
        command: Command,
        offset: int = 0,
        length: int = 0,
        sink: Sink = NOWHERE,
        *,
        flags: int = 0,
        payload: Buffer | None = None,
    ) -> Job[None]:
        """Makes one request and sees it through; see `submit`.

        Raises:
            NbdRequestError: the request failed; the connection can be used further.
            NbdProtocolError: the server broke the protocol.
            NbdDisconnectedError: the server is shutting down, or the connection was lost before.
            UsageError: the connection is closed.
        """
        with self.batch() as batch:
            size = None if payload is None else len(payload)
            header = self.submit(batch, command, offset, length, sink, flags=flags, payload=size)
            yield Send(header, b"" if payload is None else payload)
            yield Wait(batch, Due(batch.pending))
            self.require_success(batch.finished.popleft())

    def disconnect(self) -> bytes:
        """Takes leave if there is anybody to take leave of, and returns what to send for it.

        No answer comes ("Terminating the transmission phase").
        """
        if not self.live:
            return b""
        self._become(State.CLOSED)
        return pack_request(Command.DISC, self._ledger.cookie(), 0, 0, 0, extended=self._extended)

    def require_success(self, request: Request) -> None:
        """Returns if a finished request was carried out.

        Raises:
            NbdRequestError: it failed.
            NbdDisconnectedError: it failed because the server is shutting down.
        """
        if request.failure is not None:
            raise request_failed(request, request.failure, self.where)

    # Answers.

    def receive(self) -> Reception:
        """Receives one message and books it to its request.

        Raises:
            NbdProtocolError: the server broke the protocol.
        """
        return self._receiver.receive()

    def _drain(self) -> None:
        self._become(State.DRAINING)

    def _require_open(self) -> None:
        if self._state is State.CLOSED:
            raise UsageError("the connection is closed", where=self.where)
        if self._state is not State.OPEN:
            why = "the server is shutting down" if self._state is State.DRAINING else "the connection was lost before"
            raise NbdDisconnectedError(why, where=self.where)

    def _become(self, state: State) -> None:
        """Changes the state, if that is legal."""
        if state not in _NEXT[self._state]:
            raise UsageError(f"the connection is {self._state.name.lower()}", where=self.where)
        self._state = state
        if state in {State.CLOSED, State.DEAD}:
            self._ledger.forget()


_DF: Final = int(CommandFlag.DF)  # a number is compared ten times faster than a flag
