"""What is kept of a machine beside its disks."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from qmpnbd.backup.machine import QUESTIONS, SCHEMA, command_line, machine_facts, without_secrets
from qmpnbd.deadline import Deadline
from qmpnbd.qmp.monitor import Monitor
from qmpnbd.qmp.process import Peer
from tests.qemu_versions import QemuBinaries, each_qemu


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("secret,id=s0,data=hunter2,format=raw", "secret,id=s0,data=***,format=raw"),
        ('{"qom-type": "secret", "id": "s0", "data": "hunter2"}', '{"qom-type": "secret", "id": "s0", "data": "***"}'),
        ("driver=ssh,password=hunter2", "driver=ssh,password=***"),
        ("driver=qcow2,node-name=d,data-file=raw.img", "driver=qcow2,node-name=d,data-file=raw.img"),
        ("secret,id=s0,file=/etc/key", "secret,id=s0,file=/etc/key"),
        ("secret,id=s0,data=two words,format=raw", "secret,id=s0,data=***,format=raw"),
        ("secret,id=s0,data=a,,comma,format=raw", "secret,id=s0,data=***,format=raw"),
        ('{"id": "s0", "data": "a \\"quote\\", a comma"}', '{"id": "s0", "data": "***"}'),
        ("driver=curl,file.password=hunter2,id=x", "driver=curl,file.password=***,id=x"),
        ("if=none,file=https://me:hunter2@host/x", "if=none,file=https://me:***@host/x"),
        ("file=iscsi://me%hunter2@host:3260/iqn/0", "file=iscsi://me%***@host:3260/iqn/0"),
        ("file=rbd:pool/x:id=admin:key=AQB+==:conf=/c", "file=rbd:pool/x:id=admin:key=***:conf=/c"),
        ("file=https://host:8080/a@b", "file=https://host:8080/a@b"),
        ("root=/dev/vda password=hunter2 quiet", "root=/dev/vda password=*** quiet"),
    ],
)
def test_a_secret_on_the_command_line_is_not_kept(word: str, shown: str) -> None:
    assert without_secrets([word]) == [shown]


def test_a_process_that_cannot_be_seen_has_no_command_line() -> None:
    assert command_line(None) is None
    assert command_line(Peer(0)) is None
    assert command_line(Peer(2**22 + 1)) is None  # above the largest pid there can be


@pytest.mark.real
@each_qemu
def test_a_machine_tells_what_it_is_and_how_it_was_started(binaries: QemuBinaries, folder: Path) -> None:
    async def ask(address: str) -> bytes:
        async with await Monitor.connect(address, Deadline(20)) as monitor:
            return await machine_facts(monitor, Deadline(20))

    with binaries.qemu("-object", "secret,id=s0,data=hunter2", "-name", "sun") as server:
        text = asyncio.run(ask(str(server.qmp)))
    assert b"hunter2" not in text
    facts = json.loads(text)
    assert facts["schema"] == SCHEMA
    assert facts["machine"].startswith("pc")
    assert facts["qmp"]["query-name"] == {"name": "sun"}
    assert "qemu-system-x86_64" in facts["command_line"][0]
    assert set(facts["qmp"]) | set(facts["refused"]) >= set(QUESTIONS)
