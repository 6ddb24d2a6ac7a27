"""Option haggling step by step: lists, what a refusal leaves, and every way for a server to go wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmpnbd.errors import (
    NbdContextError,
    NbdDisconnectedError,
    NbdError,
    NbdProtocolError,
    NbdRefusedError,
    NbdUnsupportedError,
    UsageError,
)
from qmpnbd.nbd import constants, wire
from qmpnbd.nbd.constants import Option, OptionReplyType
from qmpnbd.nbd.export import Export, ExportInfo
from qmpnbd.nbd.negotiation import Haggling
from qmpnbd.nbd.wire import Program
from tests.option_bytes import ack, feed, info, listed, meta, option_reply, unsupported

BASE, DEPTH = constants.BASE_ALLOCATION, constants.ALLOCATION_DEPTH
LIST, LIST_META, SET = Option.LIST, Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT
INFO, GO, ABORT = Option.INFO, Option.GO, wire.OptionRequest(Option.ABORT).pack()
BEGIN = wire.Greeting.newstyle(3).pack() + unsupported(Option.EXTENDED_HEADERS) + ack(Option.STRUCTURED_REPLY)
UNKNOWN = OptionReplyType.ERR_UNKNOWN


def exported(option: int, size: int = 1 << 20) -> bytes:
    return info(wire.InfoExport(size, 3).pack(), option) + ack(option)


def begun(data: bytes = BEGIN) -> Haggling:
    haggling = Haggling("here")
    feed(haggling.begin(), data)
    return haggling


def test_exports_are_listed_with_what_is_said_of_them() -> None:
    haggling = begun()
    entries = listed(b"") + listed(b"disk", b"the\tdisk") + listed(b"\xff") + ack(LIST)
    assert feed(haggling.list_exports(), entries) == (
        [("", ""), ("disk", r"the\tdisk"), ("\udcff", "")],
        wire.OptionRequest(LIST).pack(),
    )
    assert feed(haggling.list_exports(), ack(LIST))[0] == []
    found, sent = feed(haggling.info("\udcff"), exported(INFO))
    assert found == ExportInfo("\udcff", 1 << 20, 3)  # type: ignore[arg-type]  # equal to the flags
    assert b"\0\0\0\1\xff" in sent, "a name goes back as it came"


def test_a_refusal_leaves_the_negotiation_where_it_was() -> None:
    haggling = begun()
    with pytest.raises(NbdRefusedError, match="policy"):
        feed(haggling.list_exports(), option_reply(LIST, OptionReplyType.ERR_POLICY))
    with pytest.raises(NbdRefusedError, match="no export"):
        feed(haggling.info("none"), option_reply(INFO, UNKNOWN))
    with pytest.raises(NbdUnsupportedError, match="2\\*\\*63"):
        feed(haggling.info("huge"), exported(INFO, 2**63))
    with pytest.raises(NbdUnsupportedError, match="NBD_OPT_INFO"):
        feed(haggling.info("x"), unsupported(INFO))
    with pytest.raises(NbdContextError):
        feed(haggling.set_contexts("disk", [DEPTH]), ack(SET))
    with pytest.raises(NbdRefusedError):
        feed(haggling.go("none"), option_reply(GO, UNKNOWN))
    with pytest.raises(UsageError):
        feed(haggling.info("a\0b"), b"")
    assert haggling.in_step
    export = feed(haggling.go("disk"), exported(GO))[0]
    assert isinstance(export, Export)
    assert (export.name, export.replies, dict(export.contexts)) == ("disk", "structured", {})
    assert not haggling.in_step


def test_contexts_are_listed_and_selected() -> None:
    haggling = begun()
    offered = meta(0, BASE, LIST_META) + meta(0, DEPTH, LIST_META) + meta(9, BASE, LIST_META) + ack(LIST_META)
    found, sent = feed(haggling.list_contexts("disk", ["qemu:", "base:", "qemu:"]), offered)
    assert found == [BASE, DEPTH]
    assert sent == wire.OptionRequest(LIST_META, wire.pack_meta_context_query(b"disk", [b"qemu:", b"base:"])).pack()
    assert feed(haggling.list_contexts("disk"), ack(LIST_META))[0] == []
    with pytest.raises(NbdUnsupportedError, match="no metadata contexts"):
        feed(haggling.list_contexts("disk"), unsupported(LIST_META))
    chosen = feed(haggling.set_contexts("disk", [DEPTH, BASE]), meta(5, BASE) + meta(6, DEPTH) + ack(SET))[0]
    assert list(chosen.items()) == [(DEPTH, 6), (BASE, 5)]
    with pytest.raises(UsageError, match="selected for 'disk'"):
        feed(haggling.go("other"), b"")
    assert feed(haggling.go("disk"), exported(GO))[0].contexts == chosen


def test_a_second_selection_replaces_the_first_even_when_it_fails() -> None:
    haggling = begun()
    feed(haggling.set_contexts("disk", [BASE]), meta(5, BASE) + ack(SET))
    with pytest.raises(NbdRefusedError):
        feed(haggling.set_contexts("disk", [DEPTH]), option_reply(SET, UNKNOWN))
    assert feed(haggling.go("disk"), exported(GO))[0].contexts == {}
    haggling = begun()
    feed(haggling.set_contexts("disk", [BASE]), meta(5, BASE) + ack(SET))
    assert feed(haggling.set_contexts("other", [DEPTH]), meta(5, DEPTH) + ack(SET))[0] == {DEPTH: 5}
    assert feed(haggling.go("other"), exported(GO))[0].contexts == {DEPTH: 5}


def test_leave_is_taken_once() -> None:
    haggling = begun()
    assert feed(haggling.abort(), b"") == (None, ABORT)
    assert feed(haggling.abort(), b"") == (None, b"")
    with pytest.raises(UsageError, match="over"):
        feed(haggling.list_exports(), b"")
    assert feed(Haggling("here").abort(), b"") == (None, b"")


def test_a_server_that_shuts_down_is_left_at_once() -> None:
    haggling, sent = begun(), b""

    def watched() -> Program[ExportInfo]:
        nonlocal sent
        inner = haggling.info("disk")
        operation = next(inner)
        while True:
            sent += operation.data if isinstance(operation, wire.Send) else b""
            operation = inner.send((yield operation))

    with pytest.raises(NbdRefusedError, match="shutting down"):
        feed(watched(), option_reply(INFO, OptionReplyType.ERR_SHUTDOWN))
    assert sent.endswith(ABORT)
    assert not haggling.in_step
    with pytest.raises(UsageError, match="over"):
        feed(haggling.info("disk"), b"")


def test_after_go_no_leave_can_be_taken() -> None:
    haggling = begun()
    with pytest.raises(NbdUnsupportedError):
        feed(haggling.go("disk"), exported(GO, 2**63))
    assert feed(haggling.abort(), b"") == (None, b""), "an option would be taken for a request"


def test_a_newstyle_server_can_go_and_nothing_else() -> None:
    for steps in STEPS.values():
        haggling = begun(wire.Greeting.newstyle(2).pack())
        assert haggling.style == "newstyle"
        if steps is not STEPS["go"]:
            with pytest.raises(NbdUnsupportedError, match="old as this one"):
                feed(steps(haggling), b"")
        assert feed(haggling.go("disk"), wire.ExportNameReply(512, 3).pack())[0].size == 512


STEPS: dict[str, Callable[[Haggling], Program[Any]]] = {
    "list": lambda haggling: haggling.list_exports(),
    "list contexts": lambda haggling: haggling.list_contexts("disk"),
    "set contexts": lambda haggling: haggling.set_contexts("disk", [BASE]),
    "info": lambda haggling: haggling.info("disk"),
    "go": lambda haggling: haggling.go("disk"),
}


@pytest.mark.parametrize("step", STEPS)
def test_steps_have_an_order(step: str) -> None:
    haggling = Haggling("here")
    with pytest.raises((UsageError, NbdUnsupportedError)):
        feed(STEPS[step](haggling), b"")


@pytest.mark.parametrize("step", STEPS)
def test_a_conversation_cut_anywhere_is_lost(step: str) -> None:
    option = {"list": LIST, "list contexts": LIST_META, "set contexts": SET, "info": INFO, "go": GO}[step]
    for length in range(20):
        haggling = begun()
        with pytest.raises(NbdDisconnectedError):
            feed(STEPS[step](haggling), ack(option)[:length])
        assert not haggling.in_step
        with pytest.raises(NbdDisconnectedError, match="lost before"):
            feed(STEPS[step](haggling), b"")
        assert feed(haggling.abort(), b"") == (None, b"")


@pytest.mark.parametrize(
    ("step", "data", "match"),
    [
        ("list", option_reply(LIST, OptionReplyType.SERVER, b"\0\0\0"), "3 bytes that do not fit"),
        ("list", option_reply(LIST, OptionReplyType.SERVER, b"\0\0\0\2a"), "do not fit"),
        ("list", option_reply(LIST, OptionReplyType.SERVER, b"\xff\xff\xff\xffa"), "do not fit"),
        ("list", listed(b"x" * 4097), "do not fit"),
        ("list", listed(b"x", b"y" * 4097), "do not fit"),
        ("list", listed(b"a\0"), "NUL"),
        ("list", listed(b"x") * 10_001, "more than 10000"),
        ("list", option_reply(LIST, OptionReplyType.INFO), "type 3"),
        ("list", option_reply(LIST, OptionReplyType.SERVER, length=2**31), "never needed"),
        ("list contexts", meta(0, BASE, LIST_META) * 4097, "more than 4096"),
        ("list contexts", meta(0, BASE), "one to option 10"),
        ("list contexts", option_reply(LIST_META, OptionReplyType.META_CONTEXT, bytes(4)), "4 bytes"),
        ("set contexts", b"".join(meta(n, f"{BASE}{n}") for n in range(4097)), "nobody asked"),
        ("info", exported(INFO)[:-20] + info(b"\0\3" + bytes(12), INFO) + ack(INFO), "minimum block size of 0"),
        ("info", ack(INFO), "without describing"),
    ],
)
def test_what_cannot_be_true_ends_the_negotiation(step: str, data: bytes, match: str) -> None:
    haggling = begun()
    with pytest.raises(NbdProtocolError, match=match):
        feed(STEPS[step](haggling), data)
    assert not haggling.in_step


def test_a_namespace_may_bring_many_contexts_but_not_endlessly() -> None:
    haggling, prefix = begun(), constants.DIRTY_BITMAP_PREFIX
    many = b"".join(meta(n, f"{prefix}b{n}") for n in range(4097))
    with pytest.raises(NbdProtocolError, match="more than 4096"):
        feed(haggling.set_contexts("disk", [prefix]), many)


@pytest.mark.parametrize("ask", [Haggling.list_contexts, Haggling.set_contexts])
def test_one_text_is_not_a_sequence(ask: Callable[..., Program[Any]]) -> None:
    with pytest.raises(UsageError, match="not a sequence"):
        feed(ask(begun(), "disk", "base:"), b"")


# Whatever comes, it ends with a documented error or a result that keeps its bounds.

kinds = st.sampled_from([*OptionReplyType, 0, 5, 1 << 31, (1 << 31) + 99]) | st.integers(0, 2**32 - 1)
payloads = st.binary(max_size=40) | st.builds(
    lambda kind, rest: kind.to_bytes(2, "big") + rest, st.integers(0, 4), st.binary(max_size=20)
)


def outcome(program: Program[Any], data: bytes) -> NbdError | None:
    try:
        feed(program, data)
    except NbdError as error:
        return error
    except AssertionError:  # it was content before all was used up
        return None
    return None


@settings(max_examples=400)
@given(st.sampled_from(sorted(STEPS)), st.lists(st.tuples(kinds, payloads), max_size=4), st.binary(max_size=30))
def test_any_replies_end_well(step: str, replies: list[tuple[int, bytes]], rest: bytes) -> None:
    option = {"list": LIST, "list contexts": LIST_META, "set contexts": SET, "info": INFO, "go": GO}[step]
    haggling = begun()
    error = outcome(
        STEPS[step](haggling), b"".join(option_reply(option, kind, payload) for kind, payload in replies) + rest
    )
    assert str(error).isprintable()
    if isinstance(error, NbdProtocolError | NbdDisconnectedError):
        assert not haggling.in_step
    elif error is not None:
        assert isinstance(error, NbdRefusedError | NbdContextError | NbdUnsupportedError)


@settings(max_examples=200)
@given(st.binary(max_size=200), st.booleans())
def test_any_greeting_ends_well(data: bytes, magic: bool) -> None:
    error = outcome(Haggling("here").begin(), b"NBDMAGIC" + data if magic else data)
    assert error is None or isinstance(error, NbdProtocolError | NbdDisconnectedError | NbdRefusedError)
    assert str(error).isprintable()
