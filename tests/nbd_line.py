"""Runs the programs of a connection without a socket: what they send is answered by a function, or by bytes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from qmpnbd.errors import NbdDisconnectedError
from qmpnbd.nbd.connection import Connection
from qmpnbd.nbd.constants import Command, CommandFlag
from qmpnbd.nbd.messages import RequestHeader
from qmpnbd.nbd.requests import Give, Job, Look, ReceiveInto
from qmpnbd.nbd.wire import Receive, Send

_T = TypeVar("_T")
Tell = Callable[[RequestHeader], Iterable[bytes]]


def stopped() -> float:
    """A clock on which nothing takes any time, so that block status is asked for one request at a time."""
    return 0.0


def hurried() -> Callable[[], float]:
    """Makes a clock on which the server becomes ever quicker, so that as many requests are in flight as may be."""
    return itertools.accumulate(1e40 * 0.9**count for count in itertools.count()).__next__


class Line:
    """A connection and what is at the other end of it.

    Attributes:
        sent: everything sent.
        requests: the headers in it.
        payloads: what followed them.
        incoming: bytes not yet received.
        given: what programs gave.
    """

    def __init__(
        self, connection: Connection, tell: Tell | None = None, data: bytes = b"", most: int = 1 << 26
    ) -> None:
        self.connection = connection
        self.tell = tell
        self._most = most  # bytes that a program may want room for
        self.sent = b""
        self.requests: list[RequestHeader] = []
        self.payloads: list[bytes] = []
        self.incoming = bytearray(data)
        self._told = bytearray(data)
        self.given: list[Any] = []

    @property
    def taken(self) -> bytes:
        """All bytes received so far."""
        return bytes(self._told[: len(self._told) - len(self.incoming)])

    def run(self, job: Job[_T]) -> _T:
        """Runs a program to its end."""
        try:
            operation = next(job)
            while True:
                if isinstance(operation, Give):
                    offset, view = operation.result
                    self.given.append((offset, bytes(view)))
                elif isinstance(operation, Send):
                    self._sent(operation)
                else:
                    try:
                        while not operation.batch.finished:
                            self.receive()
                    except Exception as error:
                        operation = job.throw(error)
                        continue
                operation = job.send(b"")
        except StopIteration as stop:
            result: _T = stop.value
            return result
        finally:
            job.close()

    def receive(self) -> None:
        """Receives one message."""
        program = self.connection.receive()
        try:
            operation = next(program)
            while True:
                assert 0 < operation.count <= self._most, f"{operation.count} bytes wanted at once"
                skipped = operation.skip if isinstance(operation, ReceiveInto) else 0
                if skipped + operation.count > len(self.incoming):
                    self.connection.lose()
                    raise NbdDisconnectedError(f"the end while {operation.what} was due", where="test")
                if isinstance(operation, Look):
                    operation = program.send(memoryview(bytes(self.incoming)))
                    continue
                del self.incoming[:skipped]
                taken = self.incoming[: operation.count]
                del self.incoming[: operation.count]
                if isinstance(operation, Receive):
                    operation = program.send(taken)
                else:
                    if operation.buffer is not None:
                        operation.buffer[:] = taken
                    operation = program.send(b"")
        except StopIteration:
            pass
        finally:
            program.close()

    def _sent(self, operation: Send) -> None:
        data = bytes(operation.data) + bytes(operation.payload)
        self.sent += data
        layout = RequestHeader.EXTENDED if self.connection.export.replies == "extended" else RequestHeader.LAYOUT
        while data:
            request = RequestHeader.unpack(data[: layout.size])
            carries = request.command == Command.WRITE or bool(request.flags & CommandFlag.PAYLOAD_LEN)
            end = layout.size + (request.length if carries else 0)
            self.requests.append(request)
            self.payloads.append(data[layout.size : end])
            data = data[end:]
            if self.tell is not None:
                told = b"".join(self.tell(request))
                self.incoming += told
                self._told += told
