"""From the persistent bitmaps of a chain to their document, and to text."""

from __future__ import annotations

from qmpnbd.images.layers import Chain
from qmpnbd.printable import printable
from qmpnbd.report.columns import table
from qmpnbd.report.model import BitmapEntry, BitmapsDocument
from qmpnbd.report.sizes import human_size


def bitmaps_document(image: str, chain: Chain) -> BitmapsDocument:
    """Describes the bitmaps of every layer; reads their bits to count them.

    Raises:
        ImageError: the branch says what is wrong with which file.
    """
    entries = [
        BitmapEntry(
            layer_index=layer.index,
            file=layer.path,
            name=info.name,
            granularity=info.granularity,
            recording=info.auto,
            inconsistent=info.inconsistent,
            dirty_bytes=None if info.inconsistent else chain.bitmap(layer.index, info.name).totals().get(1, 0),
        )
        for layer in chain.layers
        for info in chain.bitmaps(layer.index)
    ]
    return BitmapsDocument(image=image, bitmaps=tuple(entries))


def bitmaps_text(document: BitmapsDocument, width: int | None = None) -> str:
    """Returns the list of bitmaps.

    Args:
        document: the list.
        width: columns of the terminal; None for as many as it takes.
    """
    if not document.bitmaps:
        return "no bitmaps\n"
    rows = [("layer", "granularity", "dirty", "state", "bitmap")]
    for each in document.bitmaps:
        state = "inconsistent" if each.inconsistent else "recording" if each.recording else "disabled"
        dirty = "-" if each.dirty_bytes is None else human_size(each.dirty_bytes)
        rows.append((str(each.layer_index), human_size(each.granularity), dirty, state, printable(each.name)))
    return "\n".join(table(rows, right=(0, 1, 2), width=width)) + "\n"
