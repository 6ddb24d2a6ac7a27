"""Commands timed side by side: in turn, after a warm-up, with CPU time and peak memory as the kernel counted them."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ROUNDS = 5

_SMALL = """
import json, os, subprocess, sys, time
started = time.monotonic()
child = subprocess.Popen(sys.argv[2:])
_, status, usage = os.wait4(child.pid, 0)
child.returncode = os.waitstatus_to_exitcode(status)
told = time.monotonic() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, child.returncode
os.write(int(sys.argv[1]), json.dumps(told).encode())
"""
"""Runs the command: the peak that the kernel tells of a process begins with that of the one it was forked from."""


@dataclass(frozen=True)
class Run:
    """One run of a command.

    Attributes:
        wall: seconds.
        cpu: seconds of processor time.
        memory: peak in MiB.
        inside: seconds of the work alone, if the command says so in a line ``inside SECONDS`` at the end.
    """

    wall: float
    cpu: float
    memory: float
    inside: float = math.nan


def run(command: Sequence[str]) -> Run:
    """Runs a command; its output goes to a file, of which only the end is looked at.

    Raises:
        RuntimeError: it failed, so its time means nothing.
    """
    ours, its = os.pipe()
    with tempfile.TemporaryFile() as output, os.fdopen(ours, "rb") as told:
        small = [sys.executable, "-S", "-E", "-c", _SMALL, str(its), *command]
        subprocess.run(small, stdout=output, pass_fds=[its], check=True)
        os.close(its)
        wall, cpu, memory, code = json.loads(told.read())
        output.seek(max(0, output.seek(0, os.SEEK_END) - 64))
        last = output.read().split()[-2:]
    if code:
        raise RuntimeError(f"{command} ended with {code}")
    inside = float(last[1]) if last[:1] == [b"inside"] else math.nan
    return Run(wall, cpu, memory, inside)


def medians(runs: Iterable[Run]) -> Run:
    """Returns the median of each figure."""
    all_runs = list(runs)
    return Run(
        statistics.median(each.wall for each in all_runs),
        statistics.median(each.cpu for each in all_runs),
        statistics.median(each.memory for each in all_runs),
        statistics.median(each.inside for each in all_runs),
    )


def side_by_side(commands: dict[str, Sequence[str]], rounds: int = ROUNDS, *, warm_up: bool = True) -> dict[str, Run]:
    """Times commands in turn, A B C A B C …, and returns their medians.

    Args:
        commands: name -> words.
        rounds: how often each is timed.
        warm_up: whether a round that is not counted comes first.
    """
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for number in range(0 if warm_up else 1, rounds + 1):
        for name, command in commands.items():
            result = run(command)
            if number:
                runs[name].append(result)
    return {name: medians(results) for name, results in runs.items()}


def table(title: str, results: dict[str, Run], reference: str) -> str:
    """Returns the results as a Markdown table; ratios are against `reference`."""
    base = results[reference]
    lines = [f"**{title}**", "", "| command | seconds | ratio | without start-up | ratio | CPU seconds | peak MiB |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name, each in results.items():
        inside = ("", "") if math.isnan(each.inside) else (f"{each.inside:.2f}", f"{each.inside / base.wall:.2f}")
        figures = [f"{each.wall:.2f}", f"{each.wall / base.wall:.2f}", *inside, f"{each.cpu:.2f}", f"{each.memory:.0f}"]
        lines.append(f"| {name} | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"
