"""Options and their replies, whatever they mean: one is asked at a time, and is over with its final reply.

::

             ask()               reply(), concluded()
    READY  --------->  ASKED  -------------------------->  READY        ACK, or a refusal
      |                  |    -------------------------->  OVER         a refusal because the server shuts down
      |                  |
      |  leave()         +--- anything else: out of step for good, the connection is of no more use
      +----------------------------------------------->  OVER
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto

from qmpnbd.errors import (
    NbdDisconnectedError,
    NbdProtocolError,
    NbdRefusedError,
    NbdTlsError,
    QmpnbdError,
    UsageError,
)
from qmpnbd.nbd import constants, wire
from qmpnbd.nbd.constants import Option, OptionReplyType
from qmpnbd.nbd.limits import DEFAULT_LIMITS, Limits
from qmpnbd.nbd.wire import Program, Receive, Received, Send


class Phase(Enum):
    """What may be said next."""

    READY = auto()  # an option
    ASKED = auto()  # nothing, until the final reply is there
    OVER = auto()  # nothing any more: transmission has begun, or leave was taken


@dataclass(frozen=True, slots=True)
class OptionReply:
    """One reply to an option."""

    type: int
    data: Received

    @property
    def refuses(self) -> bool:
        """Whether it is a no, known or not ("Option reply types")."""
        return bool(self.type & constants.OPTION_ERROR_BIT)

    def __str__(self) -> str:
        known = self.type in OptionReplyType.__members__.values()
        name = f"NBD_REP_{OptionReplyType(self.type).name}" if known else f"error {self.type:#010x}"
        said = wire.printable(bytes(self.data))
        return f"{name}: {said}" if said else name


class Options:
    """The exchange of options with a fixed newstyle server.

    Args:
        where: server and export, for messages.
        limits: how much the server may answer.

    Attributes:
        phase: what may be said next.
        untried_tls: TLS was agreed and nothing has come over it yet.
    """

    def __init__(self, where: str, limits: Limits = DEFAULT_LIMITS) -> None:
        self.phase = Phase.READY
        self.untried_tls = False
        self._where = where
        self._limits = limits
        self._held = 0

    def ask(self, option: Option, data: bytes = b"") -> Program[None]:
        """Sends an option.

        Raises:
            UsageError: the negotiation is over.
            NbdDisconnectedError: the conversation is out of step since an earlier failure.
        """
        if self.phase is Phase.OVER:
            raise UsageError("the negotiation is over", where=self._where)
        if self.phase is Phase.ASKED:
            raise NbdDisconnectedError("the connection was lost before", where=self._where)
        self.phase = Phase.ASKED
        self._held = 0
        try:
            yield Send(wire.OptionRequest(option, data).pack())
        except NbdDisconnectedError:
            if not self.untried_tls:
                raise
            yield from self._receive(1, "the reason")  # an alert of TLS may have come before the end

    def reply(self, option: Option) -> Program[OptionReply]:
        """Reads one reply ("Fixed newstyle negotiation").

        Raises:
            NbdProtocolError: it is not one, or not to this option, or longer than any, or more than the limits allow.
        """
        what = f"the reply to NBD_OPT_{option.name}"
        header = wire.OptionReplyHeader.unpack((yield from self._receive(wire.OptionReplyHeader.LAYOUT.size, what)))
        if header.magic != constants.OPTION_REPLY_MAGIC:
            raise NbdProtocolError(f"{what} begins with {header.magic:#018x}", where=self._where)
        if header.option != option:
            raise NbdProtocolError(f"{what} is one to option {header.option}", where=self._where)
        if header.length > constants.MAX_OPTION_REPLY:
            raise NbdProtocolError(
                f"{what} has {header.length} bytes, more than {constants.MAX_OPTION_REPLY} are never needed",
                where=self._where,
            )
        self._held += header.length
        if self._held > self._limits.memory:
            raise NbdProtocolError(
                f"the replies to NBD_OPT_{option.name} have {self._held} bytes or more, and {self._limits.memory} are"
                " allowed",
                where=self._where,
                remedy="Allow more memory.",
            )
        data: Received = (yield from self._receive(header.length, what)) if header.length else b""
        return OptionReply(header.type, data)

    def replies(
        self, option: Option, kind: OptionReplyType, take: Callable[[Received], None], most: int
    ) -> Program[OptionReply]:
        """Reads replies of one kind up to the first of another kind, which is not concluded yet.

        Args:
            option: what was asked.
            kind: the kind of which there may be several.
            take: is given the data of each as it comes, so that the first wrong one is the last.
            most: how many at most, if the limits allow so many.

        Returns:
            The reply after them.

        Raises:
            NbdProtocolError: there are more.
        """
        most = min(most, self._limits.option_replies)
        for _ in range(most + 1):
            reply = yield from self.reply(option)
            if reply.type != kind:
                return reply
            take(reply.data)
        raise NbdProtocolError(f"more than {most} replies to NBD_OPT_{option.name}", where=self._where)

    def concluded(self, option: Option, reply: OptionReply) -> Program[None]:
        """Returns if the reply is the final yes, and raises what it is otherwise ("Option reply types").

        Raises:
            NbdRefusedError: it is a no.
            NbdProtocolError: it is neither.
        """
        if reply.refuses:
            self.phase = Phase.READY
            if reply.type == OptionReplyType.ERR_SHUTDOWN:
                yield from self.leave()  # what the specification wants of a client then: a soft disconnect
            raise self._refused(option, reply)
        if reply.type != OptionReplyType.ACK:
            raise NbdProtocolError(f"a reply of type {reply.type} to NBD_OPT_{option.name}", where=self._where)
        if reply.data:
            raise NbdProtocolError(f"an NBD_REP_ACK with {len(reply.data)} bytes of data", where=self._where)
        self.phase = Phase.READY

    def agreed(self, option: Option) -> Program[bool]:
        """Asks for something a server may not have, and returns whether it has it."""
        yield from self.ask(option)
        reply = yield from self.reply(option)
        if reply.type in _NOT_HERE:
            self.phase = Phase.READY
            return False
        yield from self.concluded(option, reply)
        return True

    def leave(self) -> Program[None]:
        """Takes leave if it can be taken ("Termination of the session during option haggling")."""
        if self.phase is Phase.READY:
            self.phase = Phase.OVER
            with suppress(QmpnbdError):  # the server may be gone already; what it said before matters more
                yield Send(wire.OptionRequest(Option.ABORT).pack())

    def _receive(self, count: int, what: str) -> Program[Received]:
        try:
            data = yield Receive(count, what)
        except NbdDisconnectedError as error:
            if not self.untried_tls:
                raise
            # With TLS 1.3 a client learns that its certificate is not liked only from what follows the handshake.
            raise NbdTlsError(
                "the server ended the connection right after the TLS handshake",
                where=self._where,
                remedy="It may want to know who we are: give it a client certificate. Its log says more.",
            ) from error
        self.untried_tls = False
        return data

    def _refused(self, option: Option, reply: OptionReply) -> NbdRefusedError:
        """Makes the error for a refusal, in the server's own words where it has some."""
        why, remedy = _REFUSALS.get(reply.type, (f"the server refused NBD_OPT_{option.name}", ""))
        return NbdRefusedError(f"{why} ({reply})", where=self._where, remedy=remedy)


_NOT_HERE = {
    OptionReplyType.ERR_UNSUP,
    OptionReplyType.ERR_POLICY,
    OptionReplyType.ERR_INVALID,
    OptionReplyType.ERR_PLATFORM,
}
"""The ways of servers to say that they do not have something; what is left says more than that."""

_REFUSALS: dict[int, tuple[str, str]] = {
    OptionReplyType.ERR_TLS_REQD: (
        "the server requires TLS",
        "Use nbds:// or nbds+unix://, with the certificates the server trusts.",
    ),
    OptionReplyType.ERR_UNKNOWN: (
        "there is no export of this name",
        "query-block-exports, nbdinfo --list or qemu-nbd --list show which there are.",
    ),
    OptionReplyType.ERR_POLICY: ("the server's policy forbids it", ""),
    OptionReplyType.ERR_SHUTDOWN: ("the server is shutting down", "Try again when it is back."),
    OptionReplyType.ERR_TOO_BIG: ("the server finds the request too big", ""),
}
