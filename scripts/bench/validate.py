"""A whole validation of a large disk against ``nbdinfo --map=qemu:allocation-depth``, and many small images in one run.

The large disk is that of the benchmark of chains: 1 TiB, four layers, 2.2 million extents, standing still. Ours reads
two maps from the server, computes both from the files and compares a sample of the content; nbdinfo reads one map. Each
side has a storage daemon of its own: ours is the one that the command starts, and its time counts; nbdinfo's runs
already. Peak memory is that of the larger process: of ours, or of the storage daemon that it starts. Prints Markdown.

On a busy machine `chrt -r 1 scripts/bench/validate --rounds 2` keeps others from being measured, the daemons included.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from chain import four_layers
from measure import ROUNDS, run, side_by_side, table

from qmpnbd.validate.fleet import usable_cpus

OURS = [sys.executable, "-m", "qmpnbd", "validate"]
THEIRS = "nbdinfo --map=qemu:allocation-depth"


@contextlib.contextmanager
def served(image: Path, folder: Path) -> Iterator[str]:
    """Serves an image by a storage daemon and yields its URI."""
    path = folder / "nbd"
    file = {"driver": "file", "filename": str(image)}
    node = json.dumps({"driver": "qcow2", "node-name": "top", "read-only": True, "file": file})
    command = ["qemu-storage-daemon", "--blockdev", node, "--nbd-server", f"addr.type=unix,addr.path={path}"]
    command += ["--export", "type=nbd,id=x,node-name=top,name=x,allocation-depth=on"]
    with subprocess.Popen(command) as child:
        while not path.exists():
            if child.poll() is not None:
                raise SystemExit("the storage daemon does not start")
            time.sleep(0.05)
        yield f"nbd+unix:///x?socket={path}"
        child.terminate()


def large(folder: Path, rounds: int) -> None:
    """Prints the comparison on the large disk."""
    # In a process of its own: the kernel counts what this one has used at its peak for every child it starts.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        image = pool.apply(four_layers, (folder,))
    with served(image, folder) as uri:
        commands = {THEIRS: ["nbdinfo", "--map=qemu:allocation-depth", "--json", uri]}
        commands["qmpnbd validate, depth alone"] = [*OURS, "--json", "--compare=depth", "--content=none", str(image)]
        commands["qmpnbd validate"] = [*OURS, "--json", str(image)]
        # Few rounds need none to warm up: nothing is read from a disk, the image has just been written.
        results = side_by_side(commands, rounds, warm_up=rounds > 2)
    print(table("1 TiB, four layers, 2.2 million extents, standing still", results, THEIRS))


def small(folder: Path, count: int) -> None:
    """Prints how many small images a second are validated."""
    first = folder / "many" / "0000.qcow2"
    first.parent.mkdir()
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(first), "64M"], check=True)
    writes = ("write -q -P 1 1M 1M", "write -q -z 10M 64k", "write -q -P 2 20M 192k", "write -q -P 3 30M 64k")
    subprocess.run(["qemu-io", *(word for write in writes for word in ("-c", write)), str(first)], check=True)
    for number in range(1, count):
        shutil.copy(first, first.with_name(f"{number:04}.qcow2"))
    print(f"**{count:,} images of 64 MiB in one run, {usable_cpus()} jobs**\n")
    print("| compared | seconds | images/s | CPU seconds | peak MiB |\n|---|---|---|---|---|")
    for words, options in (("all but whole content", []), ("depth alone", ["--compare=depth", "--content=none"])):
        once = run([*OURS, *options, str(first.parent)])
        print(f"| {words} | {once.wall:.1f} | {count / once.wall:.0f} | {once.cpu:.1f} | {once.memory:.0f} |")


def main() -> None:
    """Runs the cases asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=["large", "small", []], help="default: both")
    parser.add_argument("--images", type=int, default=1000, help="small images (default: 1000)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of the large disk (default: {ROUNDS})")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-validate-"))
    try:
        if "large" in (arguments.cases or ["large"]):
            large(folder, arguments.rounds)
        if "small" in (arguments.cases or ["small"]):
            small(folder, arguments.images)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
