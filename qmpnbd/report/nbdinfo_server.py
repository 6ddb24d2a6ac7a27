"""The very bytes of ``nbdinfo URI`` and ``nbdinfo --list URI``, as of nbdinfo 1.14, without ``content``.

``content`` is what file(1) says of the first bytes of the disk; ``nbdinfo --no-content`` leaves it out, and so do we.
Control characters in a server's texts are escapes here, in text as well, where nbdinfo lets the terminal obey them.
"""

from __future__ import annotations

from collections.abc import Iterator

from qmpnbd.report.model import ExportEntry, InfoDocument

FLAGS = (
    "is_rotational",
    "is_read_only",
    "can_cache",
    "can_df",
    "can_fast_zero",
    "can_flush",
    "can_fua",
    "can_multi_conn",
    "can_trim",
    "can_zero",
)
BLOCK_SIZES = ("block_size_minimum", "block_size_preferred", "block_size_maximum")
_UNITS = ("", "K", "M", "G", "T", "P", "E")


def size_in_units(size: int) -> str:
    """Returns a size with the largest unit that divides it: 1536000 is ``1500K``, 1000 is ``1000``."""
    unit = 0
    while size and size % 1024 == 0 and unit < len(_UNITS) - 1:
        size, unit = size // 1024, unit + 1
    return f"{size}{_UNITS[unit]}"


def info_text(document: InfoDocument) -> str:
    """Returns the description of a server and its exports as text."""
    lines = [f"protocol: {document.protocol} {_tls(document)}, using {document.replies} packets"]
    for export in document.exports:
        lines += _export_text(export)
    return "\n".join(lines) + "\n"


def _tls(document: InfoDocument) -> str:
    return "with TLS" if document.tls else "without TLS"


def _export_text(export: ExportEntry) -> Iterator[str]:
    yield f"export={_quoted(export.name)}:"
    if export.description:
        yield f"\tdescription: {export.description}"
    units = size_in_units(export.size)
    yield f"\texport-size: {export.size}" + ("" if units == str(export.size) else f" ({units})")
    yield f"\turi: {export.uri}"
    if export.contexts:
        yield "\tcontexts:"
        yield from (f"\t\t{context}" for context in export.contexts)
    for name in FLAGS:
        yield f"\t{name}: {_boolean(getattr(export, name))}"
    for name in BLOCK_SIZES:
        if (value := getattr(export, name)) is not None:
            yield f"\t{name}: {value}"


def info_json(document: InfoDocument) -> str:
    """Returns the description of a server and its exports as JSON."""
    head = [
        f'"protocol": {_quoted(document.protocol)}',
        f'"TLS": {_boolean(document.tls)}',
        f'"structured": {_boolean(document.replies == "structured")}',
    ]
    exports = ",\n".join("\t{\n" + ",\n".join(_export_json(export)) + "\n\t}" for export in document.exports)
    return "{\n" + ",\n".join(head) + ',\n"exports": [\n' + exports + " ]\n}\n"


def _export_json(export: ExportEntry) -> Iterator[str]:
    yield f'\t"export-name": {_quoted(export.name)}'
    if export.description:
        yield f'\t"description": {_quoted(export.description)}'
    yield f'\t"uri": {_quoted(export.uri)}'
    if export.contexts:
        contexts = ",\n".join(f"\t\t{_quoted(context)}" for context in export.contexts)
        yield f'\t"contexts": [\n{contexts}\n\t]'
    for name in FLAGS:
        yield f'\t"{name}": {_boolean(getattr(export, name))}'
    for name in BLOCK_SIZES:
        if (value := getattr(export, name)) is not None:
            yield f'\t"{name}": {value}'
    yield f'\t"export-size": {export.size}'
    yield f'\t"export-size-str": {_quoted(size_in_units(export.size))}'


def _boolean(value: bool) -> str:
    return "true" if value else "false"


def _quoted(text: str) -> str:
    """Returns a JSON string as nbdinfo writes it: non-ASCII as it is."""
    quoted = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(char if char >= " " else f"\\u{ord(char):04x}" for char in quoted) + '"'
