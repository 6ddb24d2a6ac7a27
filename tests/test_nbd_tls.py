"""TLS through both doors: with real servers that do it right, and with scripted ones that do not."""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qmpnbd.deadline import Deadline
from qmpnbd.errors import (
    DeadlineError,
    NbdDisconnectedError,
    NbdProtocolError,
    NbdRefusedError,
    NbdTlsError,
    NbdUnsupportedError,
    QmpnbdError,
    UsageError,
)
from qmpnbd.nbd import aio_stepwise, constants, stepwise, wire
from qmpnbd.nbd.channel import Channel
from qmpnbd.nbd.constants import Option
from qmpnbd.nbd.policy import UriPolicy
from qmpnbd.nbd.tls import Tls
from qmpnbd.nbd.tls_socket import TlsSocket
from qmpnbd.nbd.uri import NbdUri
from qmpnbd.nbd.wire import Receive
from tests.option_bytes import ack, info, unsupported
from tests.servers import listening, process, tool, wait_until
from tests.tls_files import Authority

LONG, SHORT = 20.0, 0.2
HAS_PSK = getattr(ssl, "HAS_PSK", False)
needs_psk = pytest.mark.skipif(not HAS_PSK, reason="this Python has no TLS with shared secrets (3.13 has)")


@dataclass(frozen=True)
class Seen:
    """What a look at a server brought."""

    tls: bool
    size: int
    chosen: int


Look = Callable[..., Seen]


def blocking(uri: NbdUri | str, tls: Tls | None = None, seconds: float = LONG, **more: Any) -> Seen:
    deadline = Deadline(seconds)
    with stepwise.Negotiation.connect(uri, tls=tls, deadline=deadline, **more) as negotiation:
        size = negotiation.info("", deadline).size
        with negotiation.go("", deadline) as client:
            return Seen(negotiation.tls, size, client.export.size)


def awaited(uri: NbdUri | str, tls: Tls | None = None, seconds: float = LONG, **more: Any) -> Seen:
    async def main() -> Seen:
        deadline = Deadline(seconds)
        async with await aio_stepwise.Negotiation.connect(uri, tls=tls, deadline=deadline, **more) as negotiation:
            size = (await negotiation.info("", deadline)).size
            async with await negotiation.go("", deadline) as client:
                return Seen(negotiation.tls, size, client.export.size)

    return asyncio.run(main())


both_doors = pytest.mark.parametrize("look", [blocking, awaited])


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def server(authority: Authority) -> Path:
    return authority.server()


@pytest.fixture(scope="module")
def client(authority: Authority) -> Path:
    return authority.client()


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("stranger"))


# Real servers.

MIB = 1 << 20


@contextlib.contextmanager
def running(command: Sequence[str], folder: Path) -> Iterator[Path]:
    path = folder / "s"
    with process(command, folder / "log") as child:
        wait_until(lambda: listening(path) or child.poll() is not None, command[0])
        assert child.poll() is None, (folder / "log").read_text()
        yield path
    path.unlink(missing_ok=True)


@contextlib.contextmanager
def qemu_nbd(folder: Path, certificates: Path | None, *, verify: bool = False) -> Iterator[NbdUri]:
    """A qemu-nbd on a UNIX socket."""
    (folder / "image").write_bytes(bytes(MIB))
    command = [tool("qemu-nbd"), "-k", f"{folder}/s", "-t", "-e", "9", "-f", "raw", f"{folder}/image"]
    if certificates is not None:
        peer = "yes" if verify else "no"
        command += ["--object", f"tls-creds-x509,id=t,endpoint=server,dir={certificates},verify-peer={peer}"]
        command += ["--tls-creds", "t"]
    with running(command, folder) as path:
        yield NbdUri.unix(str(path), tls=Tls())


@contextlib.contextmanager
def nbdkit(folder: Path, *arguments: str) -> Iterator[NbdUri]:
    flags = [argument for argument in arguments if argument.startswith("-")]
    rest = [argument for argument in arguments if not argument.startswith("-")]
    with running([tool("nbdkit"), "-f", "-U", f"{folder}/s", *flags, "memory", "1M", *rest], folder) as path:
        yield NbdUri.unix(str(path), tls=Tls())


@both_doors
@pytest.mark.real
def test_a_verified_server(look: Look, folder: Path, authority: Authority, server: Path, client: Path) -> None:
    with qemu_nbd(folder, server) as uri:
        for tls in (
            Tls(hostname="localhost", ca_file=str(authority.ca_file)),
            Tls(hostname="127.0.0.1", certificates=str(client)),
            Tls(verify=False),
        ):
            assert look(uri, tls) == Seen(tls=True, size=MIB, chosen=MIB)
        inside = NbdUri.unix(uri.path, tls=Tls(certificates=str(client), hostname="localhost"))
        with pytest.raises(UsageError, match="may not name files"):
            look(inside)
        assert look(str(inside), policy=UriPolicy(local_files=True)).tls


@both_doors
@pytest.mark.real
def test_over_tcp_the_host_is_verified(look: Look, folder: Path, server: Path, client: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [tool("nbdkit"), "-f", "-i", "127.0.0.1", "-p", str(port), "--tls=require"]
    with process([*command, f"--tls-certificates={server}", "memory", "1M"], folder / "log"):

        def accepts() -> bool:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                return True
            return False

        wait_until(accepts, "nbdkit")
        tls = Tls(certificates=str(client))
        assert look(f"nbds://127.0.0.1:{port}/", tls) == Seen(tls=True, size=MIB, chosen=MIB)
        assert look(f"nbd://localhost:{port}/", tls).tls, "TLS that the caller wants need not be in the URI"
        with pytest.raises(NbdTlsError, match="not who it should be"):
            look(f"nbds://127.0.0.1:{port}/?tls-hostname=example.com", tls)


@both_doors
@pytest.mark.real
def test_a_server_that_is_not_who_it_should_be(
    look: Look, folder: Path, authority: Authority, server: Path, stranger: Authority
) -> None:
    own = str(authority.ca_file)
    with qemu_nbd(folder, server) as uri:
        for tls in (
            Tls(hostname="localhost", ca_file=str(stranger.ca_file)),
            Tls(hostname="localhost"),  # the system trusts others
            Tls(hostname="example.com", ca_file=own),
            Tls(hostname="127.0.0.2", ca_file=own),
        ):
            with pytest.raises(NbdTlsError, match=r"not who it should be.*tls-certificates"):
                look(uri, tls)
        with pytest.raises(UsageError, match="tls-hostname"):
            look(uri)
        with pytest.raises(NbdTlsError, match="by the name"):
            look(uri, Tls(hostname=".".join(["x" * 70] * 3), ca_file=own))


@both_doors
@pytest.mark.real
def test_a_server_whose_certificate_has_expired(look: Look, folder: Path, authority: Authority) -> None:
    expired = authority.server(f"expired-{look.__name__}", "localhost", expired=True)
    with nbdkit(folder, "--tls=require", f"--tls-certificates={expired}") as uri:
        with pytest.raises(NbdTlsError, match="has expired"):
            look(uri, Tls(hostname="localhost", ca_file=str(authority.ca_file)))
        assert look(uri, Tls(verify=False)).tls


@both_doors
@pytest.mark.real
def test_a_server_whose_certificate_was_revoked(look: Look, folder: Path, authority: Authority, server: Path) -> None:
    mine = authority.client(f"careful-{look.__name__}")
    other = authority.server(f"other-{look.__name__}", "localhost")
    with nbdkit(folder, "--tls=require", f"--tls-certificates={server}") as uri:
        authority.revoke(mine, other)
        assert look(uri, Tls(certificates=str(mine), hostname="localhost")).tls
        authority.revoke(mine, other, server)
        with pytest.raises(NbdTlsError, match="revoked"):
            look(uri, Tls(certificates=str(mine), hostname="localhost"))
        (mine / "ca-crl.pem").write_text("rubbish")
        with pytest.raises(NbdTlsError, match="cannot use the certificates"):
            look(uri, Tls(certificates=str(mine), hostname="localhost"))


@both_doors
@pytest.mark.real
def test_a_server_that_wants_to_know_us(
    look: Look, folder: Path, server: Path, client: Path, authority: Authority, stranger: Authority
) -> None:
    other = stranger.client(f"client-{look.__name__}")
    mixed = Tls(
        hostname="localhost",
        ca_file=str(authority.ca_file),
        certificate_file=str(other / "client-cert.pem"),
        key_file=str(other / "client-key.pem"),
    )
    with qemu_nbd(folder, server, verify=True) as uri:
        assert look(uri, Tls(hostname="localhost", certificates=str(client))).tls
        for tls in (Tls(hostname="localhost", ca_file=str(authority.ca_file)), mixed):
            with pytest.raises(NbdTlsError):
                look(uri, tls)


@both_doors
@pytest.mark.real
def test_one_side_has_tls_and_the_other_not(look: Look, folder: Path, server: Path, client: Path) -> None:
    tls = Tls(hostname="localhost", certificates=str(client))
    with qemu_nbd(folder, None) as uri:
        with pytest.raises(NbdTlsError, match="TLS is wanted, and the server refuses it"):
            look(uri, tls)
        assert not look(NbdUri.unix(uri.path)).tls
    with qemu_nbd(folder, server) as uri, pytest.raises(NbdRefusedError, match=r"requires TLS.*nbds://"):
        look(NbdUri.unix(uri.path))
    for old in ("-o", "--mask-handshake=0"):
        with nbdkit(folder, old) as uri, pytest.raises(NbdTlsError, match="too old"):
            look(uri, tls)


@both_doors
@pytest.mark.real
def test_a_server_that_falls_back_for_those_in_clear(look: Look, folder: Path, server: Path, client: Path) -> None:
    arguments = ["--tls=on", f"--tls-certificates={server}", "--filter=tls-fallback", "tlsreadme=use TLS"]
    with nbdkit(folder, *arguments) as uri:
        assert look(uri, Tls(hostname="localhost", certificates=str(client))) == Seen(tls=True, size=MIB, chosen=MIB)
        assert look(NbdUri.unix(uri.path)) == Seen(tls=False, size=512, chosen=512)


@both_doors
@needs_psk
@pytest.mark.real
def test_a_shared_secret(look: Look, folder: Path) -> None:
    (folder / "keys").write_text("alice:0123456789abcdef0123456789abcdef\nbob:00112233445566778899aabbccddeeff\n")
    (folder / "mine").write_text("alice:0123456789abcdef0123456789abcdef\n")
    (folder / "wrong").write_text("alice:ffffffffffffffffffffffffffffffff\n")
    with nbdkit(folder, "--tls=require", f"--tls-psk={folder}/keys") as uri:
        assert look(uri, Tls(psk_file=f"{folder}/mine")) == Seen(tls=True, size=MIB, chosen=MIB)
        assert look(uri, Tls(psk_file=f"{folder}/keys", username="bob")).tls
        for tls in (Tls(psk_file=f"{folder}/wrong"), Tls(hostname="localhost")):
            with pytest.raises(NbdTlsError):
                look(uri, tls)


@both_doors
@needs_psk
@pytest.mark.real
def test_a_certificate_does_not_pass_for_a_shared_secret(look: Look, folder: Path, server: Path) -> None:
    (folder / "mine").write_text("alice:0123456789abcdef0123456789abcdef\n")
    with (
        nbdkit(folder, "--tls=require", f"--tls-certificates={server}") as uri,
        pytest.raises(NbdTlsError),
    ):
        look(uri, Tls(psk_file=f"{folder}/mine"))


# A scripted server: honest up to the ACK of STARTTLS.

Behaviour = Callable[[socket.socket], None]


@contextlib.contextmanager
def scripted(folder: Path, after_ack: Behaviour, with_ack: bytes = b"") -> Iterator[NbdUri]:
    path = folder / "s"

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listener.accept()
                sock.settimeout(LONG)
                with sock, contextlib.suppress(OSError):
                    sock.sendall(wire.Greeting.newstyle(3).pack())
                    _exactly(sock, 4 + 16)
                    sock.sendall(ack(Option.STARTTLS) + with_ack)
                    after_ack(sock)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(8)
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield NbdUri.unix(str(path), tls=Tls(verify=False))
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(5)
            assert not thread.is_alive(), "the scripted server does not end"
    path.unlink()


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        if not (more := sock.recv(count - len(data))):
            raise ConnectionError
        data += more
    return data


def until_left(sock: socket.socket) -> None:
    while sock.recv(65536):
        pass


def encrypted(certificates: Path, sock: socket.socket) -> ssl.SSLSocket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server-cert.pem", certificates / "server-key.pem")
    return context.wrap_socket(sock, server_side=True, suppress_ragged_eofs=True)


REPLIES = {
    Option.EXTENDED_HEADERS: unsupported(Option.EXTENDED_HEADERS),
    Option.STRUCTURED_REPLY: ack(Option.STRUCTURED_REPLY),
    **{option: info(wire.InfoExport(MIB, 3).pack(), option) + ack(option) for option in (Option.INFO, Option.GO)},
}


def haggle(sock: socket.socket, *, drip: bool = False, cut: int | None = None) -> None:
    """Answers options, in one piece or byte by byte, up to a number of bytes."""
    left = 1 << 30 if cut is None else cut
    while True:
        _, option, length = wire.OptionRequest.unpack_header(_exactly(sock, 16))
        _exactly(sock, length)
        reply = REPLIES[Option(option)][:left]
        for piece in (reply[n : n + 1] for n in range(len(reply))) if drip else (reply,):
            sock.sendall(piece)
        left -= len(reply)
        if left <= 0:
            return
        if option == Option.GO:
            until_left(sock)
            return


@both_doors
@pytest.mark.parametrize("drip", [False, True])
def test_tls_in_small_pieces(look: Look, folder: Path, server: Path, drip: bool) -> None:
    def behave(sock: socket.socket) -> None:
        with encrypted(server, sock) as secure:
            haggle(secure, drip=drip)

    with scripted(folder, behave) as uri:
        assert look(uri) == Seen(tls=True, size=MIB, chosen=MIB)


@both_doors
def test_bytes_in_clear_behind_the_ack_are_not_used(look: Look, folder: Path) -> None:
    evil = REPLIES[Option.EXTENDED_HEADERS]
    with (
        scripted(folder, until_left, with_ack=evil) as uri,
        pytest.raises(NbdProtocolError, match="20 bytes in clear where TLS was to begin"),
    ):
        look(uri)


@both_doors
def test_bytes_in_clear_instead_of_tls(look: Look, folder: Path) -> None:
    def behave(sock: socket.socket) -> None:
        sock.recv(5)  # of the ClientHello
        sock.sendall(REPLIES[Option.EXTENDED_HEADERS])
        until_left(sock)

    with scripted(folder, behave) as uri, pytest.raises(NbdTlsError, match="TLS failed"):
        look(uri)


@both_doors
def test_a_hang_up_instead_of_tls(look: Look, folder: Path) -> None:
    with scripted(folder, lambda sock: None) as uri, pytest.raises(NbdTlsError, match="during the TLS handshake"):
        look(uri)


@both_doors
def test_silence_instead_of_tls(look: Look, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted(folder, until_left) as uri:
        with pytest.raises(DeadlineError, match="TLS handshake"):
            look(uri, seconds=SHORT)
        monkeypatch.setattr(constants, "TLS_PATIENCE", SHORT)
        with pytest.raises(NbdTlsError, match="silent in the middle"):
            look(uri)


@both_doors
@pytest.mark.parametrize("farewell", [False, True])
def test_a_stream_that_ends_early(look: Look, folder: Path, server: Path, farewell: bool) -> None:
    whole = sum(len(reply) for reply in REPLIES.values())
    cuts = [1, 19, 20, 21, 41, whole - 1]
    left = iter(cuts)

    def behave(sock: socket.socket) -> None:
        with encrypted(server, sock) as secure:
            haggle(secure, cut=next(left))
            if farewell:
                secure.unwrap().close()

    with scripted(folder, behave) as uri:
        for _ in cuts:
            with pytest.raises((NbdDisconnectedError, NbdTlsError)):
                look(uri)


@both_doors
def test_a_server_that_rejects_us_after_the_handshake(look: Look, folder: Path, server: Path) -> None:
    def behave(sock: socket.socket) -> None:
        encrypted(server, sock).close()

    with scripted(folder, behave) as uri, pytest.raises(NbdTlsError, match=r"right after the TLS handshake.*client"):
        look(uri)


@both_doors
def test_a_record_that_was_changed_on_the_way(look: Look, folder: Path, server: Path) -> None:
    def behave(sock: socket.socket) -> None:
        secure = encrypted(server, sock)
        _exactly(secure, 16)
        with socket.socket(fileno=secure.detach()) as raw:
            raw.sendall(b"\x17\x03\x03\0\x20" + bytes(32))
            until_left(raw)

    with scripted(folder, behave) as uri, pytest.raises(NbdTlsError, match="TLS failed"):
        look(uri)


@both_doors
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_versions_of_tls(look: Look, folder: Path, server: Path, version: ssl.TLSVersion) -> None:
    def behave(sock: socket.socket) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(server / "server-cert.pem", server / "server-key.pem")
        context.minimum_version = context.maximum_version = version
        with context.wrap_socket(sock, server_side=True) as secure:
            haggle(secure)

    with scripted(folder, behave) as uri:
        assert look(uri).tls


# What is read from files.


@both_doors
@pytest.mark.parametrize(
    ("tls", "match"),
    [
        (Tls(hostname="h", ca_file="/nonexistent"), "No such file"),
        (Tls(hostname="h", certificates="/nonexistent"), "No such file"),
        (Tls(hostname="h", ca_file="/dev/null"), "no certificate"),
        (Tls(verify=False, certificate_file="/dev/null"), "/dev/null"),
    ],
)
def test_certificates_that_cannot_be_used(look: Look, folder: Path, tls: Tls, match: str) -> None:
    with scripted(folder, until_left) as uri, pytest.raises(NbdTlsError, match=match):
        look(NbdUri.unix(uri.path), tls)


@pytest.mark.parametrize("verify", [True, False])
def test_the_authorities_of_the_system_are_read_only_to_verify(verify: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[bool] = []
    monkeypatch.setattr(ssl.SSLContext, "load_default_certs", lambda *_: read.append(True))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        TlsSocket(ours, Tls(hostname="h", verify=verify), "here")
    assert bool(read) == verify


@both_doors
def test_a_folder_needs_the_key_to_its_certificate(look: Look, folder: Path, authority: Authority) -> None:
    mine = authority.client(f"keyless-{look.__name__}")
    (mine / "client-key.pem").unlink()
    with scripted(folder, until_left) as uri, pytest.raises(NbdTlsError, match="No such file"):
        look(NbdUri.unix(uri.path), Tls(hostname="h", certificates=str(mine)))


@both_doors
@pytest.mark.parametrize(
    ("text", "username", "match"),
    [
        ("", "", "0 shared secrets"),
        ("a:00\nb:00\n", "", "2 shared secrets"),
        ("# a:00\na:00\n", "b", "no shared secret of 'b'"),
        ("a:xyz\n", "", "hexadecimal"),
        ("a:\n", "", "hexadecimal"),
        ("a:" + "0" * (1 << 20), "", "more than"),
    ],
)
def test_secrets_that_cannot_be_used(look: Look, folder: Path, text: str, username: str, match: str) -> None:
    (folder / "keys").write_text(text)
    tls = Tls(psk_file=f"{folder}/keys", username=username)
    with scripted(folder, until_left) as uri:
        expected: tuple[type[QmpnbdError], str] = (NbdTlsError, match) if HAS_PSK else (NbdUnsupportedError, "3.13")
        with pytest.raises(expected[0], match=expected[1]) as caught:
            look(NbdUri.unix(uri.path), tls)
    assert "xyz" not in str(caught.value), "secrets stay out of messages"


# The socket by itself.


def test_much_in_both_directions_at_once(server: Path) -> None:
    """A peer that answers all it gets: nothing is lost or swapped however full the buffers are."""
    ours, theirs = socket.socketpair()
    size = 8 << 20

    def echo() -> None:
        with encrypted(server, theirs) as secure:
            left = size
            while left:
                data = secure.recv(100_000)
                secure.sendall(data)
                left -= len(data)

    thread = threading.Thread(target=echo, daemon=True)
    thread.start()
    ours.setblocking(False)
    channel = Channel(ours, "here")
    secure = channel.start_tls(Tls(verify=False))
    while (events := secure.shake()) is not None:
        _ready(secure, events)
    data = bytes(range(251)) * (size // 251 + 1)
    pieces = [data[:10], data[10:300_000], data[300_000:300_001], data[300_001 : size - 7], data[size - 7 : size]]
    channel.push(*pieces)
    wanted = Receive(size, "the echo")
    while not (done := channel.receive(wanted)) or not channel.flush():
        if not done:
            flushed = channel.flush()
            _ready(secure, select.POLLIN if flushed else select.POLLIN | select.POLLOUT)
    assert channel.take() == data[:size]
    assert (channel.sent, channel.received) == (size, size)
    thread.join(5)
    channel.close()
    assert secure.fileno() == -1


def _ready(secure: TlsSocket, events: int) -> None:
    poll = select.poll()
    poll.register(secure, events)
    assert poll.poll(1000 * LONG)
