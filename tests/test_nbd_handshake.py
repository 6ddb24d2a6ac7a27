"""Option haggling against bytes written by hand: what is agreed on, and every way not to agree."""

from __future__ import annotations

import pytest

from qmpnbd.errors import (
    DeadlineError,
    NbdConnectError,
    NbdContextError,
    NbdDisconnectedError,
    NbdError,
    NbdProtocolError,
    NbdRefusedError,
    NbdTlsError,
    NbdUnsupportedError,
    UsageError,
)
from qmpnbd.nbd import constants, wire
from qmpnbd.nbd.constants import Option, OptionReplyType
from qmpnbd.nbd.export import Export
from qmpnbd.nbd.handshake import handshake
from qmpnbd.nbd.tls import Tls
from tests.option_bytes import TLS_STARTS, ack, feed, info, meta, option_reply, unsupported

DEPTH, BASE = constants.ALLOCATION_DEPTH, constants.BASE_ALLOCATION
NEWSTYLE = wire.Greeting.newstyle(3).pack()
EXT, SR, SET, GO, ABORT = (
    Option.EXTENDED_HEADERS,
    Option.STRUCTURED_REPLY,
    Option.SET_META_CONTEXT,
    Option.GO,
    Option.ABORT,
)
HELLO = NEWSTYLE + unsupported(EXT)
INFOS = b"\0\3\0\1\0\2\0\3"
EXPORT = info(wire.InfoExport(1 << 20, 0x058F).pack())
SIZES = info(wire.InfoBlockSize(512, 4096, 1 << 25).pack())
GOOD = HELLO + ack(SR) + meta(4, BASE) + meta(7, DEPTH) + ack(SET) + SIZES + EXPORT + ack(GO)
ABORTED = wire.OptionRequest(ABORT).pack()


def shake(data: bytes, contexts: tuple[str, ...] = (DEPTH, BASE), name: str = "disk") -> tuple[Export, bytes]:
    return feed(handshake(name, contexts, "here"), data)


def test_what_is_agreed_on_and_what_is_said_for_it() -> None:
    export, sent = shake(GOOD)
    assert (export.name, export.size, export.flags, export.replies) == ("disk", 1 << 20, 0x058F, "structured")
    assert (export.minimum_block, export.preferred_block, export.maximum_payload) == (512, 4096, 1 << 25)
    assert list(export.contexts.items()) == [(DEPTH, 7), (BASE, 4)]
    assert sent == (
        b"\0\0\0\3"
        + wire.OptionRequest(EXT).pack()
        + wire.OptionRequest(SR).pack()
        + wire.OptionRequest(
            SET, wire.pack_meta_context_query(b"disk", [b"qemu:allocation-depth", b"base:allocation"])
        ).pack()
        + wire.OptionRequest(GO, b"\0\0\0\4disk" + INFOS).pack()
    )


def test_an_end_of_the_stream_anywhere_is_told() -> None:
    for length in range(len(GOOD)):
        with pytest.raises(NbdDisconnectedError):
            shake(GOOD[:length])
    with pytest.raises(AssertionError, match="left over"):
        shake(GOOD + b"\0")


def test_a_server_that_tells_no_sizes_has_the_defaults_and_unknown_things_are_ignored() -> None:
    odd = info(b"\xff\xff whatever") + info(b"\0\2a description")
    export, sent = shake(
        wire.Greeting.newstyle(0xFFFF).pack() + unsupported(EXT) + ack(SR) + odd + EXPORT + ack(GO), ()
    )
    assert (export.minimum_block, export.preferred_block, export.maximum_payload) == (1, 4096, 1 << 25)
    assert sent.startswith(b"\0\0\0\3IHAVEOPT"), "unknown handshake flags are not sent back"


def test_without_contexts_structured_replies_are_not_needed() -> None:
    refused = option_reply(SR, OptionReplyType.ERR_UNSUP, b"no idea")
    assert shake(HELLO + refused + EXPORT + ack(GO), ())[0].replies == "simple"
    with pytest.raises(NbdUnsupportedError, match="no structured replies"):
        shake(HELLO + refused)


@pytest.mark.parametrize(
    ("data", "error", "match"),
    [
        (b'{"QMP": {"version"', NbdProtocolError, "QMP monitor"),
        (b"SSH-2.0-OpenSSH_9.6", NbdProtocolError, "not an NBD server"),
        (b"\x15\x03\x01\0\2\2\x28" + bytes(11), NbdProtocolError, "speaks TLS from the first byte"),
        (b"NBDMAGIC" + bytes(10), NbdProtocolError, "unknown style"),
        (wire.Greeting.newstyle(2).pack(), NbdUnsupportedError, "old as this one (newstyle)"),
        (HELLO + option_reply(SR, OptionReplyType.ACK, magic=1), NbdProtocolError, "begins with"),
        (HELLO + ack(GO), NbdProtocolError, "one to option 7"),
        (HELLO + option_reply(SR, OptionReplyType.ACK, length=2**32 - 1), NbdProtocolError, "never needed"),
        (HELLO + option_reply(SR, OptionReplyType.ACK, b"x"), NbdProtocolError, "1 bytes of data"),
        (HELLO + option_reply(SR, OptionReplyType.SERVER), NbdProtocolError, "type 2"),
        (HELLO + ack(SR) + ack(SET), NbdContextError, "allocation-depth: true, or with qemu-nbd -A"),
        (HELLO + ack(SR) + meta(1, DEPTH) + ack(SET), NbdContextError, BASE),
        (HELLO + ack(SR) + meta(1, "base:other"), NbdProtocolError, "nobody asked"),
        (HELLO + ack(SR) + meta(1, DEPTH) * 2, NbdProtocolError, "twice"),
        (HELLO + ack(SR) + option_reply(SET, 4, b"\0\0\0\1a\0b"), NbdProtocolError, "NUL"),
        (HELLO + ack(SR) + meta(1, DEPTH) + meta(1, BASE), NbdProtocolError, "id 1 to two"),
        (HELLO + ack(SR) + option_reply(SET, OptionReplyType.META_CONTEXT, b"abc"), NbdProtocolError, "3 bytes"),
        (HELLO + ack(SR) + option_reply(SET, OptionReplyType.ERR_UNSUP), NbdUnsupportedError, "no metadata"),
        (HELLO + ack(SR) + option_reply(SET, OptionReplyType.ERR_UNKNOWN), NbdRefusedError, "no export of this name"),
    ],
)
def test_no_agreement_before_go(data: bytes, error: type[NbdError], match: str) -> None:
    with pytest.raises(error) as caught:
        shake(data)
    assert match in str(caught.value)
    assert str(caught.value).startswith("here: ")


@pytest.mark.parametrize(
    ("data", "error", "match"),
    [
        (ack(GO), NbdProtocolError, "without describing"),
        (EXPORT + info(wire.InfoExport(2 << 20, 0x058F).pack()), NbdProtocolError, "differ"),
        (info(b"\0\0" + bytes(9)), NbdProtocolError, "wrong length"),
        (info(b"\0"), NbdProtocolError, "without a type"),
        (EXPORT + info(b"\0\1a\0b") + ack(GO), NbdProtocolError, "NUL"),
        (info(b"\0\1" + b"x" * 4097), NbdProtocolError, "NBD_INFO_NAME of the wrong length"),
        (info(b"\0\2one") + info(b"\0\2two"), NbdProtocolError, "two NBD_INFO_DESCRIPTION that differ"),
        (info(b"\xff\xff") * 65, NbdProtocolError, "more than 64"),
        (info(wire.InfoExport(2**63, 0x058F).pack()) + ack(GO), NbdUnsupportedError, "2\\*\\*63"),
        (info(wire.InfoExport(512, 0x058E).pack()) + ack(GO), NbdProtocolError, "HAS_FLAGS"),
        (option_reply(GO, OptionReplyType.ERR_TLS_REQD, b"tls\nfirst"), NbdRefusedError, r"TLS.*: tls\\nfirst"),
        (option_reply(GO, OptionReplyType.ERR_UNKNOWN), NbdRefusedError, "NBD_REP_ERR_UNKNOWN"),
        (option_reply(GO, OptionReplyType.ERR_POLICY), NbdRefusedError, "policy"),
        (option_reply(GO, OptionReplyType.ERR_SHUTDOWN), NbdRefusedError, "shutting down"),
        (option_reply(GO, (1 << 31) + 77, b"because"), NbdRefusedError, "0x8000004d: because"),
        (option_reply(GO, OptionReplyType.META_CONTEXT), NbdProtocolError, "type 4"),
    ],
)
def test_no_agreement_at_go(data: bytes, error: type[NbdError], match: str) -> None:
    with pytest.raises(error, match=match):
        shake(HELLO + ack(SR) + data, ())


@pytest.mark.parametrize(
    ("sizes", "error"),
    [
        ((0, 4096, 1 << 25), NbdProtocolError),
        ((3, 4096, 1 << 25), NbdProtocolError),
        ((1 << 17, 1 << 17, 1 << 25), NbdProtocolError),
        ((1, 256, 1 << 25), NbdProtocolError),
        ((4096, 512, 1 << 25), NbdProtocolError),
        ((1, 5000, 1 << 25), NbdProtocolError),
        ((1, 4096, 2048), NbdProtocolError),
        ((65536, 65536, 65536), None),
        ((1, 1 << 31, 2**32 - 1), None),
        ((512, 512, 5000), None),
    ],
)
def test_size_constraints_are_judged(sizes: tuple[int, int, int], error: type[NbdError] | None) -> None:
    data = HELLO + ack(SR) + info(wire.InfoBlockSize(*sizes).pack()) + EXPORT + ack(GO)
    if error is None:
        export = shake(data, ())[0]
        assert (export.minimum_block, export.preferred_block, export.maximum_payload) == sizes
    else:
        with pytest.raises(error, match=r"block size|payload"):
            shake(data, ())


def test_an_export_that_ends_inside_a_block_is_not_read_in_part() -> None:
    data = HELLO + ack(SR) + SIZES + info(wire.InfoExport(1000, 0x058F).pack()) + ack(GO)
    with pytest.raises(NbdUnsupportedError, match="last bytes"):
        shake(data, ())


def test_leave_is_taken_where_the_server_may_expect_it() -> None:
    sent: list[bytes] = []

    def gone() -> wire.Program[Export]:
        """Passes everything on, and has the server gone when leave is taken."""
        inner = handshake("disk", [DEPTH], "here")
        operation = next(inner)
        while True:
            if isinstance(operation, wire.Send):
                sent.append(operation.data)
            if sent[-1:] == [ABORTED]:
                operation = inner.throw(NbdDisconnectedError("gone", where="here"))
            else:
                operation = inner.send((yield operation))

    with pytest.raises(NbdContextError):  # not NbdDisconnectedError: what the server said before matters more
        feed(gone(), HELLO + ack(SR) + ack(SET))
    assert sent[-1] == ABORTED


@pytest.mark.parametrize(("thrown", "error"), [(TimeoutError(), NbdConnectError), (None, DeadlineError)])
def test_silence_instead_of_a_greeting_is_explained(thrown: Exception | None, error: type[Exception]) -> None:
    program = handshake("disk", [], "here")
    first = next(program)
    assert isinstance(first, wire.Receive)
    assert first.patience == 10
    with pytest.raises(error, match="connection limit"):
        program.throw(thrown or DeadlineError("timed out", where="here"))


@pytest.mark.parametrize(
    ("name", "contexts"),
    [("a\0b", ()), ("ä" * 2049, ()), ("\ud800", ()), ("", ("x\0",)), ("", ("x" * 4097,))],
)
def test_names_that_cannot_be_sent_are_the_callers_mistake(name: str, contexts: tuple[str, ...]) -> None:
    with pytest.raises(UsageError):
        shake(b"", contexts, name)


def test_one_text_is_not_a_sequence_of_contexts() -> None:
    with pytest.raises(UsageError, match="not a sequence"):
        feed(handshake("disk", DEPTH, "here"), b"")


def test_a_bitmap_that_is_missing_is_told_with_how_to_offer_it() -> None:
    with pytest.raises(NbdContextError, match="qemu-nbd -B b0"):
        shake(HELLO + ack(SR) + ack(SET), ("qemu:dirty-bitmap:b0",))
    with pytest.raises(NbdContextError, match="in full"):
        shake(HELLO + ack(SR) + ack(SET), ("qemu:",))


# Old servers, and old ways of new ones.

OLDSTYLE = wire.OldstyleGreeting(1 << 20, 0x0001_0003).pack()


def test_an_oldstyle_server_is_good_for_its_only_export() -> None:
    export, sent = shake(OLDSTYLE, (), "")
    assert (export.size, export.flags, export.replies, dict(export.contexts)) == (1 << 20, 3, "simple", {})
    assert sent == b""
    for length in range(len(OLDSTYLE)):
        with pytest.raises(NbdDisconnectedError):
            shake(OLDSTYLE[:length], (), "")
    with pytest.raises(NbdUnsupportedError, match="no names, so none that is 'disk'"):
        shake(OLDSTYLE, (), "disk")
    with pytest.raises(NbdUnsupportedError, match="cannot grant metadata contexts"):
        shake(OLDSTYLE, (BASE,), "")
    with pytest.raises(NbdProtocolError, match="HAS_FLAGS"):
        shake(wire.OldstyleGreeting(512, 0x0001_0002).pack(), (), "")
    with pytest.raises(NbdUnsupportedError, match="63"):
        shake(wire.OldstyleGreeting(2**63, 3).pack(), (), "")


@pytest.mark.parametrize(("flags", "zeroes"), [(0, True), (2, False)])
def test_a_newstyle_server_knows_only_export_name(flags: int, zeroes: bool) -> None:
    hello, reply = wire.Greeting.newstyle(flags).pack(), wire.ExportNameReply(1 << 20, 3).pack(zeroes=zeroes)
    assert len(reply) == (134 if zeroes else 10)
    export, sent = shake(hello + reply, ())
    assert (export.name, export.size, export.flags, export.replies) == ("disk", 1 << 20, 3, "simple")
    assert sent == bytes([0, 0, 0, flags]) + wire.OptionRequest(Option.EXPORT_NAME, b"disk").pack()
    for length in range(len(reply)):
        with pytest.raises(NbdDisconnectedError, match="no export 'disk'"):
            shake(hello + reply[:length], ())


def test_a_server_that_does_not_know_go_is_asked_the_old_way() -> None:
    data = HELLO + unsupported(SR) + unsupported(GO) + wire.ExportNameReply(1 << 20, 3).pack()
    export, sent = shake(data, ())
    assert (export.size, export.replies) == (1 << 20, "simple")
    assert sent.endswith(wire.OptionRequest(Option.EXPORT_NAME, b"disk").pack())
    with pytest.raises(NbdUnsupportedError, match="extended headers"):
        shake(NEWSTYLE + ack(EXT) + unsupported(GO), ())


@pytest.mark.parametrize("no", ["ERR_UNSUP", "ERR_POLICY", "ERR_INVALID", "ERR_PLATFORM"])
def test_the_best_form_of_replies_is_taken(no: str) -> None:
    def refused(option: int) -> bytes:
        return option_reply(option, OptionReplyType[no], b"no")

    end = EXPORT + ack(GO)
    assert shake(NEWSTYLE + ack(EXT) + end, ())[0].replies == "extended"
    assert shake(NEWSTYLE + refused(EXT) + ack(SR) + end, ())[0].replies == "structured"
    assert shake(NEWSTYLE + refused(EXT) + refused(SR) + end, ())[0].replies == "simple"
    assert feed(handshake("disk", (), "here", best="structured"), NEWSTYLE + ack(SR) + end)[0].replies == "structured"
    assert feed(handshake("disk", (), "here", best="simple"), NEWSTYLE + end)[0].replies == "simple"


def test_what_the_server_tells_of_the_export_is_kept_printable() -> None:
    texts = info(b"\0\1disk \xff") + info(b"\0\2a\nline \xff\x1b[31m")
    export, _ = shake(HELLO + ack(SR) + texts + EXPORT + ack(GO), ())
    assert export.canonical == "disk \udcff"
    assert export.description == r"a\nline �\x1b[31m"


def test_a_namespace_is_content_with_what_is_granted_of_it() -> None:
    bitmaps = meta(2, "qemu:dirty-bitmap:b0") + meta(3, "qemu:dirty-bitmap:b1") + meta(0, BASE)
    contexts = (BASE, "qemu:dirty-bitmap:")
    export, _ = shake(HELLO + ack(SR) + bitmaps + ack(SET) + EXPORT + ack(GO), contexts)
    assert list(export.contexts.items()) == [(BASE, 0), ("qemu:dirty-bitmap:b0", 2), ("qemu:dirty-bitmap:b1", 3)]
    with pytest.raises(NbdProtocolError, match="nobody asked"):
        shake(HELLO + ack(SR) + meta(1, DEPTH), contexts)


# TLS, as far as the protocol goes.

TLS = Tls(hostname="h")
STARTTLS = Option.STARTTLS


def encrypted(data: bytes) -> tuple[Export, bytes]:
    return feed(handshake("disk", (), "here", TLS), data)


def test_tls_comes_first() -> None:
    export, sent = encrypted(NEWSTYLE + ack(STARTTLS) + unsupported(EXT) + ack(SR) + EXPORT + ack(GO))
    assert export.tls
    start, options = wire.OptionRequest(STARTTLS).pack(), wire.OptionRequest(EXT).pack()
    assert sent.startswith(b"\0\0\0\3" + start + TLS_STARTS + options)


@pytest.mark.parametrize(
    "no",
    [OptionReplyType.ERR_UNSUP, OptionReplyType.ERR_POLICY, OptionReplyType.ERR_INVALID, (1 << 31) + 99],
)
def test_tls_that_is_refused_is_not_done_without(no: int) -> None:
    with pytest.raises(NbdTlsError, match=r"server refuses it .*: not today"):
        encrypted(NEWSTYLE + option_reply(STARTTLS, no, b"not today"))


@pytest.mark.parametrize("old", [OLDSTYLE, wire.Greeting.newstyle(2).pack()])
def test_a_server_too_old_for_tls_is_not_used(old: bytes) -> None:
    with pytest.raises(NbdTlsError, match="too old"):
        encrypted(old)


def test_a_server_that_ends_after_tls_wants_to_know_us() -> None:
    with pytest.raises(NbdTlsError, match="client certificate"):
        encrypted(NEWSTYLE + ack(STARTTLS))
    with pytest.raises(NbdDisconnectedError):
        encrypted(NEWSTYLE + ack(STARTTLS) + unsupported(EXT))


def test_an_answer_to_starttls_has_nothing_with_it() -> None:
    with pytest.raises(NbdProtocolError, match="4 bytes of data"):
        encrypted(NEWSTYLE + option_reply(STARTTLS, OptionReplyType.ACK, b"evil"))
    with pytest.raises(NbdProtocolError, match="type 3"):
        encrypted(NEWSTYLE + option_reply(STARTTLS, OptionReplyType.INFO))
