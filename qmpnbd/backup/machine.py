"""What a machine is, beside its disks: what QEMU tells of it, and how it was started; for who has to build it again.

Secrets that stand on QEMU's command line, or in the names of images, are left out. What QEMU does not know or refuses
to tell is left out, too, and named: a backup does not fail for want of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from qmpnbd.deadline import Deadline
from qmpnbd.errors import CommandFailedError
from qmpnbd.qmp.monitor import Monitor
from qmpnbd.qmp.process import Peer

SCHEMA = "qmpnbd.machine/1"

QUESTIONS = (
    "query-version",
    "query-name",
    "query-uuid",
    "query-status",
    "query-kvm",
    "query-memory-size-summary",
    "query-memory-devices",
    "query-hotpluggable-cpus",
    "query-cpus-fast",
    "query-iothreads",
    "query-pci",
    "query-chardev",
    "query-rx-filter",
    "query-block",
    "query-tpm",
)
"""QMP commands that change nothing; what they reply is kept as it is, but for secrets in the names of images."""

MAX_BYTES = 8 << 20
"""Of all of it as JSON: far above what a machine with a thousand devices has."""

_MAX_COMMAND_LINE = 1 << 20
_KEY = r"(?:[\w.-]+\.)?(?:data|password|passwd|secret-data)"
_SECRETS = (
    re.compile(rf'("{_KEY}"\s*:\s*")(?:[^"\\]|\\.)*'),  # JSON, where a quote may be escaped
    re.compile(rf"((?:^|,){_KEY}=)(?:[^,]|,,)+"),  # QEMU's options, where a comma is written twice
    re.compile(rf"(\s{_KEY}=)[^\s,\"}}]+"),  # words within a word
    re.compile(r"(:key=)[^:,\"}\s]+"),  # Ceph's, in the name of an image
    re.compile(r"(://[^/@\s:%\"]*[:%])[^/@\s\"]+(?=@)"),  # of a URI's user
)
_HIDDEN = r"\1***"


async def machine_facts(monitor: Monitor, deadline: Deadline) -> bytes:
    """Asks what the machine is.

    Args:
        monitor: the QEMU.
        deadline: for its replies.

    Returns:
        One JSON document: the replies by command (``qmp``), the machine's type, the command line where QEMU runs on
        this host (else null), and what was refused (``refused``).

    Raises:
        MonitorError: QEMU is gone.
        DeadlineError: no reply in time.
    """
    replies: dict[str, object] = {}
    refused: dict[str, str] = {}
    for command in QUESTIONS:
        try:
            replies[command] = await monitor.execute(command, deadline=deadline)
        except CommandFailedError as error:
            refused[command] = error.description
    try:
        machine = await monitor.execute("qom-get", {"path": "/machine", "property": "type"}, deadline=deadline)
    except CommandFailedError as error:
        machine, refused["qom-get"] = "", error.description
    facts = {
        "schema": SCHEMA,
        "machine": machine,
        "command_line": command_line(monitor.peer),
        "qmp": _cleared(replies),
        "refused": refused,
    }
    text = json.dumps(facts, indent=1, sort_keys=True).encode()
    if len(text) > MAX_BYTES:
        text = json.dumps({**facts, "qmp": {}, "refused": {"all": f"{len(text)} bytes are too many"}}).encode()
    return text + b"\n"


def command_line(peer: Peer | None) -> list[str] | None:
    """Returns how QEMU was started, secrets left out; None if that cannot be seen from here."""
    if peer is None or not peer.pid:
        return None
    try:
        with Path(f"/proc/{peer.pid}/cmdline").open("rb") as file:
            words = file.read(_MAX_COMMAND_LINE)
    except OSError:
        return None
    return without_secrets([word.decode("utf-8", "backslashreplace") for word in words.split(b"\0")[:-1]])


def without_secrets(words: Sequence[str]) -> list[str]:
    """Returns a command line with the values of secrets replaced by asterisks."""
    return [_without_secrets(word) for word in words]


def _without_secrets(text: str) -> str:
    for secret in _SECRETS:
        text = secret.sub(_HIDDEN, text)
    return text


def _cleared(reply: object) -> object:
    """Returns a reply with secrets in its texts replaced: names of images may have them."""
    if isinstance(reply, str):
        return _without_secrets(reply)
    if isinstance(reply, Mapping):
        return {name: _cleared(value) for name, value in reply.items()}
    return [_cleared(each) for each in reply] if isinstance(reply, list) else reply
