"""Runs the programs of calls for the asyncio door: many at once over one connection.

There is no task: while an answer is due, the event loop calls when something arrives, and what arrives is received
and booked then and there. A call waits for its own answers only, and may be cancelled without harm to the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any, Final, TypeVar

from qmpnbd.deadline import Deadline
from qmpnbd.errors import NbdDisconnectedError, QmpnbdError
from qmpnbd.nbd.aio_sockets import Stream, bounded
from qmpnbd.nbd.channel import Pump
from qmpnbd.nbd.connection import Connection
from qmpnbd.nbd.requests import Give, Job, Wait
from qmpnbd.nbd.wire import Send

_BURST: Final = 16  # messages received before others have their turn

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
        self._waiting: set[asyncio.Future[None]] = set()
        self._error: BaseException | None = None
        self._listening: asyncio.AbstractEventLoop | None = None
        self._sending: asyncio.AbstractEventLoop | None = None

    async def run(self, job: Job[_T], deadline: Deadline | None) -> _T:
        """Runs a program that gives nothing but what it returns."""
        clock = deadline or Deadline(None)
        try:
            while isinstance(operation := await self._step(job, clock), Give):
                pass
            result: _T = operation[0]
            return result
        finally:
            self._end(job)

    async def give(self, job: Job[None], deadline: Deadline | None) -> AsyncGenerator[Any, None]:
        """Runs a program and yields what it gives."""
        clock = deadline or Deadline(None)
        try:
            while isinstance(operation := await self._step(job, clock), Give):
                yield operation.result
        finally:
            self._end(job)

    async def close(self, patience: float) -> None:
        """Takes leave and closes; never fails. Calls under way fail."""
        try:
            if self._waiting:
                self.connection.closed()
            else:
                self.stream.push(self.connection.disconnect())
                async with bounded(Deadline(patience), "the server to take the leave", self.connection.where):
                    while not self.stream.flush():
                        await self.stream.writable()
        except QmpnbdError:
            pass
        finally:
            self.connection.closed()
            self._fail(NbdDisconnectedError("the client was closed", where=self.connection.where))

    async def _step(self, job: Job[_T], deadline: Deadline) -> Give | tuple[_T]:
        """Goes on to the next thing that is given, or to what the program returns."""
        try:
            operation = next(job)
            while not isinstance(operation, Give):
                try:
                    await self._perform(operation, deadline)
                except QmpnbdError as error:
                    operation = job.throw(error)
                else:
                    operation = job.send(b"")
        except StopIteration as stop:
            return (stop.value,)
        except BaseException:
            self.stream.keep()  # the caller may have its buffer back
            raise
        return operation

    async def _perform(self, operation: Send | Wait, deadline: Deadline) -> None:
        clock = deadline if self._request_seconds is None else deadline.within(self._request_seconds)
        if isinstance(operation, Send):
            self._require_alive()
            self.stream.push(operation.data, operation.payload)
            self._writable()
            while self._sending is not None:
                await self._wait(clock, "the server to take a request")
            self._require_alive()
            return
        batch = operation.batch
        while not batch.finished:
            self._require_alive()
            self._listen()
            await self._wait(clock, operation.what, operation)

    async def _wait(self, clock: Deadline, what: object, operation: Wait | None = None) -> None:
        """Waits for an answer, or for all to be sent, or for the end, or for the time to be over.

        Which of them it was is for the caller to see; who waits again then learns that the time is over. `bounded`
        would cost 10 us more, and a READ of 256 KiB waits about once.

        Raises:
            DeadlineError: the time was over before.
        """
        loop = asyncio.get_running_loop()
        left = clock.remaining(what, self.connection.where)
        ready = loop.create_future()
        timer = None if left is None else loop.call_later(left, _settle, ready)
        self._waiting.add(ready)
        if operation is not None:
            operation.batch.wake = partial(_settle, ready)
        try:
            await ready
        finally:
            if timer is not None:
                timer.cancel()
            self._waiting.discard(ready)
            if operation is not None:
                operation.batch.wake = None

    def _listen(self) -> None:
        """Has what arrives received, until nothing is due any more."""
        if self._listening is None:
            self._listening = asyncio.get_running_loop()
            self._listening.add_reader(self.stream.fileno(), self._readable)

    def _readable(self) -> None:
        if self._listening is None:
            return
        try:
            for _ in range(_BURST):
                if not self.connection.busy:
                    self._listening.remove_reader(self.stream.fileno())
                    self._listening = None
                    return
                if not self._pump.advance():
                    return
        except BaseException as error:
            self._fail(error)
            if not isinstance(error, QmpnbdError):
                raise
            return
        self._listening.call_soon(self._readable)  # what was received early does not show at the socket

    def _writable(self) -> None:
        """Sends what can be sent, and has the loop call again for the rest."""
        try:
            done = self.stream.flush()
        except QmpnbdError as error:
            self._fail(error)
            return
        if not done and self._sending is None:
            self._sending = asyncio.get_running_loop()
            self._sending.add_writer(self.stream.fileno(), self._writable)
            self._listen()  # a server that waits for room for its answers does not read
        elif done and self._sending is not None:
            self._sending.remove_writer(self.stream.fileno())
            self._sending = None
            for ready in self._waiting:
                _settle(ready)

    def _require_alive(self) -> None:
        """Raises the error that ended the connection, anew for each call that it hit."""
        if self._error is None:
            return
        if isinstance(self._error, QmpnbdError):
            error = self._error
            raise type(error)(error.what, where=error.where, remedy=error.remedy) from error
        raise NbdDisconnectedError(f"the connection was given up ({self._error!r})", where=self.connection.where)

    def _fail(self, error: BaseException) -> None:
        """Ends the connection for all calls."""
        self._error = self._error or error
        if self.connection.live:
            self.connection.lose()
        self._pump.stop()
        if self._listening is not None:
            self._listening.remove_reader(self.stream.fileno())
        if self._sending is not None:
            self._sending.remove_writer(self.stream.fileno())
        self._listening = self._sending = None
        self.stream.close()
        for ready in self._waiting:
            _settle(ready)

    def _end(self, job: Job[Any]) -> None:
        """Lets go of a program, finished or not."""
        job.close()
        if not self.connection.live and self._error is None:
            self._fail(NbdDisconnectedError("the connection was lost", where=self.connection.where))


def _settle(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
