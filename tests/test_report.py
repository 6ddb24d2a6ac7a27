"""Renderings of maps against the slow way to write them."""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpnbd.extents import ExtentMap
from qmpnbd.report import jsontext, maptext, nbdinfo
from qmpnbd.report.contexts import describe
from qmpnbd.report.model import ChainDocument, MapDocument
from qmpnbd.report.rows import choice, constant, digits, extent_rows
from qmpnbd.report.sizes import human_size
from qmpnbd.report.strip import dominant

lengths = st.one_of(st.integers(1, 20), st.integers(1, 2**40))
maps = st.lists(st.tuples(lengths, st.integers(0, 6)), max_size=12).map(ExtentMap.of_extents)
contexts = st.sampled_from(["qemu:allocation-depth", "base:allocation", "qemu:dirty-bitmap:x", "foreign:thing"])


def written(pieces: Iterable[str | bytes]) -> str:
    return "".join(piece if isinstance(piece, str) else piece.decode() for piece in pieces)


@given(maps, contexts)
def test_nbdinfo(extents: ExtentMap, context: str) -> None:
    lines = []
    for extent in extents:
        meaning = describe(context, extent.value)
        words = "" if meaning is None else f', "description": "{meaning}"'
        lines.append(f'{{ "offset": {extent.offset}, "length": {extent.length}, "type": {extent.value}{words}}}')
    assert written(nbdinfo.map_json(context, extents)) == "[\n" + ",\n".join(lines) + "\n]\n"


@given(maps, maps, st.integers(0, 2**40))
def test_text_in_lockstep(first: ExtentMap, second: ExtentMap, base: int) -> None:
    size = min(first.size, second.size)
    both = {"qemu:allocation-depth": first.resized(size, 0), "foreign:thing": second.resized(size, 0)}
    lines = written(maptext.maps_text(both, base)).splitlines()
    table = [line.split() for line in lines if not line.split()[1].startswith("[")]
    assert table[0] == ["offset", "length", *both]
    cursor = base
    for row in table[1:]:
        offset, length, depth, foreign = int(row[0]), int(row[1]), int(row[2]), int(row[-1])
        assert offset == cursor
        for at in (offset - base, offset - base + length - 1):
            assert (both["qemu:allocation-depth"].at(at), both["foreign:thing"].at(at)) == (depth, foreign)
        assert describe("qemu:allocation-depth", depth) == " ".join(row[3:-1])
        cursor += length
    assert cursor == base + size


@given(maps, contexts)
def test_nbdinfos_text(extents: ExtentMap, context: str) -> None:
    lines = []
    for extent in extents:
        meaning = describe(context, extent.value)
        words = "" if meaning is None else f"  {meaning}"
        lines.append(f"{extent.offset:>10}  {extent.length:>10}  {extent.value:>3}{words}\n")
    assert written(nbdinfo.map_text(context, extents)) == "".join(lines)


@given(maps, maps)
def test_documents(first: ExtentMap, second: ExtentMap) -> None:
    wanted = [{"offset": each.offset, "length": each.length, "value": each.value} for each in first]
    head = ChainDocument(image="x", size=first.size, layers=(), extents=())
    chain = json.loads(written(jsontext.chain_json(head, first)))
    assert (chain["schema"], chain["size"], chain["extents"]) == ("qmpnbd.chain/1", first.size, wanted)
    both = MapDocument(uri="nbd://x", size=first.size, maps=())
    maps = json.loads(written(jsontext.map_json(both, {"a": first, 'b"': second})))["maps"]
    assert [each["context"] for each in maps] == ["a", 'b"']
    assert maps[0]["extents"] == wanted
    assert len(maps[1]["extents"]) == len(second)


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20), st.integers(0, 24))
def test_digits(numbers: list[int], width: int) -> None:
    for row, number in zip(digits(np.array(numbers, dtype=np.uint64), width), numbers, strict=True):
        assert row.tobytes().replace(b"\0", b"").decode() == f"{number:>{width}}"


def test_pieces_continue_where_the_last_one_ended() -> None:
    extents = ExtentMap.of_extents([(7, n % 2) for n in range(100)])
    pieces = list(extent_rows(extents, lambda o, n, v: [digits(o), constant(b"+", o.size), digits(n)], lines=9))
    assert len(pieces) == 12
    assert b"".join(pieces) == b"".join(b"%d+7" % (7 * n) for n in range(100))


def test_choice_is_asked_once_for_each_value() -> None:
    asked: list[int] = []

    def text_of(value: int) -> bytes:
        asked.append(value)
        return b"x" * value

    block = choice(np.array([5, 1, 5], dtype=np.uint64), text_of)
    assert asked == [1, 5]
    assert block.tobytes().replace(b"\0", b"") == b"x" * 11


@pytest.mark.parametrize(("value", "shown"), [(0, "0 B"), (1023, "1023 B"), (65536, "64 KiB"), (1 << 60, "1 EiB")])
def test_human_sizes(value: int, shown: str) -> None:
    assert human_size(value) == shown


@given(maps, st.integers(1, 9))
def test_dominant_of_small_maps(extents: ExtentMap, cells: int) -> None:
    small = extents.resized(min(extents.size, 90), 0)
    statuses = [extent.value for extent in small for _ in range(extent.length)]
    count = min(cells, len(statuses))
    wanted = []
    for cell in range(count):
        part = statuses[len(statuses) * cell // count : len(statuses) * (cell + 1) // count]
        wanted.append(max(sorted(set(part)), key=part.count))
    assert dominant(small, cells) == tuple(wanted)
