"""Chains read by us and by ``qemu-img map``, side by side. Prints Markdown.

Each case is timed twice: the work inside a process that only computes (start-up of the interpreter taken off), and the
whole command with its output. Answers are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).parent))

from images import CLUSTER, write_qcow2
from measure import ROUNDS, side_by_side, table

from qmpnbd.images.files import open_chain

TIB = 1 << 40
POOL = 1024  # clusters: 64 MiB of data a layer


def random_runs(rng: np.random.Generator, clusters: int, share: float, longest: int) -> npt.NDArray[np.bool_]:
    """Flags in runs of 1 to `longest` clusters, of which a share is set."""
    lengths = rng.integers(1, longest + 1, size=2 * clusters // longest + 64)
    return np.repeat(rng.random(lengths.size) < share, lengths)[:clusters]


def four_layers(folder: Path) -> Path:
    """1 TiB, about 2.2 million extents."""
    rng, below = np.random.default_rng(4), None
    for number in range(4):
        path = folder / f"four{number}.qcow2"
        write_qcow2(path, random_runs(rng, TIB // CLUSTER, 0.35, 14), below, pool=POOL)
        below = path.name
    return path


def hundred_layers(folder: Path) -> Path:
    """1 TiB; every layer holds a little in a tenth of its L2 tables, as a daily snapshot would."""
    rng, below, per_table = np.random.default_rng(100), None, CLUSTER // 8
    for number in range(100):
        flags = random_runs(rng, TIB // CLUSTER, 0.02, 8).reshape(-1, per_table)
        flags[rng.random(flags.shape[0]) >= 0.1] = False
        path = folder / f"hundred{number}.qcow2"
        write_qcow2(path, flags.reshape(-1), below, pool=POOL)
        below = path.name
    return path


def empty(folder: Path) -> Path:
    """64 TiB of nothing."""
    path = folder / "empty.qcow2"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", str(path), "64T"]
    subprocess.run(command, check=True)
    return path


def work(path: Path) -> int:
    """Everything that `qemu-img map` says, without turning it into text; returns the number of extents."""
    with open_chain(str(path)) as chain:
        return sum(batch.starts.size for batch in chain.map_entries())


def depth(path: Path) -> int:
    """The allocation depth alone."""
    with open_chain(str(path)) as chain:
        return len(chain.allocation_depth())


def seconds(function: Callable[[Path], int], path: Path) -> tuple[float, int]:
    """Median of so many calls after one that is not counted, and what it returned."""
    times = []
    result = function(path)
    for _ in range(ROUNDS):
        started = time.monotonic()
        function(path)
        times.append(time.monotonic() - started)
    return statistics.median(times), result


def compare(path: Path) -> None:
    """Ends the benchmark if qemu-img says something else."""
    done = subprocess.run(["qemu-img", "map", "--output=json", str(path)], check=True, capture_output=True)
    theirs = json.loads(done.stdout)
    with open_chain(str(path)) as chain:
        starts = np.concatenate([batch.starts for batch in chain.map_entries()]).tolist()
    if starts != [entry["start"] for entry in theirs]:
        raise SystemExit(f"{path}: our map is not qemu-img's")


def report(name: str, path: Path) -> None:
    """Prints one case."""
    # Elsewhere: what this process once needed would count as the peak of every command it starts.
    subprocess.run([sys.executable, __file__, "--compare", str(path)], check=True)
    chain_command = [sys.executable, "-m", "qmpnbd", "chain", "--json", str(path)]
    commands = {"qemu-img map --output=json": ["qemu-img", "map", "--output=json", str(path)]}
    commands["qmpnbd chain --json"] = chain_command
    results = side_by_side(commands)
    theirs = results["qemu-img map --output=json"].wall
    print(table(name, results, "qemu-img map --output=json"))
    for what, function in (("entries as qemu-img maps them", work), ("allocation depth", depth)):
        command = [sys.executable, __file__, "--time", function.__name__, str(path)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        own, count, peak = done.stdout.split()
        faster = f"{theirs / float(own):.1f} x faster, peak {peak} MiB"
        print(f"{what}, in process: {float(own):.3f} s for {count} extents, {faster}\n", flush=True)


CASES = {"four": four_layers, "hundred": hundred_layers, "empty": empty}


def main() -> None:
    """Runs the cases asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", choices=["four", "hundred", "empty", []], help="default: all")
    parser.add_argument("--check", action="store_true", help="have qemu-img check the images")
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--compare", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--time", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        print(CASES[arguments.make[0]](Path(arguments.make[1])))
        return
    if arguments.compare:
        compare(arguments.compare)
        return
    if arguments.time:
        own, count = seconds({"work": work, "depth": depth}[arguments.time[0]], Path(arguments.time[1]))
        print(own, count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
        return
    folder = Path(tempfile.mkdtemp(prefix="bench-chain-"))
    try:
        for case in arguments.cases or CASES:
            made = subprocess.run(
                [sys.executable, __file__, "--make", case, str(folder)], check=True, capture_output=True, text=True
            )
            path = Path(made.stdout.strip())
            if arguments.check:
                for image in sorted(folder.glob(f"{case}*.qcow2")):
                    subprocess.run(["qemu-img", "check", "-q", str(image)], check=True)
            report(f"{case}: {CASES[case].__doc__}", path)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
