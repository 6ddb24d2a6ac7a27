"""From exports that are up to the document of ``qmpnbd export``, and to text; pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from qmpnbd.export.session import Export, Image, Session
from qmpnbd.printable import printable as shown
from qmpnbd.qmp.address import MonitorAddress
from qmpnbd.qmp.checkpoint_at import BegunCheckpoint
from qmpnbd.report.contexts import ALLOCATION_DEPTH, BASE_ALLOCATION, DIRTY_BITMAP
from qmpnbd.report.instant import instant_entry, instant_text
from qmpnbd.report.model import BegunCheckpointEntry, DiskExportEntry, ExportDocument, IncrementEntry
from qmpnbd.report.sizes import human_size

URI = "QMPNBD_URI"
"""The environment variable with the URI of the only export."""

EXPORTS = "QMPNBD_EXPORTS"
"""The environment variable with the whole document."""

_NOT_IN_A_VARIABLE = re.compile(r"[^A-Z0-9]")


def variable(disk: str) -> str:
    """Returns the environment variable for a disk's URI: ``QMPNBD_URI_VD0``."""
    return f"{URI}_" + _NOT_IN_A_VARIABLE.sub("_", disk.upper())


def export_document(
    what: MonitorAddress | str | Image,
    session: Session,
    *,
    depth: bool,
    writable: bool,
    depth_files: Mapping[str, str] | None = None,
) -> ExportDocument:
    """Describes exports that are up.

    Args:
        what: what was exported.
        session: the exports.
        depth: whether they offer the allocation depth.
        writable: whether clients may write.
        depth_files: export id -> file with the allocation depth of the instant.
    """
    files = depth_files or {}
    contexts = (BASE_ALLOCATION, *((ALLOCATION_DEPTH,) if depth else ()))
    return ExportDocument(
        monitor=None if isinstance(what, Image) else session.monitor.where,
        image=what.path if isinstance(what, Image) else None,
        qemu=str(session.monitor.version),
        guest=session.guest,
        consistent=session.consistent,
        exports=tuple(_entry(each, contexts, files.get(each.id), writable=writable) for each in session.exports),
        instant=None if session.statement is None else instant_entry(session.statement),
        checkpoint=None if session.checkpoint is None else _checkpoint(session.checkpoint),
    )


def _checkpoint(begun: BegunCheckpoint) -> BegunCheckpointEntry:
    return BegunCheckpointEntry(
        chain=begun.chain,
        number=begun.number,
        backup=begun.backup,
        disks=tuple(
            IncrementEntry(
                disk=each.disk,
                bitmap=each.bitmap,
                base=each.base.number if each.base else None,
                increment=each.increment,
                reason=each.reason,
                remedy=each.remedy,
                transient_because=each.transient_because,
            )
            for each in begun.disks
        ),
    )


def _entry(export: Export, contexts: Iterable[str], depth_file: str | None, *, writable: bool) -> DiskExportEntry:
    return DiskExportEntry(
        disk=export.disk.name,
        qom_path=export.disk.qom_path,
        node_name=export.node_name,
        export=export.id,
        uri=str(export.uri),
        size=export.size,
        read_only=not writable,
        contexts=(*contexts, *(DIRTY_BITMAP + name for name in export.bitmaps)),
        allocation_depth=depth_file,
        variable=variable(export.disk.name),
    )


def environment(document: ExportDocument, text: str) -> dict[str, str]:
    """Returns the environment variables that tell a command about the exports.

    Args:
        document: the exports.
        text: the same as JSON.
    """
    found = {EXPORTS: text}
    names = [each.variable for each in document.exports]
    for each in document.exports:
        if names.count(each.variable) == 1:  # vd-0 and vd_0 make the same name: then only the document tells
            found[each.variable] = each.uri
    if len(document.exports) == 1:
        found[URI] = document.exports[0].uri
    return found


def export_text(document: ExportDocument) -> str:
    """Returns the exports as text."""
    place = f"monitor {document.monitor}" if document.image is None else f"image {document.image}"
    guest = document.guest if document.image is not None or " " in document.guest else f"guest {document.guest}"
    lines = [shown(f"QEMU {document.qemu}, {guest}, {place}")]
    if document.instant is not None:
        lines += instant_text(document.instant)
    elif document.consistent:
        lines.append("consistent: yes, nothing writes to what is exported")
    else:
        lines.append("consistent: no, the exports move with the guest: what is read is of no one instant")
    lines += [shown(line) for line in _checkpoint_text(document.checkpoint)]
    for each in document.exports:
        access = "read-only" if each.read_only else "WRITABLE"
        lines += ["", shown(f"disk {each.disk} (node {each.node_name}): {human_size(each.size)}, {access}")]
        lines += [f"  {each.uri}", *(f"  {shown(context)}" for context in each.contexts)]
        if each.allocation_depth is not None:
            lines.append(shown(f"  allocation depth at that instant: {each.allocation_depth}"))
    return "\n".join(lines) + "\n"


def _checkpoint_text(begun: BegunCheckpointEntry | None) -> Iterator[str]:
    if begun is None:
        return
    yield f"checkpoint {begun.number} of chain {begun.chain} began"
    for each in begun.disks:
        told = f"full: {each.reason}. {each.remedy}"
        if each.base is not None:
            told = f"increment since {each.base}: in {', '.join(each.increment)}"
        yield f"  disk {each.disk}: {told}"
        if each.transient_because:
            yield f"  disk {each.disk}: the checkpoint is transient: {each.transient_because}"
