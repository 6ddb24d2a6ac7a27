"""The very bytes of ``qemu-img map --output=json``, and the facts of ``qemu-img info --backing-chain --output=json``.

Established on qemu-img 5.2, 7.2 and 10.0. A map is a line an extent::

    [{ "start": 0, "length": 65536, "depth": 0, "present": true, "zero": false, "data": true, "offset": 327680},
    { "start": 65536, "length": 983040, "depth": 0, "present": false, "zero": true, "data": false}]

10.0 has ``"compressed": false`` behind ``data``, 5.2 no ``present``. A disk of no bytes has one line of length 0 where
nothing is true.

Of ``info`` these are left out, since they are not read here: what ``encrypt`` says beside the format (LUKS key slots),
and ``format-specific`` of other formats than qcow2. 10.0's ``children`` repeat what is there already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

from qmpnbd.images.mapentries import COMPRESSED, DATA, OFFSET, PRESENT, ZERO, Generation, MapBatch
from qmpnbd.report.rows import LINES, Block, choice, constant, digits, joined, shown_where, typeset

if TYPE_CHECKING:
    from qmpnbd.images.layers import Chain
    from qmpnbd.images.members import Member
    from qmpnbd.images.qcow2_metadata import Qcow2Facts

Info: TypeAlias = dict[str, Any]

_BILLION = 10**9


def map_json(batches: Iterable[MapBatch], generation: Generation) -> Iterator[bytes]:
    """Yields the map piece by piece.

    Args:
        batches: of `Chain.map_entries`, for the same generation.
        generation: of QEMU; its form is printed.
    """

    def meaning(flags: int) -> bytes:
        words = [("zero", ZERO), ("data", DATA)]
        if generation != "5.2":
            words.insert(0, ("present", PRESENT))
        if generation == "10.0":
            words.append(("compressed", COMPRESSED))
        return "".join(f', "{word}": {"true" if flags & flag else "false"}' for word, flag in words).encode()

    def lines() -> Iterator[bytes]:
        for batch in batches:
            for first in range(0, batch.starts.size, LINES):
                yield typeset(_line(batch, slice(first, first + LINES), meaning))

    yield b"["
    text = joined(lines(), b",\n")
    first = next(text, b"")
    yield first or b'{ "start": 0, "length": 0, "depth": 0' + meaning(0) + b"}"
    yield from text
    yield b"]\n"


def _line(batch: MapBatch, part: slice, meaning: Callable[[int], bytes]) -> list[Block]:
    starts, flags = batch.starts[part], batch.flags[part]
    count, placed = starts.size, (flags & OFFSET) != 0
    return [
        constant(b'{ "start": ', count),
        digits(starts),
        constant(b', "length": ', count),
        digits(batch.lengths[part]),
        constant(b', "depth": ', count),
        digits(batch.depths[part].astype("u8")),
        choice(flags.astype("u8"), meaning),
        shown_where(constant(b', "offset": ', count), placed),
        shown_where(digits(batch.offsets[part]), placed),
        constant(b"},\n", count),
    ]


def info(chain: Chain) -> list[Info]:
    """Returns what ``qemu-img info`` tells of each layer, from the active one down.

    Raises:
        ImageError: the branch says what is wrong with which file.
    """
    members = chain.members
    return [_image(chain, index, members[index + 1 : index + 2]) for index in range(len(members))]


def _image(chain: Chain, index: int, below: tuple[Member, ...]) -> Info:
    member, layer = chain.members[index], chain.layers[index]
    image: Info = {
        "virtual-size": layer.size,
        "filename": layer.path,
        "format": layer.format,
        "actual-size": member.file.allocated_bytes(),
    }
    if layer.format == "parallels":  # QEMU's driver tells no more
        return image
    image["dirty-flag"] = False
    if layer.cluster_size is not None:
        image["cluster-size"] = layer.cluster_size
    facts, qcow2 = chain.facts(index), member.qcow2
    if facts is None or qcow2 is None:
        return image
    image["dirty-flag"] = facts.dirty
    if facts.encryption != "none":
        image["encrypted"] = True
    if facts.snapshots:
        image["snapshots"] = _snapshots(facts)
    image["format-specific"] = {"type": "qcow2", "data": _qcow2(facts)}
    if qcow2.backing_name:
        image["backing-filename"] = qcow2.backing_name
        if qcow2.backing_format:
            image["backing-filename-format"] = qcow2.backing_format
        # A name with a protocol stays as it is; any other is the path that was opened.
        plain = ":" not in qcow2.backing_name.partition("/")[0]
        image["full-backing-filename"] = below[0].layer.path if below and plain else qcow2.backing_name
    return image


def _qcow2(facts: Qcow2Facts) -> Info:
    data: Info = {
        "compat": "0.10" if facts.version == 2 else "1.1",
        "compression-type": facts.compression_type,
        "refcount-bits": facts.refcount_bits,
    }
    if facts.encryption != "none":
        data["encrypt"] = {"format": facts.encryption}
    if facts.version == 2:
        return data
    data |= {"lazy-refcounts": facts.lazy_refcounts, "corrupt": facts.corrupt, "extended-l2": facts.extended_l2}
    if facts.data_file is not None:
        data |= {"data-file": facts.data_file, "data-file-raw": facts.data_file_raw}
    if facts.bitmaps:
        data["bitmaps"] = [
            {
                "name": bitmap.name,
                "granularity": bitmap.granularity,
                "flags": [word for word, is_set in (("in-use", bitmap.inconsistent), ("auto", bitmap.auto)) if is_set],
            }
            for bitmap in facts.bitmaps
        ]
    return data


def _snapshots(facts: Qcow2Facts) -> list[Info]:
    entries = []
    for each in facts.snapshots:
        seconds, nanoseconds = divmod(each.vm_clock_ns, _BILLION)
        entry = {
            "id": each.id,
            "name": each.name,
            "date-sec": each.seconds,
            "date-nsec": each.nanoseconds,
            "vm-clock-sec": seconds,
            "vm-clock-nsec": nanoseconds,
            "vm-state-size": each.vm_state_size,
        }
        if each.instruction_count is not None:
            entry["icount"] = each.instruction_count
        entries.append(entry)
    return entries
