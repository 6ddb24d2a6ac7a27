"""Quirks: what servers are known to do wrong, and a caller may choose to bear.

None is borne unless it is asked for: a server that breaks one rule may break another that nobody notices.
"""

from __future__ import annotations

from enum import Enum, auto


class Quirk(Enum):
    """A fault that harms nothing if it is taken for what it was meant to be; all of them are about block status.

    Attributes:
        UNKNOWN_CONTEXT: a chunk for a context that was not agreed on is ignored, instead of ending the connection. The
            chunk is well-formed and what was asked for is there; libnbd (1.14 to 1.22) has always ignored it.
        EXTENT_PAST_EXPORT: an extent that ends past the export's end is cut there. libnbd before 1.18 showed it as it
            came, QEMU's client and ovirt-imageio cut it, so servers that do this were never told off.
        ZERO_LENGTH_EXTENT: what follows an extent of no length in a chunk is not believed but asked for again, as long
            as something came before it. QEMU's client reads such a chunk like this.
        EXTRA_EXTENT: extents that begin past the end of the request are dropped, as QEMU's client and ovirt-imageio do.
    """

    UNKNOWN_CONTEXT = auto()
    EXTENT_PAST_EXPORT = auto()
    ZERO_LENGTH_EXTENT = auto()
    EXTRA_EXTENT = auto()
