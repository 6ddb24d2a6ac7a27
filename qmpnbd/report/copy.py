"""From what was copied to the document of ``qmpnbd copy``; pure."""

from __future__ import annotations

from qmpnbd.backup.destination import Form
from qmpnbd.backup.whole_copy import WholeCopy
from qmpnbd.report.model import CopyDocument


def copy_document(source: str, target: str, form: Form, done: WholeCopy) -> CopyDocument:
    """Describes a copy.

    Args:
        source: as it was asked for.
        target: likewise.
        form: what the target is.
        done: the copy.
    """
    return CopyDocument(
        source=source,
        target=target,
        form=form,
        size=done.size,
        data_bytes=done.copied.data_bytes,
        zero_bytes=done.copied.zero_bytes,
        read_back_bytes=done.read_back_bytes,
        resumed_bytes=done.resumed_bytes,
        seconds=done.copied.seconds,
    )
