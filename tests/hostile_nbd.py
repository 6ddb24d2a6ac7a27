"""An NBD server that does what a script says, right or wrong, with real bytes through a real socket.

A `Script` is an honest small server until a knob is turned; `serving` runs one. Written against the specification only:
of the package it uses nothing but the packing of structs.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from qmpnbd.nbd import constants, messages, wire
from qmpnbd.nbd.constants import ChunkType, Command, CommandFlag, Option
from qmpnbd.nbd.messages import ChunkHeader, ErrorPayload, RequestHeader, SimpleReply
from tests.option_bytes import ack, info, meta, unsupported

DEPTH, BASE = constants.ALLOCATION_DEPTH, constants.BASE_ALLOCATION
Extents = Iterable[tuple[int, int]]
Answer = Callable[[RequestHeader, int], Iterable[bytes]]
_T = TypeVar("_T")


def simple(cookie: int, error: int = 0) -> bytes:
    return messages.MAGIC.pack(constants.SIMPLE_REPLY_MAGIC) + SimpleReply(error, cookie).pack()


def chunk(cookie: int, kind: int, payload: bytes = b"", *, done: bool = False, length: int | None = None) -> bytes:
    header = ChunkHeader(int(done), kind, cookie, len(payload) if length is None else length)
    return messages.MAGIC.pack(constants.CHUNK_MAGIC) + header.pack() + payload


def status(cookie: int, id_: int, extents: Extents, *, done: bool = False) -> bytes:
    payload = id_.to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for pair in extents for n in pair)
    return chunk(cookie, ChunkType.BLOCK_STATUS, payload, done=done)


def failure(cookie: int, error: int, text: bytes = b"", *, done: bool = True, kind: int = ChunkType.ERROR) -> bytes:
    rest = bytes(8) if kind == ChunkType.ERROR_OFFSET else b""
    return chunk(cookie, kind, ErrorPayload(error, text, rest).pack(), done=done)


def pattern(offset: int, length: int) -> bytes:
    """What the fake server's disk holds: each sector its own number, never zero."""
    first, last = offset // 512, (offset + length + 511) // 512
    sectors = b"".join(bytes([number % 251 + 1]) * 512 for number in range(first, last))
    return sectors[offset - first * 512 :][:length]


def acknowledged(request: RequestHeader) -> bytes:
    """Says that a request without content was carried out."""
    return To(request).none() if To(request).extended else simple(request.cookie)


class To:
    """Chunks in reply to a request, in the form in which it was made."""

    def __init__(self, request: RequestHeader) -> None:
        self._request = request
        self.extended = request.magic == constants.EXTENDED_REQUEST_MAGIC

    def chunk(self, kind: int, payload: bytes = b"", *, done: bool = False, **wrong: int) -> bytes:
        facts = {"cookie": self._request.cookie, "length": len(payload), "offset": self._request.offset} | wrong
        header = ChunkHeader(int(done), kind, **facts).pack(extended=self.extended)
        magic = constants.EXTENDED_CHUNK_MAGIC if self.extended else constants.CHUNK_MAGIC
        return messages.MAGIC.pack(magic) + header + payload

    def none(self) -> bytes:
        return self.chunk(ChunkType.NONE, done=True)

    def data(self, offset: int, content: bytes, *, done: bool = False) -> bytes:
        return self.chunk(ChunkType.OFFSET_DATA, messages.OFFSET.pack(offset) + content, done=done)

    def hole(self, offset: int, length: int, *, done: bool = False) -> bytes:
        return self.chunk(ChunkType.OFFSET_HOLE, messages.HOLE.pack(offset, length), done=done)

    def failure(self, error: int, *, done: bool = True) -> bytes:
        return self.chunk(ChunkType.ERROR, ErrorPayload(error, b"").pack(), done=done)

    def status(self, id_: int, extents: Extents, *, done: bool = False, count: int | None = None) -> bytes:
        width = 8 if self.extended else 4
        entries = [n.to_bytes(width, "big") for pair in extents for n in pair]
        if not self.extended:
            return self.chunk(ChunkType.BLOCK_STATUS, id_.to_bytes(4, "big") + b"".join(entries), done=done)
        head = messages.STATUS_EXT.pack(id_, len(entries) // 2 if count is None else count)
        return self.chunk(ChunkType.BLOCK_STATUS_EXT, head + b"".join(entries), done=done)


def honest(request: RequestHeader, count: int) -> Iterable[bytes]:
    """Tells depth 1 for everything, in both contexts; the ids are those of `Script.contexts`."""
    to = To(request)
    yield to.status(7, [(request.length, 1)])
    yield to.status(4, [(request.length, 0)], done=True)


def honest_read(request: RequestHeader, count: int) -> Iterable[bytes]:
    """Tells the pattern in two pieces, the second one first."""
    to, half = To(request), request.length // 2
    if half:
        yield to.data(request.offset + half, pattern(request.offset + half, request.length - half))
        yield to.data(request.offset, pattern(request.offset, half), done=True)
    else:
        yield to.data(request.offset, pattern(request.offset, request.length), done=True)


def simple_read(request: RequestHeader, count: int) -> Iterable[bytes]:
    """The same without structured replies."""
    yield simple(request.cookie) + pattern(request.offset, request.length)


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
        read: the same for READ.
        others: the same for whatever else is asked.
        cut: close after so many bytes sent to a client.
        stall: fall silent after so many bytes sent to a client, until it closes its end.
        drip: send one byte at a time.
        tls: what to encrypt with after STARTTLS; None for everything in clear. What is cut then is what is encrypted.
        extended: have extended headers.
        requests: what clients asked for in the transmission phase.
        payloads: what followed each of these.
        asked: which options clients sent.
        sent: how many bytes were sent.
        came: how many clients connected.
        left: how many of them closed their end before we did.
    """

    greeting: bytes = field(default_factory=lambda: wire.Greeting.newstyle(3).pack())
    size: int = 8 << 20
    flags: int = 0x058F
    contexts: Sequence[tuple[int, str]] = ((7, DEPTH), (4, BASE))
    sizes: tuple[int, int, int] | None = (1, 4096, 32 << 20)
    options: dict[int, bytes] = field(default_factory=dict)
    answer: Answer = honest
    flush: Answer = lambda request, count: [acknowledged(request)]
    read: Answer = honest_read
    others: Answer = lambda request, count: [acknowledged(request)]
    cut: int | None = None
    stall: int | None = None
    drip: bool = False
    tls: ssl.SSLContext | None = None
    extended: bool = False
    requests: list[RequestHeader] = field(default_factory=list)
    payloads: list[bytes] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)
    sent: int = 0
    came: int = 0
    left: int = 0

    def option(self, option: int, data: bytes) -> bytes:
        """Returns the reply to an option."""
        if option in self.options:
            return self.options[option]
        if option == Option.EXTENDED_HEADERS and not self.extended:
            return unsupported(option)
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
        self._sent = 0
        self._extended = False
        self._tls: ssl.SSLObject | None = None
        self._arrived, self._leaving = ssl.MemoryBIO(), ssl.MemoryBIO()

    def serve(self) -> None:
        try:
            if self._script.greeting:
                self._send(self._script.greeting)
                self._read(4)
                self._haggle()
                self._transmit()
            self._be_silent()
        except OSError:
            self._script.left += 1
        except EOFError:
            pass  # the script ends it

    def _be_silent(self) -> None:
        """Waits for the client to leave."""
        while True:
            self._receive(65536)

    def _haggle(self) -> None:
        option = 0
        while option != Option.GO:
            _, option, length = wire.OptionRequest.unpack_header(self._read(16))
            data = self._read(length)
            self._script.asked.append(option)
            self._extended |= option == Option.EXTENDED_HEADERS and self._script.extended
            if option == Option.ABORT:
                self._be_silent()
            self._send(self._script.option(option, data))
            if option == Option.STARTTLS and self._script.tls is not None:
                self._encrypt(self._script.tls)

    def _encrypt(self, context: ssl.SSLContext) -> None:
        tls = context.wrap_bio(self._arrived, self._leaving, server_side=True)
        while self._tls is None:
            with contextlib.suppress(ssl.SSLWantReadError):
                tls.do_handshake()
                self._tls = tls
            self._push(self._leaving.read())
            if self._tls is None:
                self._arrived.write(self._receive(65536))

    def _transmit(self) -> None:
        script = self._script
        layout = RequestHeader.EXTENDED if self._extended else RequestHeader.LAYOUT
        answers = {Command.FLUSH: script.flush, Command.READ: script.read, Command.BLOCK_STATUS: script.answer}
        while True:
            request = RequestHeader.unpack(self._read(layout.size))
            carries = request.command == Command.WRITE or bool(request.flags & CommandFlag.PAYLOAD_LEN)
            payload = self._read(request.length) if carries else b""
            script.payloads.append(payload)
            script.requests.append(request)
            if request.command == Command.DISC:
                self._be_silent()
            for data in answers.get(Command(request.command), script.others)(request, len(script.requests)):
                self._send(data)

    def _send(self, data: bytes) -> None:
        if self._tls is not None:
            self._tls.write(data)
            data = self._leaving.read()
        self._push(data)

    def _push(self, data: bytes) -> None:
        script = self._script
        end = script.cut if script.stall is None else script.stall
        over = end is not None and self._sent + len(data) >= end
        if end is not None:
            data = data[: end - self._sent]
        for piece in (data[n : n + 1] for n in range(len(data))) if script.drip else (data,):
            self._sock.sendall(piece)
        self._sent += len(data)
        script.sent += len(data)
        if over and script.stall is not None:
            self._be_silent()
        if over:
            raise EOFError

    def _read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            if self._tls is None:
                data += self._receive(min(count - len(data), 65536))
                continue
            try:
                data += self._tls.read(count - len(data))
            except ssl.SSLWantReadError:
                self._arrived.write(self._receive(65536))
        return data

    def _receive(self, count: int) -> bytes:
        if not (data := self._sock.recv(count)):
            raise ConnectionResetError
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
                script.came += 1
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
