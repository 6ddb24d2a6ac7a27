"""What a server says of an export, judged before it is believed.

The same facts come in four ways: an oldstyle greeting, the reply to EXPORT_NAME, and the infos of INFO and of GO. They
pass through the same judgement ("Transmission flags", "Size constraints" of doc/proto.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal, TypeAlias, TypeVar

from qmpnbd.errors import NbdProtocolError, NbdUnsupportedError, UsageError
from qmpnbd.nbd import constants, wire
from qmpnbd.nbd.constants import Info, TransmissionFlag
from qmpnbd.nbd.wire import Received

Replies: TypeAlias = Literal["simple", "structured", "extended"]

_I = TypeVar("_I")


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """What a server tells of an export.

    Attributes:
        name: the export name that was asked for; may be empty, which means the server's default export.
        size: bytes.
        flags: what it can do; bits that nobody here knows are kept.
        minimum_block: bytes; every request begins and ends at a multiple of it.
        preferred_block: bytes; multiples of it are efficient.
        maximum_payload: bytes of data in one request or reply.
        description: the server's words, printable; may be empty.
        canonical: the name the server itself gives the export; empty if it did not tell.
        sizes_told: whether the block sizes are the server's word, and not the specification's defaults.
    """

    name: str
    size: int
    flags: TransmissionFlag
    minimum_block: int = constants.DEFAULT_MINIMUM_BLOCK
    preferred_block: int = constants.DEFAULT_PREFERRED_BLOCK
    maximum_payload: int = constants.DEFAULT_MAXIMUM_PAYLOAD
    description: str = ""
    canonical: str = ""
    sizes_told: bool = False


@dataclass(frozen=True, slots=True)
class Export(ExportInfo):
    """An export as agreed in the handshake; the transmission phase is about it.

    Attributes:
        contexts: the id of each granted metadata context by name. Ids are the server's own choice.
        replies: the form of replies that was agreed: simple, structured, or extended (64-bit headers).
        tls: whether the connection is encrypted.
    """

    contexts: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}), hash=False)
    replies: Replies = "structured"
    tls: bool = False


class InfoCollector:
    """Collects the infos that come in reply to INFO and GO ("Option reply types", NBD_REP_INFO).

    Infos nobody asked for are fine and unknown ones are ignored. "A particular information type SHOULD only appear
    once": of two that differ, neither can be believed.
    """

    def __init__(self, name: str, where: str) -> None:
        self._name = name
        self._where = where
        self._export: wire.InfoExport | None = None
        self._sizes: wire.InfoBlockSize | None = None
        self._texts: dict[int, bytes] = {}

    def take(self, data: Received) -> None:
        """Books one info.

        Raises:
            NbdProtocolError: it cannot be read, or contradicts an earlier one.
        """
        kind = wire.info_type(data)
        if kind is None:
            raise NbdProtocolError("an NBD_REP_INFO without a type", where=self._where)
        if kind == Info.EXPORT:
            self._export = self._once(kind, self._export, wire.InfoExport.unpack(data))
        elif kind == Info.BLOCK_SIZE:
            self._sizes = self._once(kind, self._sizes, wire.InfoBlockSize.unpack(data))
        elif kind in (Info.NAME, Info.DESCRIPTION):
            self._texts[kind] = self._once(kind, self._texts.get(kind), wire.unpack_info_text(data))

    def judged(self, option: str) -> ExportInfo:
        """Returns the export that the infos describe.

        Raises:
            NbdProtocolError: they do not, or what they say cannot be true.
            NbdUnsupportedError: the export cannot be worked with.
        """
        if self._export is None:
            raise NbdProtocolError(f"the server agreed to {option} without describing the export", where=self._where)
        info = judged(self._name, self._export.size, self._export.flags, self._where)
        if self._sizes is not None:
            info = _with_sizes(info, self._sizes, self._where)
        canonical = name_from_wire(self._texts.get(Info.NAME, b""), "the export's name", self._where)
        description = wire.printable(self._texts.get(Info.DESCRIPTION, b""))
        return replace(info, canonical=canonical, description=description)

    def _once(self, kind: int, before: _I | None, now: _I | None) -> _I:
        what = f"NBD_INFO_{Info(kind).name}"
        if now is None:
            raise NbdProtocolError(f"an {what} of the wrong length", where=self._where)
        if before not in (None, now):
            raise NbdProtocolError(f"two {what} that differ: {before!r} and {now!r}", where=self._where)
        return now


def judged(name: str, size: int, flags: int, where: str) -> ExportInfo:
    """Judges size and flags.

    Raises:
        NbdProtocolError: they cannot be true.
        NbdUnsupportedError: too large to work with.
    """
    if not flags & TransmissionFlag.HAS_FLAGS:
        raise NbdProtocolError(f"transmission flags {flags:#06x} without NBD_FLAG_HAS_FLAGS", where=where)
    if size > constants.MAX_EXPORT_SIZE:
        raise NbdUnsupportedError(
            f"an export of {size} bytes, which is more than 2**63 - 1 (some servers mean 'unknown')", where=where
        )
    return ExportInfo(name, size, TransmissionFlag(flags))


def _with_sizes(info: ExportInfo, sizes: wire.InfoBlockSize, where: str) -> ExportInfo:
    """Judges block sizes ("Size constraints")."""
    minimum, preferred, maximum = sizes.minimum, sizes.preferred, sizes.maximum
    if minimum.bit_count() != 1 or minimum > constants.MAX_MINIMUM_BLOCK:
        raise NbdProtocolError(f"a minimum block size of {minimum}, not a power of two up to 65536", where=where)
    if preferred.bit_count() != 1 or preferred < max(minimum, 512):
        raise NbdProtocolError(
            f"a preferred block size of {preferred}, not a power of two of at least {max(minimum, 512)}", where=where
        )
    if maximum < preferred:
        raise NbdProtocolError(f"a maximum payload of {maximum}, less than the preferred {preferred}", where=where)
    if info.size % minimum:
        raise NbdUnsupportedError(
            f"an export of {info.size} bytes in blocks of {minimum}: its last bytes cannot be asked for", where=where
        )
    return replace(info, minimum_block=minimum, preferred_block=preferred, maximum_payload=maximum, sizes_told=True)


def name_to_wire(what: str, text: str, where: str) -> bytes:
    """Returns a name as it may go over the wire ("Conventions").

    Raises:
        UsageError: it may not.
    """
    try:
        # A name that a server told (`name_from_wire`) goes back to it byte for byte.
        encoded = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise UsageError(f"{what} {text!r} is not valid Unicode", where=where) from error
    if b"\0" in encoded:
        raise UsageError(f"{what} {text!r} contains a NUL", where=where)
    if len(encoded) > constants.MAX_STRING:
        raise UsageError(f"{what} has {len(encoded)} bytes, more than {constants.MAX_STRING}", where=where)
    return encoded


def name_from_wire(name: bytes, what: str, where: str) -> str:
    """Returns a name that a server told; bytes that are no UTF-8 become lone surrogates, as in Python's file names.

    Raises:
        NbdProtocolError: it has a NUL, or is longer than any name.
    """
    if b"\0" in name or len(name) > constants.MAX_STRING:
        raise NbdProtocolError(f"{what} has a NUL, or {len(name)} bytes are too many", where=where)
    return name.decode("utf-8", "surrogateescape")
