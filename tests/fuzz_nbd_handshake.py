"""Negotiations whose server is not to be trusted, of every style and by every step: a part of `tests.fuzz_nbd`."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from qmpnbd.nbd import wire
from qmpnbd.nbd.constants import Info, Option
from qmpnbd.nbd.export import Export
from qmpnbd.nbd.handshake import handshake
from qmpnbd.nbd.negotiation import Haggling
from qmpnbd.nbd.wire import Program
from tests.hostile_nbd import BASE, DEPTH
from tests.nbd_verdict import DOCUMENTED_OF_HANDSHAKE, FindingError
from tests.option_bytes import ack, feed, info, listed, meta, unsupported

SIZE = 1 << 20
FLAGS = 0x058F
HELLO = wire.Greeting.newstyle(3).pack()
STRUCTURED = unsupported(Option.EXTENDED_HEADERS) + ack(Option.STRUCTURED_REPLY)


def facts(option: Option) -> bytes:
    """What a server tells of an export."""
    told = [kind.to_bytes(2, "big") + b"a disk" for kind in (Info.NAME, Info.DESCRIPTION)]
    told += [wire.InfoBlockSize(512, 4096, 1 << 25).pack(), wire.InfoExport(SIZE, FLAGS).pack()]
    return b"".join(info(each, option) for each in told) + ack(option)


def look_around() -> Program[Export]:
    """Takes every step that there is."""
    haggling = Haggling("here")
    yield from haggling.begin()
    yield from haggling.list_exports()
    yield from haggling.list_contexts("disk", ("qemu:",))
    yield from haggling.info("disk")
    yield from haggling.set_contexts("disk", (DEPTH, BASE))
    return (yield from haggling.go("disk"))


AGREED = meta(4, BASE) + meta(7, DEPTH) + ack(Option.SET_META_CONTEXT) + facts(Option.GO)
LOOKED = listed(b"disk", b"words") + listed(b"\xff") + ack(Option.LIST)
LOOKED += meta(0, DEPTH, Option.LIST_META_CONTEXT) + ack(Option.LIST_META_CONTEXT) + facts(Option.INFO)

TALKS: list[tuple[Callable[[], Program[Export]], bytes]] = [
    (lambda: handshake("disk", (DEPTH, BASE), "here"), HELLO + STRUCTURED + AGREED),
    (
        lambda: handshake("disk", (BASE, DEPTH), "here"),
        HELLO + ack(Option.EXTENDED_HEADERS) + AGREED,
    ),
    (look_around, HELLO + STRUCTURED + LOOKED + AGREED),
    (
        lambda: handshake("disk", (), "here"),
        HELLO + STRUCTURED + unsupported(Option.GO) + wire.ExportNameReply(SIZE, FLAGS).pack(),
    ),
    (
        lambda: handshake("disk", (), "here"),
        wire.Greeting.newstyle(0).pack() + wire.ExportNameReply(SIZE, FLAGS).pack(zeroes=True),
    ),
    (lambda: handshake("", (), "here"), wire.OldstyleGreeting(SIZE, FLAGS).pack()),
]
"""Each with what an honest server says."""


def attack(chance: random.Random, mutated: Callable[[random.Random, bytes], bytes]) -> str:
    """Runs one negotiation with a server that is not to be trusted.

    Returns:
        How it ended.

    Raises:
        FindingError: with an export that cannot be one.
    """
    talk, whole = chance.choice(TALKS)
    said = chance.randbytes(chance.randrange(80)) if chance.random() < 0.05 else mutated(chance, whole)
    try:
        export: Any = feed(talk(), said)[0]
    except DOCUMENTED_OF_HANDSHAKE as error:
        return type(error).__name__
    except AssertionError as error:
        if "left over" not in str(error):
            raise
        return "export"
    if not 0 <= export.size < 2**63 or (said == whole != b"" and (export.size, export.flags) != (SIZE, FLAGS)):
        raise FindingError(f"{export} is no export")
    return "export"
