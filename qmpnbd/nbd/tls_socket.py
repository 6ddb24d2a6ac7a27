"""TLS over a non-blocking socket, which looks like such a socket itself.

::

                 send, sendmsg                        socket
    Channel  ------------------->  encrypt  -------------------->
             <-------------------  decrypt  <--------------------
                   recv_into

OpenSSL works on two buffers in memory and never sees the socket, so both doors can use it and waiting stays theirs:
where the kernel has no room or no bytes, BlockingIOError is raised as a socket would. As with OpenSSL's own calls, a
`send` that raised it is to be repeated with the same data, perhaps with more behind it; a part of it is encrypted
already.
"""

from __future__ import annotations

import select
import socket
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from qmpnbd.errors import NbdTlsError, NbdUnsupportedError
from qmpnbd.nbd.tls import Tls
from qmpnbd.nbd.wire import Buffer, printable

_PIECE: Final = 256 * 1024
"""Bytes encrypted or received at a time: sixteen TLS records, some of the socket's own buffer."""

_FILLS: Final = 16
"""Pieces received in a row without a byte for the caller, such as new session tickets; then the clock is looked at."""

MAX_SECRETS: Final = 1024 * 1024
"""Bytes of a file of shared secrets; ten thousand users."""


class TlsSocket:
    """A socket that encrypts. Call `shake` until it returns None before anything else.

    Args:
        sock: connected, never blocking; belongs to this one from now on.
        tls: how, complete.
        where: the server, for messages.

    Raises:
        NbdTlsError: certificates or secrets cannot be read.
        NbdUnsupportedError: this Python has no TLS with shared secrets.
    """

    def __init__(self, sock: socket.socket, tls: Tls, where: str) -> None:
        self._sock = sock
        self._where = where
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._ciphertext = memoryview(b"")  # encrypted, not yet taken by the kernel
        self._booked = 0  # bytes of the caller's data that are in there
        self._buffer = memoryview(bytearray(_PIECE))
        name = None if tls.psk else tls.hostname or None
        try:
            self._tls = _context(tls, where).wrap_bio(self._incoming, self._outgoing, server_hostname=name)
        except ValueError as error:  # a host name that cannot be one
            raise NbdTlsError(f"cannot verify a server by the name {tls.hostname!r} ({error})", where=where) from error

    def shake(self) -> int | None:
        """Goes on with the TLS handshake; what to wait for (POLLIN or POLLOUT), or None if it is done.

        Raises:
            NbdTlsError: it failed, or the server is not who it should be.
        """
        try:
            while True:
                done = self._shaken()
                if not self._flush():
                    return select.POLLOUT
                if done:
                    return None
                try:
                    self._fill()
                except BlockingIOError:
                    return select.POLLIN
        except ssl.SSLError as error:
            self._say_why()
            raise _failed(error, self._where) from error
        except OSError as error:
            raise NbdTlsError(
                f"the connection broke during the TLS handshake ({error.strerror or error})", where=self._where
            ) from error

    def send(self, data: Buffer) -> int:
        """Encrypts and sends some of `data`; how many bytes of it.

        Raises:
            BlockingIOError: there is no room; to be repeated.
            OSError: the connection broke.
        """
        if not self._booked:
            self._booked = self._tls.write(memoryview(data)[:_PIECE])
        if not self._flush():
            raise BlockingIOError
        sent, self._booked = self._booked, 0
        return sent

    def sendmsg(self, buffers: Sequence[Buffer]) -> int:
        """The same for the beginning of several pieces; small ones leave together."""
        if len(buffers[0]) >= _PIECE or self._booked:
            return self.send(buffers[0])
        joined = bytearray()
        for piece in buffers:
            joined += memoryview(piece)[: _PIECE - len(joined)]
            if len(joined) == _PIECE:
                break
        return self.send(joined)

    def recv_into(self, buffer: memoryview) -> int:
        """Receives and decrypts what is there, up to the size of `buffer`; 0 at the end of the stream.

        Raises:
            BlockingIOError: nothing is there.
            NbdTlsError: what came is not what was sent, or the server does not accept us after all.
            OSError: the connection broke.
        """
        got = fills = 0
        try:
            while got < len(buffer):
                try:
                    more = self._read(buffer[got:])
                except ssl.SSLWantReadError:
                    if got:
                        break
                    if (fills := fills + 1) > _FILLS:
                        raise BlockingIOError from None
                    self._flush()  # an answer to what was read, such as a change of keys
                    self._fill()
                    continue
                if not more:
                    break
                got += more
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            # With a farewell or without: NBD tells by itself whether something is missing.
            return got
        except ssl.SSLError as error:
            if got:
                return got  # it will fail again at the next call
            raise _failed(error, self._where) from error
        return got

    def recvmsg_into(self, buffers: Sequence[memoryview]) -> tuple[int]:
        """The same for the first of several buffers."""
        return (self.recv_into(buffers[0]),)

    def fileno(self) -> int:
        """Returns the socket's number, -1 when it is closed."""
        return self._sock.fileno()

    def shutdown(self, how: int) -> None:
        """Ends the conversation, so that whoever waits for the socket learns of it."""
        self._sock.shutdown(how)

    def close(self) -> None:
        """Closes the socket. Without a farewell of TLS: NBD has taken leave by itself, and nobody waits for another."""
        self._sock.close()

    def _read(self, buffer: memoryview) -> int:
        # With a buffer it returns how much came; the type stubs do not know that.
        count: object = self._tls.read(len(buffer), buffer)  # type: ignore[arg-type,unused-ignore]
        return count if isinstance(count, int) else 0

    def _shaken(self) -> bool:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    def _fill(self) -> None:
        """Receives what is there."""
        count = self._sock.recv_into(self._buffer)
        if count:
            self._incoming.write(self._buffer[:count])
        else:
            self._incoming.write_eof()

    def _flush(self) -> bool:
        """Sends what is encrypted, as far as the kernel takes it; whether nothing is left."""
        while True:
            if not self._ciphertext:
                self._ciphertext = memoryview(self._outgoing.read())
                if not self._ciphertext:
                    return True
            try:
                self._ciphertext = self._ciphertext[self._sock.send(self._ciphertext) :]
            except BlockingIOError:
                return False

    def _say_why(self) -> None:
        """Lets the server know what we did not like, if there is room for it."""
        try:
            self._flush()
        except OSError:
            return


def _context(tls: Tls, where: str) -> ssl.SSLContext:
    """Makes OpenSSL's view of the parameters."""
    try:
        context = _shared_secret(tls, where) if tls.psk else _certificates(tls)
    except OSError as error:  # ssl.SSLError is one, too
        raise NbdTlsError(
            f"cannot use the certificates or secrets of {_files(tls)}: {_reason(error)}", where=where
        ) from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    return context


def _certificates(tls: Tls) -> ssl.SSLContext:
    """Makes a context for certificates, our own included."""
    certificate, key = tls.certificate_file, tls.key_file
    if tls.certificates:
        own, its_key = Path(tls.certificates, "client-cert.pem"), Path(tls.certificates, "client-key.pem")
        if own.exists() or its_key.exists():
            certificate, key = str(own), str(its_key)
    if tls.verified:
        context = _verifying(tls)
    else:
        # `create_default_context` would read all authorities of the system, which takes 65 ms and is of no use here.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if certificate:
        # Without a password OpenSSL would ask for one on the terminal.
        context.load_cert_chain(certificate, key or None, password=lambda: b"")
    return context


def _verifying(tls: Tls) -> ssl.SSLContext:
    """Makes a context that has servers prove who they are, to the authorities named or else to the system's."""
    ca = str(Path(tls.certificates, "ca-cert.pem")) if tls.certificates else tls.ca_file
    context = ssl.create_default_context(cafile=ca or None)
    if tls.certificates and (revoked := Path(tls.certificates, "ca-crl.pem")).exists():
        context.load_verify_locations(revoked)
        context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
    return context


def _shared_secret(tls: Tls, where: str) -> ssl.SSLContext:
    """Makes a context for a shared secret."""
    if not getattr(ssl, "HAS_PSK", False):
        raise NbdUnsupportedError(
            "this Python has no TLS with shared secrets (PSK)", where=where, remedy="Use Python 3.13, or certificates."
        )
    user, secret = _secret(tls)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # A server that answers with a certificate instead has not proven that it knows the secret. No certificate can
    # pass, because there is no authority to trust; names are only in certificates.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_ciphers("kECDHEPSK:kDHEPSK")
    context.set_psk_client_callback(lambda _: (user, secret))  # type: ignore[attr-defined,unused-ignore]  # 3.13
    return context


def _secret(tls: Tls) -> tuple[str, bytes]:
    """Reads user name and secret (the format of psktool: lines of ``USERNAME:HEXKEY``)."""
    with Path(tls.psk_file).open("rb") as file:
        lines = file.read(MAX_SECRETS + 1)
    if len(lines) > MAX_SECRETS:
        raise NbdTlsError(f"more than {MAX_SECRETS} bytes of shared secrets", where=tls.psk_file)
    found: dict[str, str] = {}
    for line in lines.decode("utf-8", "surrogateescape").splitlines():
        name, _, key = line.rpartition(":")
        if name and not line.startswith("#"):
            found.setdefault(name, key.strip())
    if not tls.username and len(found) != 1:
        raise NbdTlsError(
            f"{len(found)} shared secrets to choose from", where=tls.psk_file, remedy="Give a user name (tls-username)."
        )
    name = tls.username or next(iter(found))
    if name not in found:
        raise NbdTlsError(f"no shared secret of {name!r}", where=tls.psk_file)
    try:
        secret = bytes.fromhex(found[name])
    except ValueError:
        secret = b""
    if not secret:
        # The text itself stays out of the message.
        raise NbdTlsError(f"the shared secret of {name!r} is not written in hexadecimal", where=tls.psk_file)
    return name, secret


def _files(tls: Tls) -> str:
    named = (tls.certificates, tls.ca_file, tls.certificate_file, tls.key_file, tls.psk_file)
    return ", ".join(name for name in named if name) or "the system"


def _reason(error: OSError) -> str:
    """Returns what went wrong in words, without the place in OpenSSL's source."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.lower().replace("_", " ")
    return error.strerror or str(error)


def _failed(error: ssl.SSLError, where: str) -> NbdTlsError:
    """Makes the error for TLS that fails."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return NbdTlsError(
            f"the server is not who it should be: {printable(error.verify_message.encode())}",
            where=where,
            remedy="Trust its authority (tls-certificates), or tell its name (tls-hostname), if it is the right one.",
        )
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return NbdTlsError(
            "the server ended the connection during the TLS handshake",
            where=where,
            remedy="It may want to know who we are: give it a client certificate. Its log says more.",
        )
    return NbdTlsError(f"TLS failed: {_reason(error)}", where=where, remedy="The log of the server may say more.")
