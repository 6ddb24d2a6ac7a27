"""Why QEMU refuses an export or its NBD server, in one table; pure.

QMP has one error class for nearly everything, so QEMU's words must be read. They were compared on QEMU 5.2, 7.2 and
10.0; where releases differ, a row knows all of them. What no row knows stays what QEMU said, as `CommandFailedError`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from qmpnbd.errors import CommandFailedError, ExportRefusedError

MAX_TEXT = 4096
"""Bytes of an export's name or description (NBD_MAX_STRING_SIZE); QEMU repeats longer ones in its refusal."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A row of the table.

    Attributes:
        reason: a word for it that programs can rely on.
        words: what QEMU says; a regular expression that is searched for.
        remedy: what to do next.
    """

    reason: str
    words: str
    remedy: str


REFUSALS: Final = (
    Refusal("id-taken", r"^Block export id '.*' is already in use", "Choose another id, or remove that export first."),
    Refusal(
        "id-invalid",
        r"^Invalid block export id",
        "An id begins with a letter; letters, digits, '-', '.' and '_' follow.",
    ),
    Refusal(
        "name-taken", r"already has export named", "Choose another name: the server has an export of this one already."
    ),
    Refusal(
        "text-too-long",
        r"^(export name|description) '.*' too long",
        f"At most {MAX_TEXT} bytes can be told to clients.",
    ),
    Refusal(
        "node-missing",
        r"^Cannot find device=",
        "Give a node-name, not the id of a drive or device (`qmpnbd disks` lists them).",
    ),
    Refusal(
        "bitmap-missing",
        r"^(Dirty b|B)itmap '.*' (is )?not found",
        "It must be on the exported node, on one below it, or on the node that is named with it.",
    ),
    Refusal(
        "bitmap-enabled",
        r"^Enabled bitmap '.*' incompatible with readonly export",
        "It still records: disable it, and have another one go on in the same transaction if nothing may be lost.",
    ),
    Refusal(
        "bitmap-busy",
        r"^Bitmap '.*' is currently in use by another operation",
        "A bitmap can be in one export or job at a time: end that one first.",
    ),
    Refusal(
        "bitmap-inconsistent",
        r"^Bitmap '.*' is inconsistent",
        "QEMU did not end in an orderly way, so what the bitmap missed is unknown: remove it "
        "(block-dirty-bitmap-remove), and make a full backup.",
    ),
    Refusal(
        "read-only", r"^Cannot export read-only node as writable", "Leave writable out, or open the image writable."
    ),
    Refusal(
        "permission",
        r"^(Permission conflict|Conflicts with use by)",
        "Who uses the node forbids it: export the format node of the disk, and read-only.",
    ),
    Refusal("iothread-missing", r'^iothread ".*" not found', "Name an iothread of this QEMU (-object iothread,id=…)."),
    Refusal(
        "iothread-taken",
        r"^Cannot change iothread of active block backend",
        "The node runs where its device does: leave the iothread out, or do not insist on it.",
    ),
    Refusal(
        "path-too-long",
        r"^UNIX socket path '.*' is too long",
        "A socket's path has at most 107 bytes: choose a shorter.",
    ),
    Refusal(
        "path-unusable",
        r"^Failed to bind socket to ",
        "QEMU must be able to reach and write the folder of --runtime-dir: run as QEMU's user, or as root.",
    ),
    Refusal(
        "port-in-use",
        r"^Failed to (find an available port|listen on socket|bind socket): Address already in use",
        "Another program listens there: choose another port, or 0 for one that is free.",
    ),
    Refusal(
        "address-unusable",
        r"^(address resolution failed|Failed to bind socket: )",
        "Listen at an address that QEMU's host has.",
    ),
    Refusal(
        "in-use",
        r"^export '.*' still in use",
        "A client is connected: let it end, or remove the export with mode hard.",
    ),
    Refusal("export-missing", r"^Export '.*' is not found", "It is gone already."),
    Refusal("server-not-running", r"^NBD server not running", "Leave --nbd out: then a server is started."),
    Refusal(
        "tls-needs-tcp",
        r"^TLS is only supported with IPv4/IPv6",
        "QEMU has TLS on UNIX sockets from 7.0 on: listen on a TCP port (--listen).",
    ),
    Refusal(
        "tls-endpoint",
        r"^Expect(ed|ing) TLS credentials (for|with) a server endpoint",
        "These credentials are a client's: give those of a server.",
    ),
    Refusal("tls-missing", r"^No TLS credentials with id ", "Somebody has removed them: run again."),
    Refusal(
        "tls-files",
        r"credentials|certificate|PSK|private key|DH parameters",
        "QEMU must find ca-cert.pem, server-cert.pem and server-key.pem in the folder, or keys.psk for shared secrets.",
    ),
)
"""Read from the top: the first row that fits is the one."""


def explained(error: CommandFailedError) -> CommandFailedError:
    """Returns the error with reason and remedy, or as it is if no row knows what QEMU said."""
    for row in REFUSALS:
        if re.search(row.words, error.description, re.DOTALL):
            return ExportRefusedError(
                error.command,
                error.error_class,
                error.description,
                reason=row.reason,
                where=error.where,
                remedy=row.remedy,
            )
    return error
