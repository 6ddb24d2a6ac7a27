"""Who asked for what: the requests of a connection by their cookies, until they are answered and a while longer.

::

                 add()                         find()                       finish()
    request    ------------->  pending   <------------ chunk of cookie 1  ------------->  finished, and in its batch
                                             |
    many at once -> volleys  <---------------+  one of them whose answer is not the expected one becomes pending

Those that are finished are remembered, because late chunks are real: with two metadata contexts, QEMU (5.2 to 10.0)
answers a request that failed for the first context with an error chunk that says DONE, and goes on to send the chunk of
the second one.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from qmpnbd.nbd import constants
from qmpnbd.nbd.requests import NOWHERE, Batch, Request, Volley

_VOLLEYS: Final = 4  # of 256 requests each: as many as are remembered of others


class Ledger:
    """The requests of one connection.

    Attributes:
        pending: those whose answer is not complete, by cookie.
        volleys: many at once, likewise.
        made: how many there were.
        answered: how many of them, or of many at once, got all of their answer.
    """

    def __init__(self) -> None:
        self.pending: dict[int, Request] = {}
        self.volleys: list[Volley] = []
        self.made = 0
        self.answered = 0
        self._abandoned = 0  # of those that are pending
        self._finished: dict[int, Request] = {}
        self._finished_before: dict[int, Request] = {}  # forgotten together: one at a time is slow, at a dict's front
        self._answered: deque[Volley] = deque(maxlen=_VOLLEYS)
        self._last_cookie = 0  # counts up and never wraps in practice: no cookie is used twice

    def cookie(self) -> int:
        """Returns one that was never used."""
        self._last_cookie += 1
        return self._last_cookie

    @property
    def abandoned(self) -> int:
        """How many requests nobody waits for any more, and are not answered."""
        return self._abandoned + sum(volley.open for volley in self.volleys if volley.request.sink is NOWHERE)

    def add(self, request: Request) -> int:
        """Books a request; returns its cookie."""
        cookie = self.cookie()
        self.made += 1
        self.pending[cookie] = request.batch.pending[cookie] = request
        return cookie

    def add_volley(self, batch: Batch, volley: Volley) -> int:
        """Books many requests at once; returns the first of their cookies.

        What stands for all of them has a cookie of its own, which is never sent: any of them may become a request by
        itself, the first one as well.
        """
        own = self.cookie()
        self._last_cookie += volley.count
        self.made += volley.count
        self.volleys.append(volley)
        batch.pending[own] = volley.request
        return own + 1

    def find(self, cookie: int) -> Request | None:
        """Returns the request that a message belongs to, perhaps one that is finished; None for an unknown cookie."""
        return self.pending.get(cookie) or self._late(cookie) or self._of_volley(cookie)

    def is_finished(self, cookie: int) -> bool:
        """Whether nothing more should have come for a request."""
        return self._late(cookie) is not None

    def take_volleys(self, arrived: memoryview) -> int:
        """Books answers that are as expected all together; returns how many bytes they have."""
        for volley in self.volleys:
            if taken := volley.take(arrived):
                self.answered += 1
                if not volley.open:
                    self._end_volley(volley)
                return taken
        return 0

    def finish(self, cookie: int) -> None:
        """Books that nothing more comes for a request, if that was not said before."""
        request = self.pending.get(cookie)
        if request is None:
            return
        request.sink.done(request)
        self.answered += 1
        del self.pending[cookie]
        request.sink = NOWHERE
        self._remember(cookie, request)
        batch = request.batch
        if batch.pending.pop(cookie, None) is not None:
            batch.finished.append(request)
            if batch.wake is not None:
                batch.wake()
        else:
            self._abandoned -= 1

    def abandon(self, batch: Batch) -> None:
        """Has dropped what still comes for a batch, because nobody waits for it."""
        for cookie, request in batch.pending.items():
            request.sink = NOWHERE
            self._abandoned += cookie in self.pending
        batch.pending.clear()

    def forget(self) -> None:
        """Forgets what nobody will answer any more."""
        self._abandoned = 0
        self.pending.clear()
        self.volleys.clear()

    def _late(self, cookie: int) -> Request | None:
        """Returns a request that is finished, and that something still comes for."""
        return self._finished.get(cookie) or self._finished_before.get(cookie)

    def _of_volley(self, cookie: int) -> Request | None:
        """Has one of many requests booked by itself, because its answer is not the expected one, or a late one."""
        for volley in self.volleys:
            if volley.first <= cookie < volley.first + volley.count:
                request = volley.single(cookie)
                if request is None:
                    break
                self.pending[cookie] = request
                if request.sink is not NOWHERE:
                    request.batch.pending[cookie] = request
                else:
                    self._abandoned += 1
                if not volley.open:
                    self._end_volley(volley)
                return request
        for volley in (*self.volleys, *self._answered):
            if volley.first <= cookie < volley.first + volley.count:
                request = volley.answered(cookie)
                self._remember(cookie, request)
                return request
        return None

    def _remember(self, cookie: int, request: Request) -> None:
        """Keeps a request that is finished, because something may still come for it."""
        self._finished[cookie] = request
        if len(self._finished) == constants.MAX_FINISHED_COOKIES // 2:
            self._finished, self._finished_before = {}, self._finished

    def _end_volley(self, volley: Volley) -> None:
        self.volleys.remove(volley)
        self._answered.append(volley)
        batch = volley.request.batch
        if batch.pending.pop(volley.first - 1, None) is not None:
            batch.finished.append(volley.request)
            if batch.wake is not None:
                batch.wake()
