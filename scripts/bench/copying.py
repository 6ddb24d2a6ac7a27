"""Copies from an NBD export, side by side with nbdcopy and ``qemu-img convert``.

Run it as ``scripts/bench/copy``; ``--only raw,limited,qcow2,zstd,scattered`` for parts, ``--folder`` for where (a
tmpfs, so that no disk is measured). In ``limited`` the server gives 500 MB/s and no more, as a disk or a network would.
Every target is compared with the source once, before anything is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from measure import side_by_side, table

GIB = 1 << 30

HASHES = """
import os, sys
os.environ["OPENBLAS_NUM_THREADS"] = "1"
from qmpnbd.backup.copy import CopyOptions, copy
from qmpnbd.backup.raw_target import RawTarget
from qmpnbd.backup.sources import NbdSource
from qmpnbd.deadline import Deadline
deadline = Deadline(None)
with NbdSource.connect(sys.argv[1], deadline=deadline) as source:
    target = RawTarget.create(sys.argv[2], source.size)
    copy(source, target, source.content(deadline), CopyOptions(hashes=True), deadline)
    target.finish()
"""
LOOP = """
import os, sys
from qmpnbd.nbd.client import Client
with Client.connect(sys.argv[1], contexts=["base:allocation"]) as client:
    data = ((each.offset, each.length) for each in client.maps()["base:allocation"] if not each.value & 2)
    at, file = 0, os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT) if len(sys.argv) > 2 else None
    for _, piece in client.chunks(data):
        if file is not None:
            at += os.pwrite(file, piece, at)
"""


@contextmanager
def served(*command: str, path: Path) -> Iterator[str]:
    """Runs a server that listens on a UNIX socket; the URI."""
    with subprocess.Popen(command) as server:
        try:
            deadline = time.monotonic() + 10
            while f"{path}\n" not in Path("/proc/net/unix").read_text():
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{command[0]} does not listen")
                time.sleep(0.01)
            yield f"nbd+unix:///?socket={path}"
        finally:
            server.terminate()
            path.unlink(missing_ok=True)


def afresh(target: Path, *command: str) -> Sequence[str]:
    """Returns the command that writes a target which is not there before."""
    return ["sh", "-c", f"rm -f {shlex.quote(str(target))}; exec {shlex.join(command)}"]


def half_full(folder: Path, gib: int) -> Path:
    """Makes a raw image of which every other 4 MiB are data that nothing can make smaller."""
    image, block = folder / "half.raw", os.urandom(4 << 20)
    with image.open("wb") as file:
        file.truncate(gib * GIB)
        for offset in range(0, gib * GIB, 2 * len(block)):
            file.seek(offset)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())  # or the kernel would write it back while it is read
    return image


def whole(uri: str, folder: Path, kind: str, image: Path, rounds: int) -> None:
    """Times copies of a whole disk, and prints the table."""
    target = folder / "target"
    convert = ["qemu-img", "convert", "-f", "raw"]
    ours = ["qmpnbd", "copy", uri, str(target)]
    commands: dict[str, Sequence[str]]
    if kind in {"raw", "limited"}:
        commands = {
            "`nbdcopy URI FILE`": ["nbdcopy", uri, str(target)],
            "`qemu-img convert -O raw`": [*convert, "-O", "raw", uri, str(target)],
            "`qmpnbd copy`": [*ours, "--target-format", "raw"],
            "the same, with hashes": [sys.executable, "-c", HASHES, uri, str(target)],
        }
    elif kind == "qcow2":
        commands = {
            "`qemu-img convert -O qcow2`": [*convert, "-O", "qcow2", uri, str(target)],
            "`qmpnbd copy`": [*ours, "--target-format", "qcow2"],
        }
    else:
        packed = ["-O", "qcow2", "-c", "-o", "compression_type=zstd"]
        commands = {
            "`qemu-img convert -c`": [*convert, *packed, uri, str(target)],
            "`qemu-img convert -c -W -m 16`": [*convert, *packed, "-W", "-m", "16", uri, str(target)],
            "`qmpnbd copy --compress`": [*ours, "--target-format", "qcow2", "--compress"],
        }
    form = "raw" if kind in {"raw", "limited"} else "qcow2"
    fresh = {name: afresh(target, *command) for name, command in commands.items()}
    for command in fresh.values():
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["qemu-img", "compare", "-q", "-f", "raw", "-F", form, image, target], check=True)
    print(table(f"To {kind}", side_by_side(fresh, rounds), next(iter(fresh))), flush=True)
    target.unlink()


def scattered(folder: Path, percent: float, rounds: int) -> None:
    """Times 64 KiB blocks that are scattered over 1 TiB, and prints the table."""
    target, path = folder / "target", folder / "socket"
    plugin = ["sparse-random", "size=1T", f"percent={percent:g}", "runlength=65536", "seed=1"]
    with served("nbdkit", "-f", "-U", str(path), *plugin, path=path) as uri:
        commands = {
            "a loop that reads and writes": afresh(target, sys.executable, "-c", LOOP, uri, str(target)),
            "a loop that reads and drops": [sys.executable, "-c", LOOP, uri],
            "`qmpnbd copy`, to qcow2": afresh(target, "qmpnbd", "copy", uri, str(target), "--target-format", "qcow2"),
        }
        results = side_by_side(commands, rounds)
    print(table(f"64 KiB blocks, {percent:g} % of 1 TiB", results, next(iter(commands))))
    target.unlink()


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="raw,limited,qcow2,zstd,scattered")
    parser.add_argument("--gib", type=int, default=8)
    parser.add_argument("--percent", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=None)
    arguments = parser.parse_args()
    kinds = arguments.only.split(",")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-copy-", dir=arguments.folder)))
        if "scattered" in kinds:
            scattered(folder, arguments.percent, arguments.rounds)
        if set(kinds) - {"scattered"}:
            image, path, slow = half_full(folder, arguments.gib), folder / "socket", folder / "slow"
            command = ("qemu-nbd", "-r", "-t", "-e", "0", "-f", "raw", "-k", str(path), str(image))
            uri = stack.enter_context(served(*command, path=path))
            limited = ("nbdkit", "-f", "-r", "-U", str(slow), "--filter=rate", "file", str(image), "rate=4G")
            slow_uri = stack.enter_context(served(*limited, path=slow))
            for kind in [kind for kind in kinds if kind != "scattered"]:
                whole(slow_uri if kind == "limited" else uri, folder, kind, image, arguments.rounds)


if __name__ == "__main__":
    main()
