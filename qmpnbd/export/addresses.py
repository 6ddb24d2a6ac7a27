"""NBD URIs of what QEMU's server offers; pure."""

from __future__ import annotations

from qmpnbd.errors import UsageError
from qmpnbd.nbd.tls import Tls
from qmpnbd.nbd.uri import NbdUri
from qmpnbd.qmp.address import TcpAddress, UnixAddress
from qmpnbd.qmp.credentials import ServerTls

_EVERYWHERE = frozenset({"", "0.0.0.0", "::"})  # noqa: S104 - what clients cannot connect to


def server_uri(listens: UnixAddress | TcpAddress, tls: ServerTls | None, host_name: str) -> NbdUri:
    """Returns the URI of a server, without an export.

    Args:
        listens: where it listens.
        tls: its TLS. What a client needs besides (its certificates, its secret) is not in the URI: it is the client's.
        host_name: this host's, for a server that listens on all its addresses.
    """
    client = None if tls is None else Tls(kind="psk" if tls.kind == "psk" else "")
    if isinstance(listens, UnixAddress):
        return NbdUri.unix(listens.path, tls=client)
    host = host_name if listens.host in _EVERYWHERE else listens.host
    return NbdUri.tcp(host, listens.port, tls=client)


def shared_server(uri: str) -> NbdUri:
    """Reads the URI of a server that runs already.

    Raises:
        UsageError: it is none, or names an export.
    """
    parsed = NbdUri.parse(uri)
    if parsed.export:
        raise UsageError(
            "the URI of the server names an export",
            where=uri,
            remedy="Leave its name out: exports of our own are made.",
        )
    return parsed
