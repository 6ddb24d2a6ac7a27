"""The commands of backups as people run them: real processes, their documents, and a repository read by stock tools."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.instants import Machine
from tests.servers import Server, qemu_img

CHAIN = "nightly"
SECONDS = 100


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """What `--json` printed."""
        return json.loads(self.out)


def command(*words: str | Path) -> list[str]:
    """Returns the command line of qmpnbd with some words."""
    return [sys.executable, "-m", "qmpnbd", *map(str, words)]


def run(*words: str | Path, code: int | None = 0) -> Ended:
    """Runs qmpnbd.

    Args:
        words: its arguments.
        code: the exit code that it must have; None for any.
    """
    done = subprocess.run(command(*words), check=False, capture_output=True, text=True, timeout=SECONDS)
    assert code is None or done.returncode == code, f"{done.returncode}: {' '.join(map(str, words))}\n{done.stderr}"
    return Ended(done.returncode, done.stdout, done.stderr)


def new_repository(path: Path) -> Path:
    """Makes a repository."""
    run("repository", "create", path)
    return path


def backup_words(qmp: Path | str, repository: Path, *more: str | Path, disks: Sequence[str] = ()) -> list[str | Path]:
    """Returns the words of a backup, of all disks if none is named."""
    chosen = [word for disk in disks for word in ("--disk", disk)]
    return ["backup", repository, *chosen, "--qmp", str(qmp), "--chain", CHAIN, "--json", *more]


def backup(
    qmp: Path | str, repository: Path, *more: str | Path, disks: Sequence[str] = (), code: int | None = 0
) -> Ended:
    """Backs up disks of a guest."""
    return run(*backup_words(qmp, repository, *more, disks=disks), code=code)


def kinds(ended: Ended) -> dict[str, tuple[str, str]]:
    """Returns what a backup made of each disk, and why."""
    return {each["name"]: (each["kind"], each["reason"]) for each in ended.document["disks"]}


def points(repository: Path, chain: str = CHAIN) -> list[Path]:
    """Returns the folders of a chain's backups, oldest first: NNNN-ID."""
    folder = repository / chain
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def newest(repository: Path) -> Path:
    """Returns the folder of the newest backup."""
    return points(repository)[-1]


def stock_read(point: Path, disk: str, folder: Path) -> bytes:
    """Reads a disk at a point in time by qemu-img alone, from the repository as it lies there."""
    raw = folder / f"stock-{disk}.raw"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", point / f"{disk}.qcow2", raw)
    found = raw.read_bytes()
    raw.unlink()
    return found


def restored(repository: Path, point: Path, disk: str, folder: Path) -> bytes:
    """Restores a disk at a point in time to a raw file by the product, and reads that."""
    raw = folder / f"restored-{disk}.raw"
    run(*restore_words(repository, point, disk, raw))
    found = raw.read_bytes()
    raw.unlink()
    return found


def restore_words(repository: Path, point: Path, disk: str, target: Path) -> Sequence[str | Path]:
    """Returns the words of a restore to a raw file."""
    which = point.name.partition("-")[2]
    return ["restore", repository, which, "--chain", CHAIN, "--disk", disk, target, "--format", "raw"]


@contextmanager
def full_target(most_bytes: int) -> Iterator[None]:
    """Lets no file grow beyond some bytes in processes that start meanwhile: a quota that needs no privilege."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def nothing_is_left(running: Machine | Server) -> None:
    """In QEMU there is nothing of ours but checkpoints."""
    server = running.server if isinstance(running, Machine) else running
    assert [name for name in server.nodes() if name.startswith(("qmpnbd-", "naive"))] == []
    assert server.side("query-jobs") == []
    assert [name for name in server.exports() if name.startswith("qmpnbd-")] == []
    for info in server.side("query-named-block-nodes", flat=True):
        bitmaps = [each.get("name", "") for each in info.get("dirty-bitmaps", ())]
        assert all(name.startswith(("qmpnbd.nightly.c", "naive")) for name in bitmaps), bitmaps


def is_held(running: Machine, repository: Path, folder: Path) -> None:
    """The newest backup holds what the disks hold now, for the product and for stock tools."""
    for disk, truth in zip(running.disks, running.truth(), strict=True):
        assert stock_read(newest(repository), disk, folder) == truth.content
        assert restored(repository, newest(repository), disk, folder) == truth.content
