"""What the README shows is so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import blockdev, qemu

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.real
def test_the_library_example_runs_as_it_stands(three_layers: Path) -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len([line for line in example.splitlines() if line]) <= 10
    node = blockdev(three_layers / "top.qcow2", "top", read_only=True)
    with qemu("-blockdev", node, "-device", "virtio-blk-pci,id=vd0,drive=top") as server:
        (server.folder / "vm.qmp").symlink_to(server.qmp)
        done = subprocess.run(
            [sys.executable, "-c", example], check=True, capture_output=True, text=True, cwd=server.folder, timeout=60
        )
    assert done.stdout.splitlines()[0] == "vd0: agreed, 16777216 bytes in 3 layers"
    assert [line.split(":")[0] for line in done.stdout.splitlines()[1:]] == ["  depth 1", "  depth 2", "  depth 3"]


def test_links_lead_somewhere() -> None:
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"
