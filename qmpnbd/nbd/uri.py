"""NBD URIs, as doc/uri.md of the NBD project defines them, and QEMU's older forms.

::

    nbd://example.com:10809/export             TCP; the port may be left out
    nbd+unix:///export?socket=/run/nbd.sock    UNIX socket; %00name for an abstract one
    nbds://..., nbds+unix://...                the same with TLS, or not at all
        tls-type=x509|psk  tls-hostname=NAME  tls-verify-peer=0|1      what the document defines
        tls-certificates=DIR  tls-psk-file=FILE  tls-username=NAME     what libnbd has besides

    nbd:HOST:PORT[:exportname=NAME]            QEMU's of old, taken literally: nothing in them is encoded
    nbd:unix:PATH[:exportname=NAME]

The export name is the path without exactly one leading slash, percent-decoded. What may be used of a URI that somebody
else wrote is for `qmpnbd.nbd.policy` to say.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Final, Literal, cast
from urllib.parse import quote, unquote_to_bytes

from qmpnbd.errors import NbdUnsupportedError, UsageError
from qmpnbd.nbd.constants import DEFAULT_PORT, MAX_STRING
from qmpnbd.nbd.tls import Tls

_SCHEMES: Final = {"nbd": "tcp", "nbd+tcp": "tcp", "nbd+unix": "unix", "nbds": "tcp", "nbds+unix": "unix"}

# RFC 3986, appendix B. urllib.parse.urlsplit would silently drop tabs and line ends.
_PARTS: Final = re.compile(r"([^:/?#]+):(?://([^/?#]*))?([^?#]*)(?:\?([^#]*))?(#.*)?", re.DOTALL)
_AUTHORITY: Final = re.compile(r"(?:(.*)@)?(\[[^\[\]]*\]|[^\[\]:]*)(?::([0-9]{0,8}))?", re.DOTALL)
_LEGACY: Final = re.compile(
    r"nbd:(?!/)(?:unix:(?P<path>.*?)|(?P<address>.*?))(?::exportname=(?P<export>.*))?", re.DOTALL | re.IGNORECASE
)
_BAD_PERCENT: Final = re.compile(r"%(?![0-9A-Fa-f]{2})")
_NOT_IN_A_URI: Final = re.compile(r"[^!-~]")

_TLS_PARAMETERS: Final = (
    "tls-type",
    "tls-hostname",
    "tls-verify-peer",
    "tls-certificates",
    "tls-username",
    "tls-psk-file",
)
_TLS_TEXTS: Final = ("tls-hostname", "tls-certificates", "tls-username", "tls-psk-file")


@dataclass(frozen=True, slots=True)
class NbdUri:
    """Where an export is.

    Attributes:
        transport: over what.
        path: of the UNIX socket; begins with NUL for an abstract one. Empty for TCP.
        host: name or address, without brackets. Empty for a UNIX socket.
        port: 0 for a UNIX socket.
        export: the export name; may be empty.
        tls: how to encrypt; None for not at all.

    Raises:
        UsageError: parts that do not go together, or cannot be sent.
    """

    transport: Literal["unix", "tcp"]
    path: str = ""
    host: str = ""
    port: int = 0
    export: str = ""
    tls: Tls | None = None

    def __post_init__(self) -> None:
        where = "NBD URI"
        if self.transport == "unix":
            if self.path in ("", "\0") or self.host or self.port:
                raise UsageError("a UNIX socket has a path, and neither host nor port", where=where)
            if "\0" in self.path[1:]:
                raise UsageError(f"the socket path {self.path!r} contains a NUL", where=where)
        else:
            if not self.host or self.path:
                raise UsageError("TCP needs a host, and has no socket path", where=where)
            if not self.host.isprintable() or " " in self.host:
                raise UsageError(f"{self.host!r} is not a host", where=where)
            if ":" in self.host:
                _check_ipv6(self.host)
            if not 1 <= self.port <= 65535:
                raise UsageError(f"{self.port} is not a port", where=where)
        if "\0" in self.export:
            raise UsageError(f"the export name {self.export!r} contains a NUL", where=where)
        _encode(self.export, "strict", "export name")
        _encode(self.path, "surrogateescape", "socket path")
        _encode(self.host, "strict", "host")
        if self.tls is not None:
            if self.tls.ca_file or self.tls.certificate_file:
                raise UsageError("a URI names certificates as a folder, not as single files", where=where)
            for text in (self.tls.certificates, self.tls.psk_file, self.tls.hostname, self.tls.username):
                _encode(text, "surrogateescape", "TLS parameter")

    @classmethod
    def unix(cls, path: str, export: str = "", tls: Tls | None = None) -> NbdUri:
        """Makes the address of an export behind a UNIX socket."""
        return cls("unix", path=path, export=export, tls=tls)

    @classmethod
    def tcp(cls, host: str, port: int = DEFAULT_PORT, export: str = "", tls: Tls | None = None) -> NbdUri:
        """Makes the address of an export behind a TCP port."""
        return cls("tcp", host=host, port=port, export=export, tls=tls)

    @classmethod
    def parse(cls, text: str) -> NbdUri:
        """Reads a URI.

        Raises:
            UsageError: it is not an NBD URI, or says something that is not understood here.
            NbdUnsupportedError: it demands a kind of TLS that Python does not have.
        """
        if len(text) > 4 * MAX_STRING:
            raise UsageError(f"{len(text)} characters are too many", where="NBD URI")
        if (legacy := _LEGACY.fullmatch(text)) is not None:
            return _legacy(legacy)
        if (bad := _NOT_IN_A_URI.search(text)) is not None:
            raise UsageError(f"{bad.group()!r} must be percent-encoded", where=_shown(text))
        if (bad := _BAD_PERCENT.search(text)) is not None:
            raise UsageError(f"a % that encodes nothing, at character {bad.start()}", where=_shown(text))
        parts = _PARTS.fullmatch(text)
        scheme = "" if parts is None else parts[1].lower()
        if parts is None or scheme not in _SCHEMES:
            raise UsageError(
                "not an NBD URI",
                where=_shown(text),
                remedy="It begins with nbd:// or nbd+unix://, as in nbd+unix:///export?socket=/run/nbd.sock.",
            )
        if parts[5] is not None:
            raise UsageError("an NBD URI has no fragment (#)", where=_shown(text))
        export = _decode(parts[3].removeprefix("/"), "strict", "export name", text)
        parameters = _parameters(parts[4], text)
        user, host, port = _authority(parts[2] or "", text)
        path = parameters.pop("socket", None)
        tls = _tls(user, parameters, text) if scheme.startswith("nbds") else None
        _refuse(parameters, text)
        if user is not None and tls is None:
            raise UsageError("a user name means nothing without TLS", where=_shown(text))
        if _SCHEMES[scheme] == "unix":
            if host or port is not None:
                raise UsageError(f"a UNIX socket has no host ({parts[2]!r}): write {scheme}:///", where=_shown(text))
            if not path:
                raise UsageError(f"{scheme} needs a parameter ?socket=PATH", where=_shown(text))
            return cls.unix(_decode(path, "surrogateescape", "socket path", text), export, tls)
        if path is not None:
            raise UsageError("the parameter socket belongs to nbd+unix", where=_shown(text))
        if not host:
            raise UsageError(f"{parts[2] or ''!r} is not HOST or HOST:PORT", where=_shown(text))
        return cls.tcp(host, DEFAULT_PORT if port is None else port, export, tls)

    def __str__(self) -> str:
        """Returns the URI; `parse` makes the same value of it."""
        scheme = "nbd" if self.tls is None else "nbds"
        export = quote(self.export, safe="/")
        parameters = [] if self.tls is None else _tls_parameters(self.tls)
        if self.transport == "unix":
            parameters.insert(0, ("socket", self.path))
            base = f"{scheme}+unix:///{export}"
        else:
            host = f"[{quote(self.host, safe=':')}]" if ":" in self.host else quote(self.host, safe="")
            port = "" if self.port == DEFAULT_PORT else f":{self.port}"
            base = f"{scheme}://{host}{port}/{export}"
        query = "&".join(f"{name}={quote(value, safe='/', errors='surrogateescape')}" for name, value in parameters)
        return f"{base}?{query}" if query else base


def _legacy(match: re.Match[str]) -> NbdUri:
    """Makes a URI of what QEMU understood before there were NBD URIs."""
    text, export = match.group(), match["export"] or ""
    if match["path"] is not None:
        return NbdUri.unix(match["path"], export)
    _, host, port = _authority(match["address"], text)
    if not host or port is None:
        raise UsageError(
            f"{match['address']!r} is not HOST:PORT", where=_shown(text), remedy="An NBD URI begins with nbd://."
        )
    return NbdUri.tcp(host, port, export)


def _tls(user: str | None, parameters: dict[str, str], uri: str) -> Tls:
    """Takes the parameters of TLS out of those of a URI ("NBD URI query parameters related to TLS")."""
    for name in _TLS_PARAMETERS:
        if parameters.get(name) == "":
            raise UsageError(f"the parameter {name} has no value", where=_shown(uri))
    texts = {
        name: _decode(parameters.pop(name, ""), "surrogateescape", f"parameter {name}", uri) for name in _TLS_TEXTS
    }
    kind, verify = parameters.pop("tls-type", ""), parameters.pop("tls-verify-peer", "")
    if kind == "anon":
        raise NbdUnsupportedError(
            "TLS that proves nothing (tls-type=anon) is not supported",
            where=_shown(uri),
            remedy="Use certificates, and tls-verify-peer=0 if nothing must be proven.",
        )
    if kind not in ("", "x509", "psk"):
        raise UsageError(f"tls-type={kind}: neither x509 nor psk", where=_shown(uri))
    if verify not in ("", "0", "1"):
        raise UsageError(f"tls-verify-peer={verify}: neither 0 nor 1", where=_shown(uri))
    username = texts["tls-username"]
    if user is not None and username not in ("", user):
        raise UsageError(f"two user names, {user!r} and {username!r}", where=_shown(uri))
    return Tls(
        kind=cast('Literal["", "x509", "psk"]', kind),
        certificates=texts["tls-certificates"],
        hostname=texts["tls-hostname"],
        verify=None if not verify else verify == "1",
        psk_file=texts["tls-psk-file"],
        username=username or user or "",
    )


def _tls_parameters(tls: Tls) -> list[tuple[str, str]]:
    """Returns what `_tls` makes the same value of."""
    verify = "" if tls.verify is None else str(int(tls.verify))
    values = (tls.kind, tls.hostname, verify, tls.certificates, tls.username, tls.psk_file)
    return [(name, value) for name, value in zip(_TLS_PARAMETERS, values, strict=True) if value]


def is_nbd_uri(text: str) -> bool:
    """Returns whether a text is meant as an NBD URI, and not as the name of a file; it may be a faulty one."""
    scheme, found, _ = text.partition("://")
    return (bool(found) and scheme.lower() in _SCHEMES) or _LEGACY.fullmatch(text) is not None


def _shown(text: str) -> str:
    """Returns the text of a URI so that it can be shown."""
    return text if text.isprintable() else repr(text)


def _check_ipv6(host: str) -> None:
    try:
        ipaddress.IPv6Address(host)
    except ValueError as error:
        raise UsageError(f"{host!r} is not an IPv6 address", where="NBD URI") from error


def _encode(text: str, errors: str, what: str) -> bytes:
    """Returns the bytes of a part, if they can be sent."""
    try:
        encoded = text.encode("utf-8", errors)
    except UnicodeEncodeError as error:
        raise UsageError(f"the {what} {text!r} is not valid Unicode", where="NBD URI") from error
    if len(encoded) > MAX_STRING:
        raise UsageError(f"the {what} has {len(encoded)} bytes, more than {MAX_STRING}", where="NBD URI")
    return encoded


def _decode(text: str, errors: str, what: str, uri: str) -> str:
    """Percent-decodes a part."""
    try:
        return unquote_to_bytes(text).decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise UsageError(f"the {what} {text!r} is not UTF-8", where=_shown(uri)) from error


def _parameters(query: str | None, uri: str) -> dict[str, str]:
    """Returns the parameters, still encoded."""
    parameters: dict[str, str] = {}
    for item in query.split("&") if query else []:
        name, equals, value = item.partition("=")
        if not equals or name in parameters:
            raise UsageError(f"{item!r} has no value, or is there twice", where=_shown(uri))
        parameters[name] = value
    return parameters


def _refuse(parameters: dict[str, str], uri: str) -> None:
    """Refuses what is left of the parameters: one that is not understood may be one that matters."""
    for name in parameters:
        if name in _TLS_PARAMETERS:
            raise UsageError(f"the parameter {name} belongs to nbds and nbds+unix", where=_shown(uri))
        raise UsageError(f"the parameter {name!r} is not known", where=_shown(uri))


def _authority(authority: str, uri: str) -> tuple[str | None, str, int | None]:
    """Returns user, host and port, as far as they are there (RFC 3986, section 3.2)."""
    match = _AUTHORITY.fullmatch(authority)
    if match is None:
        raise UsageError(f"{authority!r} is not HOST or HOST:PORT", where=_shown(uri))
    user = None if match[1] is None else _decode(match[1], "strict", "user name", uri)
    host = _decode(match[2].strip("[]"), "strict", "host", uri)
    if match[2].startswith("[") and ":" not in host:
        raise UsageError(f"{host!r} is not an IPv6 address", where=_shown(uri))
    return user, host, int(match[3]) if match[3] else None
