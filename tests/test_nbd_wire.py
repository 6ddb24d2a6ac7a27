"""The structs of NBD, byte for byte against the layouts of doc/proto.md."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpnbd.nbd import messages, wire
from qmpnbd.nbd.channel import Inbox
from qmpnbd.nbd.wire import Receive

u16, u32, u64 = (st.integers(0, 2**bits - 1) for bits in (16, 32, 64))


def test_the_bytes_are_those_of_the_specification() -> None:
    assert wire.Greeting.newstyle(3).pack() == b"NBDMAGICIHAVEOPT\0\3"
    assert wire.OptionRequest(7, b"ab").pack() == b"IHAVEOPT\0\0\0\7\0\0\0\2ab"
    assert wire.OptionReplyHeader(7, 1, 0).pack() == bytes.fromhex("0003e889045565a9 00000007 00000001 00000000")
    assert messages.RequestHeader(7, 0x0102, 512, 1024).pack() == bytes.fromhex(
        "25609513 0000 0007 0000000000000102 0000000000000200 00000400"
    )
    assert messages.ChunkHeader(1, 5, 9, 12).pack() == bytes.fromhex("0001 0005 0000000000000009 0000000c")
    assert messages.SimpleReply(22, 9).pack() == bytes.fromhex("00000016 0000000000000009")
    assert wire.InfoExport(2**40, 3).pack() == bytes.fromhex("0000 0000010000000000 0003")
    assert wire.InfoBlockSize(1, 4096, 2**25).pack() == bytes.fromhex("0003 00000001 00001000 02000000")
    assert wire.MetaContext(5, b"a:b").pack() == b"\0\0\0\5a:b"
    assert messages.ErrorPayload(5, b"bad", b"12345678").pack() == b"\0\0\0\5\0\3bad12345678"
    assert wire.pack_go(b"ab", [3]) == b"\0\0\0\2ab\0\1\0\3"
    assert wire.pack_meta_context_query(b"", [b"a:b"]) == b"\0\0\0\0\0\0\0\1\0\0\0\3a:b"


@given(u16, u16, u64, u32, u64, u32)
def test_what_was_packed_is_unpacked(a: int, b: int, c: int, d: int, e: int, f: int) -> None:
    request = messages.RequestHeader(a, c, e, d, b)
    assert messages.RequestHeader.unpack(request.pack()) == request
    chunk = messages.ChunkHeader(a, b, c, d)
    assert messages.ChunkHeader.unpack(chunk.pack()) == chunk
    assert messages.SimpleReply.unpack(messages.SimpleReply(d, c).pack()) == messages.SimpleReply(d, c)
    option = wire.OptionReplyHeader(d, f, a)
    assert wire.OptionReplyHeader.unpack(option.pack()) == option
    assert wire.InfoExport.unpack(wire.InfoExport(c, a).pack()) == wire.InfoExport(c, a)
    sizes = wire.InfoBlockSize(d, f, a)
    assert wire.InfoBlockSize.unpack(sizes.pack()) == sizes
    assert wire.Greeting.unpack(wire.Greeting.newstyle(a).pack()) == wire.Greeting.newstyle(a)


@given(u32, st.binary(max_size=40), st.binary(max_size=9))
def test_an_error_payload_keeps_what_follows_its_message(error: int, message: bytes, rest: bytes) -> None:
    payload = messages.ErrorPayload(error, message, rest)
    assert messages.ErrorPayload.unpack(payload.pack()) == payload


def test_structs_that_are_cut_short_or_too_long_are_not_taken_apart() -> None:
    for whole, unpack in (
        (wire.InfoExport(1, 1).pack(), wire.InfoExport.unpack),
        (wire.InfoBlockSize(1, 1, 1).pack(), wire.InfoBlockSize.unpack),
    ):
        assert all(unpack(whole[:length]) is None for length in range(len(whole)))
        assert unpack(whole + b"\0") is None
    message = messages.ErrorPayload(5, b"message").pack()
    assert all(messages.ErrorPayload.unpack(message[:length]) is None for length in range(len(message)))
    assert [wire.MetaContext.unpack(bytes(n)) is None for n in (0, 3, 4, 5, 4100, 4101)] == [True] * 3 + [False] * 2 + [
        True
    ]
    assert [wire.info_type(data) for data in (b"", b"\0", b"\0\3")] == [None, None, 3]


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (b"plain", "plain"),
        (b"two\nlines\x1b[31m", r"two\nlines\x1b[31m"),
        (b"\xff", "�"),
        ("übel \u202e".encode(), r"übel \u202e"),
        (b"  ", ""),
    ],
)
def test_text_from_the_other_side_is_made_harmless(raw: bytes, shown: str) -> None:
    assert wire.printable(raw) == shown


def test_text_from_the_other_side_is_not_endless() -> None:
    assert len(wire.printable(b"\x01" * 100_000)) == 4096


@given(st.lists(st.integers(0, 200_000), max_size=8), st.data())
def test_an_inbox_gives_out_exactly_what_was_asked_for_however_it_came(counts: list[int], data: st.DataObject) -> None:
    stream = bytes(range(251)) * (sum(counts) // 251 + 1)
    fed = given_out = 0
    inbox = Inbox()
    for count in counts:
        inbox.ask(Receive(count, "it"))
        while not inbox.complete:
            most = data.draw(st.sampled_from([1000, 65536, 10**6]))
            came = 0
            for room in inbox.rooms():
                piece = min(len(room), len(stream) - fed, most - came)
                room[:piece] = stream[fed : fed + piece]
                fed += piece
                came += piece
            inbox.arrived(came)
        assert inbox.take() == stream[given_out : given_out + count]
        given_out += count


def test_an_inbox_fed_byte_by_byte() -> None:
    inbox = Inbox()
    inbox.ask(Receive(5, "it"))
    for byte in b"abcde":
        assert not inbox.complete
        inbox.rooms()[0][0] = byte
        inbox.arrived(1)
    assert inbox.complete
    assert inbox.take() == b"abcde"
