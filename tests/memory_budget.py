"""A bound for the memory of this process, so that what a liar talks somebody into is refused by the kernel."""

from __future__ import annotations

import contextlib
import gc
import resource
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def memory_budget() -> Iterator[None]:
    """256 MiB more than the process has, and no byte beyond."""
    gc.collect()  # what is freed later would widen the budget
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
