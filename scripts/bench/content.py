"""The content of a chain of 4 GiB, read by us and by ``qemu-img convert``, side by side. Prints Markdown.

qemu-img has no target that throws away what it gets: ``null-co`` takes writes and does nothing with them. Content is
compared, by checksum, before anything is timed.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from measure import side_by_side, table

from qmpnbd.images.files import open_chain

GIB = 1 << 30
SIZE = 4 * GIB
WINDOW = 1 << 22
PART = 1 << 22  # bytes of a layer that are written or left out together

PIECES = """
import sys
from qmpnbd.images.files import open_chain
with open_chain(sys.argv[1]) as chain:
    for piece in chain.read_pieces(0, chain.size):
        pass
"""
SINGLE = f"""
import sys
from qmpnbd.images.files import open_chain
with open_chain(sys.argv[1]) as chain:
    buffer = memoryview(bytearray({WINDOW}))
    for offset in range(0, chain.size, {WINDOW}):
        chain.read_into(offset, buffer[: min({WINDOW}, chain.size - offset)])
"""


def make(folder: Path, *, compress: bool = False) -> Path:
    """Four layers that together hold about three quarters of the disk."""
    rng, below = np.random.default_rng(4), None
    noise = rng.integers(0, 256, size=PART, dtype=np.uint8).tobytes()
    for number in range(4):
        raw, path = folder / "layer.raw", folder / f"layer{number}.qcow2"
        with raw.open("wb") as file:
            file.truncate(SIZE)
            for place in np.flatnonzero(rng.random(SIZE // PART) < 0.3).tolist():
                file.seek(place * PART)
                file.write(number.to_bytes(8, "big") + place.to_bytes(8, "big") + noise[16:])
        packed = ["-c"] if compress else []
        subprocess.run(["qemu-img", "convert", "-O", "qcow2", *packed, str(raw), str(path)], check=True)
        if below is not None:
            rebase = ["qemu-img", "rebase", "-u", "-b", below.name, "-F", "qcow2", str(path)]
            subprocess.run(rebase, check=True)
        below = path
    raw.unlink()
    assert below is not None
    return below


def same(path: Path, folder: Path) -> None:
    """Ends the benchmark if QEMU reads something else."""
    plain = folder / "plain.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(path), str(plain)], check=True)
    ours, theirs = hashlib.blake2b(), hashlib.blake2b()
    with open_chain(str(path)) as chain, plain.open("rb") as file:
        for piece in chain.read_pieces(0, chain.size):
            ours.update(piece)
            theirs.update(file.read(len(piece)))
    plain.unlink()
    if ours.digest() != theirs.digest():
        raise SystemExit(f"{path}: our content is not qemu-img's")


def main() -> None:
    """Runs the benchmark in a folder given on the command line, or in one of its own."""
    base = sys.argv[1] if len(sys.argv) > 1 else None
    folder = Path(tempfile.mkdtemp(prefix="bench-content-", dir=base))
    null = f"json:{{'driver':'raw','size':{SIZE},'file':{{'driver':'null-co','size':{SIZE}}}}}"
    try:
        path = make(folder)
        same(path, folder)
        reference = "qemu-img convert -O raw, to null-co"
        commands = {
            reference: ["qemu-img", "convert", "-n", "-O", "raw", str(path), null],
            "qmpnbd, read_pieces": [sys.executable, "-c", PIECES, str(path)],
            "qmpnbd, read_into, 4 MiB each": [sys.executable, "-c", SINGLE, str(path)],
        }
        print(table("content of a chain, 4 layers, 4 GiB", side_by_side(commands), reference))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
