"""Ranges of an export: what may be asked for, and in which pieces ("Size constraints" of doc/proto.md)."""

from __future__ import annotations

from collections.abc import Iterator

from qmpnbd.errors import UsageError
from qmpnbd.nbd.constants import SECTOR
from qmpnbd.nbd.export import Export

_MAX_EXTENDED = 2**63


def longest_effect(export: Export) -> int:
    """Returns the bytes that one request without data can be about, a multiple of the smallest block.

    Compact headers have 32 bits for them; nbdkit before the fix of CVE-2025-47711 aborts when asked for all of
    2**32 - 1, so this stays one sector or block below.
    """
    block = export.minimum_block
    return _MAX_EXTENDED if export.replies == "extended" else 2**32 - max(SECTOR, block)


def longest_payload(export: Export) -> int:
    """Returns the bytes of data that one request can carry, a multiple of the smallest block."""
    return max(export.maximum_payload - export.maximum_payload % export.minimum_block, export.minimum_block)


def rest(export: Export, offset: int, where: str) -> int:
    """Returns how many bytes there are from `offset` on.

    Raises:
        UsageError: it is not inside the export.
    """
    _require_inside(export, offset, 0, where)
    return export.size - offset


def _require_inside(export: Export, offset: int, length: int, where: str) -> None:
    if not 0 <= offset <= offset + length <= export.size:
        raise UsageError(f"{length} bytes at {offset} are not inside the export, which has {export.size}", where=where)


def check_range(export: Export, offset: int, length: int, where: str) -> None:
    """Returns if a range may be asked for.

    Raises:
        UsageError: it is not inside the export, or does not begin and end at multiples of the smallest block.
    """
    _require_inside(export, offset, length, where)
    block = export.minimum_block
    if offset % block or length % block:
        raise UsageError(f"{length} bytes at {offset}: this export is used in blocks of {block} bytes", where=where)


def aligned_range(export: Export, offset: int, length: int, where: str) -> tuple[int, int]:
    """Returns first byte and end of the blocks that a range touches.

    Raises:
        UsageError: the range is not inside the export.
    """
    _require_inside(export, offset, length, where)
    block = export.minimum_block
    return offset - offset % block, offset + length + -(offset + length) % block


def pieces(offset: int, length: int, longest: int) -> Iterator[tuple[int, int]]:
    """Yields offset and length of consecutive pieces, none longer than `longest`."""
    end = offset + length
    while offset < end:
        size = min(longest, end - offset)
        yield offset, size
        offset += size
