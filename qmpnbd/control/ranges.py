"""Ranges of a disk as they get into a bitmap: read from a list, compared, rounded out; pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from qmpnbd.errors import UsageError
from qmpnbd.extents import ExtentMap

Range = tuple[int, int]
"""Half-open ``(offset, end)``, in bytes."""

MAX_LIST = 1 << 28
"""Bytes of a list of extents; ours has some 50 bytes an extent, so this is more than five million."""


@dataclass(frozen=True, slots=True)
class DepthRange:
    """Which allocation depths are meant, as NBD counts them.

    Attributes:
        lowest: the lowest of them; 1 is the exported node.
        highest: the highest of them; None for no bound.
    """

    lowest: int
    highest: int | None

    def __contains__(self, depth: int) -> bool:
        return depth >= self.lowest and (self.highest is None or depth <= self.highest)

    def __str__(self) -> str:
        if self.highest == self.lowest:
            return str(self.lowest)
        return f"{self.lowest}.." + ("" if self.highest is None else str(self.highest))


def parse_depths(text: str) -> DepthRange:
    """Reads ``N``, ``N..`` or ``N..M``.

    Raises:
        UsageError: it is none of these.
    """
    first, dots, last = text.partition("..")
    numbers = [part for part in (first, last) if part]
    if first and all(part.isascii() and part.isdecimal() and len(part) < 10 for part in numbers):
        lowest = int(first)
        highest = int(last) if last else None if dots else lowest
        if highest is None or highest >= lowest:
            return DepthRange(lowest, highest)
    raise UsageError("not allocation depths", where=text, remedy="Write 1, 1..3, or 2.. (2 and more).")


def ranges_of(extents: ExtentMap, depths: DepthRange) -> Iterator[Range]:
    """Yields where a map of allocation depth has one of the depths."""
    for extent in extents:
        if extent.value in depths:
            yield extent.offset, extent.end


def parse_ranges(text: str | bytes, where: str) -> list[Range]:
    """Reads a JSON list of extents, sorts it, and joins what overlaps or touches.

    Taken are a list of objects with ``offset`` (or ``start``) and ``length``; one of pairs ``[offset, length]``; and an
    object that has such a list as ``extents``, as ``qmpnbd chain --json`` prints. Extents that have a ``value`` of 0 or
    ``present`` false are left out, so that documents of ``qmpnbd chain`` and ``qemu-img map`` mean what they show.

    Args:
        text: the document.
        where: its name, for messages.

    Raises:
        UsageError: it is none of these.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"not JSON: {error}", where=where, remedy=_FORM) from error
    if isinstance(document, dict):
        document = document.get("extents")
    if not isinstance(document, list):
        raise UsageError("no list of extents", where=where, remedy=_FORM)
    found = sorted(each for index, entry in enumerate(document) if (each := _range(entry, index, where)) is not None)
    return list(joined(found))


_FORM = 'Write [{"offset": 0, "length": 65536}, ...], in bytes.'


def _range(entry: object, index: int, where: str) -> Range | None:
    offset: object = None
    length: object = None
    if isinstance(entry, dict):
        if entry.get("value", 1) == 0 or entry.get("present", True) is False:
            return None
        # qemu-img map says `start`; its `offset`, if any, is one in the file.
        offset, length = entry.get("start", entry.get("offset")), entry.get("length")
    elif isinstance(entry, list) and len(entry) == 2:
        offset, length = entry
    if type(offset) is not int or type(length) is not int or offset < 0 or length < 0 or offset + length >= 1 << 63:
        raise UsageError(f"entry {index} is no extent of a disk", where=where, remedy=_FORM)
    return (offset, offset + length) if length else None


def joined(ranges: Iterable[Range]) -> Iterator[Range]:
    """Yields ranges, sorted by offset, with those joined that overlap or touch."""
    held: Range | None = None
    for offset, end in ranges:
        if held is not None and offset <= held[1]:
            held = held[0], max(held[1], end)
            continue
        if held is not None:
            yield held
        held = offset, end
    if held is not None:
        yield held


def rounded_out(ranges: Iterable[Range], granularity: int, size: int, where: str) -> list[Range]:
    """Returns ranges widened to whole granules of a disk; the last granule may be cut by the disk's end.

    Args:
        ranges: sorted by offset.
        granularity: bytes.
        size: of the disk, in bytes.
        where: where the ranges come from, for the message.

    Raises:
        UsageError: a range lies outside the disk.
    """
    kept = list(ranges)
    beyond = next((each for each in kept if each[1] > size), None)
    if beyond is not None:
        raise UsageError(
            f"the extent [{beyond[0]}, {beyond[1]}) lies outside a disk of {size} bytes",
            where=where,
            remedy="These are the extents of another disk, or of this one before it shrank.",
        )
    return list(joined((o - o % granularity, min(-(-e // granularity) * granularity, size)) for o, e in kept))


def granules(ranges: Iterable[Range], granularity: int) -> int:
    """Returns the bytes of the granules that ranges touch, as QEMU counts them: the last one in full."""
    return sum(-(-end // granularity) - offset // granularity for offset, end in ranges) * granularity
