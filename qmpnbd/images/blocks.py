"""Images with one table of large blocks: vdi, vpc (dynamic), vhdx and parallels. Values only.

::

    header | table [ e e e - e ]  | block | block | block | ...      an entry leads to the block that holds its part
                                                                     of the disk, or says that there is none
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from qmpnbd.extents import U64
from qmpnbd.images.qcow2 import U8

Places: TypeAlias = Callable[[U64], tuple[U8, U64]]
"""From entries to a `Status` and a host offset each; of offsets only those of DATA mean something."""

MAX_BLOCK = 1 << 28  # VHDX's limit, 256 MiB; no other format has larger ones


@dataclass(frozen=True, slots=True)
class Blocks:
    """What a header says.

    Attributes:
        size: bytes of the disk.
        granule: bytes of a block, a power of two.
        table_offset: where the table lies.
        entries: blocks that it describes; those behind them hold nothing.
        entry: numpy's name of an entry's type.
        places: understands entries.
        stride: after so many entries comes one that describes no block; 0 for never.
        is_static: QEMU looks for holes in the file under the data.
    """

    size: int
    granule: int
    table_offset: int
    entries: int
    entry: str
    places: Places
    stride: int = 0
    is_static: bool = False

    def slot(self, block: int) -> int:
        """Returns where in the table the entry of a block is."""
        return block + block // self.stride if self.stride else block
