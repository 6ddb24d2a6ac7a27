"""Going on with a reading after the connection was lost: when, how often, and only to the same export."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType

from qmpnbd.errors import NbdDisconnectedError
from qmpnbd.nbd.export import Export


@dataclass(frozen=True, slots=True)
class Reconnect:
    """How to go on after a lost connection. Only what reads is done again, never what writes.

    Attributes:
        attempts: so often a connection is tried before the loss is told; and so many connections in a row may be lost
            without an answer.
        delay: seconds before each of them.
    """

    attempts: int = 3
    delay: float = 0.5


class Losses:
    """Counts the connections lost in a row without an answer: a server may accept, and hang up, for ever."""

    def __init__(self) -> None:
        self._in_vain = 0

    def book(self, reconnect: Reconnect, answered: int, error: NbdDisconnectedError) -> None:
        """Books a loss.

        Args:
            reconnect: how many are borne.
            answered: how many requests the lost connection had got all of their answer to.
            error: the loss.

        Raises:
            NbdDisconnectedError: it is one too many; later calls begin to count again.
        """
        self._in_vain = 0 if answered else self._in_vain + 1
        if self._in_vain > reconnect.attempts:
            self._in_vain = 0
            raise error


def require_same(before: Export, now: Export, where: str) -> None:
    """Returns if an export is still what it was; the ids of its contexts may have changed.

    Raises:
        NbdDisconnectedError: it is not.
    """
    nothing: MappingProxyType[str, int] = MappingProxyType({})
    same = replace(before, contexts=nothing) == replace(now, contexts=nothing)
    if not same or set(before.contexts) != set(now.contexts):
        raise NbdDisconnectedError(
            f"the connection was lost, and the export is another one now ({before} before, {now} now)", where=where
        )


@dataclass(frozen=True, slots=True)
class Statistics:
    """What a client has done, over all its connections and after the handshake where not told otherwise.

    Attributes:
        requests: requests made.
        messages: replies and chunks received.
        sent: bytes sent, in the handshake too.
        received: bytes received, in the handshake too.
        connections: how often it connected.
    """

    requests: int = 0
    messages: int = 0
    sent: int = 0
    received: int = 0
    connections: int = 0
