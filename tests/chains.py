"""Backing chains to test with: recipes from a seeded generator, built by qemu-img and qemu-io.

A recipe is plain data with a readable id, so it can be a pytest parameter; `build` turns it into files::

    @pytest.mark.parametrize("recipe", recipes(), ids=lambda recipe: recipe.id)
    def test_something(recipe: ChainRecipe, tmp_path: Path) -> None:
        top = build(recipe, tmp_path)

The option matrix: cluster sizes 512 to 2 MiB, versions 2 and 3, one to five layers, raw or qcow2 at the bottom,
extended L2 entries, external data files, zlib and zstd, backing files shorter, longer and unaligned, data, zeroes,
discards and compressed writes, internal snapshots, commits, relative, absolute, ``file:`` and ``json:`` names,
preallocation of metadata and data, lazy refcounts, persistent bitmaps.
"""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

SEED = 20250101
COUNT = 60
CLUSTER_BITS = range(9, 22)
BITMAP = "b0"
"""The name of all bitmaps."""

Naming: TypeAlias = Literal["relative", "absolute", "file", "json"]


@dataclass(frozen=True)
class Write:
    """One change of a layer: a qemu-io command without its offset and length."""

    command: str
    offset: int
    length: int

    def __str__(self) -> str:
        return f"{self.command} {self.offset} {self.length}"


@dataclass(frozen=True)
class LayerRecipe:
    """One file of a chain.

    Attributes:
        naming: how the layer above names this one.
        snapshot_after: an internal snapshot is taken after so many writes; None for none.
        committed: what it holds is written to the layer below too, once it was made.
        bitmap: granularity of a persistent bitmap that records all writes; 0 for none.
        odd: bytes taken from the size in a qcow2 header afterwards; qemu-img itself only makes whole sectors.
    """

    format: Literal["qcow2", "raw"]
    size: int
    cluster_bits: int = 16
    version: Literal[2, 3] = 3
    extended_l2: bool = False
    data_file: Literal["", "plain", "raw"] = ""
    compression: Literal["zlib", "zstd"] = "zlib"
    lazy_refcounts: bool = False
    preallocation: str = "off"
    writes: tuple[Write, ...] = ()
    snapshot_after: int | None = None
    committed: bool = False
    odd: int = 0
    bitmap: int = 0
    naming: Naming = "relative"


@dataclass(frozen=True)
class ChainRecipe:
    """A chain; `layers` from the base up, as they are made."""

    id: str
    layers: tuple[LayerRecipe, ...]


def recipes(count: int = COUNT, seed: int = SEED, *, data_files: bool = False) -> list[ChainRecipe]:
    """Returns `count` different chains, the same ones every time; external data files only where asked for."""
    return [_chain(number, random.Random(seed + number), data_files) for number in range(count)]


def build(recipe: ChainRecipe, folder: Path) -> Path:
    """Makes the files of a chain in `folder` and returns the active layer's.

    Raises:
        FileNotFoundError: qemu-img or qemu-io is not installed. A missing tool must not turn tests green.
        RuntimeError: one of them failed.
    """
    paths = [folder / _file_name(number, recipe) for number in range(len(recipe.layers))]
    for number, layer in enumerate(recipe.layers):
        _create(paths[number], layer, paths[number - 1] if number else None, recipe.layers[number - 1])
    script: list[str] = []
    for layer, path in zip(recipe.layers, paths, strict=True):
        cut = len(layer.writes) if layer.snapshot_after is None else layer.snapshot_after
        script += _changes(path, layer, layer.writes[:cut])
        if layer.snapshot_after is not None:
            script = _play(script)
            run("qemu-img", "snapshot", "-q", "-c", "before", path)
            script += _changes(path, layer, layer.writes[cut:])
        if layer.committed:
            script = _play(script)
            run("qemu-img", "commit", "-q", "-d", "-f", "qcow2", path)
    _play(script)
    for layer, path in zip(recipe.layers, paths, strict=True):
        if layer.odd:
            with path.open("r+b") as file:
                file.seek(24)
                file.write((layer.size - layer.odd).to_bytes(8, "big"))
    for path in folder.iterdir():
        # The file system calls what was preallocated data while it is written back, and a hole afterwards.
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return paths[-1]


def _file_name(number: int, recipe: ChainRecipe) -> str:
    last = len(recipe.layers) - 1
    name = "top" if number == last else "base" if number == 0 else f"mid{number}"
    return f"{name}.{recipe.layers[number].format}"


SECRET = ("--object", "secret,id=s,data=123456")
"""What encrypted images are opened with."""


def make_encrypted(path: Path | str, kind: str, options: str, *rest: object) -> None:
    """Makes a qcow2 file whose data is encrypted, by ``luks`` or ``aes``; `rest` is its size, or names of other files.

    Raises:
        RuntimeError: qemu-img failed.
    """
    more = f"encrypt.format={kind},encrypt.key-secret=s,{options}" + (",encrypt.iter-time=10" if kind == "luks" else "")
    create_with_key("-f", "qcow2", "-o", more, path, *rest)


def create_with_key(*arguments: object) -> None:
    """Has ``qemu-img create`` make an encrypted image.

    Raises:
        RuntimeError: it failed.
    """
    for attempt in range(20):
        try:
            run("qemu-img", "create", "-q", *SECRET, *arguments)
            break
        except RuntimeError as error:
            # To choose LUKS's iterations QEMU measures its own CPU time, and gives up where that is too short to tell.
            if attempt == 19 or "accurate CPU usage" not in str(error):
                raise


def encrypted_options(path: Path | str, kind: str) -> str:
    """Returns what opens such a file with ``--image-opts``."""
    return f"driver=qcow2,encrypt.format={kind},encrypt.key-secret=s,file.driver=file,file.filename={path}"


def run(tool: str, *arguments: object, cwd: Path | None = None) -> str:
    """Runs a tool and returns its standard output.

    Raises:
        FileNotFoundError: the tool is not installed.
        RuntimeError: it failed.
    """
    found = shutil.which(tool)
    if found is None:
        raise FileNotFoundError(f"{tool} is not installed: apt install qemu-utils libnbd-bin")
    command = [found, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=cwd)
    if done.returncode:
        raise RuntimeError(f"{command} ended with {done.returncode}: {done.stderr or done.stdout}")
    return done.stdout


def converted(top: Path, folder: Path, image_format: str = "qcow2") -> bytes:
    """The disk as QEMU reads it."""
    run("qemu-img", "convert", "-f", image_format, "-O", "raw", top, folder / "converted.raw")
    return (folder / "converted.raw").read_bytes()


@functools.cache
def knows_zstd(qemu_img: str) -> bool:
    """Whether a qemu-img was built with zstd; Debian's 5.2 was not, and makes the same chains with zlib."""
    with tempfile.TemporaryDirectory() as folder:
        command = [qemu_img, "create", "-q", "-f", "qcow2", "-o", "compression_type=zstd", f"{folder}/a", "1M"]
        return subprocess.run(command, capture_output=True, check=False, timeout=60).returncode == 0


def _create(path: Path, layer: LayerRecipe, below: Path | None, below_recipe: LayerRecipe) -> None:
    if layer.format == "raw":
        with path.open("wb") as file:
            file.truncate(layer.size)
        return
    options = [f"cluster_size={1 << layer.cluster_bits}", f"compat={'0.10' if layer.version == 2 else '1.1'}"]
    if layer.extended_l2:
        options.append("extended_l2=on")
    if layer.data_file:
        options.append(f"data_file={path.absolute()}.data")
        options.append(f"data_file_raw={'on' if layer.data_file == 'raw' else 'off'}")
    if layer.compression != "zlib" and knows_zstd(shutil.which("qemu-img") or ""):
        options.append(f"compression_type={layer.compression}")
    if layer.lazy_refcounts:
        options.append("lazy_refcounts=on")
    if layer.preallocation != "off":
        options.append(f"preallocation={layer.preallocation}")
    backing: list[object] = []
    if below is not None:
        backing = ["-u", "-F", below_recipe.format, "-b", _name(below, below_recipe)]
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", ",".join(options), *backing, path, layer.size)
    if layer.bitmap:
        run("qemu-img", "bitmap", "--add", "-g", layer.bitmap, path, BITMAP)


def _name(path: Path, layer: LayerRecipe) -> str:
    match layer.naming:
        case "relative":
            return path.name
        case "absolute":
            return str(path.absolute())
        case "file":
            return f"file:{path.absolute()}"
        case "json":
            file = {"driver": "file", "filename": str(path.absolute())}
            return "json:" + json.dumps({"driver": layer.format, "file": file})


def _changes(path: Path, layer: LayerRecipe, writes: tuple[Write, ...]) -> list[str]:
    """Returns what to tell qemu-io to change a layer."""
    return [f"open -o driver={layer.format},cache.no-flush=on {path}", *map(str, writes), "close"] if writes else []


def _play(script: list[str]) -> list[str]:
    """Has one qemu-io carry out a script: starting a process costs more than what it does."""
    if script:
        output = run("qemu-io", *(part for command in script for part in ("-c", command)))
        if "failed" in output or "rror" in output or "no file open" in output:
            raise RuntimeError(f"qemu-io {script}: {output}")
    return []


def _chain(number: int, dice: random.Random, data_files: bool) -> ChainRecipe:
    count = number % 5 + 1
    base_format: Literal["qcow2", "raw"] = "raw" if count > 1 and dice.random() < 0.35 else "qcow2"
    # Every cluster size comes up; the disk is some tens of clusters, and with small ones many L2 tables.
    first_bits = CLUSTER_BITS[number % len(CLUSTER_BITS)]
    size = max(1 << 20, 24 << first_bits)
    layers: list[LayerRecipe] = []
    for height in range(count):
        bits = first_bits if dice.random() < 0.6 else dice.choice([bits for bits in CLUSTER_BITS if bits <= 18])
        raw = height == 0 and base_format == "raw"
        layer = _layer(dice, size, bits, raw=raw, has_backing=height > 0)
        if layer.committed and layers[-1].size < layer.size:
            layer = replace(layer, committed=False)  # QEMU would have to grow it, which it does not always do
        layers.append(layer if data_files else replace(layer, data_file=""))
    if layers[-1].version == 3 and not layers[-1].odd and dice.random() < 0.4:
        layers[-1] = replace(layers[-1], bitmap=dice.choice([512, 4096, 65536]))
    parts = [_word(layer) for layer in reversed(layers)]
    return ChainRecipe(f"{number:02}-{'-'.join(parts)}-{1 << layers[-1].cluster_bits}", tuple(layers))


def _word(layer: LayerRecipe) -> str:
    """Returns a layer in a few letters, for the id of its chain."""
    if layer.format == "raw":
        return "raw"
    letters = {"e": layer.extended_l2, "d": layer.data_file, "s": layer.snapshot_after is not None}
    return f"v{layer.version}" + "".join(letter for letter, is_so in letters.items() if is_so)


def _layer(dice: random.Random, size: int, bits: int, *, raw: bool, has_backing: bool) -> LayerRecipe:
    own = size
    match dice.randrange(5):
        case 0:
            own = dice.randrange(size // 3, size)
        case 1:
            own = size + dice.randrange(size // 2)
        case 2:
            own = dice.randrange(size // 2, size) // 512 * 512 + 512
    if not raw:
        own = own // 512 * 512
    version: Literal[2, 3] = dice.choice([2, 3, 3, 3])
    extended = version == 3 and bits >= 14 and dice.random() < 0.4
    data_file: Literal["", "plain", "raw"] = ""
    if version == 3 and not raw and dice.random() < 0.2:
        data_file = "plain" if has_backing else dice.choice(["plain", "raw"])
    preallocation = "off"
    if not has_backing and not raw and dice.random() < 0.2:
        preallocation = dice.choice(["metadata", "metadata", "falloc", "full"])
    writes = tuple(_write(dice, own, bits) for _ in range(0 if dice.random() < 0.1 else dice.randrange(1, 16)))
    if writes and not raw and preallocation == "off" and not data_file:
        writes = (*_compressed(dice, own, bits), *writes)
    return LayerRecipe(
        format="raw" if raw else "qcow2",
        size=own,
        cluster_bits=bits,
        version=version,
        extended_l2=extended and not raw,
        data_file=data_file,
        compression=dice.choice(["zlib", "zstd"]) if version == 3 and not raw else "zlib",
        lazy_refcounts=version == 3 and dice.random() < 0.2,
        preallocation=preallocation,
        writes=writes,
        snapshot_after=dice.randrange(len(writes))
        if writes and not raw and not data_file and dice.random() < 0.2
        else None,
        committed=has_backing and dice.random() < 0.1,
        odd=0 if raw or dice.random() < 0.8 else dice.randrange(1, 512),
        naming=dice.choice(["relative", "relative", "absolute", "file", "json"]),
    )


def _compressed(dice: random.Random, size: int, bits: int) -> list[Write]:
    """Compressed writes come first and never twice: QEMU cannot compress into a cluster that is in use."""
    clusters = range(size >> bits)
    chosen = dice.sample(clusters, min(len(clusters), dice.choice([0, 1, 4])))
    return [Write("write -q -c", cluster << bits, 1 << bits) for cluster in chosen]


def _write(dice: random.Random, size: int, bits: int) -> Write:
    command = dice.choice(["write -q", "write -q", "write -q -z", "write -q -z -u", "discard -q"])
    sectors, cluster = size // 512, (1 << bits) // 512
    start = dice.randrange(sectors)
    if dice.random() < 0.5:
        start = start // cluster * cluster
        length = cluster * dice.choice([1, 1, 2, 5 if bits < 19 else 1])
    else:
        length = dice.randrange(1, (3 if bits < 19 else 1) * cluster + 1)
    return Write(command, start * 512, min(length, sectors - start) * 512)
