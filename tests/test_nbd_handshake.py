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
    NbdUnsupportedError,
    UsageError,
)
from qmpnbd.nbd import wire
from qmpnbd.nbd.constants import Option, OptionReplyType
from qmpnbd.nbd.handshake import Export, handshake
from tests.hostile_nbd import BASE, DEPTH, Script, ack, feed, info, meta, option_reply

HELLO = wire.Greeting.newstyle(3).pack()
SR, SET, GO, ABORT = Option.STRUCTURED_REPLY, Option.SET_META_CONTEXT, Option.GO, Option.ABORT
EXPORT = info(wire.InfoExport(1 << 20, 0x058F).pack())
SIZES = info(wire.InfoBlockSize(512, 4096, 1 << 25).pack())
GOOD = HELLO + ack(SR) + meta(4, BASE) + meta(7, DEPTH) + ack(SET) + SIZES + EXPORT + ack(GO)
ABORTED = wire.OptionRequest(ABORT).pack()


def shake(data: bytes, contexts: tuple[str, ...] = (DEPTH, BASE), name: str = "disk") -> tuple[Export, bytes]:
    return feed(handshake(name, contexts, "here"), data)


def test_what_is_agreed_on_and_what_is_said_for_it() -> None:
    export, sent = shake(GOOD)
    assert (export.name, export.size, export.flags, export.structured) == ("disk", 1 << 20, 0x058F, True)
    assert (export.minimum_block, export.preferred_block, export.maximum_payload) == (512, 4096, 1 << 25)
    assert list(export.contexts.items()) == [(DEPTH, 7), (BASE, 4)]
    assert sent == (
        b"\0\0\0\3"
        + wire.OptionRequest(SR).pack()
        + wire.OptionRequest(
            SET, wire.pack_meta_context_query(b"disk", [b"qemu:allocation-depth", b"base:allocation"])
        ).pack()
        + wire.OptionRequest(GO, b"\0\0\0\4disk\0\1\0\3").pack()
    )


def test_an_end_of_the_stream_anywhere_is_told() -> None:
    for length in range(len(GOOD)):
        with pytest.raises(NbdDisconnectedError):
            shake(GOOD[:length])
    with pytest.raises(AssertionError, match="left over"):
        shake(GOOD + b"\0")


def test_a_server_that_tells_no_sizes_has_the_defaults_and_unknown_things_are_ignored() -> None:
    odd = info(b"\xff\xff whatever") + info(b"\0\2a description")
    export, sent = shake(wire.Greeting.newstyle(0xFFFF).pack() + ack(SR) + odd + EXPORT + ack(GO), ())
    assert (export.minimum_block, export.preferred_block, export.maximum_payload) == (1, 4096, 1 << 25)
    assert sent.startswith(b"\0\0\0\3IHAVEOPT"), "unknown handshake flags are not sent back"


def test_without_contexts_structured_replies_are_not_needed() -> None:
    refused = option_reply(SR, OptionReplyType.ERR_UNSUP, b"no idea")
    assert not shake(HELLO + refused + EXPORT + ack(GO), ())[0].structured
    with pytest.raises(NbdUnsupportedError, match="no structured replies"):
        shake(HELLO + refused)


@pytest.mark.parametrize(
    ("data", "error", "match"),
    [
        (b'{"QMP": {"version"', NbdProtocolError, "QMP monitor"),
        (b"SSH-2.0-OpenSSH_9.6", NbdProtocolError, "not an NBD server"),
        (b"NBDMAGIC" + bytes.fromhex("0000420281861253") + bytes(2), NbdUnsupportedError, "oldstyle"),
        (b"NBDMAGIC" + bytes(10), NbdProtocolError, "unknown style"),
        (wire.Greeting.newstyle(2).pack(), NbdUnsupportedError, "fixed newstyle"),
        (HELLO + option_reply(SR, OptionReplyType.ACK, magic=1), NbdProtocolError, "begins with"),
        (HELLO + ack(GO), NbdProtocolError, "one to option 7"),
        (HELLO + option_reply(SR, OptionReplyType.ACK, length=2**32 - 1), NbdProtocolError, "never needed"),
        (HELLO + option_reply(SR, OptionReplyType.ACK, b"x"), NbdProtocolError, "1 bytes of data"),
        (HELLO + option_reply(SR, OptionReplyType.SERVER), NbdProtocolError, "type 2"),
        (HELLO + ack(SR) + ack(SET), NbdContextError, "allocation-depth: true, or with qemu-nbd -A"),
        (HELLO + ack(SR) + meta(1, DEPTH) + ack(SET), NbdContextError, BASE),
        (HELLO + ack(SR) + meta(1, "base:other"), NbdProtocolError, "nobody asked"),
        (HELLO + ack(SR) + meta(1, DEPTH) * 2, NbdProtocolError, "twice"),
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
        (info(b"\xff\xff") * 64, NbdProtocolError, "more than 64"),
        (info(wire.InfoExport(2**63, 0x058F).pack()) + ack(GO), NbdUnsupportedError, "2\\*\\*63"),
        (info(wire.InfoExport(512, 0x058E).pack()) + ack(GO), NbdProtocolError, "HAS_FLAGS"),
        (option_reply(GO, OptionReplyType.ERR_UNSUP), NbdUnsupportedError, "NBD_OPT_GO"),
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


def test_the_script_of_the_fake_server_is_honest_by_default() -> None:
    script = Script()
    queries = wire.pack_meta_context_query(b"disk", [DEPTH.encode(), BASE.encode()])
    replies = script.option(SR, b"") + script.option(SET, queries) + script.option(GO, b"")
    assert shake(script.greeting + replies)[0].size == script.size
