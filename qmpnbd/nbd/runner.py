"""Runs the programs of calls for the blocking door: one thread at a time sends, waits and receives.

While sending would block, answers are received: a server that waits for room for its answers does not read.
"""

from __future__ import annotations

import select
import threading
from collections.abc import Generator
from typing import Any, TypeVar

from qmpnbd.deadline import Deadline
from qmpnbd.errors import NbdDisconnectedError, QmpnbdError, UsageError
from qmpnbd.nbd.channel import Pump
from qmpnbd.nbd.connection import Connection
from qmpnbd.nbd.requests import Give, Job, Wait
from qmpnbd.nbd.sockets import Stream
from qmpnbd.nbd.wire import Send

_T = TypeVar("_T")


class Runner:
    """One connection over one stream.

    Args:
        stream: after the handshake.
        connection: what was agreed.
        request_seconds: how long an answer may take, whatever time a call has.
    """

    def __init__(self, stream: Stream, connection: Connection, request_seconds: float | None) -> None:
        self.stream = stream
        self.connection = connection
        self._request_seconds = request_seconds
        self._pump = Pump(connection, stream)
        self._lock = threading.Lock()

    def run(self, job: Job[_T], deadline: Deadline | None) -> _T:
        """Runs a program that gives nothing but what it returns."""
        gives = self.give(job, deadline)
        try:
            while True:
                next(gives)
        except StopIteration as stop:
            result: _T = stop.value
            return result
        finally:
            gives.close()

    def give(self, job: Job[_T], deadline: Deadline | None) -> Generator[Any, None, _T]:
        """Runs a program and yields what it gives; where it leaves the stream unusable, the connection is over."""
        clock = deadline or Deadline(None)
        try:
            operation = self._step(job, clock)
            while True:
                yield operation.result
                operation = self._step(job, clock)
        except StopIteration as stop:
            result: _T = stop.value
            return result
        finally:
            job.close()
            if not self.connection.live:
                self.stream.close()

    def close(self, patience: float) -> None:
        """Takes leave and closes; never fails. A call under way in another thread fails, and closes."""
        if not self._lock.acquire(blocking=False):
            self.connection.closed()
            self.stream.shut_down()
            return
        try:
            self.stream.push(self.connection.disconnect())
            deadline = Deadline(patience)
            while not self.stream.flush():
                self.stream.wait(select.POLLOUT, "the server to take the leave", deadline)
        except QmpnbdError:
            pass
        finally:
            self.connection.closed()
            self.stream.close()
            self._lock.release()

    def _step(self, job: Job[Any], deadline: Deadline) -> Give:
        """Goes on to the next thing that is given."""
        if not self._lock.acquire(blocking=False):
            raise UsageError("another thread is using this connection", where=self.connection.where)
        try:
            operation = next(job)
            while not isinstance(operation, Give):
                try:
                    self._perform(operation, deadline)
                except QmpnbdError as error:
                    operation = job.throw(error)
                else:
                    operation = job.send(b"")
        except StopIteration:
            raise
        except QmpnbdError:
            self.stream.keep()
            raise
        except BaseException:
            self.connection.lose()  # interrupted anywhere, perhaps between receiving and booking
            raise
        else:
            return operation
        finally:
            self._lock.release()

    def _perform(self, operation: Send | Wait, deadline: Deadline) -> None:
        clock = deadline if self._request_seconds is None else deadline.within(self._request_seconds)
        stream, where = self.stream, self.connection.where
        if isinstance(operation, Send):
            stream.push(operation.data, operation.payload)
            while not self._flush():
                stream.wait(select.POLLIN | select.POLLOUT, "the server to take a request", clock)
                self._pump.advance()
            return
        finished, what = operation.batch.finished, operation.what
        while not finished:
            if self._pump.advance():
                if not finished:
                    clock.check(what, where)
            elif self._flush():
                stream.wait(select.POLLIN, what, clock)
            else:  # what a call that ran out of time left behind
                stream.wait(select.POLLIN | select.POLLOUT, what, clock)

    def _flush(self) -> bool:
        """Sends what the socket takes; whether nothing is left."""
        try:
            return self.stream.flush()
        except NbdDisconnectedError:
            self.connection.lose()
            raise
