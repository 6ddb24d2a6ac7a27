"""The bytes of option haggling, written by hand, and a way to feed them to a program without any socket."""

from __future__ import annotations

from typing import TypeVar

from qmpnbd.errors import NbdDisconnectedError
from qmpnbd.nbd import wire
from qmpnbd.nbd.constants import Option, OptionReplyType
from qmpnbd.nbd.wire import Program, Receive, Send, StartTls

TLS_STARTS = b"[TLS]"
_T = TypeVar("_T")


def option_reply(option: int, kind: int, data: bytes = b"", **wrong: int) -> bytes:
    facts = {"option": option, "type": kind, "length": len(data)} | wrong
    return wire.OptionReplyHeader(**facts).pack() + data


def ack(option: int) -> bytes:
    return option_reply(option, OptionReplyType.ACK)


def unsupported(option: int) -> bytes:
    return option_reply(option, OptionReplyType.ERR_UNSUP)


def info(data: bytes, option: int = Option.GO) -> bytes:
    return option_reply(option, OptionReplyType.INFO, data)


def meta(id_: int, name: str, option: int = Option.SET_META_CONTEXT) -> bytes:
    return option_reply(option, OptionReplyType.META_CONTEXT, wire.MetaContext(id_, name.encode()).pack())


def listed(name: bytes, description: bytes = b"") -> bytes:
    return option_reply(Option.LIST, OptionReplyType.SERVER, wire.ServerEntry(name, description).pack())


def feed(program: Program[_T], data: bytes) -> tuple[_T, bytes]:
    """Gives a program bytes until it returns.

    Returns:
        What it returned, and what it sent, with a mark where TLS was to begin.

    Raises:
        NbdDisconnectedError: the bytes were not enough.
        AssertionError: bytes were left over.
    """
    sent = b""
    try:
        operation = next(program)
        while True:
            if isinstance(operation, Receive):
                if operation.count <= len(data):
                    taken, data = data[: operation.count], data[operation.count :]
                    operation = program.send(bytearray(taken))
                else:
                    operation = program.throw(NbdDisconnectedError("the end", where="test"))
            else:
                assert isinstance(operation, Send | StartTls)
                sent += operation.data if isinstance(operation, Send) else TLS_STARTS
                operation = program.send(b"")
    except StopIteration as stop:
        assert data == b"", "bytes were left over"
        result: _T = stop.value
        return result, sent
