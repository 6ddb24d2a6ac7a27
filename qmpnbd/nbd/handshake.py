"""From the greeting to the transmission phase: one program that reads top to bottom like the specification.

::

    server                                client
      NBDMAGIC IHAVEOPT flags   ----->
                                <-----    flags
                                <-----    STRUCTURED_REPLY
      ACK                       ----->
                                <-----    SET_META_CONTEXT name, contexts
      META_CONTEXT id, context  ----->                                      one for each that is granted
      ACK                       ----->
                                <-----    GO name, BLOCK_SIZE
      INFO export, block size   ----->
      ACK                       ----->    transmission

A server does not say no to a context: it just does not grant it. So what was granted is compared with what was
wanted, and a context that is missing is an error, never an empty map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import NoReturn, TypeVar

from qmpnbd.errors import (
    DeadlineError,
    NbdConnectError,
    NbdContextError,
    NbdDisconnectedError,
    NbdError,
    NbdProtocolError,
    NbdRefusedError,
    NbdUnsupportedError,
    QmpnbdError,
    UsageError,
)
from qmpnbd.nbd import constants, wire
from qmpnbd.nbd.constants import HandshakeFlag, Info, Option, OptionReplyType, TransmissionFlag
from qmpnbd.nbd.wire import Program, Receive, Received, Send


@dataclass(frozen=True, slots=True)
class Export:
    """What a server serves under one name, as agreed in the handshake.

    Attributes:
        name: the export name; may be empty.
        size: bytes.
        flags: what it can do; bits that nobody here knows are kept.
        minimum_block: bytes; every request begins and ends at a multiple of it.
        preferred_block: bytes; multiples of it are efficient.
        maximum_payload: bytes of data in one request or reply.
        contexts: the id of each granted metadata context by name. Ids are the server's own choice.
        structured: whether structured replies were agreed.
    """

    name: str
    size: int
    flags: TransmissionFlag
    minimum_block: int = constants.DEFAULT_MINIMUM_BLOCK
    preferred_block: int = constants.DEFAULT_PREFERRED_BLOCK
    maximum_payload: int = constants.DEFAULT_MAXIMUM_PAYLOAD
    contexts: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}), hash=False)
    structured: bool = True


@dataclass(frozen=True, slots=True)
class OptionReply:
    """One reply to an option."""

    type: int
    data: Received


_I = TypeVar("_I")

_CROWDED = (
    "A server at its connection limit behaves like this: end the other client, or allow more of them "
    "(qemu-nbd -e N, nbd-server-start max-connections)."
)


def handshake(name: str, contexts: Sequence[str], where: str) -> Program[Export]:
    """Agrees with a server on an export and its metadata contexts; the transmission phase follows.

    Args:
        name: the export name.
        contexts: the names of the metadata contexts wanted; all of them, or it is an error.
        where: server and export, for messages.

    Returns:
        The export as agreed.

    Raises:
        UsageError: a name that cannot be sent.
        NbdConnectError: no greeting came.
        NbdProtocolError: what answers does not speak NBD, or broke the protocol.
        NbdUnsupportedError: the server is too old, or the export too large.
        NbdRefusedError: the server refused.
        NbdContextError: a context is not offered.
    """
    if isinstance(contexts, str):
        raise UsageError(f"contexts is one text ({contexts!r}), not a sequence of names", where=where)
    wire_name = _encoded("the export name", name, where)
    wanted = {_encoded("a context name", context, where): context for context in contexts}
    yield from _greet(where)
    structured = yield from _ask_for_structured_replies(where)
    granted: dict[str, int] = {}
    if wanted:
        if not structured:
            yield from _leave(
                NbdUnsupportedError("the server has no structured replies, so no metadata contexts", where=where)
            )
        granted = yield from _select_contexts(wire_name, wanted, where)
    export = yield from _go(name, wire_name, where)
    return replace(export, contexts=MappingProxyType(granted), structured=structured)


def _encoded(what: str, text: str, where: str) -> bytes:
    """Returns a string as it may go over the wire ("Conventions")."""
    try:
        encoded = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"{what} {text!r} is not valid Unicode", where=where) from error
    if b"\0" in encoded:
        raise UsageError(f"{what} {text!r} contains a NUL", where=where)
    if len(encoded) > constants.MAX_STRING:
        raise UsageError(f"{what} has {len(encoded)} bytes, more than {constants.MAX_STRING}", where=where)
    return encoded


def _greet(where: str) -> Program[None]:
    """Reads the greeting and answers it ("Newstyle negotiation", "Fixed newstyle negotiation")."""
    try:
        greeting = wire.Greeting.unpack(
            (yield Receive(wire.Greeting.LAYOUT.size, "the greeting", patience=constants.GREETING_PATIENCE))
        )
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
    if greeting.magic != constants.GREETING_MAGIC:
        raise _not_nbd(greeting.magic, where)
    if greeting.style == constants.OLDSTYLE_MAGIC:
        raise NbdUnsupportedError(
            "an oldstyle NBD server, which has no options", where=where, remedy="Use a newer server, or nbdkit -n."
        )
    if greeting.style != constants.OPTION_MAGIC:
        raise NbdProtocolError(f"a greeting with the unknown style {greeting.style:#018x}", where=where)
    if not greeting.flags & HandshakeFlag.FIXED_NEWSTYLE:
        raise NbdUnsupportedError("an NBD server without fixed newstyle negotiation", where=where)
    known = greeting.flags & (HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)
    yield Send(wire.CLIENT_FLAGS.pack(known))


def _not_nbd(beginning: bytes, where: str) -> NbdProtocolError:
    """Makes the error for something that does not speak NBD."""
    remedy = "This is a QMP monitor, not an NBD server." if beginning.startswith(b'{"QMP"') else ""
    return NbdProtocolError(
        f"what answers is not an NBD server: it begins with {beginning!r}", where=where, remedy=remedy
    )


def _ask_for_structured_replies(where: str) -> Program[bool]:
    """Returns whether the server will send structured replies."""
    yield Send(wire.OptionRequest(Option.STRUCTURED_REPLY).pack())
    reply = yield from _reply(Option.STRUCTURED_REPLY, where)
    if reply.type == OptionReplyType.ERR_UNSUP:
        return False
    yield from _require_ack(Option.STRUCTURED_REPLY, reply, where)
    return True


def _select_contexts(name: bytes, wanted: Mapping[bytes, str], where: str) -> Program[dict[str, int]]:
    """Selects the metadata contexts and returns their ids ("Option types", NBD_OPT_SET_META_CONTEXT)."""
    option = Option.SET_META_CONTEXT
    yield Send(wire.OptionRequest(option, wire.pack_meta_context_query(name, list(wanted))).pack())
    granted: dict[str, int] = {}
    # Ends by itself: every reply must be one of the wanted, and not one of those that came already.
    while (reply := (yield from _reply(option, where))).type == OptionReplyType.META_CONTEXT:
        context = wire.MetaContext.unpack(reply.data)
        if context is None:
            raise NbdProtocolError(f"a metadata context of {len(reply.data)} bytes", where=where)
        asked = wanted.get(context.name)
        if asked is None:
            raise NbdProtocolError(
                f"granted the metadata context {wire.printable(context.name)!r}, which nobody asked for", where=where
            )
        if asked in granted:
            raise NbdProtocolError(f"granted the metadata context {asked!r} twice", where=where)
        if context.id in granted.values():
            raise NbdProtocolError(f"gave the id {context.id} to two metadata contexts", where=where)
        granted[asked] = context.id
    if reply.type == OptionReplyType.ERR_UNSUP:
        yield from _leave(NbdUnsupportedError("the server has no metadata contexts", where=where))
    yield from _require_ack(option, reply, where)
    for asked in wanted.values():
        if asked not in granted:
            yield from _leave(
                NbdContextError(
                    f"the metadata context {asked!r} is not offered", where=where, remedy=_how_to_offer(asked)
                )
            )
    return {asked: granted[asked] for asked in wanted.values()}  # in the caller's order, not the server's


def _how_to_offer(context: str) -> str:
    """Returns what makes a QEMU server offer a context."""
    if context == constants.ALLOCATION_DEPTH:
        return "Export the disk with block-export-add allocation-depth: true, or with qemu-nbd -A."
    if context.startswith(constants.DIRTY_BITMAP_PREFIX):
        bitmap = context.removeprefix(constants.DIRTY_BITMAP_PREFIX)
        return f"Export the disk with block-export-add bitmaps: [{bitmap!r}], or with qemu-nbd -B {bitmap}."
    if context.endswith(":"):
        return "Name a context in full; a namespace alone selects nothing."
    return ""


def _go(name: str, wire_name: bytes, where: str) -> Program[Export]:
    """Enters the transmission phase and returns what is known of the export ("Option types", NBD_OPT_GO)."""
    yield Send(wire.OptionRequest(Option.GO, wire.pack_go(wire_name, [Info.BLOCK_SIZE])).pack())
    found: wire.InfoExport | None = None
    sizes: wire.InfoBlockSize | None = None
    for _ in range(constants.MAX_OPTION_REPLIES):
        reply = yield from _reply(Option.GO, where)
        if reply.type != OptionReplyType.INFO:
            break
        kind = wire.info_type(reply.data)
        # "A particular information type SHOULD only appear once": of two that differ, neither can be believed.
        if kind == Info.EXPORT:
            found = _once("NBD_INFO_EXPORT", found, wire.InfoExport.unpack(reply.data), where)
        elif kind == Info.BLOCK_SIZE:
            sizes = _once("NBD_INFO_BLOCK_SIZE", sizes, wire.InfoBlockSize.unpack(reply.data), where)
        elif kind is None:
            raise NbdProtocolError("an NBD_REP_INFO without a type", where=where)
    else:
        raise NbdProtocolError(f"more than {constants.MAX_OPTION_REPLIES} replies to NBD_OPT_GO", where=where)
    if reply.type == OptionReplyType.ERR_UNSUP:
        yield from _leave(NbdUnsupportedError("the server is too old: it does not know NBD_OPT_GO", where=where))
    yield from _require_ack(Option.GO, reply, where)
    if found is None:
        raise NbdProtocolError("the server agreed to NBD_OPT_GO without describing the export", where=where)
    return _checked_export(name, found, sizes, where)


def _once(what: str, before: _I | None, now: _I | None, where: str) -> _I:
    """Returns an info that came, unless it cannot be read or contradicts one that came before."""
    if now is None:
        raise NbdProtocolError(f"an {what} of the wrong length", where=where)
    if before not in (None, now):
        raise NbdProtocolError(f"two {what} that differ: {before} and {now}", where=where)
    return now


def _checked_export(name: str, found: wire.InfoExport, sizes: wire.InfoBlockSize | None, where: str) -> Export:
    """Judges what the server says of the export ("Transmission flags", "Size constraints")."""
    if not found.flags & TransmissionFlag.HAS_FLAGS:
        raise NbdProtocolError(f"transmission flags {found.flags:#06x} without NBD_FLAG_HAS_FLAGS", where=where)
    if found.size > constants.MAX_EXPORT_SIZE:
        raise NbdUnsupportedError(
            f"an export of {found.size} bytes, which is more than 2**63 - 1 (some servers mean 'unknown')", where=where
        )
    export = Export(name, found.size, TransmissionFlag(found.flags))
    if sizes is None:
        return export
    minimum, preferred, maximum = sizes.minimum, sizes.preferred, sizes.maximum
    if minimum.bit_count() != 1 or minimum > constants.MAX_MINIMUM_BLOCK:
        raise NbdProtocolError(f"a minimum block size of {minimum}, not a power of two up to 65536", where=where)
    if preferred.bit_count() != 1 or preferred < max(minimum, 512):
        raise NbdProtocolError(
            f"a preferred block size of {preferred}, not a power of two of at least {max(minimum, 512)}", where=where
        )
    if maximum < preferred:
        raise NbdProtocolError(f"a maximum payload of {maximum}, less than the preferred {preferred}", where=where)
    if found.size % minimum:
        raise NbdUnsupportedError(
            f"an export of {found.size} bytes in blocks of {minimum}: its last bytes cannot be asked for", where=where
        )
    return replace(export, minimum_block=minimum, preferred_block=preferred, maximum_payload=maximum)


def _reply(option: Option, where: str) -> Program[OptionReply]:
    """Reads one reply to an option ("Fixed newstyle negotiation")."""
    what = f"the reply to NBD_OPT_{option.name}"
    header = wire.OptionReplyHeader.unpack((yield Receive(wire.OptionReplyHeader.LAYOUT.size, what)))
    if header.magic != constants.OPTION_REPLY_MAGIC:
        raise NbdProtocolError(f"{what} begins with {header.magic:#018x}", where=where)
    if header.option != option:
        raise NbdProtocolError(f"{what} is one to option {header.option}", where=where)
    if header.length > constants.MAX_OPTION_REPLY:
        raise NbdProtocolError(
            f"{what} has {header.length} bytes, more than {constants.MAX_OPTION_REPLY} are never needed", where=where
        )
    return OptionReply(header.type, (yield Receive(header.length, what)) if header.length else b"")


def _require_ack(option: Option, reply: OptionReply, where: str) -> Program[None]:
    """Returns if the reply is the final yes, and raises what it is otherwise ("Option reply types")."""
    if reply.type & constants.OPTION_ERROR_BIT:
        yield from _leave(_refused(option, reply, where))
    if reply.type != OptionReplyType.ACK:
        raise NbdProtocolError(f"a reply of type {reply.type} to NBD_OPT_{option.name}", where=where)
    if reply.data:
        raise NbdProtocolError(f"an NBD_REP_ACK with {len(reply.data)} bytes of data", where=where)


def _refused(option: Option, reply: OptionReply, where: str) -> NbdRefusedError:
    """Makes the error for a refusal, in the server's own words where it has some."""
    known = reply.type in OptionReplyType.__members__.values()
    name = f"NBD_REP_{OptionReplyType(reply.type).name}" if known else f"error {reply.type:#010x}"
    why, remedy = _REFUSALS.get(reply.type, (f"the server refused NBD_OPT_{option.name}", ""))
    said = wire.printable(bytes(reply.data))
    return NbdRefusedError(f"{why} ({name}{': ' + said if said else ''})", where=where, remedy=remedy)


_REFUSALS: dict[int, tuple[str, str]] = {
    OptionReplyType.ERR_TLS_REQD: (
        "the server requires TLS, which is not supported yet",
        "Export the disk over a UNIX socket without TLS.",
    ),
    OptionReplyType.ERR_UNKNOWN: (
        "there is no export of this name",
        "query-block-exports, nbdinfo --list or qemu-nbd --list show which there are.",
    ),
    OptionReplyType.ERR_POLICY: ("the server's policy forbids it", ""),
    OptionReplyType.ERR_SHUTDOWN: ("the server is shutting down", "Try again when it is back."),
}


def _leave(error: NbdError) -> Program[NoReturn]:
    """Takes leave as the specification asks for ("Termination of the session during option haggling"), and raises."""
    with suppress(QmpnbdError):  # the server may be gone already; what it said before matters more
        yield Send(wire.OptionRequest(Option.ABORT).pack())
    raise error
