"""NBD URIs, as doc/uri.md of the NBD project defines them.

::

    nbd://example.com:10809/export             TCP; the port may be left out
    nbd+unix:///export?socket=/run/nbd.sock    UNIX socket; %00name for an abstract one
    nbds://..., nbds+unix://...                the same with TLS, recognised but not supported yet

The export name is the path without exactly one leading slash, percent-decoded.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Final, Literal
from urllib.parse import quote, unquote_to_bytes

from qmpnbd.errors import NbdUnsupportedError, UsageError
from qmpnbd.nbd.constants import DEFAULT_PORT, MAX_STRING

_SCHEMES: Final = {"nbd": "tcp", "nbd+unix": "unix"}
_TLS_SCHEMES: Final = {"nbds", "nbds+unix"}

# RFC 3986, appendix B. urllib.parse.urlsplit would silently drop tabs and line ends.
_PARTS: Final = re.compile(r"([^:/?#]+):(?://([^/?#]*))?([^?#]*)(?:\?([^#]*))?(#.*)?", re.DOTALL)
_AUTHORITY: Final = re.compile(r"(?:(.*)@)?(\[[^\[\]]*\]|[^\[\]:]*)(?::([0-9]{0,8}))?", re.DOTALL)
_BAD_PERCENT: Final = re.compile(r"%(?![0-9A-Fa-f]{2})")
_NOT_IN_A_URI: Final = re.compile(r"[^!-~]")


@dataclass(frozen=True, slots=True)
class NbdUri:
    """Where an export is.

    Attributes:
        transport: over what.
        path: of the UNIX socket; begins with NUL for an abstract one. Empty for TCP.
        host: name or address, without brackets. Empty for a UNIX socket.
        port: 0 for a UNIX socket.
        export: the export name; may be empty.

    Raises:
        UsageError: parts that do not go together, or cannot be sent.
    """

    transport: Literal["unix", "tcp"]
    path: str = ""
    host: str = ""
    port: int = 0
    export: str = ""

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

    @classmethod
    def unix(cls, path: str, export: str = "") -> NbdUri:
        """Makes the address of an export behind a UNIX socket."""
        return cls("unix", path=path, export=export)

    @classmethod
    def tcp(cls, host: str, port: int = DEFAULT_PORT, export: str = "") -> NbdUri:
        """Makes the address of an export behind a TCP port."""
        return cls("tcp", host=host, port=port, export=export)

    @classmethod
    def parse(cls, text: str) -> NbdUri:
        """Reads a URI.

        Raises:
            UsageError: it is not an NBD URI, or says something that is not understood here.
            NbdUnsupportedError: it demands TLS.
        """
        if len(text) > 4 * MAX_STRING:
            raise UsageError(f"{len(text)} characters are too many", where="NBD URI")
        if (bad := _NOT_IN_A_URI.search(text)) is not None:
            raise UsageError(f"{bad.group()!r} must be percent-encoded", where=_shown(text))
        if (bad := _BAD_PERCENT.search(text)) is not None:
            raise UsageError(f"a % that encodes nothing, at character {bad.start()}", where=_shown(text))
        parts = _PARTS.fullmatch(text)
        scheme = "" if parts is None else parts[1].lower()
        if scheme in _TLS_SCHEMES:
            raise NbdUnsupportedError(
                "TLS is not supported yet", where=_shown(text), remedy="Use a UNIX socket in a private directory."
            )
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
        if _SCHEMES[scheme] == "unix":
            if parts[2]:
                raise UsageError(f"a UNIX socket has no host ({parts[2]!r}): write nbd+unix:///", where=_shown(text))
            path = parameters.pop("socket", "")
            if not path:
                raise UsageError("nbd+unix needs a parameter ?socket=PATH", where=_shown(text))
            _refuse(parameters, text)
            return cls.unix(_decode(path, "surrogateescape", "socket path", text), export)
        _refuse(parameters, text)
        host, port = _host_and_port(parts[2] or "", text)
        return cls.tcp(host, port, export)

    def __str__(self) -> str:
        """Returns the URI; `parse` makes the same value of it."""
        export = quote(self.export, safe="/")
        if self.transport == "unix":
            return f"nbd+unix:///{export}?socket={quote(self.path, safe='/', errors='surrogateescape')}"
        host = f"[{quote(self.host, safe=':')}]" if ":" in self.host else quote(self.host, safe="")
        port = "" if self.port == DEFAULT_PORT else f":{self.port}"
        return f"nbd://{host}{port}/{export}"


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
        if name == "socket":
            raise UsageError("the parameter socket belongs to nbd+unix", where=_shown(uri))
        raise UsageError(f"the parameter {name!r} is not known", where=_shown(uri))


def _host_and_port(authority: str, uri: str) -> tuple[str, int]:
    """Takes the authority apart (RFC 3986, section 3.2)."""
    match = _AUTHORITY.fullmatch(authority)
    if match is None or not match[2]:
        raise UsageError(f"{authority!r} is not HOST or HOST:PORT", where=_shown(uri))
    if match[1] is not None:
        raise UsageError("a user name means nothing without TLS", where=_shown(uri))
    host = _decode(match[2].strip("[]"), "strict", "host", uri)
    if match[2].startswith("[") and ":" not in host:
        raise UsageError(f"{host!r} is not an IPv6 address", where=_shown(uri))
    return host, int(match[3]) if match[3] else DEFAULT_PORT
