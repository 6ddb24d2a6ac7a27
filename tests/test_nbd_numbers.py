"""Every number that the specification has, and some that it has not, on the wire: what the client makes of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qmpnbd.errors import (
    NbdDisconnectedError,
    NbdError,
    NbdProtocolError,
    NbdRefusedError,
    NbdRequestError,
    NbdTlsError,
    NbdUnsupportedError,
)
from qmpnbd.extents import ExtentMap
from qmpnbd.nbd import messages
from qmpnbd.nbd.client import Client
from qmpnbd.nbd.constants import ChunkType, Command, CommandFlag, Option, OptionReplyType, TransmissionFlag, WireError
from qmpnbd.nbd.handshake import handshake
from qmpnbd.nbd.messages import RequestHeader
from qmpnbd.nbd.negotiation import Haggling
from qmpnbd.nbd.tls import Tls
from qmpnbd.nbd.wire import Greeting, InfoExport, Program
from tests.hostile_nbd import BASE, DEPTH, Script, To, honest, honest_read, pattern, serving, simple
from tests.nbd_doors import Door, both_doors
from tests.option_bytes import ack, feed, info, option_reply, unsupported
from tests.servers import wait_until

HONEST = {DEPTH: ExtentMap.uniform(8 << 20, 1), BASE: ExtentMap.uniform(8 << 20, 0)}
FORMS = ["structured", "extended"]
both_forms = pytest.mark.parametrize("form", FORMS)
every_form = pytest.mark.parametrize("form", ["simple", *FORMS])


def script(form: str, **knobs: Any) -> Script:
    server = Script(extended=form == "extended", **knobs)
    if form == "simple":
        server.options[Option.STRUCTURED_REPLY] = unsupported(Option.STRUCTURED_REPLY)
    return server


# Flags.


@both_doors
@both_forms
def test_one_extent_is_asked_for_with_its_bit_and_only_then(door: Door, folder: Path, form: str) -> None:
    server = script(form)
    with serving(folder, server) as uri:
        steps = (("block_status", 0, 4096, {"one": True}), ("block_status", 0, 4096), "maps", ("read", 0, 512))
        assert not any(isinstance(outcome, Exception) for outcome in door(uri, *steps))
    flags = [request.flags for request in server.requests[:4]]
    assert flags == [1 << 3, 0, 0, 0]


@both_doors
@both_forms
@pytest.mark.parametrize("bits", [1 << 13, 1 << 14, 1 << 15, 7 << 13])
def test_unknown_transmission_flags_are_kept_and_mean_nothing(door: Door, folder: Path, form: str, bits: int) -> None:
    server = script(form, flags=0x0DED | bits)
    with serving(folder, server) as uri:
        with Client.connect(uri) as client:
            assert client.export.flags == TransmissionFlag(0x0DED | bits)
        outcomes = door(uri, "maps", ("read", 5, 700), ("write", 0, b"x" * 512), ("trim", 0, 512))
    assert outcomes == [HONEST, pattern(5, 700), None, None]
    assert [request.flags & ~CommandFlag.PAYLOAD_LEN for request in server.requests] == [0] * len(server.requests)


@both_doors
@both_forms
@pytest.mark.parametrize("bits", [1 << 1, 1 << 7, 1 << 15, 0xFFFE])
def test_unknown_chunk_flags_are_ignored(door: Door, folder: Path, form: str, bits: int) -> None:
    """The bits are in every chunk; the bit that says that it is the last one is set as ever."""

    def also(data: bytes) -> bytes:
        return data[:4] + (int.from_bytes(data[4:6], "big") | bits).to_bytes(2, "big") + data[6:]

    server = script(
        form,
        answer=lambda request, count: map(also, honest(request, count)),
        read=lambda request, count: map(also, honest_read(request, count)),
        flush=lambda request, count: [also(To(request).none())],
    )
    with serving(folder, server) as uri:
        assert door(uri, "maps", ("read", 512, 1024), "flush", "maps") == [HONEST, pattern(512, 1024), None, HONEST]


# Chunk types.


@both_doors
@both_forms
@pytest.mark.parametrize("kind", [3, 4, 7, 0x77, 0x7FFF])
@pytest.mark.parametrize("step", [("read", 0, 512), "maps", "flush"])
def test_an_unknown_chunk_that_is_no_error_ends_the_connection(
    door: Door, folder: Path, form: str, kind: int, step: Any
) -> None:
    def tell(request: RequestHeader, count: int) -> Iterator[bytes]:
        yield To(request).chunk(kind, bytes(8), done=True)

    with serving(folder, script(form, answer=tell, read=tell, flush=tell)) as uri:
        wrong, after = door(uri, step, "flush")
    assert isinstance(wrong, NbdProtocolError)
    assert f"a chunk of type {kind} in reply to" in str(wrong)
    assert isinstance(after, NbdDisconnectedError)


@both_doors
@both_forms
@pytest.mark.parametrize("kind", [0x8000, 0x8003, 0x8077, 0xFFFF])
@pytest.mark.parametrize("step", [("read", 0, 512), "maps", "flush"])
def test_an_unknown_chunk_that_is_an_error_fails_its_request_only(
    door: Door, folder: Path, form: str, kind: int, step: Any
) -> None:
    def tell(request: RequestHeader, count: int) -> Iterator[bytes]:
        payload = messages.ErrorPayload(WireError.EIO, b"as of 2040", b"more of it").pack()
        yield To(request).chunk(kind, payload, done=True) if count == 1 else To(request).none()

    with serving(folder, script(form, answer=tell, read=tell, flush=tell)) as uri:
        failed, after = door(uri, step, "flush")
    assert isinstance(failed, NbdRequestError)
    assert failed.wire_error == WireError.EIO
    assert "as of 2040" in str(failed)
    assert after is None


# Error values.

UNKNOWN_ERRORS = [2, 11, 107, 4711, 2**31, 2**32 - 1]


def error_replies(form: str) -> Iterator[Callable[[RequestHeader, int], bytes]]:
    """Yields the ways to say no in a form of replies."""
    if form != "extended":
        yield lambda request, error: simple(request.cookie, error)
    if form != "simple":
        yield lambda request, error: To(request).failure(error)
        yield lambda request, error: To(request).chunk(
            ChunkType.ERROR_OFFSET,
            messages.ErrorPayload(error, b"?", messages.OFFSET.pack(request.offset)).pack(),
            done=True,
        )


@both_doors
@every_form
@pytest.mark.parametrize("error", [*sorted(set(WireError) - {WireError.ESHUTDOWN}), *UNKNOWN_ERRORS])
def test_every_error_is_told_by_its_number_on_the_wire(door: Door, folder: Path, form: str, error: int) -> None:
    name = WireError(error).name if error in set(WireError) else f"unknown error {error}, as good as EINVAL"
    for no in error_replies(form):

        def tell(request: RequestHeader, count: int, no: Any = no) -> Iterator[bytes]:
            yield no(request, error)

        with serving(folder, script(form, read=tell, flags=0x0DED)) as uri:
            failed, after = door(uri, ("read", 512, 512), "flush", contexts=())
        assert isinstance(failed, NbdRequestError)
        assert (failed.wire_error, failed.offset, failed.length) == (error, 512, 512)
        assert f"({name}" in str(failed)
        assert after is None


@both_doors
@every_form
def test_a_shutdown_is_the_end_and_leave_is_taken(door: Door, folder: Path, form: str) -> None:
    for no in error_replies(form):
        server = script(form, read=lambda request, count, no=no: [no(request, WireError.ESHUTDOWN)])
        with serving(folder, server) as uri:
            outcomes = door(uri, ("read", 512, 512), ("read", 0, 512), "flush", contexts=())
            wait_until(lambda: server.requests[-1].command == Command.DISC, "the leave")  # noqa: B023 - waited for here
        assert [type(outcome) for outcome in outcomes] == [NbdDisconnectedError] * 3
        assert all("shutting down" in str(outcome) for outcome in outcomes)
        assert len(server.requests) == 2


# Refusals of options.

HELLO = Greeting.newstyle(3).pack()
UNKNOWN_REFUSALS = [1 << 31, (1 << 31) + 11, (1 << 31) + 4711, 2**32 - 1]
REFUSALS = [kind for kind in OptionReplyType if kind >> 31] + UNKNOWN_REFUSALS
NOT_HERE = {
    OptionReplyType.ERR_UNSUP,
    OptionReplyType.ERR_POLICY,
    OptionReplyType.ERR_INVALID,
    OptionReplyType.ERR_PLATFORM,
}
REFUSALS_OF_GO = [kind for kind in REFUSALS if kind != OptionReplyType.ERR_UNSUP]  # which has it asked the old way


def named(kind: int) -> str:
    return f"NBD_REP_{OptionReplyType(kind).name}" if kind in set(OptionReplyType) else f"error {kind:#010x}"


every_refusal = pytest.mark.parametrize("kind", REFUSALS, ids=named)


@both_doors
@pytest.mark.parametrize("kind", REFUSALS_OF_GO, ids=named)
def test_a_refused_export_is_told_with_the_reason_and_leave_is_taken(door: Door, folder: Path, kind: int) -> None:
    server = Script(options={Option.GO: option_reply(Option.GO, kind, b"the server's words")})
    with serving(folder, server) as uri:
        with pytest.raises(NbdRefusedError) as caught:
            door(uri)
        assert f"({named(kind)}: the server's words)" in str(caught.value)


def in_steps(step: Callable[[Haggling], Program[Any]]) -> Callable[[bytes], object]:
    """Returns what takes one step after the greeting; the negotiation can go on unless the server shuts down."""

    def take(refusal: bytes) -> object:
        haggling = Haggling("here")
        feed(haggling.begin(), HELLO + unsupported(Option.EXTENDED_HEADERS) + ack(Option.STRUCTURED_REPLY))
        try:
            return feed(step(haggling), refusal)[0]
        finally:
            shuts_down = refusal[12:16] == OptionReplyType.ERR_SHUTDOWN.to_bytes(4, "big")
            assert haggling.in_step != shuts_down
            if not shuts_down:
                exported = info(InfoExport(512, 3).pack()) + ack(Option.GO)
                assert feed(haggling.go("disk"), exported)[0].size == 512

    return take


def beginning(tls: Tls | None = None) -> Callable[[bytes], object]:
    """Returns what begins a handshake without contexts, whose rest goes well."""

    def take(refusal: bytes) -> object:
        exported = info(InfoExport(512, 3).pack()) + ack(Option.GO)
        asked = Option(int.from_bytes(refusal[8:12], "big"))
        structured = ack(Option.STRUCTURED_REPLY) if asked == Option.EXTENDED_HEADERS else b""
        kind = int.from_bytes(refusal[12:16], "big")
        rest = structured + exported if kind in NOT_HERE and tls is None else b""
        return feed(handshake("disk", (), "here", tls), HELLO + before[asked] + refusal + rest)[0].replies

    before = {
        Option.STARTTLS: b"",
        Option.EXTENDED_HEADERS: b"",
        Option.STRUCTURED_REPLY: unsupported(Option.EXTENDED_HEADERS),
    }
    return take


STEPS: dict[Option, Callable[[bytes], object]] = {
    Option.STARTTLS: beginning(Tls(hostname="example.com")),
    Option.EXTENDED_HEADERS: beginning(),
    Option.STRUCTURED_REPLY: beginning(),
    Option.LIST: in_steps(lambda haggling: haggling.list_exports()),
    Option.INFO: in_steps(lambda haggling: haggling.info("disk")),
    Option.LIST_META_CONTEXT: in_steps(lambda haggling: haggling.list_contexts("disk")),
    Option.SET_META_CONTEXT: in_steps(lambda haggling: haggling.set_contexts("disk", [BASE])),
}


def documented(option: Option, kind: int) -> type[NbdError] | str:
    """Returns the error that a refusal of an option is, or the lesser form of replies that is taken instead."""
    if option == Option.STARTTLS:
        return NbdTlsError
    if option in {Option.EXTENDED_HEADERS, Option.STRUCTURED_REPLY} and kind in NOT_HERE:
        return "structured" if option == Option.EXTENDED_HEADERS else "simple"
    if kind == OptionReplyType.ERR_UNSUP and option != Option.LIST:
        return NbdUnsupportedError
    return NbdRefusedError


@pytest.mark.parametrize("option", STEPS, ids=lambda option: option.name)
@every_refusal
def test_every_refusal_of_an_option_is_the_documented_error(option: Option, kind: int) -> None:
    refusal = option_reply(option, kind, b"the server's\nwords")
    expected = documented(option, kind)
    if isinstance(expected, str):
        assert STEPS[option](refusal) == expected
        return
    with pytest.raises(expected) as caught:
        STEPS[option](refusal)
    assert type(caught.value) is expected
    if expected is not NbdUnsupportedError:
        assert named(kind) in str(caught.value)
        assert r"the server's\nwords" in str(caught.value)
