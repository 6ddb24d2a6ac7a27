"""What is wanted of TLS: parameters as values; nothing here opens a file or a socket.

::

    Tls()                                 the server's certificate must come from an authority the system trusts
    Tls(certificates="/etc/pki/libnbd")   ca-cert.pem, client-cert.pem, client-key.pem, as QEMU and libnbd lay them out
    Tls(psk_file="keys.psk")              a secret shared with the server instead of certificates

TLS that is wanted is never done without: a server that refuses it, or is too old for it, is an error
("TLS support", "Client-side requirements" of doc/proto.md).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from qmpnbd.errors import UsageError


@dataclass(frozen=True, slots=True)
class Tls:
    """How to agree on TLS. What is empty is not set.

    Attributes:
        kind: how the peers prove who they are; if not set, "psk" where there is a `psk_file` and "x509" otherwise.
        certificates: folder with ca-cert.pem and, where the server asks who we are, client-cert.pem and
            client-key.pem; ca-crl.pem is heeded if it is there.
        ca_file: certificates of the authorities to trust, in place of the system's.
        certificate_file: our own certificate, with the chain that leads to the authority.
        key_file: the key to it, if it is not in the same file.
        hostname: the name that the server's certificate must bear; without it the host that is connected to.
        verify: whether the server must prove who it is; if not set, it must.
        psk_file: lines of ``USERNAME:HEXKEY``, as psktool of GnuTLS writes them.
        username: which line of `psk_file`; may be left out where it has only one.

    Raises:
        UsageError: parts that do not go together.
    """

    kind: Literal["", "x509", "psk"] = ""
    certificates: str = ""
    ca_file: str = ""
    certificate_file: str = ""
    key_file: str = ""
    hostname: str = ""
    verify: bool | None = None
    psk_file: str = ""
    username: str = ""

    def __post_init__(self) -> None:
        where = "TLS"
        if self.kind not in ("", "x509", "psk"):
            raise UsageError(f"{self.kind!r} is no kind of TLS: x509 or psk", where=where)
        files = (self.ca_file, self.certificate_file, self.key_file)
        if any("\0" in str(getattr(self, each.name)) for each in fields(self)):
            raise UsageError("a file or a name with a NUL", where=where)
        if self.certificates and any(files):
            raise UsageError("certificates as a folder and as single files", where=where)
        if self.key_file and not self.certificate_file:
            raise UsageError("a key without its certificate", where=where)
        if self.kind == "x509" and (self.psk_file or self.username):
            raise UsageError("x509 has no user name and no file of shared secrets", where=where)
        if self.kind == "psk" or self.psk_file:
            if self.certificates or any(files):
                raise UsageError("either certificates or a shared secret", where=where)
            if self.verify is False:
                raise UsageError("a shared secret always proves who the server is", where=where)

    @property
    def psk(self) -> bool:
        """Whether a shared secret is used and not certificates."""
        return self.kind == "psk" or bool(self.psk_file)

    @property
    def verified(self) -> bool:
        """Whether the server must prove who it is."""
        return self.verify is not False

    @property
    def local_files(self) -> bool:
        """Whether a file of this machine is named."""
        return any((self.certificates, self.ca_file, self.certificate_file, self.key_file, self.psk_file))

    def over(self, other: Tls) -> Tls:
        """Returns these parameters, completed by those of `other` where nothing is set here.

        Raises:
            UsageError: together they make no sense.
        """
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        return Tls(**{name: getattr(other, name) if value in ("", None) else value for name, value in own.items()})

    def for_host(self, host: str, where: str) -> Tls:
        """Returns what TLS with `host` needs: the host name it is to be verified by, and whatever kind it is.

        Args:
            host: name or address connected to; empty for a UNIX socket.
            where: the server, for messages.

        Raises:
            UsageError: something is missing.
        """
        if self.psk:
            if not self.psk_file:
                raise UsageError(
                    "TLS with a shared secret needs a file of secrets", where=where, remedy="Name it (tls-psk-file)."
                )
            return self
        name = self.hostname or host.partition("%")[0]  # a scope ("fe80::1%eth0") means nothing to the other side
        if not name and self.verified:
            raise UsageError(
                "TLS over a UNIX socket, and no name to verify the server by",
                where=where,
                remedy="Give the name in its certificate (tls-hostname), or switch verification off.",
            )
        return Tls(hostname=name).over(self)
