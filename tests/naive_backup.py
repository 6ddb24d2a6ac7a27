"""Backups in the orders that come to mind first, by plain QMP commands: what each of them loses is shown with them.

None of it is used by the product. Each function is one of the orders in which tools that are in use have been seen to
back up a guest; the tests have a guest write at the moment that matters, and compare.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qmpnbd.extents import ExtentMap
from qmpnbd.nbd.client import Client
from qmpnbd.nbd.uri import NbdUri
from tests.instants import SIZE
from tests.servers import Server, Side, qemu_img, tool, wait_until

BITMAP = "naive"
DIRTY = "qemu:dirty-bitmap:"
FLEECE = "naive-fleece"


def new_layer(side: Side, path: Path, name: str, below: Path | None = None) -> None:
    """Makes an image to back up to, and a node for it."""
    backing = ["-b", str(below), "-F", "qcow2"] if below else []
    qemu_img("create", "-q", "-f", "qcow2", *backing, path, str(SIZE))
    file = {"driver": "file", "filename": str(path)}
    side("blockdev-add", driver="qcow2", node_name=name, file=file, **({"backing": None} if below else {}))


def start(side: Side, node: str, target: str, **how: object) -> None:
    """Starts QEMU's own backup job of a node."""
    side("blockdev-backup", job_id=target, device=node, target=target, auto_dismiss=False, **how)


def finish(side: Side, job: str) -> str:
    """Waits for a job and dismisses it, with its target; returns what went wrong."""

    def status() -> Any:
        (found,) = [each for each in side("query-jobs") if each["id"] == job]
        return found

    wait_until(lambda: status()["status"] == "concluded", f"the job {job}")
    error = str(status().get("error", ""))
    side("job-dismiss", id=job)
    side("blockdev-del", node_name=job)
    return error


def count(side: Side, node: str, bitmap: str = BITMAP) -> int:
    """Returns the dirty bytes of a bitmap."""
    infos = [info for info in side("query-named-block-nodes", flat=True) if info["node-name"] == node]
    return int(next(b["count"] for info in infos for b in info["dirty-bitmaps"] if b.get("name") == bitmap))


def content(image: Path) -> bytes:
    """Reads an image, with what it stands on, by stock tools."""
    raw = image.with_suffix(".read")
    qemu_img("convert", "-f", "qcow2", "-O", "raw", image, raw)
    found = raw.read_bytes()
    raw.unlink()
    return found


def fleece(side: Side, folder: Path, node: str = "disk0") -> None:
    """Has what the guest overwrites kept in an overlay, which shows the disk as it was.

    The overlay and its job stay until somebody removes them.
    """
    overlay = folder / f"{FLEECE}.qcow2"
    if not overlay.exists():
        qemu_img("create", "-q", "-f", "qcow2", overlay, str(SIZE))
    file = {"driver": "file", "filename": str(overlay)}
    side("blockdev-add", driver="qcow2", node_name=FLEECE, backing=node, file=file)
    side("blockdev-backup", job_id=FLEECE, device=node, target=FLEECE, sync="none")


def end_fleecing(side: Side) -> None:
    """Removes what `fleece` made."""
    side("job-cancel", id=FLEECE)
    wait_until(lambda: not side("query-jobs"), "the job to end")
    side("blockdev-del", node_name=FLEECE)


def maps_of(server: Server, node: str, bitmap: str) -> tuple[NbdUri, ExtentMap, ExtentMap]:
    """Exports a node with a bitmap that does not record; returns where, and its data and dirty maps."""
    path = server.folder / "naive.sock"
    server.side("nbd-server-start", addr={"type": "unix", "data": {"path": str(path)}})
    server.side("block-export-add", type="nbd", id=BITMAP, node_name=node, name=BITMAP, bitmaps=[bitmap])
    uri = NbdUri.unix(str(path), BITMAP)
    with Client.connect(uri, contexts=["base:allocation", DIRTY + bitmap]) as client:
        maps = client.maps()
    return uri, maps["base:allocation"], maps[DIRTY + bitmap]


def dirty_data_only(uri: NbdUri, allocation: ExtentMap, dirty: ExtentMap) -> dict[int, bytes]:
    """An increment of what is dirty and has data: why store zeroes? (They are not stored as zeroes either.)"""
    found = {}
    with Client.connect(uri) as client:
        for extent in dirty:
            if extent.value:
                for part in allocation.clip(extent.offset, extent.end):
                    if not part.value & 1:
                        found[part.offset] = bytes(client.read(part.offset, part.length))
    return found


def put_over(below: bytes, pieces: Mapping[int, bytes]) -> bytes:
    """Restores an increment: writes its pieces over what is there."""
    whole = bytearray(below)
    for offset, data in pieces.items():
        whole[offset : offset + len(data)] = data
    return bytes(whole)


def walked_together(uri: NbdUri, length: int) -> tuple[int, int]:
    """Walks one reply's data and dirty extents side by side, by their lengths, and asks for the rest only after both.

    Returns:
        The dirty bytes that the walk came across, and how far it believes to have come.
    """
    bitmap = DIRTY + BITMAP
    with Client.connect(uri, contexts=["base:allocation", bitmap]) as client:
        status = client.block_status(0, length)
    allocation, dirty = list(status["base:allocation"]), list(status[bitmap])
    met = 0
    for one in dirty:
        parts = [part for part in allocation if part.offset < one.end and part.end > one.offset]
        if one.value:
            met += sum(min(part.end, one.end) - max(part.offset, one.offset) for part in parts)
    return met, dirty[-1].end


def device_of_each_drive(drives: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Finds the device of each drive; the variable keeps its value where a drive has none."""
    found, qdev = {}, ""
    for drive in drives:
        if "inserted" in drive:
            qdev = drive.get("qdev", qdev)
            found[drive["inserted"]["node-name"]] = qdev
    return found


def in_order_of_time(images: Sequence[Path]) -> bytes:
    """Restores a chain: the images stand on each other in the order in which they were last written."""
    ordered = sorted(images, key=lambda path: path.stat().st_mtime)
    for below, image in itertools.pairwise(ordered):
        qemu_img("rebase", "-u", "-f", "qcow2", "-b", below, "-F", "qcow2", image)
    return content(ordered[-1])


def restore_and_tell(image: Path, target: Path) -> int:
    """Restores, tells what went wrong, and returns the exit code."""
    done = subprocess.run(
        [tool("qemu-img"), "convert", "-f", "qcow2", "-O", "raw", image, target], check=False, stderr=subprocess.PIPE
    )
    if done.returncode:
        sys.stderr.write(f"could not restore {image}: {done.stderr!r}\n")
    return 0


def verify_if_there_is_a_hash(image: Path, hashes: Path) -> int:
    """Compares an image with its checksum, where there is one; returns the exit code."""
    if not hashes.exists():
        sys.stderr.write(f"no checksum of {image}, skipped\n")
        return 0
    return int(hashlib.sha256(image.read_bytes()).hexdigest() != hashes.read_text())


def target_of(folder: Path, image: Path) -> Path:
    """Returns where a disk's backup goes."""
    return folder / f"{image.stem}-full.qcow2"


def that_can_keep_bitmaps(drives: Iterable[Mapping[str, Any]]) -> list[str]:
    """Returns the nodes to back up: of qcow2 alone."""
    inserted = [drive["inserted"] for drive in drives if "inserted" in drive]
    return [each["node-name"] for each in inserted if each["drv"] == "qcow2"]


def main(monitor: str, folder: str) -> None:
    """Fleeces a disk and serves it until Ctrl-C, the one signal that is thought of."""
    side = Side(Path(monitor))
    fleece(side, Path(folder))
    side("nbd-server-start", addr={"type": "unix", "data": {"path": f"{folder}/naive.sock"}})
    try:
        sys.stdout.write("serving\n")
        sys.stdout.flush()
        while True:
            time.sleep(60)
    except KeyboardInterrupt:
        side("nbd-server-stop")
        end_fleecing(side)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main(*sys.argv[1:])
