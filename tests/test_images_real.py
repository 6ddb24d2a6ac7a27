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

from qmpnbd.errors import ImageError
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


def mapped(top: Path, sizes: Sequence[int], image_format: str = "qcow2") -> tuple[ExtentMap, bool]:
    """What qemu-img says, in NBD's numbers; and whether it tells what nobody holds apart, which 5.2 does not.

    It counts from 0. Past the end of a short backing file it names the layer above, where NBD names the short one.
    """
    entries = json.loads(run("qemu-img", "map", "--output=json", "-f", image_format, top))
    tells = "present" in entries[0]
    pieces = (piece for entry in entries for piece in _pieces({"present": True, **entry}, sizes))
    return ExtentMap.of_extents(pieces), tells


def _pieces(entry: dict[str, int], sizes: Sequence[int]) -> Iterable[tuple[int, int]]:
    start, length, depth = entry["start"], entry["length"], entry["depth"]
    if entry["present"]:
        return [(length, depth + 1)]
    if depth + 1 == len(sizes):
        return [(length, 0)]
    inside = min(max(sizes[depth + 1] - start, 0), length)
    return [(inside, 0), (length - inside, depth + 2)]


def blurred(depths: ExtentMap, sizes: Sequence[int]) -> ExtentMap:
    """What qemu-img 5.2 can say of a map: what nobody holds is the last layer's, what is too short the one's above."""
    pieces: list[tuple[int, int]] = []
    for extent in depths:
        number = extent.value or len(sizes)
        inside = min(max(sizes[number - 1] - extent.offset, 0), extent.end - extent.offset)
        pieces += [(inside, number), (extent.end - extent.offset - inside, number - 1)]
    return ExtentMap.of_extents(pieces)


def sizes_in_qemu(top: Path, image_format: str = "qcow2") -> list[int]:
    chain = json.loads(run("qemu-img", "info", "--backing-chain", "--output=json", "-f", image_format, top))
    return [image["virtual-size"] for image in chain]


def agree(top: Path, chain: Chain) -> ExtentMap:
    """Asserts that all three judges say the same, and that `explain` agrees with the map it explains."""
    computed = chain.allocation_depth()
    assert computed == served(top)
    sizes = sizes_in_qemu(top)
    assert [layer.size for layer in chain.layers] == sizes
    said, tells = mapped(top, sizes)
    assert said == (computed if tells else blurred(computed, sizes))
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


def image(path: str, mark: int, backing: str = "", recorded: str = "qcow2") -> None:
    """An image of 1 MiB with data in one cluster, a different one for each image, so that its map tells it apart."""
    behind = ("-u", "-b", backing, "-F", recorded) if backing else ()
    run("qemu-img", "create", "-q", "-f", "qcow2", *behind, path, "1M")
    if not backing:
        run("qemu-io", "-f", "qcow2", "-c", f"write -q {mark * 65536} 64k", path)


NAMES = [
    ("base.qcow2", "qcow2"),
    ("../images/./base.qcow2", "qcow2"),
    ("file:base.qcow2", "qcow2"),
    ("link.qcow2", "qcow2"),
    ("base.qcow2", "raw"),
    ("sub/a:b.qcow2", "qcow2"),
    ('json:{"driver":"qcow2","file":{"driver":"file","filename":"base.qcow2"}}', "qcow2"),
    ('json:{"driver":"qcow2","file":{"driver":"file","filename":"base.qcow2"}}', "raw"),
    ('json:{"driver":"raw","file.filename":"base.qcow2"}', "qcow2"),
    ('json:{"file.filename":"base.qcow2","backing":null}', "qcow2"),
    ('json:{"file.filename":"file:base.qcow2"}', "qcow2"),
    ("json:{'driver':'qcow2','file.filename':'base.qcow2'}", "qcow2"),
    ("base.qcow2", "file"),
    ('json:{"driver":"raw","offset":65536,"size":"131072","file.filename":"base.qcow2"}', "raw"),
    ('json:{"driver":"raw","offset":512,"file.filename":"base.qcow2"}', "raw"),
]


@pytest.mark.parametrize(("name", "recorded"), NAMES)
def test_names_lead_to_the_file_qemu_opens(
    name: str, recorded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of the same name waits in every wrong place, with another map."""
    monkeypatch.chdir(tmp_path)
    for folder in ("images/sub", "elsewhere"):
        Path(folder).mkdir(parents=True)
    places = ("images/base.qcow2", "base.qcow2", "images/file:base.qcow2", "file:base.qcow2", "images/sub/a:b.qcow2")
    for mark, place in enumerate((*places, "images/deeper.qcow2", "elsewhere/deeper.qcow2"), start=1):
        image(f"./{place}", mark)
    image("elsewhere/link.qcow2", 0, "deeper.qcow2")
    Path("images/link.qcow2").symlink_to("../elsewhere/link.qcow2")
    top = Path("images/top.qcow2")
    image(str(top), 0, name, recorded)
    with open_chain(str(top)) as chain:
        assert set(agree(top, chain).values.tolist()) - {0, 1}, "the map must show which file was opened"


def test_a_real_image_cut_anywhere(tmp_path: Path) -> None:
    """The right map, or a documented error."""
    cut, top = tmp_path / "cut.qcow2", tmp_path / "top.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", top, "8M")
    run("qemu-io", "-f", "qcow2", *("-c", "write -q -z 7M 64k", "-c", "write -q 5M 9k", "-c", "write -q 0 20k"), top)
    whole = top.read_bytes()
    with open_chain(str(top)) as chain:
        right = agree(top, chain)
    lengths = [*range(0, len(whole), 509), *range(len(whole) - 4200, len(whole))]
    complete = 0
    for length in lengths:
        cut.write_bytes(whole[:length])
        try:
            with open_chain(str(cut), format="qcow2") as chain:
                assert chain.allocation_depth() == right, length
            complete += 1
        except ImageError:
            continue
    assert 0 < complete < len(lengths)
