"""A whole validation of a large disk against ``nbdinfo --map=qemu:allocation-depth``, and many small images in one run.

The large disk is that of the benchmark of chains: 1 TiB, four layers, 2.2 million extents, standing still. Ours reads
two maps from the server, computes both from the files and compares a sample of the content; nbdinfo reads one map. Each
side has a storage daemon of its own: ours is the one that the command starts, and its time counts; nbdinfo's runs
already. Prints Markdown.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from chain import four_layers
from measure import side_by_side, table

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


def large(folder: Path) -> None:
    """Prints the comparison on the large disk."""
    image = four_layers(folder)
    with served(image, folder) as uri:
        commands = {THEIRS: ["nbdinfo", "--map=qemu:allocation-depth", "--json", uri]}
        commands["qmpnbd validate"] = [*OURS, "--json", str(image)]
        commands["qmpnbd validate, depth alone"] = [*OURS, "--json", "--compare=depth", "--content=none", str(image)]
        results = side_by_side(commands)
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
    print("| images | compared | seconds | images/s |\n|---|---|---|---|")
    for words, options in (("all but whole content", []), ("depth alone", ["--compare=depth", "--content=none"])):
        began = time.monotonic()
        subprocess.run([*OURS, *options, str(first.parent)], check=True, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - began
        print(f"| {count} | {words} | {seconds:.1f} | {count / seconds:.0f} |")


def main() -> None:
    """Runs the cases asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=["large", "small", []], help="default: both")
    parser.add_argument("--images", type=int, default=1000, help="small images (default: 1000)")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-validate-"))
    try:
        if "large" in (arguments.cases or ["large"]):
            large(folder)
        if "small" in (arguments.cases or ["small"]):
            small(folder, arguments.images)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
