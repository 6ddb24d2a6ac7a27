"""From a bitmap that was filled to its document, and to text; pure."""

from __future__ import annotations

from qmpnbd.control.populate import Filled
from qmpnbd.control.ranges import DepthRange
from qmpnbd.printable import printable as shown
from qmpnbd.report.model import PopulateDocument
from qmpnbd.report.sizes import human_size


def populate_document(filled: Filled) -> PopulateDocument:
    """Describes what was filled in."""
    source = filled.filling.source
    return PopulateDocument(
        monitor=filled.where,
        qemu=filled.qemu,
        disk=filled.filling.disk,
        node_name=filled.node_name,
        bitmap=filled.filling.bitmap,
        created=filled.created,
        recording=filled.bitmap.recording,
        persistent=filled.bitmap.persistent,
        granularity=filled.bitmap.granularity,
        source=f"depth {source}" if isinstance(source, DepthRange) else str(source),
        extents=filled.extents,
        filled_bytes=filled.filled_bytes,
        dirty_bytes=filled.bitmap.count,
    )


def populate_text(document: PopulateDocument) -> str:
    """Returns two lines: what was filled in, and what the bitmap is now."""
    made = "made" if document.created else "existed"
    state = "recording" if document.recording else "disabled"
    kept = "persistent" if document.persistent else "transient"
    return (
        f"bitmap {shown(document.bitmap)} of disk {shown(document.disk)} (node {shown(document.node_name)}): "
        f"{human_size(document.filled_bytes)} in {document.extents} extents from {shown(document.source)}\n"
        f"  {made}, {state}, {kept}, granularity {human_size(document.granularity)}, "
        f"{human_size(document.dirty_bytes)} dirty now\n"
    )
