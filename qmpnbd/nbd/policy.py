"""What may be used of a URI, decided before anything is opened.

A URI can come from somebody else: a configuration, a ticket, another program. It may name a file of this machine (whose
presence or content would leak into messages), or ask for less protection than its reader wants.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qmpnbd.errors import UsageError
from qmpnbd.nbd.tls import Tls
from qmpnbd.nbd.uri import NbdUri


@dataclass(frozen=True, slots=True)
class UriPolicy:
    """What a URI may ask for. What is not said in the URI but by the caller (`tls=`) is not concerned.

    Attributes:
        transports: the ways to a server.
        tls: "allow" both, "require" it, or "forbid" it.
        unverified: whether a URI may say that the server need not prove who it is.
        local_files: whether a URI may name certificates and secrets; the path of a UNIX socket does not count.
    """

    transports: frozenset[str] = frozenset({"unix", "tcp"})
    tls: Literal["allow", "require", "forbid"] = "allow"
    unverified: bool = True
    local_files: bool = False

    def check(self, uri: NbdUri) -> None:
        """Returns if all that a URI asks for is allowed.

        Raises:
            UsageError: something is not.
        """
        where = str(uri)
        if uri.transport not in self.transports:
            raise UsageError(f"a URI may not use {uri.transport} here", where=where)
        if uri.tls is None:
            return
        if self.tls == "forbid":
            raise UsageError("a URI may not use TLS here", where=where)
        if uri.tls.local_files and not self.local_files:
            raise UsageError(
                "a URI may not name files of this machine here (tls-certificates, tls-psk-file)",
                where=where,
                remedy="Name them apart from the URI (--tls-certificates DIR, --tls-psk-file FILE, Tls(...)).",
            )
        if not uri.tls.verified and not self.unverified:
            raise UsageError("a URI may not switch off verification here", where=where)


def admitted(uri: str | NbdUri, tls: Tls | None = None, policy: UriPolicy | None = None) -> tuple[NbdUri, Tls | None]:
    """Reads a URI, holds it against a policy, and completes the caller's TLS parameters by those of the URI.

    Args:
        uri: where the export is.
        tls: parameters of the caller. If there are any, TLS is used even if the URI does not ask for it.
        policy: what the URI may ask for; the default is everything but files of this machine.

    Returns:
        The URI, and how to encrypt: complete, or None for not at all.

    Raises:
        UsageError: the URI cannot be read, asks for what is not allowed, or does not fit `tls`.
        NbdUnsupportedError: it demands a kind of TLS that is not supported.
    """
    parsed = NbdUri.parse(uri) if isinstance(uri, str) else uri
    policy = policy or UriPolicy()
    policy.check(parsed)
    if tls is None and parsed.tls is None:
        if policy.tls == "require":
            raise UsageError("TLS is required here", where=str(parsed), remedy="Use nbds:// or nbds+unix://.")
        return parsed, None
    wanted = (tls or Tls()).over(parsed.tls or Tls())
    return parsed, wanted.for_host(parsed.host, str(parsed))
