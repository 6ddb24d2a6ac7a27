"""Commands timed side by side: in turn, after a warm-up, with CPU time and peak memory as the kernel counted them."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ROUNDS = 5


@dataclass(frozen=True)
class Run:
    """One run of a command: seconds, seconds of processor time, and peak memory in MiB."""

    wall: float
    cpu: float
    memory: float


def run(command: Sequence[str]) -> Run:
    """Runs a command with its output thrown away.

    Raises:
        RuntimeError: it failed, so its time means nothing.
    """
    started = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.monotonic() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"{command} ended with {child.returncode}")
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def medians(runs: Iterable[Run]) -> Run:
    """Returns the median of each figure."""
    all_runs = list(runs)
    return Run(
        statistics.median(each.wall for each in all_runs),
        statistics.median(each.cpu for each in all_runs),
        statistics.median(each.memory for each in all_runs),
    )


def side_by_side(commands: dict[str, Sequence[str]], rounds: int = ROUNDS) -> dict[str, Run]:
    """Times commands in turn, A B C A B C …, after one round that is not counted; returns their medians."""
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name, command in commands.items():
            result = run(command)
            if number:
                runs[name].append(result)
    return {name: medians(results) for name, results in runs.items()}


def table(title: str, results: dict[str, Run], reference: str) -> str:
    """Returns the results as a Markdown table; ratios are against `reference`."""
    base = results[reference]
    lines = [f"**{title}**", "", "| command | seconds | ratio | CPU seconds | peak MiB |", "|---|---|---|---|---|"]
    for name, each in results.items():
        ratio = f"{each.wall / base.wall:.2f}"
        lines.append(f"| {name} | {each.wall:.2f} | {ratio} | {each.cpu:.2f} | {each.memory:.0f} |")
    return "\n".join(lines) + "\n"
