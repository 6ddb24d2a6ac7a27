"""``qmpnbd checkpoint`` and ``qmpnbd bitmap populate`` as their users meet them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guestwrites import two_disks
from tests.servers import Server, qemu
from tests.test_cli import document, qmpnbd

pytestmark = pytest.mark.real


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    with qemu(*two_disks(folder)) as running:
        yield running


def test_a_cycle_in_text(server: Server) -> None:
    chain = ["--qmp", str(server.qmp), "--chain", "nightly"]
    assert "no checkpoints" in qmpnbd("checkpoint", "list", "--qmp", server.qmp).stdout
    first = qmpnbd("checkpoint", "create", *chain).stdout
    assert "create checkpoint 1 of chain nightly" in first
    assert first.count("full: the disk has no checkpoint of this chain") == 2
    assert "transient: raw cannot store bitmaps" in first
    assert "disk vd0: increment since 1: in qmpnbd.nightly.c1." in qmpnbd("checkpoint", "create", *chain).stdout
    assert "chain nightly: pending" in qmpnbd("checkpoint", "list", *chain, "--disk", "vd1").stdout
    assert "disk vd0: done" in qmpnbd("checkpoint", "commit", *chain).stdout
    assert "disk vd0: nothing to do" in qmpnbd("checkpoint", "commit", *chain).stdout
    undecided = qmpnbd("checkpoint", "abort", *chain, code=26)
    assert "--number" in undecided.stderr
    qmpnbd("checkpoint", "merge", *chain, code=2)
    assert "vd0, chain nightly: missing" in qmpnbd("checkpoint", "remove", *chain).stdout


def test_documents_and_dry_runs(server: Server) -> None:
    chain = ["--qmp", str(server.qmp), "--chain", "nightly", "--json"]
    shown = document(qmpnbd("checkpoint", "create", *chain, "--dry-run", "--granularity", "4096").stdout)
    text = qmpnbd("checkpoint", "create", *chain[:-1], "--dry-run", "--disk", "vd0").stdout
    (line,) = [line for line in text.splitlines() if line.startswith("{")]
    for command in (*shown["commands"], json.loads(line)):  # type: ignore[misc]
        assert command["execute"] == "transaction"
        server.side.execute("transaction", command["arguments"])
    assert document(qmpnbd("checkpoint", "list", *chain).stdout)["operation"] == "list"
    made = document(qmpnbd("checkpoint", "create", *chain, "--keep").stdout)
    assert (made["number"], made["dry_run"]) == (2, False)
    wrong = document(qmpnbd("checkpoint", "create", *chain, "--granularity", "7", code=2).stdout)
    assert wrong["schema"] == "qmpnbd.error/1"
    filled = qmpnbd("bitmap", "populate", *chain[:2], "--disk", "vd1", "--name", "x", "--from-depth", "1", "--json")
    assert document(filled.stdout)["filled_bytes"] == 64 << 20
