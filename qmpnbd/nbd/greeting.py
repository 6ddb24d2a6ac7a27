"""The first bytes of a server, and which of three styles of negotiation they begin.

::

    fixed newstyle    NBDMAGIC IHAVEOPT flags    client flags    options, each with replies
    newstyle          NBDMAGIC IHAVEOPT flags    client flags    EXPORT_NAME, which cannot be refused but by hanging up
    oldstyle          NBDMAGIC size flags zeroes                 nothing: the transmission phase follows
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qmpnbd.errors import DeadlineError, NbdConnectError, NbdDisconnectedError, NbdProtocolError
from qmpnbd.nbd import constants, wire
from qmpnbd.nbd.constants import HandshakeFlag
from qmpnbd.nbd.wire import Program, Receive, Send

_CROWDED = (
    "A server at its connection limit behaves like this: end the other client, or allow more of them "
    "(qemu-nbd -e N, nbd-server-start max-connections)."
)


@dataclass(frozen=True, slots=True)
class Greeted:
    """How a server wants to be talked to.

    Attributes:
        style: of the negotiation.
        zeroes: whether padding follows the reply to EXPORT_NAME.
        oldstyle: what an oldstyle server told of its only export.
    """

    style: Literal["oldstyle", "newstyle", "fixed newstyle"]
    zeroes: bool = True
    oldstyle: wire.OldstyleGreeting | None = None


def greet(where: str) -> Program[Greeted]:
    """Reads the greeting and answers it ("Newstyle negotiation", "Fixed newstyle negotiation").

    Raises:
        NbdConnectError: no greeting came.
        NbdDisconnectedError: the server closed the connection instead.
        NbdProtocolError: what answers does not speak NBD.
    """
    # The shortest greeting; a read of an oldstyle one's 152 bytes would wait for ever for a newstyle server.
    first = yield from _beginning(where)
    greeting = wire.Greeting.unpack(first)
    if greeting.magic != constants.GREETING_MAGIC:
        raise _not_nbd(greeting.magic, where)
    if greeting.style == constants.OLDSTYLE_MAGIC:
        rest = yield Receive(wire.OldstyleGreeting.LAYOUT.size - len(first), "the rest of the greeting")
        return Greeted("oldstyle", oldstyle=wire.OldstyleGreeting.unpack(bytes(first) + bytes(rest)))
    if greeting.style != constants.OPTION_MAGIC:
        raise NbdProtocolError(f"a greeting with the unknown style {greeting.style:#018x}", where=where)
    known = greeting.flags & (HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)
    yield Send(wire.CLIENT_FLAGS.pack(known))
    fixed = bool(known & HandshakeFlag.FIXED_NEWSTYLE)
    return Greeted("fixed newstyle" if fixed else "newstyle", zeroes=not known & HandshakeFlag.NO_ZEROES)


def _beginning(where: str) -> Program[wire.Received]:
    """Receives the first bytes, and explains it if they do not come."""
    try:
        return (yield Receive(wire.Greeting.LAYOUT.size, "the greeting", patience=constants.GREETING_PATIENCE))
    except TimeoutError as error:
        raise NbdConnectError(
            f"connected, but no NBD greeting came within {constants.GREETING_PATIENCE:g} s",
            where=where,
            remedy=_CROWDED,
        ) from error
    except DeadlineError as error:
        raise DeadlineError(error.what, where=error.where, remedy=_CROWDED) from error
    except NbdDisconnectedError as error:
        raise NbdDisconnectedError(f"{error.what} before greeting", where=where, remedy=_CROWDED) from error


def _not_nbd(beginning: bytes, where: str) -> NbdProtocolError:
    """Makes the error for something that does not speak NBD."""
    remedy = ""
    if beginning.startswith(b'{"QMP"'):
        remedy = "This is a QMP monitor, not an NBD server."
    elif beginning.startswith((b"\x15\x03", b"\x16\x03")):  # a TLS alert or handshake record
        remedy = "It speaks TLS from the first byte; NBD begins in clear and changes to TLS later."
    return NbdProtocolError(
        f"what answers is not an NBD server: it begins with {beginning!r}", where=where, remedy=remedy
    )
