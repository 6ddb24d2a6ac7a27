"""From the greeting to the transmission phase at one go: one program that reads top to bottom like the specification.

::

    server                                client
      NBDMAGIC IHAVEOPT flags   ----->
                                <-----    flags
                                <-----    STARTTLS, if TLS is wanted; an ACK, and TLS from here on
                                <-----    EXTENDED_HEADERS
      ERR_UNSUP                 ----->
                                <-----    STRUCTURED_REPLY
      ACK                       ----->
                                <-----    SET_META_CONTEXT name, contexts
      META_CONTEXT id, context  ----->                                      one for each that is granted
      ACK                       ----->
                                <-----    GO name, infos
      INFO export, block size   ----->
      ACK                       ----->    transmission

Old servers are good for what they can do: without metadata contexts and TLS, an export of a newstyle or oldstyle server
can be used as well. It takes seven round trips at most; QEMU hangs up on whoever needs more than 10 s.
"""

from __future__ import annotations

from collections.abc import Sequence

from qmpnbd.errors import NbdError, UsageError
from qmpnbd.nbd.export import Export, Replies, name_to_wire
from qmpnbd.nbd.limits import DEFAULT_LIMITS, Limits
from qmpnbd.nbd.negotiation import Haggling
from qmpnbd.nbd.tls import Tls
from qmpnbd.nbd.wire import Program


def handshake(
    name: str,
    contexts: Sequence[str],
    where: str,
    tls: Tls | None = None,
    best: Replies = "extended",
    *,
    limits: Limits = DEFAULT_LIMITS,
) -> Program[Export]:
    """Agrees with a server on an export and its metadata contexts; the transmission phase follows.

    Args:
        name: the export name.
        contexts: the metadata contexts wanted; all of them, or it is an error.
        where: server and export, for messages.
        tls: how to encrypt; None for not at all.
        best: the form of replies not to be exceeded.
        limits: how much the server may answer.

    Returns:
        The export as agreed.

    Raises:
        UsageError: a name that cannot be sent.
        NbdConnectError: no greeting came.
        NbdProtocolError: what answers does not speak NBD, or broke the protocol.
        NbdUnsupportedError: the server is too old for what is wanted, or the export too large.
        NbdRefusedError: the server refused.
        NbdTlsError: TLS is wanted and did not come about.
        NbdContextError: a context is not offered.
    """
    if isinstance(contexts, str):
        raise UsageError(f"contexts is one text ({contexts!r}), not a sequence of names", where=where)
    for what, text in [("the export name", name), *(("a context name", context) for context in contexts)]:
        name_to_wire(what, text, where)  # before anything is said
    haggling = Haggling(where, limits)
    try:
        yield from haggling.begin(tls, best)
        if contexts:
            yield from haggling.set_contexts(name, contexts)
        return (yield from haggling.go(name))
    except NbdError:
        if haggling.in_step:
            yield from haggling.abort()
        raise
