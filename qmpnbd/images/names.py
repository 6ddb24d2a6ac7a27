"""Backing names: what QEMU makes of the name that an overlay records.

::

    /images/base.qcow2      absolute: as it is
    base.qcow2              beside the overlay: joined to the folder part of the overlay's name, symlinks unresolved
    file:base.qcow2         beside QEMU's working directory, not beside the overlay
    nbd://host/base         any other protocol: not a local file
    json:{"driver": ...}    options of the nodes; file names in it as they are, beside QEMU's working directory

A name has a protocol if the first of ':' and '/' in it is a ':'. The format recorded beside the name overrides the
format in ``json:``. All of it checked against QEMU 7.2, with the names above.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn, TypeAlias

from qmpnbd.errors import BackingNotLocalError, ImageUnsupportedError
from qmpnbd.images.chain import Format
from qmpnbd.printable import printable

Options: TypeAlias = dict[str, object]

READ_FORMATS: tuple[Format, ...] = ("qcow2", "raw", "qed", "vmdk", "vdi", "vpc", "vhdx", "parallels", "luks")
_LOCAL = ("file", "host_device")
_OTHER_FORMATS = ("bochs", "cloop", "dmg", "qcow")
_FILTERS = ("blkdebug", "blkverify", "compress", "copy-before-write", "copy-on-read", "preallocate", "throttle")
_OTHER_NODES = (*_OTHER_FORMATS, *_FILTERS, "blklogwrites", "blkreplay", "quorum", "replication", "snapshot-access")
# Options that change how QEMU reaches a file or caches it, never which bytes the file holds.
_NODE_OPTIONS = ("node-name", "read-only", "auto-read-only", "discard", "detect-zeroes", "force-share")
_CACHE_OPTIONS = ("cache.direct", "cache.no-flush", "cache-size", "l2-cache-size", "cache-clean-interval")
_HARMLESS = {*_NODE_OPTIONS, *_CACHE_OPTIONS, "locking", "aio", "lazy-refcounts", "overlap-check"}
_STRINGS = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
_REMEDY_JSON = "Name the layers yourself, or give the overlay a plain backing name with 'qemu-img rebase -u'."
_REMEDY_LOCAL = "Validate where the file is local, or name the layers yourself."


@dataclass(frozen=True, slots=True)
class Reference:
    """Where the next layer lies, as its overlay says.

    Attributes:
        path: the file.
        format: how to read it; None if nothing says so and QEMU would guess from the content.
        offset: raw only: where the layer starts in the file.
        size: raw only: bytes of the layer; None for the rest of the file.
        is_last: whatever the layer's own header says, the chain ends with it.
    """

    path: str
    format: Format | None
    offset: int = 0
    size: int | None = None
    is_last: bool = False


def resolve(name: str, recorded_format: str, overlay: str, where: str, working_directory: str = "") -> Reference:
    """Resolves the name an overlay records for its backing file.

    Args:
        name: the backing name; not empty.
        recorded_format: the backing format recorded beside it, "" if none is.
        overlay: the path of the overlay, as it was given.
        where: the overlay, for messages.
        working_directory: QEMU's, where names with a protocol and those in ``json:`` are looked for; "" for the
            caller's own.

    Raises:
        BackingNotLocalError: the name needs a protocol other than ``file:``.
        ImageUnsupportedError: a format or a node that is not read here, or options not understood.
    """
    if name.startswith("json:"):
        return _resolve_json(name[5:], recorded_format, where, working_directory)
    backing_format = known_format(recorded_format, where) if recorded_format else None
    protocol = protocol_of(name)
    if protocol in _LOCAL:
        return Reference(posixpath.join(working_directory, name[len(protocol) + 1 :]), backing_format)
    if protocol is not None:
        raise BackingNotLocalError(
            f"its backing file {printable(name)} is not a local file", where=where, remedy=_REMEDY_LOCAL
        )
    return Reference(posixpath.join(posixpath.dirname(overlay), name), backing_format)


def resolve_data_file(name: str, where: str, working_directory: str = "") -> str:
    """Resolves the name an image records for its external data file.

    Unlike a backing name it is never looked for beside the image.

    Args:
        name: as recorded.
        where: the image, for messages.
        working_directory: QEMU's; "" for the caller's own.

    Raises:
        BackingNotLocalError: the name needs a protocol other than ``file:``.
        ImageUnsupportedError: options not understood.
    """
    if name.startswith("json:"):
        return _file_node(_parse(name[5:], where), "", "raw", where, working_directory).path
    protocol = protocol_of(name)
    if protocol is not None and protocol not in _LOCAL:
        what = f"its data file {printable(name)} is not a local file"
        raise BackingNotLocalError(what, where=where, remedy=_REMEDY_LOCAL)
    return posixpath.join(working_directory, name[len(protocol) + 1 :] if protocol else name)


def resolve_extent(name: str, descriptor: str, where: str) -> str:
    """Resolves the name of a file that a vmdk descriptor says holds data: it lies beside the descriptor.

    Args:
        name: as recorded.
        descriptor: the path of the descriptor, as it was given.
        where: the descriptor, for messages.

    Raises:
        BackingNotLocalError: the name has a protocol.
    """
    if protocol_of(name) is not None:
        what = f"its extent {printable(name)} is not a local file"
        raise BackingNotLocalError(what, where=where, remedy=_REMEDY_LOCAL)
    return posixpath.join(posixpath.dirname(descriptor), name)


def known_format(name: str, where: str) -> Format:
    """Returns `name` as one of the formats read here.

    Raises:
        ImageUnsupportedError: it is another one.
    """
    name = "raw" if name in _LOCAL else name  # a protocol's driver in a format's place reads bytes as they are
    for known in READ_FORMATS:
        if name == known:
            return known
    raise ImageUnsupportedError(
        f"the format {printable(name)} is not read here", where=where, remedy=f"{', '.join(READ_FORMATS)} are read."
    )


def protocol_of(name: str) -> str | None:
    """Returns the protocol of a QEMU file name, None for a plain path."""
    before, colon, _ = name.partition(":")
    return before if colon and "/" not in before else None


def _resolve_json(text: str, recorded_format: str, where: str, working_directory: str) -> Reference:
    options = _parse(text, where)
    driver = options.pop("driver", None)
    if driver == "file" and not recorded_format:
        return _file_node(options, "", "raw", where, working_directory)
    file_options = {key[5:]: options.pop(key) for key in list(options) if key.startswith("file.")}
    if recorded_format:
        driver = recorded_format
    if driver is not None and not isinstance(driver, str):
        _refuse(f"driver is {driver!r}", where)
    if driver in _OTHER_NODES:
        raise ImageUnsupportedError(
            f"its backing file is read by QEMU's {driver} driver, which is not known here",
            where=where,
            remedy=_REMEDY_JSON,
        )
    if not file_options and driver not in (*READ_FORMATS, None):
        raise BackingNotLocalError(
            f"its backing file is reached by QEMU's {printable(str(driver))} driver", where=where, remedy=_REMEDY_LOCAL
        )
    layer_format = known_format(driver, where) if driver is not None else None
    reference = _file_node(file_options, "file.", layer_format, where, working_directory)
    is_last = "backing" in options
    if is_last and options.pop("backing") is not None:
        _refuse("it replaces the backing file of the backing file", where)
    offset = _number(options, "offset", where) if layer_format == "raw" else None
    size = _number(options, "size", where) if layer_format == "raw" else None
    _only_harmless(options, where)
    return Reference(reference.path, layer_format, offset or 0, size, is_last)


def _file_node(
    options: Options, prefix: str, layer_format: Format | None, where: str, working_directory: str
) -> Reference:
    driver = options.pop("driver", "file")
    if driver not in _LOCAL:
        if not isinstance(driver, str) or driver in (*_OTHER_NODES, *READ_FORMATS):
            _refuse(f"{prefix}driver is {driver!r}", where)
        raise BackingNotLocalError(
            f"its backing file is reached by QEMU's {printable(driver)} driver", where=where, remedy=_REMEDY_LOCAL
        )
    filename = options.pop("filename", None)
    if not isinstance(filename, str) or not filename:
        _refuse(f"{prefix}filename is missing or no string", where)
    _only_harmless(options, where)
    return Reference(posixpath.join(working_directory, filename), layer_format)


def _parse(text: str, where: str) -> Options:
    try:
        parsed = json.loads(_double_quoted(text), object_pairs_hook=_unique)
        if not isinstance(parsed, dict):
            _refuse("no object", where)
        return _unique(list(_flatten(parsed, "")))
    except (ValueError, RecursionError) as error:
        _refuse(f"not understood: {error}", where)


def _double_quoted(text: str) -> str:
    """Turns strings in single quotes, which QEMU's JSON knows too, into standard ones."""
    return _STRINGS.sub(_standard, text)


def _standard(found: re.Match[str]) -> str:
    if found[0][0] == '"':
        return found[0]
    inside = found[0][1:-1].replace("\\'", "'")
    return '"' + re.sub(r'(?<!\\)((?:\\\\)*)"', r'\1\\"', inside) + '"'


def _unique(pairs: list[tuple[str, object]]) -> Options:
    options = dict(pairs)
    if len(options) != len(pairs):
        raise ValueError("an option is given twice")
    return options


def _flatten(options: Mapping[str, object], prefix: str) -> Iterator[tuple[str, object]]:
    for key, value in options.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _number(options: Options, key: str, where: str) -> int | None:
    value = options.pop(key, None)
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        _refuse(f"{key} is {value!r}", where)
    return value


def _only_harmless(options: Options, where: str) -> None:
    unknown = sorted(set(options) - _HARMLESS)
    if unknown:
        _refuse(f"the option {printable(unknown[0])} is not understood", where)


def _refuse(what: str, where: str) -> NoReturn:
    raise ImageUnsupportedError(
        f"its backing file is named by json: options that are not read here ({what})",
        where=where,
        remedy=_REMEDY_JSON,
    )
