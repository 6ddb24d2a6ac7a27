"""What a backing chain is made of: pure values.

::

    LayerSpec   what the caller says about a layer before its file was opened (from a block graph told by QMP)
    Layer       what is known after the file was opened
    Explanation which table entry decided a byte, and what was read on the way there
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Format: TypeAlias = Literal["qcow2", "raw", "qed", "vmdk", "vdi", "vpc", "vhdx", "parallels", "luks"]


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """A layer of a chain whose order is known from elsewhere.

    Attributes:
        path: the file.
        format: how QEMU reads it.
        allocation_depth: the NBD number of data found in this layer; counts filter nodes.
        node_name: the format node in QEMU, for messages.
        offset: raw only: where the layer starts in the file.
        size: raw only: bytes of the layer; None for the rest of the file.
        data_file: qcow2 only: the external data file, whatever name the image records for it; "" to go by that name.
    """

    path: str
    format: Format
    allocation_depth: int
    node_name: str = ""
    offset: int = 0
    size: int | None = None
    data_file: str = ""


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer of an open chain.

    Attributes:
        index: the layer index; 0 is the active layer.
        path: the file, as it was found: given, or the overlay's folder and the name in its header.
        format: how it is read.
        format_probed: no format was recorded or given; QEMU would guess it from the content too.
        size: bytes the guest sees.
        node_name: the node in QEMU, "" if unknown.
        allocation_depth: the NBD number of data found in this layer.
        cluster_size: bytes in a cluster; None for raw.
        has_backing: a layer below it continues the chain.
        offset: raw only: where the layer starts in the file.
    """

    index: int
    path: str
    format: Format
    format_probed: bool
    size: int
    node_name: str
    allocation_depth: int
    cluster_size: int | None
    has_backing: bool
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """What one layer says about a byte.

    Attributes:
        layer: the layer index.
        path: its file.
        decides: the search ends here.
        text: the entries that were read and what they mean, without a full stop.
    """

    layer: int
    path: str
    decides: bool
    text: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a byte has its allocation depth.

    Attributes:
        offset: the byte.
        layer: the layer index of the layer that holds it; None if none does.
        path: that layer's file; None if none does.
        allocation_depth: NBD's number.
        steps: what each layer said that was looked at, from the active layer down.
    """

    offset: int
    layer: int | None
    path: str | None
    allocation_depth: int
    steps: tuple[Step, ...]

    @property
    def text(self) -> str:
        """One line a layer that was looked at."""
        return "\n".join(f"layer {step.layer}, {step.path}: {step.text}" for step in self.steps)
