"""An NBD server that does what a script says, right or wrong, with real bytes through a real socket.

A `Script` is an honest small server until a knob is turned. `serving` runs one; `feed` gives a program bytes without
any socket. Written against the specification only: of the package it uses nothing but the packing of structs.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from qmpnbd.errors import NbdDisconnectedError
from qmpnbd.nbd import constants, wire
from qmpnbd.nbd.constants import ChunkType, Command, Option, OptionReplyType
from qmpnbd.nbd.wire import Program, Receive, RequestHeader

DEPTH, BASE = constants.ALLOCATION_DEPTH, constants.BASE_ALLOCATION
Extents = Iterable[tuple[int, int]]
Answer = Callable[[RequestHeader, int], Iterable[bytes]]
_T = TypeVar("_T")


def option_reply(option: int, kind: int, data: bytes = b"", **wrong: int) -> bytes:
    facts = {"option": option, "type": kind, "length": len(data)} | wrong
    return wire.OptionReplyHeader(**facts).pack() + data


def meta(id_: int, name: str) -> bytes:
    data = wire.MetaContext(id_, name.encode()).pack()
    return option_reply(Option.SET_META_CONTEXT, OptionReplyType.META_CONTEXT, data)


def ack(option: int) -> bytes:
    return option_reply(option, OptionReplyType.ACK)


def info(data: bytes) -> bytes:
    return option_reply(Option.GO, OptionReplyType.INFO, data)


def simple(cookie: int, error: int = 0) -> bytes:
    return wire.REPLY_MAGIC.pack(constants.SIMPLE_REPLY_MAGIC) + wire.SimpleReply(error, cookie).pack()


def chunk(cookie: int, kind: int, payload: bytes = b"", *, done: bool = False, length: int | None = None) -> bytes:
    header = wire.ChunkHeader(int(done), kind, cookie, len(payload) if length is None else length)
    return wire.REPLY_MAGIC.pack(constants.CHUNK_MAGIC) + header.pack() + payload


def status(cookie: int, id_: int, extents: Extents, *, done: bool = False) -> bytes:
    payload = id_.to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for pair in extents for n in pair)
    return chunk(cookie, ChunkType.BLOCK_STATUS, payload, done=done)


def failure(cookie: int, error: int, text: bytes = b"", *, done: bool = True, kind: int = ChunkType.ERROR) -> bytes:
    rest = bytes(8) if kind == ChunkType.ERROR_OFFSET else b""
    return chunk(cookie, kind, wire.ErrorPayload(error, text, rest).pack(), done=done)


def honest(request: RequestHeader, count: int) -> Iterable[bytes]:
    """Tells depth 1 for everything, in both contexts; the ids are those of `Script.contexts`."""
    yield status(request.cookie, 7, [(request.length, 1)])
    yield status(request.cookie, 4, [(request.length, 0)], done=True)


@dataclass
class Script:
    """What the server does.

    Attributes:
        greeting: sent first; empty for silence.
        contexts: id and name of each context granted if asked for.
        sizes: minimum, preferred, maximum; None to tell none.
        options: replies to send instead of the honest ones.
        answer: given a BLOCK_STATUS request and its number, the bytes to send.
        flush: the same for FLUSH.
        cut: close after so many bytes sent.
        drip: send one byte at a time.
        requests: what clients asked for in the transmission phase.
        asked: which options clients sent.
    """

    greeting: bytes = field(default_factory=lambda: wire.Greeting.newstyle(3).pack())
    size: int = 8 << 20
    flags: int = 0x058F
    contexts: Sequence[tuple[int, str]] = ((7, DEPTH), (4, BASE))
    sizes: tuple[int, int, int] | None = (1, 4096, 32 << 20)
    options: dict[int, bytes] = field(default_factory=dict)
    answer: Answer = honest
    flush: Answer = lambda request, count: [simple(request.cookie)]
    cut: int | None = None
    drip: bool = False
    requests: list[RequestHeader] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)

    def option(self, option: int, data: bytes) -> bytes:
        """Returns the reply to an option."""
        if option in self.options:
            return self.options[option]
        if option == Option.SET_META_CONTEXT:
            granted = [meta(id_, name) for id_, name in self.contexts if name.encode() in data]
            return b"".join(granted) + ack(option)
        if option == Option.GO:
            sizes = info(wire.InfoBlockSize(*self.sizes).pack()) if self.sizes else b""
            return sizes + info(wire.InfoExport(self.size, self.flags).pack()) + ack(option)
        return ack(option)


class _Conversation:
    """One client, served until it leaves, the script cuts, or nothing more is to be said."""

    def __init__(self, script: Script, sock: socket.socket) -> None:
        self._script = script
        self._sock = sock
        self._left = script.cut

    def serve(self) -> None:
        with contextlib.suppress(OSError, EOFError):
            if self._script.greeting:
                self._send(self._script.greeting)
                self._read(4)
                self._haggle()
                self._transmit()
            self._read(1 << 30)  # silence: wait for the client to leave

    def _haggle(self) -> None:
        option = 0
        while option != Option.GO:
            _, option, length = wire.OptionRequest.unpack_header(self._read(16))
            data = self._read(length)
            self._script.asked.append(option)
            if option == Option.ABORT:
                raise EOFError
            self._send(self._script.option(option, data))

    def _transmit(self) -> None:
        while True:
            request = RequestHeader.unpack(self._read(28))
            self._script.requests.append(request)
            if request.command == Command.DISC:
                raise EOFError
            answer = self._script.flush if request.command == Command.FLUSH else self._script.answer
            for data in answer(request, len(self._script.requests)):
                self._send(data)

    def _send(self, data: bytes) -> None:
        cut = self._left is not None and len(data) >= self._left
        if cut:
            data = data[: self._left]
        for piece in (data[n : n + 1] for n in range(len(data))) if self._script.drip else (data,):
            self._sock.sendall(piece)
        if cut:
            raise EOFError
        if self._left is not None:
            self._left -= len(data)

    def _read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            if not (more := self._sock.recv(min(count - len(data), 65536))):
                raise EOFError
            data += more
        return data


@contextlib.contextmanager
def serving(folder: Path, script: Script) -> Iterator[str]:
    """Runs a server and yields its URI; everything is closed and joined afterwards."""
    path = folder / "s"
    path.unlink(missing_ok=True)
    clients: list[socket.socket] = []

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                clients.append(client)
                with client:
                    _Conversation(script, client).serve()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(8)
        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield f"nbd+unix:///disk?socket={path}"
        finally:
            for sock in (listener, *clients):
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            thread.join(5)
            assert not thread.is_alive(), "the fake server does not end"


def feed(program: Program[_T], data: bytes) -> tuple[_T, bytes]:
    """Gives a program bytes until it returns.

    Returns:
        What it returned, and what it sent.

    Raises:
        NbdDisconnectedError: the bytes were not enough.
        AssertionError: bytes were left over.
    """
    sent = b""
    try:
        operation = next(program)
        while True:
            if not isinstance(operation, Receive):
                sent += operation.data
                operation = program.send(b"")
            elif operation.count <= len(data):
                taken, data = data[: operation.count], data[operation.count :]
                operation = program.send(bytearray(taken))
            else:
                operation = program.throw(NbdDisconnectedError("the end", where="test"))
    except StopIteration as stop:
        assert data == b"", "bytes were left over"
        result: _T = stop.value
        return result, sent
