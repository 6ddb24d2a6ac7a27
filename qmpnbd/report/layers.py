"""From the layers of a chain to their entries in a document; pure."""

from __future__ import annotations

from collections.abc import Iterable

from qmpnbd.images.chain import Layer
from qmpnbd.images.status import Unreadable
from qmpnbd.report.model import LayerEntry, UnreadableEntry


def layer_entries(layers: Iterable[Layer]) -> tuple[LayerEntry, ...]:
    """Describes the layers of a chain."""
    return tuple(
        LayerEntry(
            layer_index=layer.index,
            allocation_depth=layer.allocation_depth,
            file=layer.path,
            format=layer.format,
            format_probed=layer.format_probed,
            node_name=layer.node_name,
            size=layer.size,
            cluster_size=layer.cluster_size,
        )
        for layer in layers
    )


def unreadable_entries(ranges: Iterable[Unreadable]) -> tuple[UnreadableEntry, ...]:
    """Describes what QEMU cannot read."""
    return tuple(
        UnreadableEntry(layer_index=each.layer, file=each.path, offset=each.offset, end=each.end, reason=each.reason)
        for each in ranges
    )
