"""Our reading of chains against two judges: what QEMU serves over NBD, and what qemu-img says.

Both come from QEMU, but by different roads: the server's number is the one we claim to compute, ``qemu-img map`` counts
differently and has its own rule for short backing files. nbdinfo reads the server, so that our own client is no part
of the judgement.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from qmpnbd.extents import ExtentMap
from qmpnbd.images.chain import LayerSpec
from qmpnbd.images.files import Chain, open_chain, open_layers
from tests.chains import ChainRecipe, build, recipes, run

pytestmark = pytest.mark.real

CONTEXT = "qemu:allocation-depth"


def served(top: Path, image_format: str = "qcow2") -> ExtentMap:
    """What qemu-nbd serves; nbdinfo starts it and ends it."""
    server = [shutil.which("qemu-nbd"), "-A", "-r", "-f", image_format, top]
    extents = json.loads(run("nbdinfo", f"--map={CONTEXT}", "--json", "--", "[", *server, "]"))
    return ExtentMap.of_extents((extent["length"], extent["type"]) for extent in extents)


def mapped(top: Path, image_format: str = "qcow2") -> ExtentMap:
    """What qemu-img says, in NBD's numbers.

    It counts from 0. Past the end of a short backing file it names the layer above, where NBD names the short one.
    """
    sizes = sizes_in_qemu(top, image_format)
    entries = json.loads(run("qemu-img", "map", "--output=json", "-f", image_format, top))
    return ExtentMap.of_extents(piece for entry in entries for piece in _pieces(entry, sizes))


def _pieces(entry: dict[str, int], sizes: Sequence[int]) -> Iterable[tuple[int, int]]:
    start, length, depth = entry["start"], entry["length"], entry["depth"]
    if entry["present"]:
        return [(length, depth + 1)]
    if depth + 1 == len(sizes):
        return [(length, 0)]
    inside = min(max(sizes[depth + 1] - start, 0), length)
    return [(inside, 0), (length - inside, depth + 2)]


def sizes_in_qemu(top: Path, image_format: str = "qcow2") -> list[int]:
    chain = json.loads(run("qemu-img", "info", "--backing-chain", "--output=json", "-f", image_format, top))
    return [image["virtual-size"] for image in chain]


def agree(top: Path, chain: Chain) -> ExtentMap:
    """Asserts that all three judges say the same, and that `explain` agrees with the map it explains."""
    computed = chain.allocation_depth()
    assert computed == served(top)
    assert computed == mapped(top)
    assert [layer.size for layer in chain.layers] == sizes_in_qemu(top)
    for extent in list(computed)[:40]:
        for offset in (extent.offset, extent.end - 1):
            explanation = chain.explain(offset)
            assert explanation.allocation_depth == extent.value, explanation.text
    return computed


@pytest.mark.parametrize("recipe", recipes(), ids=lambda recipe: recipe.id)
def test_three_ways_to_the_same_map(recipe: ChainRecipe, tmp_path: Path) -> None:
    top = build(recipe, tmp_path)
    with open_chain(str(top), format="qcow2") as chain:
        computed = agree(top, chain)
        assert len(chain.layers) == len(recipe.layers)
        assert not any(layer.format_probed for layer in chain.layers)
    specs = [LayerSpec(layer.path, layer.format, layer.allocation_depth) for layer in chain.layers]
    with open_layers(specs) as chain:
        assert chain.allocation_depth() == computed


def test_the_matrix_is_covered() -> None:
    """The generator is random: that it reaches every corner is checked, not hoped."""
    chains = recipes()
    layers = [layer for chain in chains for layer in chain.layers]
    qcow2 = [layer for layer in layers if layer.format == "qcow2"]
    assert len({chain.layers for chain in chains}) >= 40
    assert {layer.cluster_bits for layer in qcow2} == set(range(9, 22))
    assert {layer.version for layer in qcow2} == {2, 3}
    assert {len(chain.layers) for chain in chains} == {1, 2, 3, 4, 5}
    assert {layer.naming for layer in layers} == {"relative", "absolute", "file", "json"}
    assert {chain.layers[0].format for chain in chains} == {"raw", "qcow2"}
    commands = {write.command for layer in qcow2 for write in layer.writes}
    assert commands == {"write -q", "write -q -c", "write -q -z", "write -q -z -u", "discard -q"}
    assert any(layer.snapshot_after is not None for layer in qcow2)
    assert any(layer.lazy_refcounts for layer in qcow2)
    assert any(layer.preallocation == "metadata" for layer in qcow2)
    assert any(layer.odd for layer in qcow2)
    assert any(layer.size % 512 for layer in layers if layer.format == "raw")
    pairs = [pair for chain in chains for pair in zip(chain.layers, chain.layers[1:], strict=False)]
    assert any(below.size < above.size for below, above in pairs)
    assert any(below.size > above.size for below, above in pairs)
