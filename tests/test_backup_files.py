"""The commands of docs/backup.md that read files in a backup do what the document says."""

from __future__ import annotations

import os
import re
import struct
import subprocess
from pathlib import Path

import pytest

from qmpnbd.backup.repository import Repository
from tests.servers import tool
from tests.stored import Stored, make_backup

pytestmark = pytest.mark.real

DOCUMENT = Path(__file__).parent.parent / "docs" / "backup.md"
START, SECTORS = 2048, 30 * 2048


def test_the_document_reads_a_file_of_a_partition_in_an_increment(tmp_path: Path) -> None:
    """As it stands there, but for the image's name: ext4 in a partition, half of it in each of two layers."""
    if not Path("/dev/fuse").exists():
        pytest.skip("no /dev/fuse in this kernel or container")
    for name in ("nbdfuse", "debugfs", "partx"):
        tool(name)
    disk = tmp_path / "disk.raw"
    make_disk(disk, tmp_path / "files")
    repository = Repository.create(tmp_path / "repository")
    size = disk.stat().st_size
    first = make_backup(repository, {"vda": Stored((f"write -s {disk} 0 {size // 2}",), size=size)})
    rest = f"write -s {tmp_path / 'rest'} {size // 2} {size // 2}"
    (tmp_path / "rest").write_bytes(disk.read_bytes()[size // 2 :])
    backup = make_backup(repository, {"vda": Stored((rest,), first, size=size)})
    (script,) = [each for each in re.findall(r"```sh\n(.*?)```", DOCUMENT.read_text(), re.S) if "nbdfuse" in each]
    script = re.sub(r"IMAGE=.*", f"IMAGE='{backup.image('vda')}'", script)
    unmount = "umount disk" if os.geteuid() == 0 else "fusermount3 -u disk"
    script = script.replace("umount disk", unmount)
    try:
        done = subprocess.run(
            ["sh", "-e"], input=script, check=False, capture_output=True, text=True, timeout=60, cwd=tmp_path
        )
    finally:
        subprocess.run(unmount.split(), check=False, capture_output=True, cwd=tmp_path)  # if the script ended early
    assert done.returncode == 0, done.stderr
    assert "the file of the backup" in done.stdout
    assert re.search(rf"^ *1 +{START} +{START + SECTORS - 1} ", done.stdout, re.M), done.stdout
    assert re.search(r"\bhostname\b", done.stdout)


def make_disk(disk: Path, files: Path) -> None:
    """Makes a disk with one partition (MBR), an ext4 with a file in it."""
    (files / "etc").mkdir(parents=True)
    (files / "etc/hostname").write_text("the file of the backup\n")
    with disk.open("wb") as file:
        file.truncate((START + SECTORS) * 512)
    offset = f"offset={START * 512}"
    command = [tool("mke2fs"), "-q", "-t", "ext4", "-d", str(files), "-E", offset, str(disk), f"{SECTORS // 2}k"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    with disk.open("r+b") as file:
        file.seek(446)
        file.write(struct.pack("<4xB3xII", 0x83, START, SECTORS))
        file.seek(510)
        file.write(b"\x55\xaa")
