"""One pass over many layers, against a model that asks one byte at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpnbd.errors import ImageError
from qmpnbd.extents import U64, ExtentMap
from qmpnbd.images import passes
from qmpnbd.images.depth import visible_sizes
from qmpnbd.images.passes import Pass
from qmpnbd.images.qcow2 import U8, Flags
from qmpnbd.images.sources import Block, Sketch, Solid
from qmpnbd.images.status import UNREADABLE_DEPTH, Status
from qmpnbd.images.views import depth_map, layer_map

NUMBERS = [1, 3, 4, 7, 9]


@dataclass
class FakeBlock:
    codes: U8
    base: int

    def shifts(self, granules: npt.NDArray[np.intp]) -> U64:
        return np.where(self.codes[granules] == Status.DATA, np.uint64(self.base), np.uint64(0))

    def reserved(self, granules: npt.NDArray[np.intp]) -> tuple[Flags, U64]:
        return np.zeros(granules.size, dtype=bool), np.zeros(granules.size, dtype=np.uint64)


class Fake:
    """A layer of granules of 2 or 4 bytes, two in an alignment, four in a span; spans of nothing have no table."""

    def __init__(self, granule: int, codes: list[int], size: int) -> None:
        self.granule, self.alignment, self.span, self.size = granule, 2 * granule, 4 * granule, size
        self.codes = np.array(codes, dtype=np.uint8)
        self.read: list[tuple[int, int]] = []

    def at(self, offset: int) -> int:
        index = offset // self.granule
        return int(self.codes[index]) if index < self.codes.size else 0

    def sketch(self, offset: int, end: int) -> Sketch:
        spans = [n for n in range(offset // self.span, -(-end // self.span)) if self.codes[4 * n : 4 * n + 4].any()]
        starts = np.array(spans, dtype=np.uint64) * np.uint64(self.span)

        def read(low: int, high: int, wanted: Flags | None) -> Block:
            assert low % self.alignment == 0
            self.read.append((low, high))
            count = -(-high // self.alignment) * 2 - low // self.granule
            codes = np.zeros(count, dtype=np.uint8)
            there = self.codes[low // self.granule :][:count]
            codes[: there.size] = there
            assert wanted is None or wanted.size * 2 >= count
            return FakeBlock(codes, self.granule)

        return Sketch(starts, starts + np.uint64(self.span), read)

    def fault(self, offset: int) -> ImageError | None:
        return None

    def look_up(self, offset: int) -> tuple[bool, str]:
        raise NotImplementedError


codes = st.lists(st.sampled_from([0, 0, 0, 1, 2, 4, 5]), max_size=24)
layers_of = st.lists(st.tuples(st.sampled_from([2, 4, 8]), codes, st.integers(1, 40)), min_size=1, max_size=4)


def model(layers: list[Fake | Solid], sizes: list[int], offset: int) -> int:
    for index, layer in enumerate(layers):
        if index and offset >= sizes[index]:
            return NUMBERS[index]
        if isinstance(layer, Solid):
            return NUMBERS[index]
        code = layer.at(offset)
        if code == Status.UNREADABLE:
            return UNREADABLE_DEPTH
        if code:
            return NUMBERS[index]
    return 0


def run(layers: list[Fake | Solid], sizes: list[int], detailed: bool) -> tuple[ExtentMap, list[tuple[int, int, int]]]:
    broken: list[tuple[int, int, int]] = []
    visible = visible_sizes(sizes, sizes[0])
    work = Pass(layers, visible, detailed, lambda: None, lambda *found: broken.append(found))
    return depth_map(work.windows(0, sizes[0]), NUMBERS, "x"), broken


@given(layers_of, st.booleans(), st.booleans(), st.sampled_from([1, 4, 1 << 17]))
def test_against_the_model(
    given_layers: list[tuple[int, list[int], int]], solid: bool, detailed: bool, rows: int
) -> None:
    layers: list[Fake | Solid] = [Fake(*layer) for layer in given_layers]
    sizes = [size for _, _, size in given_layers]
    if solid:
        layers.append(Solid(0))
        sizes.append(30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "_ROWS", rows)
        found, broken = run(layers, sizes, detailed)
    wanted = ExtentMap.of_extents([(1, model(layers, sizes, offset)) for offset in range(sizes[0])])
    assert found == wanted
    told = sum(end - start for _, start, end in broken)
    assert told == wanted.totals().get(UNREADABLE_DEPTH, 0)


@given(layers_of, st.integers(0, 40), st.integers(0, 40))
def test_a_window_of_one_layer(given_layers: list[tuple[int, list[int], int]], start: int, end: int) -> None:
    layer = Fake(*given_layers[0])
    start, end = min(start, layer.size), min(max(start, end), layer.size)
    work = Pass([layer], [layer.size], True, lambda: None, lambda *_: None)
    found = layer_map(work.windows(start, end), start, "x")
    wanted = ExtentMap.of_extents([(1, layer.at(offset)) for offset in range(start, end)])
    assert found.statuses == wanted
    assert found.shifts == wanted.mapped(lambda values: np.where(values == 1, layer.granule, 0))


def test_what_upper_layers_hold_is_not_read_below() -> None:
    top, base = Fake(2, [1] * 8 + [0] * 8, 32), Fake(2, [1] * 16, 32)
    run([top, base], [32, 32], False)
    assert base.read == [(0, 32)], "one piece, in which something is undecided"
    top, base = Fake(2, [1] * 16, 32), Fake(2, [1] * 16, 32)
    run([top, base], [32, 32], False)
    assert base.read == []
